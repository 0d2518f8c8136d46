"""A fresh search for what still leads to a few named classes: masks from large and from small
starts, modelled patches where the smallest mask lies, additive patterns.

Composition only, for `pipelines.hold`. Nothing is printed and no file is opened.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Batch, Cell, Evidence, Inversion, Key, Net, Suspect, UserError, Variables
from jaxbd.caching import cached
from jaxbd.data import draw
from jaxbd.inversion import mesa, neural_cleanse, pt_red
from jaxbd.metrics import sweep_rates
from jaxbd.pipelines.evidence import Mask, stamp_mask
from jaxbd.repairs import mixture
from jaxbd.training import slots, sweep
from jaxbd.training.program import Seconds, total_seconds
from jaxbd.training.run import Run

Kind = Literal["mask", "patch", "additive"]
LEVEL = 0.9
"""Staircase level of the patches that are modelled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a fresh search.

    Attributes:
      steps: of each mask.
      patch_steps: of the modelled patches; 0 leaves them out.
      additive_steps: of each additive pattern, at most; 0 leaves them out.
      batch_size: images per cell and step.
      first_masks: upper ends of the uniform distributions that first masks are drawn from, one
        search each, since a start from large masks can end in a large one where a small one works.
      compared: classes whose additive patterns, and where no scan has them whose masks, say what
        size is usual; at most so many.
      anomaly_threshold: anomaly index of a size from which it is unusually small.
      memory: see `neural_cleanse.Config`.
      patch: side of the modelled patches, in pixels.
      step_size: L2 length of an additive pattern's step.
    """

    steps: int = 120
    patch_steps: int = 100
    additive_steps: int = 100
    batch_size: int = 32
    first_masks: tuple[float, ...] = (1.0, 0.1)
    compared: int = 6
    anomaly_threshold: float = 2.0
    memory: float = 0.0
    patch: int = 3
    step_size: float = 0.1

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or self.compared < 1:
            raise UserError("fresh search: steps, batch_size and compared must be at least 1")
        if min(self.patch_steps, self.additive_steps) < 0:
            raise UserError("fresh search: patch_steps and additive_steps must be at least 0")
        if not self.first_masks or not all(0 < first <= 1 for first in self.first_masks):
            raise UserError(f"fresh search: first_masks {self.first_masks} must lie in (0, 1]")


class Trigger(NamedTuple):
    """A trigger that a fresh search ended with, whether it works or not.

    Attributes:
      kind: "mask", "patch" or "additive".
      size: L1 norm of a mask, L2 norm of an additive pattern; nan for patches, which have one size.
      rate: share of the held-out images of other classes that it sends to its target.
      evidence: what repairs take.
    """

    kind: Kind
    size: float
    rate: float
    evidence: Evidence


class Lab(NamedTuple):
    """What all searches of a repair share: images to search with, and others that judge."""

    run: Run
    suspect: Suspect
    search: Batch
    held: Batch
    config: Config


def search(
    lab: Lab, key: Key, variables: Variables, targets: Sequence[int], label: str
) -> tuple[list[Trigger], Seconds]:
    """Triggers of every kind that lead to `targets` in the net with `variables`, class by class."""
    parts = [search_masks(lab, key, variables, targets, label)]
    if lab.config.patch_steps:
        parts.append(_search_patches(lab, key, variables, targets, parts[0][0], label))
    if lab.config.additive_steps:
        parts.append(search_additive(lab, key, variables, targets, label))
    found = [trigger for triggers, _ in parts for trigger in triggers]
    found.sort(key=lambda trigger: targets.index(trigger.evidence.target))
    return found, total_seconds(*(seconds for _, seconds in parts))


def search_masks(
    lab: Lab, key: Key, variables: Variables, targets: Sequence[int], label: str
) -> tuple[list[Trigger], Seconds]:
    """Neural Cleanse from every start: for each target the smallest mask that works, or where none
    does the current ones."""
    config = lab.config
    settings = neural_cleanse.Config(memory=config.memory)
    inversion = make_masks(lab.suspect.net, lab.suspect.image_shape, settings)
    cells = sweep.grid(targets, config.first_masks)
    found, rates = _sweep(lab, key, 0, f"{label}: masks", inversion, cells, variables, config.steps)
    rows = []
    for row, target in enumerate(np.asarray(cells.target)):
        mask, pattern = found.states.best_mask[row], found.states.best_pattern[row]
        known = Evidence(int(target), (), stamp_mask, Mask(jnp.asarray(mask), jnp.asarray(pattern)))
        rows.append(Trigger("mask", float(mask.sum()), float(rates[row]), known))
    return rows, found.seconds


@cached(32)
def make_masks(
    net: Net, image_shape: tuple[int, int, int], config: neural_cleanse.Config
) -> Inversion:
    """Neural Cleanse whose first mask is multiplied by the cell's level, so that searches from
    large and from small masks are cells of one program."""
    made = neural_cleanse.make(net, image_shape, config)

    def step(key, state, batch, cell, variables):
        scaled = 2 * cell.level * neural_cleanse.squash(state.parameters.mask) - 1
        first = jnp.arctanh(jnp.clip(scaled, -1 + 1e-3, 1 - 1e-3))
        mask = jnp.where(state.step == 0, first, state.parameters.mask)
        state = state._replace(parameters=state.parameters._replace(mask=mask))
        return made.step(key, state, batch, cell, variables)

    return made._replace(step=step)


def _search_patches(
    lab: Lab,
    key: Key,
    variables: Variables,
    targets: Sequence[int],
    masks: Sequence[Trigger],
    label: str,
) -> tuple[list[Trigger], Seconds]:
    """MESA at the place that the smallest mask of each target, among those that work best, marks
    out."""
    settings = mesa.Config(place="fixed", hidden=128, learning_rate=1e-3, patch=lab.config.patch)
    inversion = make_mesa(lab.suspect.net, lab.suspect.image_shape, settings)
    best = [
        min(
            (each for each in masks if each.evidence.target == target),
            key=lambda each: (-(each.rate >= LEVEL), each.size),
        )
        for target in targets
    ]
    stacked = jnp.stack([each.evidence.trigger_params.mask for each in best])
    places, _ = neural_cleanse.locate(stacked, lab.config.patch)
    cells, steps = sweep.grid(targets, (LEVEL,)), lab.config.patch_steps
    name = f"{label}: patches"
    found, rates = _sweep(lab, key, 1, name, inversion, cells, variables, steps, places)
    return _wrap("patch", inversion, cells, found, rates), found.seconds


def search_additive(
    lab: Lab, key: Key, variables: Variables, targets: Sequence[int], label: str
) -> tuple[list[Trigger], Seconds]:
    """PT-RED from all classes: for each target the shortest additive pattern on its way."""
    # one lucky batch of this size is not a find
    settings = pt_red.Config(step_size=lab.config.step_size, patience=2)
    inversion = make_pt_red(lab.suspect.net, lab.suspect.image_shape, settings)
    cells, steps = sweep.grid(targets), lab.config.additive_steps
    name = f"{label}: additive patterns"
    found, rates = _sweep(lab, key, 2, name, inversion, cells, variables, steps)
    return _wrap("additive", inversion, cells, found, rates), found.seconds


make_mesa, make_pt_red = (cached(32)(factory) for factory in (mesa.make, pt_red.make))


def _sweep(
    lab: Lab,
    key: Key,
    number: int,
    name: str,
    inversion: Inversion,
    cells: Cell,
    variables: Variables,
    steps: int,
    places: jax.Array | None = None,
) -> tuple[slots.Found, np.ndarray]:
    """(what a search found, rate [N] of each cell's triggers on the images that judge)."""
    found = sweep.search(
        lab.run,
        name,
        jax.random.fold_in(key, number),
        inversion,
        draw.uniform(lab.config.batch_size),
        lab.search,
        cells,
        variables,
        num_steps=steps,
        chunk=10,
        given=None if places is None else {"place": np.asarray(places)},
    )
    rates = sweep_rates.attack_success(
        jax.random.fold_in(key, 10 + number),
        lab.suspect.net,
        inversion,
        found.states,
        cells,
        variables,
        lab.held,
        slots=found.slots,
    )
    return found, rates


def _wrap(
    kind: Kind, inversion: Inversion, cells: Cell, found: slots.Found, rates: np.ndarray
) -> list[Trigger]:
    """Each cell's state as a trigger."""
    rows = []
    for row, target in enumerate(np.asarray(cells.target)):
        state = jax.tree.map(lambda leaf, row=row: jnp.asarray(leaf[row]), found.states)
        known = Evidence(int(target), (), mixture.mix(inversion.stamp), mixture.single(state))
        size = float("nan") if inversion.size is None else float(inversion.size(state))
        rows.append(Trigger(kind, size, float(rates[row]), known))
    return rows
