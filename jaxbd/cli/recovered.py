"""Turns the triggers a scan recovered into a form that can be saved."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.attacks import given
from jaxbd.base import Evidence
from jaxbd.images import to_float
from jaxbd.interop import evidence_file
from jaxbd.interop.evidence_file import Saved
from jaxbd.inversion import mesa, neural_cleanse, pixel, plain, pt_red
from jaxbd.pipelines import evidence, pair_scan
from jaxbd.pipelines.scan import Scan
from jaxbd.repairs.mixture import Mixture


class Recovered(NamedTuple):
    """A trigger and the share of held-out images that it sends to its class; None if it was not
    measured on its own."""

    saved: Saved
    rate: float | None


def list_triggers(found: Any, config: Any, image_shape: tuple[int, int, int]) -> list[Recovered]:
    """All working triggers of a scan, for the attacked classes and for those with one sign."""
    if not isinstance(found, Scan):
        return [
            Recovered(save, _finite(each.attack_success_rate))
            for target in sorted({*found.targets, *found.leads} & {*found.triggers})
            for each in pair_scan.estimates(found, target)
            for save in as_saved(each.evidence, image_shape)
        ]
    leads = [] if found.judgement is None else found.judgement.leads
    rows = []
    for target in sorted({*found.decision.targets, *leads}):
        if not evidence.has_any(found, target):
            continue
        for each in evidence.every_trigger(found, target):
            for save in as_saved(each, image_shape, found, config):
                rows.append(Recovered(save, _rate(found, save)))
    return rows


def _rate(found: Scan, saved: Saved) -> float | None:
    if saved.kind == "additive" and found.additive is not None:
        return _finite(found.additive.rates[saved.target])
    if (
        saved.kind == "mask"
        and found.located is not None
        and found.states is not (found.located.states)
    ):
        # `found.rates` belong to the patches modelled at the mask's place, not to the mask
        return None if found.mask_rates is None else _finite(found.mask_rates[saved.target])
    return _finite(found.rates[saved.target])


def _finite(rate: float) -> float | None:
    return float(rate) if np.isfinite(rate) else None


def as_saved(
    known: Evidence,
    image_shape: tuple[int, int, int],
    found: Scan | None = None,
    config: Any = None,
) -> list[Saved]:
    """The triggers of one piece of evidence.

    Args:
      found, config: the scan by class that the evidence comes from, and its settings.
    """
    params = known.trigger_params
    if isinstance(params, Mixture):
        assert found is not None
        if isinstance(params.models, mesa.State):
            settings = evidence_file.settings_of(found.inversion.stamp)
            small = evidence_file.shrink(params)
            return [
                Saved("distribution", known.target, known.sources, models=small, settings=settings)
            ]
        states = [_pick(params.models, row) for row in range(len(np.asarray(params.weights)))]
    else:
        states = [params]
    return [_save_pixels(known, state, image_shape, config) for state in states]


def _pick(states: Any, row: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[row], states)


def _save_pixels(
    known: Evidence, state: Any, image_shape: tuple[int, int, int], config: Any
) -> Saved:
    """A trigger whose pixels are the same on every image."""
    if isinstance(state, pt_red.State):
        # for x in [0, 1], clip(x + v, 0, 1) does not change when v is clipped to [-1, 1]
        pattern = np.clip(np.asarray(state.perturbation, np.float32), -1, 1)
        mask = np.ones((*pattern.shape[:2], 1), np.float32)
        pixels = given.Loaded(pattern, mask, (0, 0), known.target, "add")
        return Saved("additive", known.target, known.sources, pixels)
    if isinstance(state, pixel.State):
        pattern = np.clip(np.asarray(state.pattern, np.float32), 0, 1)
        mask = np.ones((*pattern.shape[:2], 1), np.float32)
        fixed = config.pixel.place == "fixed"
        place = (config.pixel.row, config.pixel.column) if fixed else "random"
        pixels = given.Loaded(pattern, mask, place, known.target, "overwrite")
        return Saved("mask" if fixed else "patch", known.target, known.sources, pixels)
    pattern, mask = _overlay(known, state, image_shape)
    pixels = given.Loaded(pattern, mask, (0, 0), known.target, "overwrite")
    return Saved("mask", known.target, known.sources, pixels)


def _overlay(
    known: Evidence, state: Any, image_shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pattern [H, W, C] and mask [H, W, 1] of a trigger that overwrites pixels."""
    if isinstance(state, evidence.Mask):
        mask, pattern = state.mask, state.pattern
    elif isinstance(state, neural_cleanse.State):
        mask, pattern = state.best_mask, state.best_pattern
    else:
        assert isinstance(state, plain.State)
        # stamped on black the patch shows its colour; black and white results agree only where the
        # patch covers the image
        ends = jnp.stack([jnp.zeros(image_shape), jnp.ones(image_shape)])
        black, white = known.stamp(None, state, to_float(ends))  # pyright: ignore[reportArgumentType]
        pattern, mask = black, 1 - (white - black)[..., :1]
    return np.asarray(pattern, np.float32), np.asarray(mask, np.float32)
