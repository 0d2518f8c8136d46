"""Stamps that are exact on images stored in 8 bits: a picture blended in, and low bits replaced."""

import jax.numpy as jnp

from jaxbd import images as image_ops
from jaxbd.base import Array


def blend(images: Array, pattern: Array, mask: Array) -> Array:
    """(1 - mask) images + mask pattern, rounded to multiples of 1/255, as storing the result would.

    Shapes that broadcast, all in [0, 1]. Where the mask is 0, images of 8 bits are unchanged, bit
    for bit.
    """
    return _keep_equal(images, image_ops.to_uint8_grid(image_ops.blend(images, pattern, mask)))


def replace_bits(images: Array, pattern: Array, mask: Array) -> Array:
    """`images` as 8-bit numbers, with those bits that `mask` has set taken from `pattern`.

    Shapes that broadcast; images in [0, 1], pattern and mask in steps of 1/255: a mask of 3/255 is
    the two lowest bits. Images of 8 bits are unchanged, bit for bit, where those bits are the
    pattern's already.
    """
    old, new, which = (
        jnp.round(jnp.clip(part, 0, 1) * 255).astype(jnp.int32) for part in (images, pattern, mask)
    )
    return _keep_equal(images, ((old & ~which) | (new & which)).astype(images.dtype) / 255)


def _keep_equal(images: Array, changed: Array) -> Array:
    """`changed`, but the very bits of `images` where both are the same multiple of 1/255."""
    return jnp.where(jnp.abs(changed - images) < 1e-5, images, changed)
