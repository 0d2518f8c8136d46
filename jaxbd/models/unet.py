"""A small U-Net from an image to a perturbation of the same size (after Ronneberger et al.
2015)."""

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.generators import LEAK, double


class UNet(nn.Module):
    """Images [B, H, W, C] in [0, 1] -> perturbations [B, H, W, C] in [-1, 1], for images with sides
    of at least 4 pixels.

    Level i has `width * 2**i` channels. Down: 3x3 convolutions of stride 2. Up: nearest-neighbour
    upsampling, cropped to the size of the level above and concatenated with that level's
    activations. LeakyReLU(0.2) throughout, tanh at the end. There is no normalisation, so an
    image's perturbation depends on that image alone.
    """

    channels: int
    width: int = 16
    depth: int = 2

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = nn.leaky_relu(
            nn.Conv(self.width, (3, 3), padding=1, name="enter")(2 * images - 1), LEAK
        )
        levels = []
        for level in range(1, self.depth + 1):
            levels.append(x)
            x = nn.leaky_relu(
                nn.Conv(self.width * 2**level, (3, 3), 2, padding=1, name=f"down{level}")(x), LEAK
            )
        for level in reversed(range(self.depth)):
            beside = levels[level]
            x = jnp.concatenate(
                [double(x)[:, : beside.shape[1], : beside.shape[2]], beside], axis=-1
            )
            x = nn.leaky_relu(
                nn.Conv(self.width * 2**level, (3, 3), padding=1, name=f"up{level}")(x), LEAK
            )
        return jnp.tanh(nn.Conv(self.channels, (3, 3), padding=1, name="leave")(x))
