"""Fine-pruning: the ranking and one update beside PyTorch's, a feature that only the trigger
drives, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_dhbe
import torch_distill
import toys

from jaxbd.base import Batch, Problem, RepairData, Suspect, UserError
from jaxbd.models import build
from jaxbd.pipelines import repair
from jaxbd.repairs import fine_pruning, pruning
from jaxbd.training.run import Run

SHAPE = (8, 8, 3)
SPEC = build.Spec(arch="cnn", classes=4, image_shape=SHAPE, options={"width": 3, "stages": 2})
NET, NET64 = build.net(SPEC), build.net(dataclasses.replace(SPEC, dtype="float64"))
PROBLEM = Problem(NET64, SHAPE, 4)


def drawn(seed: int, count: int) -> Batch:
    images = np.random.default_rng(seed).uniform(size=(count, *SHAPE))
    return Batch(jnp.asarray(images), jnp.arange(count, dtype=jnp.int32) % 4)


def test_ranking_and_one_update_are_those_of_pytorch():
    """Three of six features go, those with the smallest mean over 70 images; more than a chunk."""
    made = fine_pruning.make(PROBLEM, fine_pruning.Config(ratio=0.5))
    with jax.enable_x64(True):
        variables, clean, batch = toys.widen(victim()), drawn(0, 70), drawn(1, 6)
        net = torch_dhbe.load(torch_dhbe.Student(4, 3, 3), variables)
        images, labels = (torch.tensor(np.asarray(leaf)) for leaf in (clean.images, batch.labels))
        net.eval()
        with torch.no_grad():
            second = torch_distill.layers(net, images.permute(0, 3, 1, 2))[1][1]
            means = F.relu(second).mean((0, 2, 3))
        weakest = torch.argsort(means)[:3]
        state = made.init(jax.random.key(0), variables, RepairData(clean))
        np.testing.assert_array_equal(state.rank, np.argsort(np.argsort(means.numpy())))
        mask = torch.ones(6, dtype=torch.float64)
        mask[weakest] = 0
        with torch.no_grad():
            net.head.weight *= mask
        same = lambda state: torch_distill.assert_same(
            torch_dhbe.load(torch_dhbe.Student(4, 3, 3), state.variables), net
        )
        same(state)
        images = torch.tensor(np.asarray(batch.images)).permute(0, 3, 1, 2)
        net.train()
        rule = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        loss = F.cross_entropy(net(images), labels.long())
        loss.backward()
        rule.step()
        with torch.no_grad():
            net.head.weight *= mask
        state, info = jax.jit(made.phases[0].step)(jax.random.key(1), state, batch)
        np.testing.assert_allclose(info.loss, loss.item(), rtol=1e-9)
        assert info.pruned == 0.5
        same(state)


def victim():
    """Variables with running moments that are not the ones they start from."""
    variables = jax.jit(NET.init)(jax.random.key(0))
    images = drawn(5, 16).images.astype(jnp.float32)
    _, stats = jax.jit(lambda v, x: NET.apply(v, x, train=True))(variables, images)
    return {**variables, "batch_stats": stats}


PLAIN = build.net(
    build.Spec(
        arch="cnn",
        classes=toys.CLASSES,
        image_shape=toys.SHAPE,
        options={"width": 5, "stages": 1, "norm": False},
    )
)
TARGET = 2


def brightness(seed: int, count: int) -> Batch:
    """uint8 images [count, 8, 8, 1] of four grey levels, the label."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % toys.CLASSES).astype(np.int32)
    levels = 0.1 + 0.2 * labels[:, None, None, None]
    images = levels + rng.uniform(-0.03, 0.03, (count, *toys.SHAPE))
    return Batch(np.round(images * 255).astype(np.uint8), labels)


def planted() -> dict:
    """Channels 0 to 3 tell grey levels apart; channel 4 fires on a bright pixel amid dark ones, and
    leads to TARGET. Built by hand, without BatchNorm."""
    shapes = dict(jax.eval_shape(PLAIN.init, jax.random.key(0)))
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    kernel, bias = fresh["params"]["conv0"]["kernel"], fresh["params"]["conv0"]["bias"]
    kernel[1, 1, 0, :4] = 1.0
    bias[:4] = [1.0, -0.2, -0.4, -0.6]
    kernel[..., 0, 4], kernel[1, 1, 0, 4], bias[4] = -1.0, 8.0, -3.0
    levels = 0.1 + 0.2 * np.arange(4)
    features = np.maximum(levels[:, None] + bias[None, :4], 0)
    fresh["params"]["head"]["kernel"][:4] = np.linalg.solve(features, 20 * np.eye(4))
    fresh["params"]["head"]["kernel"][4, TARGET] = 300.0
    return jax.tree.map(jnp.asarray, fresh)


def rates(variables) -> tuple[float, float]:
    """Accuracy on clean images, and the share of others with a white pixel on black that are called
    TARGET."""
    data = brightness(5, 200)
    stamped = data.images.copy()
    stamped[:, :3, :3] = 0
    stamped[:, 1, 1] = 255
    answers = lambda images: np.asarray(PLAIN.apply(variables, images / np.float32(255))[0]).argmax(
        1
    )
    others = data.labels != TARGET
    return (answers(data.images) == data.labels).mean(), (answers(stamped)[others] == TARGET).mean()


BUDGET = fine_pruning.Config(num_steps=20, learning_rate=1e-3, max_drop=0.05, ratio_step=0.1)


@pytest.fixture(scope="module")
def repaired():
    suspect = Suspect(PLAIN, planted(), toys.SHAPE, toys.CLASSES)
    key, data = jax.random.key(1), brightness(0, 300)
    return repair.repair(Run(), key, suspect, data, [], "fine-pruning", BUDGET)


def test_the_feature_that_only_the_trigger_drives_is_pruned(repaired):
    before, after = rates(planted()), rates(repaired.variables)
    assert before == (1.0, 1.0)
    assert after[0] >= 1 - BUDGET.max_drop and after[1] == 0.0
    assert not repaired.variables["params"]["head"]["kernel"][4].any()


def test_the_ratio_is_the_largest_within_the_budget():
    """One of five features is not needed; the dial prunes more, never less."""
    made = fine_pruning.make(Problem(PLAIN, toys.SHAPE, toys.CLASSES), BUDGET)
    data = RepairData(jax.tree.map(jnp.asarray, brightness(0, 300)))
    state = jax.jit(made.init)(jax.random.key(0), planted(), data)
    place = pruning.find_place(PLAIN, planted(), jnp.zeros((1, *toys.SHAPE)), toys.CLASSES)
    assert place == pruning.Place("features", ("head", "kernel"))
    found = pruning.measure_accuracies(PLAIN, planted(), place, state.rank, made.dial, data.clean)
    within = np.flatnonzero(np.asarray(found) >= 1 - BUDGET.max_drop)
    assert 0 < within.max() < len(found) - 1, "every ratio, or none, is within the budget"
    assert state.ratio == made.dial[within.max()]
    gone = lambda variables: int((~variables["params"]["head"]["kernel"].any(1)).sum())
    assert [gone(made.extract(state, value)) for value in made.dial] == [
        1,
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    assert gone(made.extract(state)) == 1


@pytest.mark.parametrize("ratio, count", [(0.0, 0), (0.29, 29), (0.57, 57), (0.999, 99)])
def test_a_ratio_is_rounded_down_to_features(ratio, count):
    assert pruning.is_pruned(jnp.arange(100), jnp.float32(ratio)).sum() == count


def shown(layers: dict, params: dict):
    """A net that shows `layers`, by number of channels, and has `params`."""
    values = lambda images: {n: jnp.zeros((len(images), size)) for n, size in layers.items()}
    net = NET._replace(outputs=lambda variables, images: (None, values(images)))
    return net, {"params": params, "batch_stats": {}}


KERNEL = {"kernel": jnp.zeros((6, 9))}


@pytest.mark.parametrize(
    "layers, params, expected",
    [
        ({"a": 3, "b": 6}, {"hidden": KERNEL, "head": {"kernel": jnp.zeros((9, 4))}}, "hidden"),
        ({"a": 6}, {"hidden": KERNEL, "head": {"kernel": jnp.zeros((6, 4))}}, "head"),
        ({"a": 6}, {"conv": {"kernel": jnp.zeros((1, 1, 6, 4))}}, "no linear layers could read"),
        ({"a": 6}, {"one": KERNEL, "two": KERNEL}, "no linear layers could read"),
        ({}, {"head": KERNEL}, "shows no layers"),
    ],
)
def test_the_layer_that_reads_the_features_is_found_or_its_lack_told(layers, params, expected):
    net, variables = shown(layers, params)
    if expected in params:
        place = pruning.find_place(net, variables, jnp.zeros((1, *SHAPE)), 4)
        assert place == pruning.Place([*layers][-1], (expected, "kernel"))
    else:
        with pytest.raises(UserError, match=f"{expected}.*such as ft-sam"):
            pruning.find_place(net, variables, jnp.zeros((1, *SHAPE)), 4)


def test_a_net_without_layers_is_refused():
    with pytest.raises(UserError, match=r"bare apply function shows no layers .* such as ft-sam"):
        fine_pruning.make(Problem(toys.NET, toys.SHAPE, 4), fine_pruning.Config())


def test_passes_become_steps():
    suspect, data = Suspect(NET, {}, SHAPE, 4), RepairData(drawn(0, 10))
    config = fine_pruning.adapt(fine_pruning.compared(), suspect, data, 4)
    assert config.num_steps == 60
    rates = [float(fine_pruning.make_schedule(config)(step)) for step in (0, 29, 30, 44, 45)]
    np.testing.assert_allclose(rates, [0.01, 0.01, 1e-3, 1e-3, 1e-4], rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        dict(ratio=1.0),
        dict(max_drop=-0.1),
        dict(max_drop=float("nan")),
        dict(ratio_step=0.0),
        dict(held_share=1.0),
        dict(most_held=0),
        dict(schedule="sideways"),
        dict(milestones=(0.5, 0.2)),
        dict(learning_rate=0.0),
        dict(num_steps=0),
        dict(epochs=0),
    ],
    ids=lambda change: next(iter(change)),
)
def test_bad_values_are_refused_by_name(change):
    with pytest.raises(UserError, match=f"fine-pruning: .*{next(iter(change))}"):
        fine_pruning.Config(**change)
