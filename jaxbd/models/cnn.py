"""A small CNN for small images: three stages of [3x3 convolution, BatchNorm, ReLU], mean over
positions, linear."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.norm import BatchNorm, Correction


class CNN(nn.Module):
    """Images [B, H, W, C], already normalised -> logits [B, classes].

    Stage i has `width * 2**i` channels; every stage except the first halves the image. The mean
    over positions makes the net blind to where a feature is, so it can learn a trigger at random
    places from few images. Without `norm` the convolutions have a bias, and a `Correction` replaces
    BatchNorm.
    """

    classes: int
    width: int = 16
    stages: int = 3
    norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for stage in range(self.stages):
            stride = 1 if stage == 0 else 2
            conv = nn.Conv(
                self.width * 2**stage,
                (3, 3),
                stride,
                padding=1,
                use_bias=not self.norm,
                dtype=self.dtype,
                name=f"conv{stage}",
            )
            name = f"norm{stage}"
            norm = (
                BatchNorm(not train, dtype=self.dtype, name=name)
                if self.norm
                else Correction(name=name)
            )
            x = nn.relu(norm(conv(x)))
        x = Correction(name="features")(x.mean((1, 2)))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)
