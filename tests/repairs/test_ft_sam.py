"""FT-SAM: its loss, its perturbation and one update beside PyTorch's, its schedules, and what it
refuses."""

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
from jaxbd.cli.commands.repair import with_steps
from jaxbd.models import build
from jaxbd.repairs import ft_sam

SHAPE = (8, 8, 3)
SPEC = build.Spec(arch="cnn", classes=4, image_shape=SHAPE, options={"width": 3, "stages": 2})
NET, NET64 = build.net(SPEC), build.net(dataclasses.replace(SPEC, dtype="float64"))
PROBLEM = Problem(NET64, SHAPE, 4)


def drawn(count: int = 6) -> Batch:
    images = np.random.default_rng(1).uniform(size=(count, *SHAPE))
    return Batch(jnp.asarray(images), jnp.arange(count, dtype=jnp.int32) % 4)


def smoothed(logits, labels, smoothing):
    """Cross-entropy against 1 - s for the true class and s / (K - 1) for the others."""
    wanted = torch.full_like(logits, smoothing / (logits.shape[1] - 1))
    wanted.scatter_(1, labels[:, None], 1 - smoothing)
    return -(wanted * F.log_softmax(logits, 1)).sum(1).mean()


def torch_step(net, images, labels, *, rho, adaptive, rate=0.01):
    """Ascend, take the gradient there, descend from here; running moments are of the first pass."""
    net.train()
    rule = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    loss = smoothed(net(images), labels, 0.1)
    loss.backward()
    moments = {name: value.clone() for name, value in net.named_buffers()}
    params = list(net.parameters())
    here = [p.detach().clone() for p in params]
    scale = [p.abs() if adaptive else torch.ones_like(p) for p in here]
    norm = torch.norm(
        torch.stack([torch.norm(t * p.grad) for t, p in zip(scale, params, strict=True)])
    )
    with torch.no_grad():
        for p, t in zip(params, scale, strict=True):
            p += rho * t * t * p.grad / norm
    rule.zero_grad()
    there = smoothed(net(images), labels, 0.1)
    there.backward()
    with torch.no_grad():
        for p, old in zip(params, here, strict=True):
            p.copy_(old)
        for name, value in net.named_buffers():
            value.copy_(moments[name])
    rule.step()
    return loss.item(), (there - loss).item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_pytorch(smoothing):
    with jax.enable_x64(True):
        logits = np.random.default_rng(0).normal(size=(5, 4))
        labels = np.array([0, 1, 2, 3, 3])
        ours = ft_sam.smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
        theirs = smoothed(torch.tensor(logits), torch.tensor(labels), smoothing)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("adaptive", [True, False])
def test_one_update_is_that_of_pytorch(adaptive):
    config = ft_sam.Config(adaptive=adaptive, rho=2.0 if adaptive else 0.5)
    made = ft_sam.make(PROBLEM, config)
    with jax.enable_x64(True):
        variables, batch = toys.widen(jax.jit(NET.init)(jax.random.key(0))), drawn()
        twin = torch_dhbe.load(torch_dhbe.Student(4, 3, 3), variables)
        images, labels = (torch.tensor(np.asarray(leaf)) for leaf in batch)
        expected = torch_step(
            twin, images.permute(0, 3, 1, 2), labels.long(), rho=config.rho, adaptive=adaptive
        )
        state = made.init(jax.random.key(0), variables, RepairData(batch))
        state, info = jax.jit(made.phases[0].step)(jax.random.key(1), state, batch)
        assert expected[1] > 0.01, "the perturbation does nothing"
        np.testing.assert_allclose(info[:2], expected, rtol=1e-9)
        torch_distill.assert_same(
            torch_dhbe.load(torch_dhbe.Student(4, 3, 3), state.variables), twin
        )


def test_the_perturbation_has_the_length_rho_and_spares_what_is_zero():
    params = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[-4.0]])}
    gradient = {"a": jnp.array([1.0, 5.0]), "b": jnp.array([[2.0]])}
    move = lambda adaptive: jax.tree.map(
        jnp.subtract, ft_sam.perturb(params, gradient, 2.0, adaptive), params
    )
    plain, adaptive = move(False), move(True)
    length = np.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(plain)))
    assert length == pytest.approx(2.0)
    # T g = (3, 0, 8), so T^2 g = (9, 0, 32) over a norm of sqrt(73)
    np.testing.assert_allclose(adaptive["a"], 2 * np.array([9, 0]) / 73**0.5, rtol=1e-5)
    np.testing.assert_allclose(adaptive["b"], 2 * np.array([[32]]) / 73**0.5, rtol=1e-5)


def test_no_gradient_perturbs_nothing():
    params = {"a": jnp.array([3.0, 1.0])}
    after = ft_sam.perturb(params, {"a": jnp.zeros(2)}, 2.0, True)
    np.testing.assert_array_equal(after["a"], params["a"])


def test_the_released_schedule_is_pytorchs_beyond_its_length():
    config = ft_sam.released(wave_steps=10, learning_rate=0.01)
    weight = torch.nn.Parameter(torch.zeros(()))
    rule = torch.optim.SGD([weight], lr=0.01)
    theirs, scheduler = [], torch.optim.lr_scheduler.CosineAnnealingLR(rule, T_max=10)
    for _ in range(35):
        theirs.append(rule.param_groups[0]["lr"])
        rule.step()
        scheduler.step()
    ours = [float(ft_sam.make_schedule(config)(jnp.asarray(step))) for step in range(35)]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert ours[20] == pytest.approx(0.01) and ours[10] == pytest.approx(0, abs=1e-8)
    falls = ft_sam.make_schedule(ft_sam.Config(num_steps=35))
    assert float(falls(20)) < float(falls(10)) and float(falls(35)) == pytest.approx(0, abs=1e-8)


def test_a_net_that_shows_no_layers_is_repaired():
    """Nothing but a gradient is needed."""
    apply = lambda variables, images: images.mean((1, 2)) @ variables["params"]["kernel"]
    net = build.from_apply(apply)
    made = ft_sam.make(Problem(net, SHAPE, 4), ft_sam.Config())
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    batch = Batch(drawn().images.astype(jnp.float32), drawn().labels)
    state = made.init(jax.random.key(0), {"params": {"kernel": kernel}}, RepairData(batch))
    after, info = jax.jit(made.phases[0].step)(jax.random.key(1), state, batch)
    assert info.sharpness > 0 and (made.extract(after)["params"]["kernel"] != kernel).any()


def test_passes_become_steps_unless_steps_are_given():
    suspect, data = Suspect(NET, {}, SHAPE, 4), RepairData(drawn(10))
    assert ft_sam.adapt(ft_sam.released(), suspect, data, 4).num_steps == 300
    assert ft_sam.adapt(with_steps(ft_sam.released(), 7), suspect, data, 4).num_steps == 7


@pytest.mark.parametrize(
    "change",
    [
        dict(rho=-1.0),
        dict(rho=float("nan")),
        dict(label_smoothing=1.0),
        dict(schedule="sideways"),
        dict(wave_steps=0),
        dict(learning_rate=0.0),
        dict(momentum=1.0),
        dict(weight_decay=float("inf")),
        dict(num_steps=0),
        dict(epochs=0),
    ],
    ids=lambda change: next(iter(change)),
)
def test_bad_values_are_refused_by_name(change):
    with pytest.raises(UserError, match=f"ft-sam: .*{next(iter(change))}"):
        ft_sam.Config(**change)
