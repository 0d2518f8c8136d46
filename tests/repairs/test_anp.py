"""Adversarial neuron pruning: masks and losses against PyTorch, what is a neuron, what pruning
does, and the choice of the threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_student
import toys
from torch_student import NET, PROBLEM

from jaxbd.base import Batch, RepairData, Suspect, UserError
from jaxbd.data import draw
from jaxbd.interop import graph_model, load
from jaxbd.interop.layouts import naming
from jaxbd.models import build
from jaxbd.pipelines import repair
from jaxbd.repairs import anp, choose
from jaxbd.repairs.neurons import find_neurons, prune, scale_neurons
from jaxbd.training.run import Run

LAYERS = ("norm0", "norm1")


def logits_of(net, images, weights, biases):
    """The student on batch moments, its BatchNorm scaled by `weights` and shifted by `biases`
    times its bias."""
    for number, layer in enumerate(LAYERS):
        norm = getattr(net, layer)
        images = F.relu(
            F.batch_norm(
                getattr(net, f"conv{number}")(images),
                None,
                None,
                norm.weight * weights[layer],
                norm.bias * biases[layer],
                training=True,
            )
        )
    return net.head(images.mean((2, 3)))


def torch_update(net, masks, optimiser, batch, noise, project):
    """(L(clean), L(changed)) of one update of `masks`: ascent by signs from `noise`, then SGD on
    alpha L(clean) + (1 - alpha) L(changed)."""
    images, labels = batch
    ones = {name: torch.ones(mask.shape).double() for name, mask in masks.items()}
    delta, xi = (
        {name: torch.tensor(np.asarray(value)).requires_grad_() for name, value in part.items()}
        for part in noise
    )
    add = lambda one, other: {name: one[name] + other[name] for name in LAYERS}
    changed = lambda: F.cross_entropy(
        logits_of(net, images, add(masks, delta), add(ones, xi)), labels
    )
    for _ in range(2):
        values = [*delta.values(), *xi.values()]
        for value, slope in zip(values, torch.autograd.grad(changed(), values), strict=True):
            value.data += 0.15 * slope.sign()
            if project:
                value.data.clamp_(-0.3, 0.3)
    clean, worst = F.cross_entropy(logits_of(net, images, masks, ones), labels), changed()
    optimiser.zero_grad()
    (0.25 * clean + 0.75 * worst).backward()
    optimiser.step()
    for mask in masks.values():
        mask.data.clamp_(0, 1)
    return clean.item(), worst.item()


@pytest.mark.parametrize("project", [False, True])
def test_two_updates_of_the_masks_are_those_of_pytorch(project):
    config = anp.Config(
        epsilon=0.3, ascent_steps=2, clean_weight=0.25, project=project, batch_size=5
    )
    made = anp.make(PROBLEM, config)
    with jax.enable_x64(True):
        data = RepairData(torch_student.batch(20))
        state = jax.jit(made.init)(jax.random.key(0), torch_student.variables(), data)
        net, step = torch_student.twin(state.variables), jax.jit(made.phases[0].step)
        masks = {
            name: torch.ones(mask.shape).double().requires_grad_()
            for name, mask in state.masks.items()
        }
        optimiser = torch.optim.SGD(masks.values(), lr=0.2, momentum=0.9)
        for number in range(2):
            key = jax.random.key(number)
            draw_key, change_key = jax.random.split(key)
            batch = torch_student.as_torch(draw.uniform(5)(draw_key, state.train))
            noise = anp.draw_change(change_key, state.masks, 0.3)
            state, info = step(key, state, None)
            expected = torch_update(net, masks, optimiser, batch, noise, project)
            found = info.clean_loss, info.changed_loss
            np.testing.assert_allclose(found, expected, rtol=1e-9)
        for name, mask in masks.items():
            np.testing.assert_allclose(state.masks[name], mask.detach().numpy(), rtol=1e-8)
        assert min(mask.min() for mask in masks.values()) < 1, "nothing moved"


def test_neurons_are_batchnorm_scales_or_kernels_or_linear_layers():
    net = lambda **options: build.net(
        build.Spec(arch="cnn", classes=4, image_shape=toys.SHAPE, options={"width": 3, **options})
    )
    shapes = lambda net: jax.eval_shape(net.init, jax.random.key(0))
    found = lambda tree: {name: ones.shape for name, ones in find_neurons(tree, 4).items()}
    assert found(shapes(net())) == {"norm0": (3,), "norm1": (6,), "norm2": (12,)}
    assert found(shapes(net(norm=False))) == {"conv0": (3,), "conv1": (6,), "conv2": (12,)}
    linear = {"params": {f"fc{n}": {"kernel": jnp.ones((5, n))} for n in (3, 4)}}
    assert found(linear) == {"fc3": (3,)}, "the classifier has no neurons to prune"


@pytest.mark.parametrize("norm", [True, False])
def test_an_imported_graph_has_the_same_neurons(tmp_path, norm):
    """Under its own names, with the same effect."""
    spec = build.Spec(
        arch="cnn",
        classes=4,
        image_shape=toys.SHAPE,
        options={"width": 3, "stages": 2, "norm": norm},
    )
    net = build.net(spec)
    ours = jax.jit(net.init)(jax.random.key(0))
    path = tmp_path / "net.onnx"
    graph_model.writer_of_net(spec, naming.export_names(spec).names, ours, ())(path)
    read = load.open_model(path)
    images = toys.quadrants(0, 8, np.float32).images
    logits = []
    for apply, variables in ((net.apply, ours), (read.net.apply, read.variables)):
        masks = find_neurons(variables, 4)
        masks = {name: mask.at[1].set(0) for name, mask in masks.items()}
        assert [mask.size for mask in masks.values()] == [3, 6]
        pruned = prune(variables, masks, jnp.float32(0.5), "threshold")
        logits.append(np.asarray(jax.jit(apply)(pruned, images)[0]))
        assert np.abs(logits[-1] - jax.jit(apply)(variables, images)[0]).max() > 1e-3
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_a_net_whose_layers_are_not_known_is_refused():
    with pytest.raises(UserError, match=r"anp: .*use another repair, such as finetune or ibau"):
        find_neurons(toys.victim(2), toys.CLASSES)


def test_weights_and_biases_are_scaled_by_channel():
    variables = {
        "params": {"conv": {"kernel": jnp.ones((3, 3, 2, 2)), "bias": jnp.array([1.0, 2.0])}},
        "kept": {"other": jnp.ones(1)},
    }
    found = scale_neurons(variables, {"conv": jnp.array([0.5, 2.0])}, {"conv": jnp.array([3.0, 1])})
    np.testing.assert_array_equal(found["params"]["conv"]["bias"], [3, 2])
    np.testing.assert_array_equal(found["params"]["conv"]["kernel"][..., 0], 0.5)
    np.testing.assert_array_equal(found["params"]["conv"]["kernel"][..., 1], 2.0)
    assert found["kept"] == variables["kept"]


@pytest.mark.parametrize(
    "by, value, kept",
    [
        ("threshold", 0.0, [1, 1, 1, 1, 1]),
        ("threshold", 0.3, [0, 1, 1, 1, 1]),
        ("threshold", 0.31, [0, 0, 1, 1, 1]),
        ("threshold", 1.0, [0, 0, 1, 0, 1]),
        ("number", 0.0, [1, 1, 1, 1, 1]),
        ("number", 0.4, [0, 0, 1, 1, 1]),
        ("number", 1.0, [0, 0, 0, 0, 0]),
    ],
)
def test_pruned_neurons_lose_their_weight_and_keep_their_bias(by, value, kept):
    masks = {"a": jnp.array([0.0, 0.3]), "b": jnp.array([1.0, 0.9, 1.0])}
    layer = lambda count: {"scale": jnp.full(count, 2.0), "bias": jnp.full(count, 5.0)}
    variables = {"params": {"a": layer(2), "b": layer(3)}}
    params = prune(variables, masks, jnp.float32(value), by)["params"]
    found = np.concatenate([params[name]["scale"] for name in "ab"])
    np.testing.assert_array_equal(found, 2 * np.array(kept))
    assert all((params[name]["bias"] == 5).all() for name in "ab")


@pytest.mark.parametrize(
    "accuracies, index",
    [
        ([0.9, 0.9, 0.88, 0.5], 2),
        ([0.9, 0.5, 0.9, 0.5], 2),
        ([0.9, 0.9, 0.9, 0.9], 3),
        ([0.5, 0.5, 0.5, 0.5], 0),
    ],
)
def test_the_strongest_value_within_the_budget_is_chosen(accuracies, index):
    assert choose.best_within(jnp.array(accuracies), jnp.float32(0.9), 0.03) == index


def test_the_automatic_choice_is_the_pruning_at_the_chosen_value():
    made = anp.make(PROBLEM, anp.Config(points=3, most=0.8, batch_size=5))
    with jax.enable_x64(True):
        data = RepairData(torch_student.batch(20))
        state = jax.jit(made.init)(jax.random.key(0), torch_student.variables(), data)
        masks = {name: jnp.linspace(0.1, 0.9, mask.size) for name, mask in state.masks.items()}
        state, step = state._replace(masks=masks), jax.jit(made.phases[1].step)
        state = made.phases[1].begin(state)
        for number in range(3):
            state, info = step(jax.random.key(0), state, None)
            pruned = made.extract(state, made.dial[number])
            assert info.accuracy == choose.measure_accuracy(NET, pruned, state.held)
        np.testing.assert_allclose(made.dial, [0, 0.4, 0.8], rtol=1e-6)
        for accuracies, chosen in (([0.9, 0.9, 0.1], 1), ([0.9, 0.9, 0.9], 2), ([0, 0, 0], 0)):
            known = state.sweep._replace(accuracies=jnp.array(accuracies), before=jnp.float64(0.9))
            found, wanted = (
                made.extract(state._replace(sweep=known)),
                made.extract(state, made.dial[chosen]),
            )
            for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
                np.testing.assert_array_equal(one, other)


def test_held_images_train_nothing():
    """Both parts together are all images, once."""
    numbered = lambda count: Batch(jnp.arange(float(count)), jnp.arange(count))
    train, held = choose.split(jax.random.key(0), numbered(20), 0.25, 500, "anp")
    assert len(held.labels) == 5
    assert sorted([*train.images.ravel().tolist(), *held.images.ravel().tolist()]) == list(
        range(20)
    )
    _, few = choose.split(jax.random.key(0), numbered(20), 0.25, 2, "anp")
    assert len(few.labels) == 2
    with pytest.raises(UserError, match="anp: 1 clean images cannot be divided"):
        choose.split(jax.random.key(0), numbered(1), 0.25, 500, "anp")


TARGET = 1
STRIPES = build.net(
    build.Spec(
        arch="cnn",
        classes=toys.CLASSES,
        image_shape=toys.SHAPE,
        options={"width": 3, "stages": 1, "norm": False},
    )
)
TRIGGER = 2
"""The neuron that only the trigger drives."""
BIAS = -0.9
"""Its bias; clean images bring it to within 0.2 of firing, which a change of 40 % reaches."""


def stamp(images: np.ndarray) -> np.ndarray:
    stamped = images.copy()
    stamped[:, 2:5, 3:6, 0] = 255 * toys.PATTERN
    return stamped


def planted() -> dict:
    """A net built by hand for `toys.stripes`: two neurons see edges along rows and columns, and the
    answer is the class whose mean edges are nearest. A third fires on the trigger, is silent on
    clean images though not by far, and leads to TARGET."""
    shapes = dict(jax.eval_shape(STRIPES.init, jax.random.key(0)))
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    kernel, bias = fresh["params"]["conv0"]["kernel"], fresh["params"]["conv0"]["bias"]
    kernel[0, :, 0, 0], kernel[2, :, 0, 0] = -1, 1
    kernel[:, 0, 0, 1], kernel[:, 2, 0, 1] = -1, 1
    kernel[:, :, 0, TRIGGER], bias[TRIGGER] = 2 * toys.PATTERN - 1, BIAS
    data = toys.stripes(0, 200)
    images = data.images / np.float32(255)
    edges = np.asarray(STRIPES.outputs(fresh, images)[1]["norm0"])
    features = np.maximum(edges, 0).mean((1, 2))
    means = np.stack([features[data.labels == label].mean(0) for label in range(4)])
    head, scale = fresh["params"]["head"], 200
    head["kernel"][:], head["bias"][:] = 2 * scale * means.T, -scale * (means**2).sum(1)
    head["kernel"][TRIGGER, TARGET] = 2000
    return jax.tree.map(jnp.asarray, fresh)


def rates(variables) -> tuple[float, float]:
    """Accuracy, and the share of stamped images of other classes that are called TARGET."""
    data = toys.stripes(5, 200)
    answers = lambda images: np.asarray(
        STRIPES.apply(variables, images / np.float32(255))[0]
    ).argmax(1)
    others = data.labels != TARGET
    clean = (answers(data.images) == data.labels).mean()
    return clean, (answers(stamp(data.images[others])) == TARGET).mean()


@pytest.fixture(scope="module")
def repaired():
    suspect = Suspect(STRIPES, planted(), toys.SHAPE, toys.CLASSES)
    config = anp.paper(num_steps=100, batch_size=32, points=10, most=0.9)
    data, key = toys.stripes(0, 200), jax.random.key(1)
    return repair.repair(Run(), key, suspect, data, [], "anp", config)


def test_the_neuron_that_only_the_trigger_drives_is_pruned_and_accuracy_stays(repaired):
    assert rates(planted()) == (1.0, 1.0)
    clean, success = rates(repaired.variables)
    assert clean >= 0.97 and success == 0.0
    kernel = repaired.variables["params"]["conv0"]["kernel"]
    assert not kernel[..., TRIGGER].any() and kernel[..., 0].any() and kernel[..., 1].any()
    assert repaired.variables["params"]["conv0"]["bias"][TRIGGER] == np.float32(BIAS)


def test_the_whole_dial_is_measured_one_value_a_step(repaired):
    """The first value prunes nothing; the infos are the curve."""
    curve = repaired.infos["prune"]
    np.testing.assert_allclose(curve.value, np.linspace(0, 0.9, 10), rtol=1e-6)
    assert curve.accuracy[0] == 1.0 and ((curve.accuracy >= 0) & (curve.accuracy <= 1)).all()
