"""WideResNet WRN-d-k (Zagoruyko and Komodakis 2016), without dropout."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array, UserError
from jaxbd.models.norm import BatchNorm
from jaxbd.models.resnet import head

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, 2 / fan_out), the usual initialisation of WideResNets."""


class WideResNet(nn.Module):
    """Images [B, H, W, C], already normalised -> logits [B, classes]; three groups of
    pre-activation blocks.

    Group i (from 0) has `width * factor * 2**i` channels; every group except the first halves the
    image.

    Attributes:
      depth: d = 6 n + 4 for n blocks in each group.
      factor: k, the widening factor.
      width: channels of the stem.
    """

    classes: int
    depth: int = 16
    factor: int = 1
    width: int = 16
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.depth < 10 or self.depth % 6 != 4:
            raise UserError(
                f"WideResNet depth {self.depth} is not 6 n + 4; use for example 16, 28 or 40"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = nn.Conv(
            self.width,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=HE_FAN_OUT,
            dtype=self.dtype,
            name="conv1",
        )(x)
        for group in range(3):
            for index in range((self.depth - 4) // 6):
                stride = 2 if group and not index else 1
                features = self.width * self.factor * 2**group
                block = WideBlock(features, stride, self.dtype, name=f"block{group + 1}_{index}")
                x = block(x, train=train)
        x = nn.relu(BatchNorm(not train, dtype=self.dtype, name="bn1")(x))
        return head(x, self.classes, self.dtype)


class WideBlock(nn.Module):
    """[B, H, W, C] -> [B, H/stride, W/stride, features].

    A convolutional shortcut starts from the pre-activated input. It exists only if the number of
    channels changes, which happens in every group after the first.
    """

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv = functools.partial(
            nn.Conv, self.features, use_bias=False, kernel_init=HE_FAN_OUT, dtype=self.dtype
        )
        norm = functools.partial(BatchNorm, not train, dtype=self.dtype)
        y = nn.relu(norm(name="bn1")(x))
        if x.shape[-1] != self.features:
            x = conv((1, 1), self.stride, padding=0, name="shortcut_conv")(y)
        y = conv((3, 3), self.stride, padding=1, name="conv1")(y)
        y = nn.relu(norm(name="bn2")(y))
        return x + conv((3, 3), padding=1, name="conv2")(y)
