"""I-BAU: the hypergradient and one update of each kind against PyTorch, written from the paper's
formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_student
from torch_student import PROBLEM

from jaxbd.base import RepairData
from jaxbd.repairs import ibau

CONFIG = ibau.Config(
    rounds=1,
    inner_learning_rate=3.0,
    penalty=0.02,
    fixed_points=4,
    fixed_point_rate=0.5,
    fixed_point_images=7,
    stamp_share=0.4,
)
MADE = ibau.make(PROBLEM, CONFIG)
SEARCH, UNLEARN = MADE.phases


def started():
    """A state with a change in it, and a batch; inside `jax.enable_x64`."""
    data = RepairData(torch_student.batch(9, 1))
    state = jax.jit(MADE.init)(jax.random.key(0), torch_student.variables(), data)
    delta = jnp.asarray(np.random.default_rng(2).uniform(-0.5, 0.5, state.delta.shape))
    return state._replace(delta=delta), torch_student.batch(6, 3)


def inner(net, delta, images, labels):
    """-CE(f(x + delta), y) + penalty ||delta||^2."""
    entropy = F.cross_entropy(net(images + delta), labels)
    return -entropy + CONFIG.penalty * torch.norm(delta) ** 2


def as_delta(state) -> torch.Tensor:
    """[1, C, H, W] with a gradient."""
    return torch.tensor(np.asarray(state.delta)).permute(2, 0, 1)[None].requires_grad_()


@pytest.mark.parametrize("labels, bound", [("predicted", 0.0), ("true", 0.2)])
def test_a_step_of_the_search_is_that_of_pytorch(labels, bound):
    config = ibau.Config(inner_learning_rate=3.0, penalty=0.02, inner_labels=labels, bound=bound)
    with jax.enable_x64(True):
        state, batch = started()
        after, info = jax.jit(ibau.make(PROBLEM, config).phases[0].step)(
            jax.random.key(1), state, batch
        )
        net, delta = torch_student.twin(state.variables).eval(), as_delta(state)
        images, truth = torch_student.as_torch(batch)
        wanted = truth if labels == "true" else net(images).argmax(1)
        loss = inner(net, delta, images, wanted)
        optimiser = torch.optim.SGD([delta], lr=3.0)
        loss.backward()
        optimiser.step()
        np.testing.assert_allclose(info.loss, loss.item(), rtol=1e-10)
        expected = delta.detach()[0].permute(1, 2, 0).numpy()
        if bound:
            assert (expected**2).mean() > bound**2
            expected = expected * bound / np.sqrt((expected**2).mean())
        np.testing.assert_allclose(after.delta, expected, rtol=1e-9, atol=1e-12)
        assert not np.allclose(truth, net(images).argmax(1)), "the labels must differ to be told"


def test_an_update_follows_the_hypergradient_of_pytorch():
    """theta <- Adam on dE/dtheta + (d phi/d theta)^T v, v from K iterations; by double
    back-propagation."""
    with jax.enable_x64(True):
        state, batch = started()
        key = jax.random.key(5)
        after, info = jax.jit(UNLEARN.step)(key, state, batch)
        carriers = torch.tensor(np.asarray(ibau.choose_carriers(key, 6, CONFIG.stamp_share)))
        fixed = torch_student.as_torch(state.fixed)
    assert carriers.sum() == 2
    net, delta = torch_student.twin(state.variables).eval(), as_delta(state)
    images, labels = torch_student.as_torch(batch)
    params = list(net.parameters())
    outer = F.cross_entropy(net(images + carriers.view(-1, 1, 1, 1).double() * delta), labels)
    by_delta, *direct = torch.autograd.grad(outer, [delta, *params])
    (slope,) = torch.autograd.grad(inner(net, delta, *fixed), delta, create_graph=True)
    phi = delta - CONFIG.fixed_point_rate * slope
    v = torch.zeros_like(delta)
    for _ in range(CONFIG.fixed_points):
        v = torch.autograd.grad(phi, delta, grad_outputs=v, retain_graph=True)[0] + by_delta
    implicit = torch.autograd.grad(phi, params, grad_outputs=v, allow_unused=True)
    size = torch.sqrt(sum((each**2).sum() for each in implicit if each is not None))
    np.testing.assert_allclose(info.implicit, size.item(), rtol=1e-8)
    np.testing.assert_allclose(info.loss, outer.item(), rtol=1e-10)
    assert size > 1e-3, "an implicit part of 0 would prove nothing"
    for param, one, other in zip(params, direct, implicit, strict=True):
        param.grad = one if other is None else one + other
    torch.optim.Adam(params, lr=CONFIG.learning_rate).step()
    torch_student.assert_same(after.variables, net, 1e-6)
    assert after.step == 1


def test_rounds_alternate_and_each_search_begins_without_a_change():
    made = ibau.make(PROBLEM, ibau.Config(rounds=2))
    assert [phase.name for phase in made.phases] == [
        "search 1",
        "unlearn 1",
        "search 2",
        "unlearn 2",
    ]
    state = ibau.State(0, {}, (), jnp.full((3, 3, 1), 4.0), ())
    assert not made.phases[2].begin(state).delta.any()


def test_a_change_within_the_ball_stays_and_bound_0_is_no_ball():
    delta = jnp.full((3, 3, 1), 0.1)
    np.testing.assert_array_equal(ibau.project(delta, 10.0), delta)
    np.testing.assert_allclose(ibau.project(20 * delta, 0.5), 5 * delta, rtol=1e-6)
    np.testing.assert_array_equal(ibau.project(100 * delta, 0.0), 100 * delta)


@pytest.mark.parametrize("share, carry", [(0.01, 1), (0.5, 5), (1.0, 10)])
def test_at_least_one_image_carries_the_change(share, carry):
    chosen = ibau.choose_carriers(jax.random.key(0), 10, share)
    assert chosen.sum() == carry and {*np.asarray(chosen).tolist()} <= {0.0, 1.0}
    other = ibau.choose_carriers(jax.random.key(1), 10, share)
    assert carry == 10 or not np.array_equal(chosen, other)


def test_the_presets_are_what_their_sources_say():
    """The released file: 5 rounds, lr 10, 0.001, K = 5, one image in a hundred, no ball; the
    paper's problem: true labels, a ball, all images."""
    found, stated = ibau.released(), ibau.paper()
    assert (found.rounds, found.inner_learning_rate, found.penalty) == (5, 10.0, 1e-3)
    assert (found.fixed_points, found.stamp_share, found.bound) == (5, 0.01, 0.0)
    assert (stated.inner_labels, stated.stamp_share) == ("true", 1.0)
    assert stated.bound * np.sqrt(32 * 32 * 3) == pytest.approx(10.0)
