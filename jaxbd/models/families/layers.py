"""Layers of a net by their names in its PyTorch state_dict.

A family of architectures is one function `forward(net, x, form) -> logits`. It asks `net` for
layers by name; their shapes determine widths, kernel sizes and groups. One function therefore
serves every depth and width. Whatever the weights do not determine, for example strides and
pooling, is in `form`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array, UserError
from jaxbd.models.generators import TORCH_KERNEL, torch_bias
from jaxbd.models.norm import BatchNorm, Correction

Shape = tuple[int, ...]


class Mismatch(UserError):
    """The layers do not match the family. The message says what differs."""


class Layers:
    """The layers of one net. Used inside the compact method of a Flax module.

    Attributes:
      shapes: layer -> shape of its weight in PyTorch's order: [O, I / groups, h, w] for a
        convolution, [O, I] for a linear layer, [C] for BatchNorm.
      biased: layers with a bias; for BatchNorm, with scale and shift.
      used: names of layers that were applied or passed to `unused`.
    """

    def __init__(
        self, shapes: Mapping[str, Shape], biased: frozenset[str], dtype: Any, train: bool
    ):
        self.shapes, self.biased, self.dtype, self.train = shapes, biased, dtype, train
        self.used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether `name` is a layer or a module that contains layers."""
        return name in self.shapes or any(key.startswith(f"{name}.") for key in self.shapes)

    def first(self, *names: str) -> str | None:
        """The first of `names` that is a layer."""
        return next((name for name in names if name in self.shapes), None)

    def children(self, name: str) -> list[str]:
        """The numbered modules directly in `name`, ordered by number."""
        return self.matching(rf"{re.escape(name)}\.\d+")

    def matching(self, pattern: str) -> list[str]:
        """Names of modules and layers that match `pattern` from the start up to a dot or the end,
        in natural order; only the matched part of each name."""
        found = {
            match[0] for key in self.shapes if (match := re.match(rf"(?:{pattern})(?=\.|$)", key))
        }
        return sorted(found, key=natural)

    def within(self, name: str) -> list[str]:
        """All layers of the module `name`, in natural order."""
        return sorted((k for k in self.shapes if k.startswith(f"{name}.")), key=natural)

    def size(self, name: str) -> Shape:
        """Shape of a layer's weight. Raises Mismatch when there is no such layer."""
        if name not in self.shapes:
            raise Mismatch(f"{name} is missing")
        return self.shapes[name]

    def conv(
        self,
        name: str,
        x: Array,
        stride: int = 1,
        padding: int | Sequence[int] | None = None,
        grouped: bool = False,
    ) -> Array:
        """Applies a convolution; the default padding keeps the image's size at stride 1. It may
        have groups (a depthwise one has as many as channels) only if `grouped`."""
        shape = self.size(name)
        if len(shape) != 4 or x.shape[-1] % shape[1] or min(x.shape) < 1:
            raise Mismatch(f"{name} does not take {x.shape[-1]} channels")
        # PyTorch stores I / groups, so the input tells the number of groups. A convolution in the
        # wrong place could fit in this way too, so only those that have groups in the family may
        groups = x.shape[-1] // shape[1]
        if groups > 1 and not grouped:
            raise Mismatch(f"{name} does not take {x.shape[-1]} channels")
        if shape[0] % groups:
            raise Mismatch(f"{name} does not divide its channels into {groups} groups")
        sides = shape[2:]
        padding = [side // 2 for side in sides] if padding is None else padding
        padding = [padding, padding] if isinstance(padding, int) else list(padding)
        if any(
            size + 2 * more < side
            for size, more, side in zip(x.shape[1:3], padding, sides, strict=True)
        ):
            raise Mismatch(f"{name} is larger than the image that reaches it")
        self.used.add(name)
        return nn.Conv(
            shape[0],
            sides,
            stride,
            padding=[(more, more) for more in padding],
            feature_group_count=groups,
            use_bias=name in self.biased,
            kernel_init=TORCH_KERNEL,
            bias_init=torch_bias(shape[1] * sides[0] * sides[1]),
            dtype=self.dtype,
            name=name,
        )(x)

    def norm(self, name: str, x: Array) -> Array:
        """Applies BatchNorm."""
        if self.size(name) != (x.shape[-1],):
            raise Mismatch(f"{name} does not take {x.shape[-1]} channels")
        self.used.add(name)
        affine = name in self.biased
        return BatchNorm(not self.train, dtype=self.dtype, affine=affine, name=name)(x)

    def linear(self, name: str, x: Array) -> Array:
        """Applies a linear layer to [B, I]."""
        shape = self.size(name)
        if len(shape) != 2 or x.ndim != 2 or x.shape[-1] != shape[1]:
            raise Mismatch(f"{name} does not take {x.shape[-1]} numbers")
        self.used.add(name)
        return nn.Dense(
            shape[0],
            use_bias=name in self.biased,
            kernel_init=TORCH_KERNEL,
            bias_init=torch_bias(shape[1]),
            dtype=self.dtype,
            name=name,
        )(x)

    def unused(self, name: str) -> None:
        """Declares a layer that the net has but never applies, so that its arrays exist."""
        shape = self.size(name)
        # applying the layer once makes Flax create its arrays
        blank = jnp.zeros((1, 1, 1, shape[0] if len(shape) == 1 else shape[1]), jnp.float32)
        self.norm(name, blank) if len(shape) == 1 else self.conv(name, blank)

    def unit(
        self, conv: str, norm: str | None, x: Array, stride: int = 1, grouped: bool = False
    ) -> Array:
        """Applies a convolution, then BatchNorm unless `norm` is None."""
        x = self.conv(conv, x, stride, grouped=grouped)
        return x if norm is None else self.norm(norm, x)

    def pool(self, x: Array) -> Array:
        """Mean over positions, [B, H, W, C] -> [B, C], with a `Correction` for defences."""
        return Correction(name="features")(x.mean((1, 2)))

    def head(self, x: Array) -> Array:
        """Mean over positions, then the only unused linear layer, under any name."""
        x = self.pool(x)
        linear = [name for name, shape in self.shapes.items() if len(shape) == 2]
        left = [name for name in linear if name not in self.used]
        if len(left) != 1:
            raise Mismatch(f"it has {len(left)} linear layers where one is expected")
        return self.linear(left[0], x)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that orders numbers by value: "conv2" before "conv10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def max_pool(x: Array, side: int, stride: int, padding: int = 0, ceil: bool = False) -> Array:
    """PyTorch's max-pooling of [B, H, W, C]."""
    pads = [
        (padding, padding + (_ceil_rest(size + 2 * padding, side, stride) if ceil else 0))
        for size in x.shape[1:3]
    ]
    if min(x.shape[1:3]) + 2 * padding < side:
        raise Mismatch("the image is too small for its pooling")
    return nn.max_pool(x, (side, side), (stride, stride), pads)  # pyright: ignore[reportArgumentType]


def _ceil_rest(size: int, side: int, stride: int) -> int:
    return -(size - side) % stride


def avg_pool(x: Array, side: int, stride: int, padding: int = 0) -> Array:
    """PyTorch's average-pooling; the mean includes the padding."""
    if min(x.shape[1:3]) + 2 * padding < side:
        raise Mismatch("the image is too small for its pooling")
    pads = [(padding, padding)] * 2
    return nn.avg_pool(x, (side, side), (stride, stride), pads)  # pyright: ignore[reportArgumentType]


def adaptive_avg_pool(x: Array, side: int) -> Array:
    """PyTorch's AdaptiveAvgPool2d: [B, H, W, C] -> [B, side, side, C]."""
    for axis in (1, 2):
        size = x.shape[axis]
        if size == side:
            continue
        parts = [
            jnp.take(x, jnp.arange(i * size // side, -(-(i + 1) * size // side)), axis).mean(
                axis, keepdims=True
            )
            for i in range(side)
        ]
        x = jnp.concatenate(parts, axis)
    return x


def squeeze(net: Layers, names: tuple[str, str], x: Array, activation: Any) -> Array:
    """Squeeze-and-excitation (Hu et al. 2018) with two linear layers or two 1x1 convolutions."""
    y = x.mean((1, 2), keepdims=True)
    if len(net.size(names[0])) == 2:
        y = y[:, 0, 0]
        y = net.linear(names[1], activation(net.linear(names[0], y)))[:, None, None]
    else:
        y = net.conv(names[1], activation(net.conv(names[0], y)))
    return x * nn.sigmoid(y)


def shuffle(x: Array, groups: int) -> Array:
    """Channel shuffle (Zhang et al. 2018)."""
    *places, channels = x.shape
    x = x.reshape(*places, groups, channels // groups)
    return jnp.swapaxes(x, -1, -2).reshape(*places, channels)
