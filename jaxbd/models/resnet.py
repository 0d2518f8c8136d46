"""ResNet-18/34 (He et al. 2016a) and PreActResNet-18 (He et al. 2016b), any stem, any width."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array, UserError
from jaxbd.models.generators import TORCH_KERNEL, torch_bias
from jaxbd.models.norm import BatchNorm, Correction

RESNET18 = (2, 2, 2, 2)
RESNET34 = (3, 4, 6, 3)
"""Blocks in each of the four stages."""
STEMS = {"cifar": (3, 1, 1), "cifar-pool": (3, 1, 1), "imagenet": (7, 2, 3), "64px": (5, 2, 1)}
"""Stem -> side, stride and padding of the first convolution."""


class ResNet(nn.Module):
    """Images [B, H, W, C], already normalised -> logits [B, classes]; basic blocks, mean over
    positions, linear.

    Stage i (from 0) has `width * 2**i` channels; every stage except the first halves the image.

    Attributes:
      blocks: blocks in each stage, `RESNET18` or `RESNET34`.
      width: channels of the first stage.
      stem: "cifar": 3x3 convolution, stride 1; "cifar-pool": the same, then 3x3 max-pooling, stride
        2; "imagenet": 7x7, stride 2, then 3x3 max-pooling, stride 2; "64px": 5x5, stride 2, padding
        1, for images of 64 pixels (the release of Yan et al. 2023).
    """

    classes: int
    blocks: tuple[int, ...] = RESNET18
    width: int = 64
    stem: Literal["cifar", "cifar-pool", "imagenet", "64px"] = "cifar"
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.stem not in STEMS:
            raise UserError(f"stem {self.stem!r} is not known; use {', '.join(STEMS)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv = functools.partial(
            nn.Conv,
            self.width,
            use_bias=False,
            kernel_init=TORCH_KERNEL,
            dtype=self.dtype,
            name="conv1",
        )
        side, stride, padding = STEMS[self.stem]
        x = conv((side, side), stride, padding=padding)(x)
        x = nn.relu(BatchNorm(not train, dtype=self.dtype, name="bn1")(x))
        if self.stem in ("cifar-pool", "imagenet"):
            pads = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), (2, 2), pads)  # pyright: ignore[reportArgumentType]
        x = stages(BasicBlock, x, self.blocks, self.width, self.dtype, train)
        return head(x, self.classes, self.dtype)


class BasicBlock(nn.Module):
    """[B, H, W, C] -> [B, H/stride, W/stride, features]; the shortcut is a 1x1 projection with
    BatchNorm if the shape changes."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv = functools.partial(
            nn.Conv, self.features, use_bias=False, kernel_init=TORCH_KERNEL, dtype=self.dtype
        )
        norm = functools.partial(BatchNorm, not train, dtype=self.dtype)
        y = nn.relu(norm(name="bn1")(conv((3, 3), self.stride, padding=1, name="conv1")(x)))
        y = norm(name="bn2")(conv((3, 3), padding=1, name="conv2")(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv((1, 1), self.stride, padding=0, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class PreActResNet(nn.Module):
    """Images [B, H, W, C], already normalised -> logits [B, classes]; pre-activation blocks, CIFAR
    stem.

    As in the widely used kuangliu/pytorch-cifar net: no BatchNorm after the stem, before the mean
    over positions, or on the shortcut. A convolutional shortcut starts from the pre-activated
    input.
    # Differs from paper: He et al. 2016b end the last block with BatchNorm and ReLU.
    """

    classes: int
    blocks: tuple[int, ...] = RESNET18
    width: int = 64
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
        x = stages(PreActBlock, x, self.blocks, self.width, self.dtype, train)
        return head(x, self.classes, self.dtype)


class PreActBlock(nn.Module):
    """[B, H, W, C] -> [B, H/stride, W/stride, features]; BatchNorm and ReLU before each
    convolution."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv = functools.partial(
            nn.Conv, self.features, use_bias=False, kernel_init=TORCH_KERNEL, dtype=self.dtype
        )
        norm = functools.partial(BatchNorm, not train, dtype=self.dtype)
        y = nn.relu(norm(name="bn1")(x))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv((1, 1), self.stride, padding=0, name="shortcut_conv")(y)
        y = conv((3, 3), self.stride, padding=1, name="conv1")(y)
        y = nn.relu(norm(name="bn2")(y))
        return x + conv((3, 3), padding=1, name="conv2")(y)


def stages(
    block: Any, x: Array, blocks: tuple[int, ...], width: int, dtype: Any, train: bool
) -> Array:
    """Applies stages of `blocks[i]` blocks with `width * 2**i` channels, named "layer<i+1>_<j>";
    each stage except the first halves the image.

    Call it inside a compact method.
    """
    for stage, count in enumerate(blocks):
        for index in range(count):
            stride = 2 if stage and not index else 1
            x = block(width * 2**stage, stride, dtype, name=f"layer{stage + 1}_{index}")(
                x, train=train
            )
    return x


def head(x: Array, classes: int, dtype: Any) -> Array:
    """Mean over positions of [B, H, W, C], then a linear layer named "head" -> logits [B, classes].

    Call it inside a compact method. The layer has PyTorch's default initialisation.
    """
    x = Correction(name="features")(x.mean((1, 2)))
    bias_init = torch_bias(x.shape[-1])
    return nn.Dense(
        classes, kernel_init=TORCH_KERNEL, bias_init=bias_init, dtype=dtype, name="head"
    )(x)
