"""A fresh search for triggers that still lead to given classes: masks from large and small starts,
modelled patches at the place of the smallest mask, and additive patterns.

Composition only, for `pipelines.hold`. Prints nothing and opens no file.
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
"""Staircase level of the modelled patches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a fresh search.

    Attributes:
      steps: steps of each mask search.
      patch_steps: steps of the modelled patches; 0 skips them.
      additive_steps: maximum steps of each additive pattern; 0 skips them.
      batch_size: images per cell and step.
      first_masks: upper ends of the uniform distributions of initial masks, one search each; a
        search from a large mask can end in a large one although a small one works.
      compared: maximum number of other classes whose additive patterns (and masks, if no scan has
        them) define the usual size.
      anomaly_threshold: anomaly index from which a size counts as unusually small.
      memory: see `neural_cleanse.Config`.
      patch: side of the modelled patches [pixels].
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
    """The trigger that a fresh search ended with, working or not.

    Attributes:
      kind: "mask", "patch" or "additive".
      size: L1 norm of a mask, L2 norm of an additive pattern; nan for patches, which have a fixed
        size.
      rate: share of the held-out images of other classes that it sends to its target.
      evidence: the trigger in the form that repairs take.
    """

    kind: Kind
    size: float
    rate: float
    evidence: Evidence


class Lab(NamedTuple):
    """Inputs shared by all searches of a repair; `search` images to optimise on, `held` images to
    judge on."""

    run: Run
    suspect: Suspect
    search: Batch
    held: Batch
    config: Config


def search(
    lab: Lab, key: Key, variables: Variables, targets: Sequence[int], label: str
) -> tuple[list[Trigger], Seconds]:
    """Searches triggers of every kind to `targets` in the net with `variables`; sorted by
    target."""
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
    """Runs Neural Cleanse from every start: for each, the smallest working mask, or the last mask
    if none works."""
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
    """Neural Cleanse with its initial mask multiplied by the cell's level, so that searches from
    large and small masks are cells of one program."""
    made = neural_cleanse.make(net, image_shape, config)

    def step(key, state, batch, cell, variables):
        # masks are optimised as (tanh(x) + 1) / 2, so scale the mask and invert this for x
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
    """Runs MESA at the place of each target's best mask: the smallest with a rate of at least
    `LEVEL`, or the smallest of all."""
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
    """Runs PT-RED from all classes to each target; takes the additive pattern it ended with."""
    # patience 2: a success rate reached on one small batch may be luck
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
    """Runs a sweep; returns it with the rate [N] of each cell's triggers on the held-out images."""
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
    """Wraps each cell's state as a trigger."""
    rows = []
    for row, target in enumerate(np.asarray(cells.target)):
        state = jax.tree.map(lambda leaf, row=row: jnp.asarray(leaf[row]), found.states)
        known = Evidence(int(target), (), mixture.mix(inversion.stamp), mixture.single(state))
        size = float("nan") if inversion.size is None else float(inversion.size(state))
        rows.append(Trigger(kind, size, float(rates[row]), known))
    return rows
