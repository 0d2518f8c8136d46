"""Trigger generators, from noise to a trigger with values in [0, 1]."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.norm import BatchNorm

LEAK = 0.2


class ReleasedGenerator(nn.Module):
    """The fully connected generator of the released MESA code.

    The noise [N, noise] is split into four chunks. The first enters layer 1; each later layer takes
    its own chunk in addition to the hidden activations. BatchNorm and LeakyReLU(0.2) follow layers
    1-3, and a sigmoid the last one.
    # Differs from paper: 4 layers with re-injected noise; Qiao et al. 2019, section 4.1, state
    three layers.
    """

    trigger_shape: tuple[int, int, int]
    hidden: int = 512

    @nn.compact
    def __call__(self, noise: Array, *, train: bool) -> Array:
        chunks = jnp.split(noise, 4, axis=-1)
        x = chunks[0]
        for layer in range(3):
            if layer:
                x = jnp.concatenate([x, chunks[layer]], axis=-1)
            x = nn.Dense(self.hidden, kernel_init=TORCH_KERNEL, bias_init=torch_bias(x.shape[-1]))(
                x
            )
            x = nn.leaky_relu(BatchNorm(not train)(x), LEAK)
        x = jnp.concatenate([x, chunks[3]], axis=-1)
        x = nn.Dense(
            math.prod(self.trigger_shape),
            kernel_init=TORCH_KERNEL,
            bias_init=torch_bias(x.shape[-1]),
        )(x)
        return nn.sigmoid(x).reshape(-1, *self.trigger_shape)


class PaperGenerator(nn.Module):
    """The generator in the paper's text: three fully connected layers (Qiao et al. 2019, section
    4.1)."""

    trigger_shape: tuple[int, int, int]
    hidden: int = 512

    @nn.compact
    def __call__(self, noise: Array, *, train: bool) -> Array:
        x = noise
        for _ in range(2):
            x = nn.leaky_relu(BatchNorm(not train)(nn.Dense(self.hidden)(x)), LEAK)
        x = nn.Dense(math.prod(self.trigger_shape))(x)
        return nn.sigmoid(x).reshape(-1, *self.trigger_shape)


class ConvGenerator(nn.Module):
    """Generator for large triggers: a linear layer to s x s, then [nearest x2, residual 3x3 block]
    up to the trigger's side.

    The side must be s times a power of two, with s 2 or 3 (16 = 2 * 2^3, the released 16x16
    generator; 24 = 3 * 2^3).
    """

    trigger_shape: tuple[int, int, int]
    hidden: int = 128

    @nn.compact
    def __call__(self, noise: Array, *, train: bool) -> Array:
        side = self.trigger_shape[0]
        # leaves a start of 2 or 3
        doublings = side.bit_length() - 2
        start = side >> doublings
        x = nn.Dense(start * start * self.hidden)(noise).reshape(-1, start, start, self.hidden)
        for _ in range(doublings):
            x = _UpBlock(self.hidden)(x, train=train)
        x = nn.relu(BatchNorm(not train)(x))
        return nn.sigmoid(nn.Conv(self.trigger_shape[2], (3, 3), padding=1)(x))


class _UpBlock(nn.Module):
    """Pre-activation residual block [B, s, s, F] -> [B, 2s, 2s, F] with nearest-neighbour
    upsampling on both paths."""

    features: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = double(nn.relu(BatchNorm(not train)(x)))
        y = nn.Conv(self.features, (3, 3), padding=1)(y)
        y = nn.relu(BatchNorm(not train)(y))
        y = nn.Conv(self.features, (3, 3), padding=1)(y)
        return y + nn.Conv(self.features, (1, 1))(double(x))


def double(x: Array) -> Array:
    """Nearest-neighbour upsampling [..., s, s, F] -> [..., 2s, 2s, F]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)


TORCH_KERNEL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear and convolution weights."""


def torch_bias(fan_in: int):
    """PyTorch's default bias initialiser, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for a layer with
    `fan_in` inputs."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
