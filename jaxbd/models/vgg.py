"""A small VGG for CIFAR-sized images: pairs of [3x3 convolution, BatchNorm, ELU or ReLU],
max-pooling, linear."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbd.base import Array, UserError
from jaxbd.models.generators import TORCH_KERNEL, torch_bias
from jaxbd.models.norm import BatchNorm, Correction

STAGES = 3


class VGG(nn.Module):
    """Images [B, H, W, C], already normalised -> logits [B, classes].

    Stage i (from 0) is two convolutions with bias of `width * 2**i` channels and a 2x2 max-pooling.
    The linear layer reads the activations flattened channel first, as in PyTorch, so the net knows
    where a feature is. Dropout, with which the published nets are trained, is left out. The
    activation is "elu" or "relu".

    Raises: UserError for images with a side below 8 pixels, which pooling would reduce to nothing,
      and for another activation.
    """

    classes: int
    width: int = 32
    activation: str = "elu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if min(x.shape[1:3]) < 2**STAGES:
            raise UserError(
                f"the small VGG needs images of at least 8x8 pixels, not {x.shape[1]}x{x.shape[2]}"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"the small VGG has activation {' or '.join(ACTIVATIONS)}, not {self.activation!r}"
            )
        activate = ACTIVATIONS[self.activation]
        for stage in range(STAGES):
            for index in range(2):
                x = nn.Conv(
                    self.width * 2**stage,
                    (3, 3),
                    padding=1,
                    kernel_init=TORCH_KERNEL,
                    bias_init=torch_bias(9 * x.shape[-1]),
                    dtype=self.dtype,
                    name=f"conv{stage}_{index}",
                )(x)
                x = activate(BatchNorm(not train, dtype=self.dtype, name=f"bn{stage}_{index}")(x))
            x = halve(x)
        x = Correction(name="features")(x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))
        bias_init = torch_bias(x.shape[-1])
        return nn.Dense(
            self.classes,
            kernel_init=TORCH_KERNEL,
            bias_init=bias_init,
            dtype=self.dtype,
            name="head",
        )(x)


@jax.custom_jvp
def elu(x: Array) -> Array:
    """x where x > 0, exp(x) - 1 elsewhere. The derivative is computed from the result, which saves
    a second exponential."""
    return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))


@elu.defjvp
def _elu_jvp(primals, tangents):
    y = elu(primals[0])
    return y, tangents[0] * jnp.where(y > 0, 1, y + 1)


ACTIVATIONS = {"elu": elu, "relu": nn.relu}


def halve(x: Array) -> Array:
    """2x2 max-pooling [B, H, W, C] -> [B, H/2, W/2, C]; drops an odd last row or column, as PyTorch
    does.

    Uses two selections, because on CPUs their gradient is cheaper than that of a pooling window. A
    `max` would be wrong: its gradient looks for entries equal to the maximum, but a recomputed
    operand need not equal it bit for bit.
    """
    rows, columns = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = _take_larger(x[:, 0:rows:2], x[:, 1:rows:2])
    return _take_larger(x[:, :, 0:columns:2], x[:, :, 1:columns:2])


def _take_larger(a: Array, b: Array) -> Array:
    """The larger of each pair; the gradient goes to exactly one of them, in a tie to the first."""
    return jnp.where(b > a, b, a)
