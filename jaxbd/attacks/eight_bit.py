"""Stamps that are exact on images stored in 8 bits: blending in a picture, and replacing low
bits."""

import jax.numpy as jnp

from jaxbd import images as image_ops
from jaxbd.base import Array


def blend(images: Array, pattern: Array, mask: Array) -> Array:
    """(1 - mask) images + mask pattern, rounded to multiples of 1/255 as in 8-bit storage.

    Shapes must broadcast; all values are in [0, 1]. Where the mask is 0, 8-bit images are
    unchanged, bit for bit.
    """
    return _keep_equal(images, image_ops.to_uint8_grid(image_ops.blend(images, pattern, mask)))


def replace_bits(images: Array, pattern: Array, mask: Array) -> Array:
    """`images` as 8-bit numbers, with the bits that are set in `mask` replaced by those of
    `pattern`.

    Shapes must broadcast. Images are in [0, 1], pattern and mask in steps of 1/255: a mask of 3/255
    selects the two lowest bits. 8-bit images are unchanged, bit for bit, where these bits already
    equal the pattern's.
    """
    old, new, which = (
        jnp.round(jnp.clip(part, 0, 1) * 255).astype(jnp.int32) for part in (images, pattern, mask)
    )
    return _keep_equal(images, ((old & ~which) | (new & which)).astype(images.dtype) / 255)


def _keep_equal(images: Array, changed: Array) -> Array:
    """`changed`, but exactly `images` where both are the same multiple of 1/255, so that rounding
    errors change no float."""
    return jnp.where(jnp.abs(changed - images) < 1e-5, images, changed)
