"""Converts the result of a scan to evidence, which repairs take."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Evidence, Key, UserError
from jaxbd.images import blend
from jaxbd.pipelines.scan import Scan
from jaxbd.repairs import mixture

AVERAGED = 20
"""Number of final steps over which a search's entropy bound is averaged."""
WORKS = 0.5
"""Minimum success rate for patches and perturbations to be included as triggers that work."""


class Mask(NamedTuple):
    """A trigger of Neural Cleanse: mask [H, W, 1] and pattern [H, W, C] in [0, 1]."""

    mask: Array
    pattern: Array


def stamp_mask(key: Key, trigger: Mask, images: Array) -> Array:
    """(1 - mask) * image + mask * pattern on every image of [B, H, W, C]; deterministic."""
    del key
    return blend(images, trigger.pattern[None], trigger.mask[None])


def states_of(scan: Scan, target: int) -> Any:
    """States [L, …] of the scan's cells with this `target`, in the configured order of levels.

    Raises: UserError when the scan did not search that class.
    """
    index = np.flatnonzero(np.asarray(scan.cells.target) == target)
    if not index.size:
        raise UserError(
            f"the scan did not model triggers for class {target}; search that class too"
        )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), scan.states)


def has_reached(scan: Scan, target: int) -> np.ndarray:
    """[L] bool: which sub-models of `target` reached their level; Algorithm 1 excludes the others
    (gamma_i = 0).

    If none did, the one with the highest rate counts as having reached it.
    """
    index = np.flatnonzero(np.asarray(scan.cells.target) == target)
    rates = scan.level_rates[target]
    good = rates >= np.asarray(scan.cells.level)[index]
    return good if good.any() else rates == rates.max()


def mix_equally(scan: Scan, target: int) -> Evidence:
    """Mixes the sub-models of `target` that reached their level with equal weights gamma_i = 1/N
    (Qiao et al. 2019, section 3.3)."""
    chosen = np.flatnonzero(has_reached(scan, target))
    models = jax.tree.map(lambda leaf: leaf[chosen], states_of(scan, target))
    return _evidence(scan, target, mixture.uniform(models))


def mix_by_entropy(scan: Scan, target: int) -> Evidence:
    """Mixes the same sub-models with gamma_i proportional to exp(h_i) / g'(g^-1(beta_i)), for a
    linear g (Algorithm 1).

    h_i is the bound on the entropy of sub-model i, averaged over its last `AVERAGED` steps.

    Raises: UserError for a scan method that models no distributions.
    """
    if not hasattr(scan.infos, "entropy"):
        raise UserError(
            "this scan method models no distributions, so there is no entropy to weight by; use"
            " mesa or auto"
        )
    chosen = np.flatnonzero(has_reached(scan, target))
    index = np.flatnonzero(np.asarray(scan.cells.target) == target)[chosen]
    courses = [
        course[np.isfinite(course)][-AVERAGED:]
        for course in np.asarray(scan.infos.entropy)[:, index].T
    ]
    entropy = jnp.asarray([course.mean() for course in courses])
    models = jax.tree.map(lambda leaf: leaf[chosen], states_of(scan, target))
    weighted = mixture.entropy_weighted(models, entropy, jnp.ones_like(entropy))
    return _evidence(scan, target, weighted)


def take_level(scan: Scan, target: int, index: int) -> Evidence:
    """Takes the sub-model of a single level, by its index."""
    model = jax.tree.map(lambda leaf: leaf[index], states_of(scan, target))
    return _evidence(scan, target, mixture.single(model))


def every_trigger(scan: Scan, target: int) -> list[Evidence]:
    """All working triggers that the scan holds for `target`: mask and pattern of Neural Cleanse,
    modelled triggers, and PT-RED's perturbation of the whole image.

    Modelled triggers are also returned if they do not work but no mask does.

    Raises: UserError when the scan did not search that class.
    """
    found = take_mask(scan, target)
    modelled = target in np.asarray(scan.cells.target)
    # a scan by Neural Cleanse alone: its sweep and its located masks are the same states
    repeated = scan.located is not None and scan.states is scan.located.states
    if modelled and not (found and (repeated or not scan.rates[target] >= WORKS)):
        found.append(mix_equally(scan, target))
    found += take_additive(scan, target)
    if not found:
        states_of(scan, target)  # raises the error that the class was not searched
    return found


def of_leads(scan: Scan) -> list[Evidence]:
    """All working triggers of the classes with one sign, for a repair after an inconclusive scan;
    empty if there are none."""
    leads = [] if scan.judgement is None else scan.judgement.leads
    return [
        each for target in leads if has_any(scan, target) for each in every_trigger(scan, target)
    ]


def has_any(scan: Scan, target: int) -> bool:
    """Whether the scan holds a trigger for `target`, so that `every_trigger` finds one."""
    modelled = target in np.asarray(scan.cells.target)
    return bool(modelled or take_mask(scan, target) or take_additive(scan, target))


def take_mask(scan: Scan, target: int) -> list[Evidence]:
    """The mask that Neural Cleanse found for `target`; empty if none works."""
    located = scan.located
    if located is None or not np.isfinite(located.norms[target]):
        return []
    # states exist only for searched classes, whose places are not -1: count those before `target`
    row = int((np.asarray(located.places)[:target, 0] >= 0).sum())
    mask, pattern = (
        jnp.asarray(leaf[row]) for leaf in (located.states.best_mask, located.states.best_pattern)
    )
    return [Evidence(target, (), stamp_mask, Mask(mask, pattern))]


def take_additive(scan: Scan, target: int) -> list[Evidence]:
    """PT-RED's perturbation of the whole image for `target`; empty if not searched or not
    working."""
    added = scan.additive
    if added is None or not added.rates[target] >= WORKS:
        return []
    row = int(np.isfinite(added.rates[:target]).sum())  # states of the classes searched, in order
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf[row]), added.states)
    return [Evidence(target, (), added.inversion.stamp, state)]


def list_mixtures(scan: Scan, target: int, levels: Sequence[float]) -> dict[str, Evidence]:
    """Everything that MESA offers for unlearning: each level alone, and the 1/N mixture of all
    levels without selection."""
    named = {
        f"level {level:g}": take_level(scan, target, index) for index, level in enumerate(levels)
    }
    everything = mixture.uniform(states_of(scan, target))
    return {**named, "mixture": _evidence(scan, target, everything)}


def _evidence(scan: Scan, target: int, models: mixture.Mixture) -> Evidence:
    """A mixture of the scan's models, from every other class to `target`."""
    return Evidence(target, (), mixture.mix(scan.inversion.stamp), models)
