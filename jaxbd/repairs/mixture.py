"""Combines several triggers of one backdoor into one piece of evidence (Qiao et al. 2019, section
3.1).

`mix(stamp)` stamps a `Mixture` of models of one kind. `join` combines triggers of different kinds,
for example a patch and a perturbation. Either way every image carries one trigger.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbd.base import Array, ArrayTree, Evidence, Key
from jaxbd.caching import cached

Stamp = Callable[[Key, Any, Array], Array]
"""(key, trigger_params, images [B, H, W, C]) -> images"""


class Mixture(NamedTuple):
    """Trigger models with weights: `Evidence.trigger_params` for the stamp `mix(stamp)`.

    Attributes:
      models: parameters of the L models, stacked on a leading axis [L]: states of an inversion, or
        triggers of an attack.
      weights: [L] mixture weights gamma, summing to 1.
    """

    models: ArrayTree
    weights: Array


def single(model: ArrayTree) -> Mixture:
    """A mixture of one model: a sub-model, a point trigger, or the true trigger for the ideal
    repair."""
    return Mixture(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], model), jnp.ones((1,)))


def uniform(models: ArrayTree) -> Mixture:
    """gamma_i = 1/N over models stacked on a leading axis [N] (Qiao et al. 2019, section 3.3)."""
    count = jax.tree.leaves(models)[0].shape[0]
    return Mixture(models, jnp.full((count,), 1 / count))


def entropy_weighted(models: ArrayTree, entropy: Array, slope: Array) -> Mixture:
    """gamma_i proportional to exp(h_i) / g'(g^-1(beta_i)) (Qiao et al. 2019, Algorithm 1).

    Args:
      models: stacked [N].
      entropy: h_i [N] in nats, from the entropy bound.
      slope: g'(g^-1(beta_i)) [N] > 0, slope of the map from density to ASR at each level; ones for
        a linear g.
    """
    # softmax of logarithms, since exp(h) can overflow
    logits = entropy - jnp.log(slope)
    return Mixture(models, jax.nn.softmax(logits))


def only(mixture: Mixture, index: Array) -> Mixture:
    """The mixture with all weight on model number `index` [] int32."""
    numbers = jnp.arange(mixture.weights.shape[0])
    return mixture._replace(weights=(numbers == index).astype(mixture.weights.dtype))


@cached(64)
def mix(stamp: Stamp) -> Callable[[Key, Mixture, Array], Array]:
    """`stamp` for a mixture: each image's trigger comes from a model drawn by the weights, G_Y with
    Y ~ Categorical(gamma) (Qiao et al. 2019, section 3.1).

    Cached: returns the same function for the same `stamp`, so that compiled programs are shared.
    """

    def stamp_mixture(key: Key, mixture: Mixture, images: Array) -> Array:
        stamp_key, choose_key = jax.random.split(key)
        keys = jax.random.split(stamp_key, mixture.weights.shape[0])
        # stamps every image with every model, [L, B, H, W, C], to keep shapes static; L is small
        stamped = jax.vmap(stamp, (0, 0, None))(keys, mixture.models, images)
        choice = jax.random.categorical(
            choose_key, jnp.log(mixture.weights), shape=images.shape[:1]
        )
        return stamped[choice, jnp.arange(images.shape[0])]

    return stamp_mixture


def join(evidence: Sequence[Evidence]) -> Evidence:
    """Joins several pieces of evidence of one target: each image gets one of the triggers, drawn
    uniformly. Target and sources are those of the first."""
    first = evidence[0]
    if len(evidence) == 1:
        return first
    return first._replace(
        stamp=_either(tuple(each.stamp for each in evidence)),
        trigger_params=tuple(each.trigger_params for each in evidence),
    )


def join_by_target(evidence: Sequence[Evidence]) -> list[Evidence]:
    """One piece of evidence for each target, in the order of the targets' first pieces; see
    `join`."""
    targets = dict.fromkeys(each.target for each in evidence)
    return [join([each for each in evidence if each.target == target]) for target in targets]


@cached(32)
def _either(stamps: tuple[Stamp, ...]) -> Callable[[Key, tuple[ArrayTree, ...], Array], Array]:
    """A stamp that puts one of several triggers on each image; it takes a tuple of their
    parameters."""

    def stamp(key: Key, params: tuple[ArrayTree, ...], images: Array) -> Array:
        choose_key, *keys = jax.random.split(key, 1 + len(stamps))
        stamped = jnp.stack(
            [
                one(own_key, own, images)
                for one, own_key, own in zip(stamps, keys, params, strict=True)
            ]
        )
        chosen = jax.random.randint(choose_key, images.shape[:1], 0, len(stamps))
        return stamped[chosen, jnp.arange(images.shape[0])]

    return stamp
