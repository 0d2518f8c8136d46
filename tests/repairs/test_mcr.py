"""Mode connectivity: curve, loss and one update against PyTorch; moments re-estimated; the choice
of t."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_student
from torch_student import NET, PROBLEM

from jaxbd.base import RepairData
from jaxbd.data import draw
from jaxbd.repairs import choose, mcr
from jaxbd.repairs.restate import restate

CONFIG = mcr.Config(
    finetune_steps=10, num_steps=10, learning_rate=0.2, weight_decay=0.05, batch_size=5, points=5
)
MADE = mcr.make(PROBLEM, CONFIG)


def started():
    """A state whose bend and second end are other nets; inside `jax.enable_x64`."""
    data = RepairData(torch_student.batch(20, 1))
    state = jax.jit(MADE.init)(jax.random.key(0), torch_student.variables(), data)
    bend, other = torch_student.variables(1)["params"], torch_student.variables(2)
    return state._replace(bend=bend, other=other)


def assert_equal(one, other) -> None:
    for now, own in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(now, own)


def test_one_update_of_the_bend_is_that_of_pytorch():
    """SGD with momentum on CE(phi(t)) + decay / 2 ||phi(t)||^2 in training mode, twice."""
    with jax.enable_x64(True):
        state = started()
        one, bend, two = (
            torch_student.twin({**state.variables, "params": params})
            for params in (state.variables["params"], state.bend, state.other["params"])
        )
        thetas = dict(bend.named_parameters())
        optimiser = torch.optim.SGD(thetas.values(), lr=0.2, momentum=0.9)
        step = jax.jit(MADE.phases[1].step)
        for number in range(2):
            key = jax.random.key(number)
            draw_key, t_key = jax.random.split(key)
            t = float(jax.random.uniform(t_key, (), dtype=jnp.float64))
            batch = draw.uniform(5)(draw_key, state.train)
            state, info = step(key, state, None)
            images, labels = torch_student.as_torch(batch)
            ends = [dict(net.named_parameters()) for net in (one, two)]
            weights = {
                name: (1 - t) ** 2 * ends[0][name].detach()
                + 2 * t * (1 - t) * theta
                + t**2 * ends[1][name].detach()
                for name, theta in thetas.items()
            }
            logits = torch.func.functional_call(one, weights, images)
            entropy = F.cross_entropy(logits, labels)
            decay = sum((weight**2).sum() for weight in weights.values())
            optimiser.zero_grad()
            (entropy + 0.05 / 2 * decay).backward()
            optimiser.step()
            np.testing.assert_allclose(info.loss, entropy.item(), rtol=1e-9)
        expected = {**state.variables, "params": state.bend}
        bend.load_state_dict(
            {**torch_student.twin(expected).state_dict(), **{k: v for k, v in thetas.items()}}
        )
        torch_student.assert_same(expected, bend)


def test_the_second_end_is_fine_tuned_as_pytorch_does():
    with jax.enable_x64(True):
        state = started()
        net = torch_student.twin(state.other)
        batch = draw.uniform(5)(jax.random.key(3), state.train)
        after, info = jax.jit(MADE.phases[0].step)(jax.random.key(3), state, None)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.05)
        images, labels = torch_student.as_torch(batch)
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimiser.step()
        np.testing.assert_allclose(info.loss, loss.item(), rtol=1e-9)
        torch_student.assert_same(after.other, net, 1e-8)
        assert_equal(after.variables, state.variables)


def test_moments_are_pytorchs_cumulative_average():
    """`momentum=None` over the batches, in their order; whatever the stored ones were."""
    with jax.enable_x64(True):
        variables, images = torch_student.variables(), torch_student.batch(13, 4).images
        found = jax.jit(lambda v, x: restate(NET, v, x, 4))(variables, images)
        net = torch_student.twin(variables)
        for layer in (net.norm0, net.norm1):
            layer.momentum = None
            layer.reset_running_stats()
        with torch.no_grad():
            for first in (0, 4, 8):
                net(torch.tensor(np.asarray(images[first : first + 4])).permute(0, 3, 1, 2))
        torch_student.assert_same({**variables, "batch_stats": found}, net)


def test_moments_that_no_net_updates_stay():
    """A net whose BatchNorm is frozen, and one without any."""
    stats = {"norm": {"mean": jnp.arange(3.0), "seen": jnp.int32(7)}}
    frozen = NET._replace(apply=lambda v, x, *, train=False: (x, v["batch_stats"]))
    found = restate(frozen, {"batch_stats": stats}, jnp.ones((4, 8, 8, 3)))
    np.testing.assert_array_equal(found["norm"]["mean"], stats["norm"]["mean"])
    assert found["norm"]["seen"] == 7
    assert restate(frozen, {"params": {}}, jnp.ones((4, 8, 8, 3))) == {}


def test_the_curve_ends_at_both_nets_and_its_middle_is_half_bend():
    with jax.enable_x64(True):
        state = started()
        ends = [state.variables["params"], state.bend, state.other["params"]]
        leaf = lambda tree: tree["head"]["kernel"]
        for t, weights in ((0.0, (1, 0, 0)), (1.0, (0, 0, 1)), (0.5, (0.25, 0.5, 0.25))):
            found = leaf(mcr.point(*ends, jnp.float64(t)))
            expected = sum(w * leaf(end) for w, end in zip(weights, ends, strict=True))
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        fresh = MADE.phases[1].begin(state).bend
        np.testing.assert_allclose(leaf(fresh), (leaf(ends[0]) + leaf(ends[2])) / 2)


def test_where_t_is_0_the_suspect_comes_back_and_elsewhere_moments_are_new():
    with jax.enable_x64(True):
        state = started()
        extract = jax.jit(MADE.extract)
        first, middle = extract(state, MADE.dial[0]), extract(state, MADE.dial[2])
        assert_equal(first, state.variables)
        expected = restate(NET, middle, state.train.images)
        for now, new in zip(*map(jax.tree.leaves, (middle["batch_stats"], expected)), strict=True):
            np.testing.assert_allclose(now, new, rtol=1e-6)


@pytest.mark.parametrize(
    "accuracies, chosen",
    [
        ([0.9, 0.9, 0.9, 0.9, 0.9], 2),
        ([0.9, 0.9, 0.1, 0.9, 0.9], 3),
        ([0.9, 0.9, 0.1, 0.1, 0.9], 1),
        ([0.9, 0.1, 0.1, 0.1, 0.88], 4),
        ([0.9, 0.1, 0.1, 0.1, 0.1], 0),
        ([0.1, 0.1, 0.1, 0.1, 0.1], 0),
        ([0.9, 0.9, 0.88, 0.9, 0.9], 2),
        ([0.9, 0.9, 0.86, 0.9, 0.9], 3),
    ],
)
def test_the_t_nearest_the_middle_within_the_budget_is_chosen(accuracies, chosen):
    assert choose.nearest_middle(jnp.array(accuracies), jnp.float32(0.9), 0.03) == chosen


def test_the_rate_is_constant_then_falls_to_a_hundredth():
    rate = mcr.falling_rate(mcr.Config(num_steps=1000, learning_rate=2.0))
    found = [float(rate(jnp.int32(step))) for step in (0, 499, 500, 700, 900, 999)]
    # what is left of a rate of 1 after 0.99 of it is taken off in float32
    assert found == pytest.approx([2, 2, 2, 2 * (1 - 0.99 / 2), 0.02, 0.02], abs=1e-6)


def test_the_suspect_as_both_ends_needs_no_fine_tuning():
    phases = mcr.make(PROBLEM, mcr.Config(other="suspect")).phases
    assert [phase.name for phase in phases] == ["curve", "measure"]
