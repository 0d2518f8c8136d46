"""NAD: its loss and its updates beside PyTorch's, the layers it compares, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_dhbe
import torch_distill
import toys

from jaxbd import testing
from jaxbd.base import Batch, Problem, RepairData, Suspect, UserError
from jaxbd.cli.commands.repair import with_steps
from jaxbd.models import build
from jaxbd.repairs import attention, distill, nad

SHAPE = (8, 8, 3)


def net_of(arch: str = "cnn", shape=SHAPE, dtype: str = "float32", **options):
    spec = build.Spec(arch=arch, classes=4, image_shape=shape, dtype=dtype, options=options)
    return build.net(spec)


NET = net_of(width=3, stages=2)
NET64 = net_of(width=3, stages=2, dtype="float64")
CONFIG = nad.Config(weights=(5.0, 7.0), num_steps=10, teacher_steps=10)
MADE = nad.make(Problem(NET, SHAPE, 4), CONFIG)


def victim(seed: int = 0):
    """Variables with running moments that are not the ones they start from."""
    variables = jax.jit(NET.init)(jax.random.key(seed))
    images = jnp.asarray(np.random.default_rng(seed).uniform(size=(16, *SHAPE)), jnp.float32)
    _, stats = jax.jit(lambda v, x: NET.apply(v, x, train=True))(variables, images)
    return {**variables, "batch_stats": stats}


def batch(seed: int = 1, count: int = 6) -> Batch:
    images = np.random.default_rng(seed).uniform(size=(count, *SHAPE))
    return Batch(jnp.asarray(images), jnp.arange(count, dtype=jnp.int32) % 4)


def as_torch(drawn: Batch):
    images, labels = (torch.tensor(np.asarray(leaf)) for leaf in drawn)
    return images.permute(0, 3, 1, 2), labels.long()


def twin(variables) -> torch_dhbe.Student:
    return torch_dhbe.load(torch_dhbe.Student(4, 3, 3), variables)


def test_maps_and_their_distance_are_those_of_pytorch():
    with jax.enable_x64(True):
        one, other = (
            jnp.asarray(np.random.default_rng(n).normal(size=(3, 5, 4, 6))) for n in (0, 1)
        )
        for power in (2.0, 3.0):
            ours = attention.attention_map(one, power)
            theirs = torch_distill.attention_map(
                torch.tensor(np.asarray(one)).permute(0, 3, 1, 2), power
            )
            np.testing.assert_allclose(ours, theirs[:, 0], rtol=1e-12)
        maps = [attention.attention_map(each) for each in (one, other)]
        ours = attention.attention_distance([maps[0]], [maps[1]], (500.0,))
        np.testing.assert_allclose(ours, 500 * jnp.square(maps[0] - maps[1]).mean(), rtol=1e-12)


def test_the_last_layers_take_the_last_weights():
    ones, zeros = [jnp.ones((1, 2, 2))] * 3, [jnp.zeros((1, 2, 2))] * 3
    distance = attention.attention_distance
    assert distance(ones, zeros, (1.0, 10.0, 100.0)) == 111
    assert distance(ones, zeros, (10.0, 100.0)) == 110
    assert distance(ones[:2], zeros[:2], (1.0, 10.0, 100.0)) == 110


def test_a_dead_layer_has_an_empty_map_and_no_gradient():
    loss = lambda values: attention.attention_map(values).sum()
    value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 3, 3, 4)))
    assert value == 0 and not gradient.any()


def test_one_update_of_each_phase_is_that_of_pytorch():
    """Weights and running moments, in float64: layers are compared as they are in training."""
    made = nad.make(Problem(NET64, SHAPE, 4), CONFIG)
    teach, study = (jax.jit(phase.step) for phase in made.phases)
    with jax.enable_x64(True):
        variables, drawn = toys.widen(victim()), batch()
        state = made.init(jax.random.key(0), variables, RepairData(drawn))
        images, labels = as_torch(drawn)
        student, rates = twin(variables), dict(rate=0.1, decay=1e-4)
        state, _ = teach(jax.random.key(1), state, drawn)
        teacher = torch_distill.fine_tune(student, images, labels, **rates)
        torch_distill.assert_same(twin(state.teacher), teacher)
        torch_distill.assert_same(twin(state.student), student)
        state, info = study(jax.random.key(2), made.phases[1].begin(state), drawn)
        distance = lambda own, wanted: torch_distill.nodes(own, wanted, CONFIG.weights)
        expected = torch_distill.update(student, teacher, images, labels, distance, **rates)
        assert expected[1] > 0.01, "the maps are alike, so nothing is compared"
        np.testing.assert_allclose(info[:2], expected, rtol=1e-9)
        torch_distill.assert_same(twin(state.student), student)
        torch_distill.assert_same(twin(state.teacher), teacher)


def test_the_student_begins_with_a_fresh_optimiser():
    state = MADE.init(jax.random.key(0), victim(), RepairData(batch()))
    before, _ = jax.jit(MADE.phases[0].step)(jax.random.key(1), state, batch())
    after = MADE.phases[1].begin(before)
    is_moving = lambda state: any(leaf.any() for leaf in jax.tree.leaves(state.opt))
    assert is_moving(before) and not is_moving(after)


@pytest.mark.parametrize(
    "arch, side, expected",
    [
        ("resnet18", 16, [(16, 8), (8, 16), (4, 32), (2, 64)]),
        ("wrn16-1", 16, [(16, 8), (8, 16), (4, 32)]),
        ("preactresnet18", 16, [(16, 8), (8, 16), (4, 32), (2, 64)]),
        ("vgg", 8, [(8, 8), (4, 16), (2, 32)]),
    ],
)
def test_the_layers_that_end_stages_are_compared(arch, side, expected):
    """(side, channels) of each."""
    net = net_of(arch, (side, side, 3), width=8)
    variables = jax.eval_shape(net.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    found = jax.eval_shape(
        lambda v, x: attention.choose_layers(net.outputs(v, x)[1]), variables, images
    )
    assert [(layer.shape[1], layer.shape[3]) for layer in found] == expected


def test_a_net_without_normalisation_is_distilled_too():
    net = net_of(width=3, stages=2, norm=False)
    made = nad.make(Problem(net, SHAPE, 4), CONFIG)
    state = made.init(jax.random.key(0), jax.jit(net.init)(jax.random.key(0)), RepairData(batch()))
    taught, _ = jax.jit(made.phases[0].step)(jax.random.key(1), state, batch())
    after, info = jax.jit(made.phases[1].step)(jax.random.key(2), taught, batch())
    assert info.distance > 0
    moved = jax.tree.map(lambda a, b: (a != b).any(), after.student, taught.student)
    assert all(jax.tree.leaves(moved["params"]))


def test_nets_without_maps_are_refused():
    data = RepairData(toys.quadrants(0, 8, np.float32))
    blind = nad.make(Problem(toys.NET, toys.SHAPE, 4), CONFIG)
    with pytest.raises(UserError, match=r"nad: a net made from a bare apply .* such as ft-sam"):
        blind.init(jax.random.key(0), toys.victim(1), data)
    flat = NET._replace(outputs=lambda v, x: (None, {"features": jnp.zeros((len(x), 5))}))
    with pytest.raises(UserError, match="nad: this net shows no layer with places"):
        nad.make(Problem(flat, SHAPE, 4), CONFIG).init(
            jax.random.key(0), victim(), RepairData(batch())
        )


def test_passes_become_steps_unless_steps_are_given():
    suspect, data = Suspect(NET, victim(), SHAPE, 4), RepairData(batch(count=10))
    config = nad.adapt(nad.released(), suspect, data, 4)
    assert (config.num_steps, config.teacher_steps, config.epochs) == (60, 30, None)
    assert nad.adapt(with_steps(nad.released(), 7), suspect, data, 4).num_steps == 7
    assert nad.adapt(nad.quick(), suspect, data, 4) == nad.quick()


def test_rates_are_those_of_the_released_code():
    """0.1 for two passes and 0.01 after, in both phases."""
    config = nad.adapt(
        nad.released(), Suspect(NET, victim(), SHAPE, 4), RepairData(batch(count=10)), 4
    )
    params = {"w": jnp.ones(())}
    for rule, length in zip(distill.rules(config), (30, 60), strict=True):
        state, moved = rule.init(params), []
        for _ in range(length):
            # without a gradient of its own, decay moves weights by the rate alone
            updates, state = rule.update({"w": jnp.zeros(())}, state, params)
            moved.append(float(-updates["w"]))
        # momentum changes little from one step to the next, the rate drops to a tenth
        ratios = np.divide(moved[1:], moved[:-1])
        assert ratios.argmin() == 5 and (ratios < 0.5).sum() == 1, ratios


@pytest.mark.parametrize(
    "change",
    [
        dict(weights=()),
        dict(weights=(1.0, float("nan"))),
        dict(power=0.5),
        dict(learning_rate=float("nan")),
        dict(momentum=1.0),
        dict(weight_decay=-1.0),
        dict(num_steps=0),
        dict(teacher_steps=0),
        dict(epochs=0),
        dict(milestones=(0.5, 0.5)),
        dict(teacher_milestones=(1.0,)),
        dict(crop_padding=-1),
    ],
    ids=lambda change: next(iter(change)),
)
def test_bad_values_are_refused_by_name(change):
    with pytest.raises(UserError, match=f"nad: .*{next(iter(change))}"):
        nad.Config(**change)


def test_the_contract_of_every_preset():
    for config in (nad.released(), nad.compared(), nad.quick()):
        testing.check_config(config)
