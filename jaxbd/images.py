"""Operations on images [H, W, C]: paste, add, blend, warp, crop, flip. Use `jax.vmap` for
batches."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, ArrayTree, Key


def image_shape_of(images: Array | np.ndarray) -> tuple[int, int, int]:
    """(H, W, C) of `images` [B, H, W, C]."""
    _, height, width, channels = images.shape
    return height, width, channels


def to_float(images: Array) -> Array:
    """Converts uint8 [..., H, W, C] in 0..255 to float32 in [0, 1], the scale of torchvision's
    `ToTensor`; floats pass unchanged."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return images.astype(jnp.float32) / 255


def spread_rows(batch: ArrayTree) -> ArrayTree:
    """Shards the rows of `batch`, leaves [B, …], over the "data" axis of the program's mesh.

    For arrays that a compiled step draws or makes itself, which no caller can place. Never changes
    values. Does nothing without such a mesh, or if the axis does not divide B.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape.get("data", 1)
    if ways == 1 or jax.tree.leaves(batch)[0].shape[0] % ways:
        return batch
    return jax.lax.with_sharding_constraint(batch, jax.sharding.PartitionSpec("data"))


def to_uint8_grid(images: Array) -> Array:
    """Clips float images to [0, 1] and rounds them to multiples of 1/255, like an 8-bit file."""
    return jnp.round(jnp.clip(images, 0, 1) * 255) / 255


def paste(image: Array, patch: Array, place: Array) -> Array:
    """Overwrites `image` [H, W, C] with `patch` [h, w, C], its top-left corner at `place` [2] int32
    (row, column).

    A place where the patch does not fit is moved back to the last one where it does.
    Pixels outside the patch are returned unchanged, bit for bit.
    """
    chex.assert_rank([image, patch, place], [3, 3, 1])
    return jax.lax.dynamic_update_slice(  # clamps the place to where the patch fits
        image, patch.astype(image.dtype), (place[0], place[1], jnp.zeros_like(place[0]))
    )


def add_on_grid(images: Array, pattern: Array) -> Array:
    """Adds `pattern` to `images` (shapes broadcast), clips to [0, 1] and rounds to multiples of
    1/255.

    The result is what a file with 8 bits per channel would hold. Values that are already such
    multiples (to 1e-5) and that the pattern does not change are returned unchanged, bit for bit.
    """
    stored = to_uint8_grid(images + pattern)
    return jnp.where(jnp.abs(stored - images) < 1e-5, images, stored)


def blend(image: Array, pattern: Array, mask: Array) -> Array:
    """(1 - mask) * image + mask * pattern; image and pattern [H, W, C], mask [H, W, 1] or [H, W, C]
    in [0, 1]."""
    return (1 - mask) * image + mask * pattern


def identity_grid(height: int, width: int) -> np.ndarray:
    """The grid [height, width, 2] float32 with which `warp` changes nothing; (x, y) in [-1, 1]."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    return np.stack([x, y], axis=-1).astype(np.float32)


def warp(image: Array, grid: Array) -> Array:
    """Samples `image` [H, W, C] bilinearly at the places `grid` [H, W, 2], each (x, y).

    The centres of the outermost pixels are at -1 and 1; zero outside (PyTorch's `grid_sample` with
    align_corners=True).
    """
    chex.assert_rank([image, grid], [3, 3])
    height, width = image.shape[:2]
    column, row = (grid[..., 0] + 1) / 2 * (width - 1), (grid[..., 1] + 1) / 2 * (height - 1)

    def corner(y: Array, x: Array) -> Array:
        """The pixel at (y, x), weighted by its proximity to the sampled place."""
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        weight = jnp.where(inside, (1 - jnp.abs(row - y)) * (1 - jnp.abs(column - x)), 0)
        pixel = image[
            jnp.clip(y, 0, height - 1).astype(jnp.int32),
            jnp.clip(x, 0, width - 1).astype(jnp.int32),
        ]
        return weight[..., None] * pixel

    top, left = jnp.floor(row), jnp.floor(column)
    corners = [corner(y, x) for y in (top, top + 1) for x in (left, left + 1)]
    return functools.reduce(operator.add, corners)


def upsample(field: Array, height: int, width: int) -> Array:
    """Upsamples `field` [h, w, C] to [height, width, C]; bicubic with aligned corners (Keys'
    kernel, a = -0.75, as PyTorch)."""
    chex.assert_rank(field, 3)
    rows, columns = (
        _cubic_weights(*sides) for sides in zip(field.shape[:2], (height, width), strict=True)
    )
    return jnp.einsum(
        "Hh,Ww,hwc->HWc", rows.astype(field.dtype), columns.astype(field.dtype), field
    )


def _cubic_weights(inner: int, outer: int, a: float = -0.75) -> np.ndarray:
    """Interpolation weights [outer, inner] of `inner` points for each of `outer` places; points
    beyond the ends are replaced by the end points."""
    place = np.arange(outer) * (inner - 1) / max(outer - 1, 1)
    weights = np.zeros((outer, inner))
    for offset in range(-1, 3):
        point = np.floor(place) + offset
        d = np.abs(place - point)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        value = np.where(d <= 1, near, np.where(d < 2, far, 0))
        np.add.at(weights, (np.arange(outer), np.clip(point, 0, inner - 1).astype(int)), value)
    return weights


def random_places(
    key: Key, count: int, image_shape: tuple[int, int, int], patch_hw: tuple[int, int]
) -> Array:
    """Draws places [count, 2] int32 (row, column), uniform over all places where the patch fits."""
    # Differs from released code: it leaves out the last row and column that fit
    limits = jnp.array([image_shape[0] - patch_hw[0] + 1, image_shape[1] - patch_hw[1] + 1])
    return jax.random.randint(key, (count, 2), 0, jnp.broadcast_to(limits, (count, 2)))


def edge_places(
    key: Key, count: int, image_shape: tuple[int, int, int], patch_hw: tuple[int, int]
) -> Array:
    """Draws places [count, 2] int32 (row, column): about a quarter in the corners, half elsewhere
    along the edges.

    Uniform over twice the range of places that fit, then clipped to it; so half of the rows and of
    the columns end at an edge.
    """
    room = jnp.array([image_shape[0] - patch_hw[0], image_shape[1] - patch_hw[1]])
    room = jnp.broadcast_to(room, (count, 2))
    return jnp.clip(
        jax.random.randint(key, (count, 2), -(room // 2), room + room // 2 + 1), 0, room
    )


def random_crop(key: Key, image: Array, padding: int) -> Array:
    """Zero-pads `image` [H, W, C] by `padding` on every side and crops [H, W, C] at a uniform
    place."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (row, column, jnp.zeros_like(row)), image.shape)


def random_flip(key: Key, image: Array) -> Array:
    """Mirrors `image` [H, W, C] left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def augment(key: Key, images: Array, *, crop_padding: int = 0, flip: bool = False) -> Array:
    """Crops (if `crop_padding` > 0) and flips each image of `images` [B, H, W, C] at random,
    independently."""
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        keys = jax.random.split(crop_key, images.shape[0])
        images = jax.vmap(random_crop, (0, 0, None))(keys, images, crop_padding)
    if flip:
        images = jax.vmap(random_flip)(jax.random.split(flip_key, images.shape[0]), images)
    return images
