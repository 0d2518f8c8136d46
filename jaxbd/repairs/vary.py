"""Variants of a recovered trigger: moved, grown, stronger. A search only recovers a trigger near
the attacker's; a repair that trains on variants covers the neighbourhood."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbd.base import Array, Key
from jaxbd.caching import cached

Stamp = Callable[[Key, Any, Array], Array]
"""(key, trigger_params, images [B, H, W, C]) -> images"""
MOST_SHIFT = 2
"""Maximum shift of a variant in each direction, in pixels."""
MOST_GAIN = 2.0
"""Maximum factor on a variant's strength."""
CHANGED, GROWN = 0.5, 0.5
"""Share of images that carry a variant, and share of variants that are grown."""


@cached(64)
def vary(stamp: Stamp) -> Stamp:
    """`stamp`, but on about every second image as a variant. Cached: the same function for the same
    `stamp`.

    Works for any kind of trigger, since variants are made from the difference that the trigger
    makes to an image, see `change_variant`.
    """

    def stamp_variant(key: Key, params: Any, images: Array) -> Array:
        stamp_key, variant_key, choose_key = jax.random.split(key, 3)
        stamped = stamp(stamp_key, params, images)
        # Differs from paper: Qiao et al. 2019 unlearn the recovered trigger unchanged
        variant = jnp.clip(images + change_variant(variant_key, stamped - images), 0, 1)
        chosen = jax.random.bernoulli(choose_key, CHANGED, images.shape[:1])
        return jnp.where(chosen[:, None, None, None], variant, stamped)

    return stamp_variant


def change_variant(key: Key, change: Array) -> Array:
    """Variants of the differences `change` [B, H, W, C] that a trigger makes.

    Each is moved by up to `MOST_SHIFT` pixels; a share `GROWN` is added to a second copy with
    another shift; the result is multiplied by a factor from 1 to `MOST_GAIN`. After clipping, a
    strong variant is the trigger blended towards white or black.
    """
    first_key, second_key, grow_key, gain_key = jax.random.split(key, 4)
    count = change.shape[:1]
    grown = jax.random.bernoulli(grow_key, GROWN, count)
    second = jnp.where(grown[:, None, None, None], _move(second_key, change), 0)
    gain = jax.random.uniform(gain_key, count, minval=1.0, maxval=MOST_GAIN)
    return gain[:, None, None, None] * (_move(first_key, change) + second)


def _move(key: Key, change: Array) -> Array:
    """Moves each change [B, H, W, C] at random; values that leave at one edge re-enter at the
    opposite one."""
    shifts = jax.random.randint(key, (change.shape[0], 2), -MOST_SHIFT, MOST_SHIFT + 1)
    return jax.vmap(lambda one, by: jnp.roll(one, by, (0, 1)))(change, shifts)
