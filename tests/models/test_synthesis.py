"""DHBE's generators: sizes, ranges, and the same numbers as PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_dhbe

from jaxbd.base import UserError
from jaxbd.models.norm import normalise
from jaxbd.models.synthesis import (
    SAMPLE_SIDES,
    TRIGGER_SIDES,
    SampleGenerator,
    TriggerGenerator,
    layout,
    to_pixels,
)


def parameters(module) -> int:
    shapes = jax.eval_shape(
        lambda key: module.init(key, jnp.zeros((2, 256)), train=True), jax.random.key(0)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize("side, count", [(32, 2_329_091), (64, 2_476_931)])
def test_sample_generators_have_the_published_size(side, count):
    assert parameters(SampleGenerator((side, side, 3))) == count


PUBLISHED = {
    3: 149_891,
    4: 265_027,
    5: 413_059,
    6: 593_987,
    7: 807_811,
    8: 1_054_531,
    9: 1_334_147,
    10: 898_307,
}


@pytest.mark.parametrize("side", PUBLISHED)
def test_trigger_generators_have_the_published_size(side):
    assert parameters(TriggerGenerator(side, 3)) == PUBLISHED[side]


def test_sides_are_doublings_of_what_the_linear_layer_makes():
    assert {side: layout(side, SAMPLE_SIDES) for side in (8, 16, 28, 32, 64)} == {
        8: (8, 0),
        16: (8, 1),
        28: (7, 2),
        32: (8, 2),
        64: (8, 3),
    }
    assert {side: layout(side, TRIGGER_SIDES) for side in (3, 9, 10, 18, 36)} == {
        3: (3, 0),
        9: (9, 0),
        10: (5, 1),
        18: (9, 1),
        36: (9, 2),
    }
    for side, native in (
        (3, SAMPLE_SIDES),
        (30, SAMPLE_SIDES),
        (2, TRIGGER_SIDES),
        (11, TRIGGER_SIDES),
    ):
        with pytest.raises(UserError, match=f"{side} pixels"):
            layout(side, native)


@pytest.mark.parametrize("shape", [(16, 16, 1), (28, 28, 1), (32, 32, 3)])
def test_images_have_zero_mean_and_unit_variance_per_channel(shape):
    module, noise = SampleGenerator(shape, width=4), jax.random.normal(jax.random.key(0), (24, 8))
    made, _ = jax.jit(functools.partial(module.init_with_output, train=True))(
        jax.random.key(1), noise
    )
    assert made.shape == (24, *shape)
    np.testing.assert_allclose(made.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(made.var((0, 1, 2)), 1, rtol=1e-2)


def test_images_must_be_square():
    with pytest.raises(UserError, match="square"):
        SampleGenerator((16, 8, 1)).init(jax.random.key(0), jnp.zeros((2, 8)), train=True)


@pytest.mark.parametrize("side", [3, 5, 12])
def test_triggers_lie_between_minus_one_and_one(side):
    module, noise = (
        TriggerGenerator(side, 3, width=4),
        jax.random.normal(jax.random.key(0), (24, 8)),
    )
    made, _ = jax.jit(functools.partial(module.init_with_output, train=True))(
        jax.random.key(1), noise
    )
    assert made.shape == (24, side, side, 3) and float(abs(made).max()) < 1
    # BatchNorm before the tanh spreads them over the range
    assert float(made.min()) < -0.8 and float(made.max()) > 0.8


def test_pixels_undo_the_normalisation():
    images, mean, std = (
        jax.random.normal(jax.random.key(0), (2, 4, 4, 3)),
        (0.4, 0.5, 0.6),
        (0.2, 0.3, 0.25),
    )
    np.testing.assert_allclose(
        normalise(to_pixels(images, mean, std), mean, std), images, atol=1e-5
    )
    np.testing.assert_allclose(to_pixels(images, (0.5,), (0.25,)), images * 0.25 + 0.5, rtol=1e-6)


def scrambled(variables):
    """The variables with every leaf drawn anew, so that nothing is compared at zero or one."""
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.uniform(0.2, 0.9, leaf.shape)) for leaf in leaves]
    )


@pytest.mark.parametrize(
    "module, twin",
    [
        (SampleGenerator((8, 8, 3), 2), dict(start=8, doublings=0, images=True)),
        (SampleGenerator((20, 20, 3), 2), dict(start=5, doublings=2, images=True)),
        (TriggerGenerator(3, 3, 2), dict(start=3, doublings=0, images=False)),
        (TriggerGenerator(12, 3, 2), dict(start=6, doublings=1, images=False)),
    ],
)
def test_generators_give_what_pytorch_gives(module, twin):
    """Outputs on batch moments and on running ones, and the running moments after one batch."""
    noise = np.random.default_rng(1).normal(size=(5, 6))
    with jax.enable_x64(True):
        init = functools.partial(module.init, train=True)
        variables = scrambled(jax.eval_shape(init, jax.random.key(0), jnp.zeros((2, 6))))
        other = torch_dhbe.load(torch_dhbe.Generator(6, channels=3, width=2, **twin), variables)
        for train in (False, True):
            apply = jax.jit(functools.partial(module.apply, train=train, mutable=["batch_stats"]))
            made, updates = apply(variables, jnp.asarray(noise))
            with torch.no_grad():
                expected = other.train(train)(torch.tensor(noise)).permute(0, 2, 3, 1)
            np.testing.assert_allclose(made, expected.numpy(), rtol=1e-9, atol=1e-9)
        after = torch_dhbe.load(
            torch_dhbe.Generator(6, channels=3, width=2, **twin), {**variables, **updates}
        )
        for name, value in after.state_dict().items():
            if not name.endswith("tracked"):
                np.testing.assert_allclose(value, other.state_dict()[name], rtol=1e-9, err_msg=name)


def test_weights_start_as_in_pytorch():
    """Uniform within 1 / sqrt(fan in), kernels and biases alike."""
    init = functools.partial(SampleGenerator((16, 16, 3), 8).init, train=True)
    variables = jax.jit(init)(jax.random.key(0), jnp.zeros((2, 64)))["params"]
    for layer, fan_in in (("linear", 64), ("conv1", 9 * 16), ("out", 9 * 8)):
        for leaf in jax.tree.leaves(variables["body"][layer]):
            assert float(abs(leaf).max()) <= fan_in**-0.5
        assert float(abs(variables["body"][layer]["kernel"]).max()) > 0.95 * fan_in**-0.5
