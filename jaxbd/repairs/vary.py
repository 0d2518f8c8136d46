"""Variants of a recovered trigger: moved, grown, stronger. What a search recovers is not the
attacker's trigger, only near it; a repair that learns from variants covers the neighbourhood."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbd.base import Array, Key
from jaxbd.caching import cached

Stamp = Callable[[Key, Any, Array], Array]
"""(key, trigger_params, images [B, H, W, C]) -> images"""
MOST_SHIFT = 2
"""Pixels that a variant moves by, at most, in each direction."""
MOST_GAIN = 2.0
"""How many times stronger a variant is, at most."""
CHANGED, GROWN = 0.5, 0.5
"""Share of images that bear a variant, and share of the variants that are grown."""


@cached(64)
def vary(stamp: Stamp) -> Stamp:
    """`stamp`, on every second image as a variant; the same function for the same `stamp`.

    Any kind of trigger has variants, since they are made of the difference that it makes to an
    image, see `change_variant`.
    """

    def stamp_variant(key: Key, params: Any, images: Array) -> Array:
        stamp_key, variant_key, choose_key = jax.random.split(key, 3)
        stamped = stamp(stamp_key, params, images)
        # Differs from paper: Qiao et al. 2019 unlearn what was recovered as it is
        variant = jnp.clip(images + change_variant(variant_key, stamped - images), 0, 1)
        chosen = jax.random.bernoulli(choose_key, CHANGED, images.shape[:1])
        return jnp.where(chosen[:, None, None, None], variant, stamped)

    return stamp_variant


def change_variant(key: Key, change: Array) -> Array:
    """The differences `change` [B, H, W, C] that a trigger makes, each as a variant: moved by up to
    `MOST_SHIFT` pixels, for a share `GROWN` added to a second copy moved otherwise, and multiplied
    by 1 to `MOST_GAIN`. Clipped to an image, a strong one is the trigger blended towards white or
    black."""
    first_key, second_key, grow_key, gain_key = jax.random.split(key, 4)
    count = change.shape[:1]
    grown = jax.random.bernoulli(grow_key, GROWN, count)
    second = jnp.where(grown[:, None, None, None], _move(second_key, change), 0)
    gain = jax.random.uniform(gain_key, count, minval=1.0, maxval=MOST_GAIN)
    return gain[:, None, None, None] * (_move(first_key, change) + second)


def _move(key: Key, change: Array) -> Array:
    """Each of [B, H, W, C] moved at random; what leaves at one edge comes back at the other."""
    shifts = jax.random.randint(key, (change.shape[0], 2), -MOST_SHIFT, MOST_SHIFT + 1)
    return jax.vmap(lambda one, by: jnp.roll(one, by, (0, 1)))(change, shifts)
