"""MobileNet v1 (Howard et al. 2017) for CIFAR-sized images: depthwise separable convolutions."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.generators import TORCH_KERNEL
from jaxbd.models.norm import BatchNorm
from jaxbd.models.resnet import head

BLOCKS = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *((16, 1),) * 5, (32, 2), (32, 1))
"""Channels in units of the stem's width, and stride, of the 13 blocks."""


class MobileNet(nn.Module):
    """Images [B, H, W, C], already normalised -> logits [B, classes]; stem of stride 1.

    `width` is the number of channels of the stem; the last block has 32 times as many. As in
    kuangliu/pytorch-cifar.
    # Differs from paper: the net for ImageNet has a stem of stride 2.
    """

    classes: int
    width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = nn.Conv(
            self.width,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=TORCH_KERNEL,
            dtype=self.dtype,
            name="conv1",
        )(x)
        x = nn.relu(BatchNorm(not train, dtype=self.dtype, name="bn1")(x))
        for index, (multiple, stride) in enumerate(BLOCKS):
            block = SeparableBlock(
                self.width * multiple, stride, self.dtype, name=f"layers_{index}"
            )
            x = block(x, train=train)
        return head(x, self.classes, self.dtype)


class SeparableBlock(nn.Module):
    """[B, H, W, C] -> [B, H/stride, W/stride, features]: a depthwise 3x3 convolution, then a 1x1
    convolution across channels."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv = functools.partial(
            nn.Conv, use_bias=False, kernel_init=TORCH_KERNEL, dtype=self.dtype
        )
        norm = functools.partial(BatchNorm, not train, dtype=self.dtype)
        channels = x.shape[-1]
        x = conv(
            channels, (3, 3), self.stride, padding=1, feature_group_count=channels, name="conv1"
        )(x)
        x = nn.relu(norm(name="bn1")(x))
        x = conv(self.features, (1, 1), padding=0, name="conv2")(x)
        return nn.relu(norm(name="bn2")(x))
