"""Operations on images [H, W, C]: paste, blend, crop, flip. Batches are handled by `jax.vmap` on these."""

import chex
import jax
import jax.numpy as jnp

from jaxbd.base import Array, Key


def to_float(images: Array) -> Array:
    """uint8 [..., H, W, C] in 0..255 -> float32 in [0, 1]; floats pass unchanged (torchvision's `ToTensor` scale)."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return images.astype(jnp.float32) / 255


def to_uint8_grid(images: Array) -> Array:
    """Rounds float images in [0, 1] to the nearest multiple of 1/255 after clipping, as storing them would."""
    return jnp.round(jnp.clip(images, 0, 1) * 255) / 255


def paste(image: Array, patch: Array, place: Array) -> Array:
    """Overwrites `image` [H, W, C] with `patch` [h, w, C], its top-left corner at `place` [2] int32 (row, column).

    The patch is kept inside the image: a place beyond the last one that fits is moved back to it. Pixels outside the
    patch are returned unchanged, bit for bit.
    """
    chex.assert_rank([image, patch, place], [3, 3, 1])
    return jax.lax.dynamic_update_slice(
        image, patch.astype(image.dtype), (place[0], place[1], jnp.zeros_like(place[0]))
    )


def add_patch(image: Array, patch: Array, place: Array) -> Array:
    """Adds `patch` [h, w, C] to `image` [H, W, C] at `place` [2] (row, column) and clips to [0, 1]."""
    canvas = paste(jnp.zeros_like(image), patch, place)
    return jnp.clip(image + canvas, 0, 1)


def blend(image: Array, pattern: Array, mask: Array) -> Array:
    """(1 - mask) * image + mask * pattern; image and pattern [H, W, C], mask [H, W, 1] or [H, W, C] in [0, 1]."""
    return (1 - mask) * image + mask * pattern


def random_places(key: Key, count: int, image_shape: tuple[int, int, int], patch_hw: tuple[int, int]) -> Array:
    """`count` places [count, 2] int32 (row, column), uniform over all places where the patch fits."""
    limits = jnp.array([image_shape[0] - patch_hw[0] + 1, image_shape[1] - patch_hw[1] + 1])
    return jax.random.randint(key, (count, 2), 0, jnp.broadcast_to(limits, (count, 2)))


def random_crop(key: Key, image: Array, padding: int) -> Array:
    """Zero-pads `image` [H, W, C] by `padding` on every side and crops [H, W, C] at a uniform place."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (row, column, jnp.zeros_like(row)), image.shape)


def random_flip(key: Key, image: Array) -> Array:
    """Mirrors `image` [H, W, C] left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def augment(key: Key, images: Array, *, crop_padding: int = 0, flip: bool = False) -> Array:
    """Random crop (when `crop_padding` > 0) and flip of each image of `images` [B, H, W, C] on its own."""
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        keys = jax.random.split(crop_key, images.shape[0])
        images = jax.vmap(random_crop, (0, 0, None))(keys, images, crop_padding)
    if flip:
        images = jax.vmap(random_flip)(jax.random.split(flip_key, images.shape[0]), images)
    return images
