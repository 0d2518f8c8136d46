"""Locates possible triggers: Neural Cleanse for every class, from one start or several."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Cell, Inversion
from jaxbd.detection import detect
from jaxbd.inversion import neural_cleanse
from jaxbd.pipelines.class_scan import (
    Located,
    ScanConfig,
    Task,
    by_class,
    list_classes,
    make_neural_cleanse,
    run_sweep,
)
from jaxbd.training import sweep
from jaxbd.training.program import Seconds, total_seconds


class Masks(NamedTuple):
    """A mask search, possibly not finished.

    Attributes:
      inversion, cells: Neural Cleanse and its cells [N], all starts of a class in a row.
      states: [N, …]; infos: [steps, N], NumPy.
      steps: steps done by every cell.
      image_steps, seconds: cost so far.
    """

    inversion: Inversion
    cells: Cell
    states: Any
    infos: Any
    steps: int
    image_steps: int
    seconds: Seconds


def search(task: Task, steps: int, first_masks: Sequence[float] = ()) -> Masks:
    """Runs Neural Cleanse on every class to search for `steps` steps, once from each of
    `first_masks`, or from the method's own start if there are none."""
    config, suspect = task.config, task.suspect
    inversion = make_neural_cleanse(suspect.net, suspect.image_shape, config.neural_cleanse)
    rows, starts = list_classes(suspect.classes, config), max(len(first_masks), 1)
    cells = jax.tree.map(lambda leaf: jnp.repeat(leaf, starts), sweep.grid(rows))
    given = _first_fields(task, len(rows), first_masks) if first_masks else None
    name = f"neural-cleanse: {len(rows)} classes"
    found = run_sweep(task, 1, name, inversion, cells, steps, given)
    return Masks(
        inversion,
        cells,
        found.states,
        found.course,
        steps,
        found.image_steps_pushed,
        found.seconds,
    )


def go_on(task: Task, masks: Masks, steps: int) -> Masks:
    """Continues the search up to `steps` steps in total; gives the same masks as an uninterrupted
    search."""
    count = len(list_classes(task.suspect.classes, task.config))
    name = f"neural-cleanse: {count} classes, to {steps}"
    # a step's key is derived from the step count in the state, so the key stream continues
    found = run_sweep(
        task,
        1,
        name,
        masks.inversion,
        masks.cells,
        steps - masks.steps,
        masks.states._asdict(),
    )
    return masks._replace(
        states=found.states,
        infos=jax.tree.map(lambda *parts: np.concatenate(parts), masks.infos, found.course),
        steps=steps,
        image_steps=masks.image_steps + found.image_steps_pushed,
        seconds=total_seconds(masks.seconds, found.seconds),
    )


def _first_fields(task: Task, classes: int, first_masks: Sequence[float]) -> dict[str, Any]:
    """Fields in which the initial states of the cells differ: masks of every start, and
    patterns."""
    height, width, channels = task.suspect.image_shape
    starts = np.tile(np.asarray(first_masks, np.float32), classes)
    # drawn by NumPy: on a CPU, XLA takes seconds to compile a generator for arrays of this size
    seed = np.asarray(jax.random.key_data(jax.random.fold_in(task.key, 5))).ravel()
    random = np.random.default_rng(seed.tolist())
    masks = random.random((len(starts), height, width, 1), np.float32)
    patterns = random.random((len(starts), height, width, channels), np.float32)
    return neural_cleanse.first_fields(
        jnp.asarray(starts[:, None, None, None] * masks), jnp.asarray(patterns)
    )


def compare(task: Task, masks: Masks) -> Located:
    """Picks the smallest mask of every class and compares it with those of the other classes."""
    config, classes = task.config, task.suspect.classes
    rows = list_classes(classes, config)
    norms = np.array(masks.states.best_norm, float).reshape(len(rows), -1)
    best = norms.argmin(1)
    index = best + norms.shape[1] * np.arange(len(rows))
    states = jax.tree.map(lambda leaf: np.asarray(leaf)[index], masks.states)
    norms = norms.min(1)
    norms[~np.isfinite(norms)] = np.nan
    places, share = neural_cleanse.locate(jnp.asarray(states.best_mask), config.mesa.patch)
    scores = -detect.mad_scores(norms)
    spread = [by_class(values, rows, classes) for values in (norms, scores, np.asarray(share))]
    places = by_class(np.asarray(places), rows, classes, missing=-1)
    return Located(spread[0], np.nan_to_num(spread[1]), places, spread[2], states)


def candidates(found: Located, config: ScanConfig) -> list[int]:
    """Classes to model: those of the `config.candidates` smallest masks and every outlier,
    ascending."""
    order = np.argsort(np.where(np.isnan(found.norms), np.inf, found.norms), kind="stable")
    order = [k for k in order if k in list_classes(len(order), config)]
    return sorted({int(k) for k in order[: config.candidates]} | {*outliers(found, config)})


def outliers(found: Located, config: ScanConfig) -> list[int]:
    """Classes whose mask is so small that its score exceeds the anomaly threshold."""
    return [int(k) for k in np.flatnonzero(found.scores > config.anomaly_threshold)]


def early_outliers(found: Located, config: ScanConfig) -> list[int]:
    """Classes that already stand out after a few steps, most anomalous first; empty unless at least
    half of the classes have a working mask to compare with."""
    rows = list_classes(len(found.norms), config)
    if np.isfinite(found.norms[rows]).mean() < 0.5:
        return []
    found_now = outliers(
        found, dataclasses.replace(config, anomaly_threshold=config.early_threshold)
    )
    return sorted(found_now, key=lambda k: -found.scores[k])
