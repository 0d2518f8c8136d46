"""DHBE's two generators, from noise to whole images or to small additive triggers (Yan et al. 2023,
App. B.2)."""

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array, UserError
from jaxbd.models.generators import LEAK, TORCH_KERNEL, double, torch_bias
from jaxbd.models.norm import BatchNorm

SAMPLE_SIDES = range(4, 9)
TRIGGER_SIDES = range(3, 10)
"""Sides that the linear layer can make directly; larger images are doublings of these."""


def layout(side: int, native: range) -> tuple[int, int]:
    """(s, n) with side = s * 2^n, where s is in `native` and n is as small as possible (32 = 8 *
    2^2, 10 = 5 * 2).

    Raises: UserError when there is no such pair.
    """
    start, doublings = side, 0
    while start > native[-1] and start % 2 == 0:
        start, doublings = start // 2, doublings + 1
    if start not in native:
        sides = f"{native[0]}..{native[-1]} or a doubling of one of these"
        raise UserError(f"no generator makes images with a side of {side} pixels; use {sides}")
    return start, doublings


def to_pixels(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """images * std + mean on [B, H, W, C] with per-channel (or single) constants; the inverse of
    `norm.normalise`."""
    along_channels = lambda values: jnp.asarray(values, images.dtype).reshape(1, 1, 1, -1)
    return images * along_channels(std) + along_channels(mean)


class SampleGenerator(nn.Module):
    """Noise [N, n] -> images [N, H, W, C], with zero mean and unit variance over the batch in every
    channel, like a net's images after its input normalisation.

    The last layers are tanh, then BatchNorm without affine parameters. 2,329,091 parameters for
    32x32x3 with 256 noise values.

    Attributes:
      image_shape: (H, W, C), square; H is 4..8 or a doubling of one of these.
      width: channels of the last hidden layer (64 in the paper); earlier ones have twice as many.
    """

    image_shape: tuple[int, int, int]
    width: int = 64

    @nn.compact
    def __call__(self, noise: Array, *, train: bool) -> Array:
        height, width, channels = self.image_shape
        if height != width:
            raise UserError(f"the sample generator makes square images only, not {height}x{width}")
        x = _Body(*layout(height, SAMPLE_SIDES), channels, self.width, name="body")(
            noise, train=train
        )
        return BatchNorm(not train, affine=False, name="norm")(jnp.tanh(x))


class TriggerGenerator(nn.Module):
    """Noise [N, n] -> triggers [N, side, side, C] with values in (-1, 1), to be added to pixels.

    The last layers are BatchNorm without affine parameters, then tanh; the sample generator has
    them in the opposite order. 413,059 parameters for 5x5x3 with 256 noise values.

    Attributes:
      side: of the square trigger in pixels, 3..9 or a doubling of one of these.
      channels: C.
      width: as in `SampleGenerator`.
    """

    side: int
    channels: int
    width: int = 64

    @nn.compact
    def __call__(self, noise: Array, *, train: bool) -> Array:
        x = _Body(*layout(self.side, TRIGGER_SIDES), self.channels, self.width, name="body")(
            noise, train=train
        )
        return jnp.tanh(BatchNorm(not train, affine=False, name="norm")(x))


class _Body(nn.Module):
    """Linear to s x s, BatchNorm; n times [nearest x2, conv3x3, BatchNorm, LeakyReLU 0.2]; conv3x3
    to the channels.

    There is no activation function between the linear layer and the first convolution.
    """

    start: int
    doublings: int
    channels: int
    width: int

    @nn.compact
    def __call__(self, noise: Array, *, train: bool) -> Array:
        features = 2 * self.width if self.doublings else self.width
        dense = nn.Dense(
            self.start**2 * features,
            kernel_init=TORCH_KERNEL,
            bias_init=torch_bias(noise.shape[-1]),
            name="linear",
        )
        x = dense(noise).reshape(-1, self.start, self.start, features)
        x = BatchNorm(not train, name="norm0")(x)
        for number in range(1, self.doublings + 1):
            features = self.width if number == self.doublings else 2 * self.width
            x = _conv(double(x), features, f"conv{number}")
            x = nn.leaky_relu(BatchNorm(not train, name=f"norm{number}")(x), LEAK)
        return _conv(x, self.channels, "out")


def _conv(x: Array, features: int, name: str) -> Array:
    """3x3 convolution with bias that keeps the side; call inside a compact method."""
    bias = torch_bias(9 * x.shape[-1])
    return nn.Conv(
        features, (3, 3), padding=1, kernel_init=TORCH_KERNEL, bias_init=bias, name=name
    )(x)
