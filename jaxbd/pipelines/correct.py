"""Corrects a net's activations for every target (BNA) and packs the corrections as a guarded net.

A correction is retried if its trigger still works. If the trigger is an estimate, the corrected net
is searched again. Prints nothing and opens no file.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import methods
from jaxbd.base import (
    Array,
    Batch,
    Evidence,
    Key,
    Net,
    Repair,
    RepairData,
    Suspect,
    UserError,
    Variables,
)
from jaxbd.caching import cached
from jaxbd.detection import guard
from jaxbd.metrics import evaluate
from jaxbd.pipelines import pair_scan
from jaxbd.pipelines import repair as repairs
from jaxbd.pipelines.repair import Repaired
from jaxbd.repairs import bna, mixture
from jaxbd.training.program import Seconds, total_seconds
from jaxbd.training.run import Run

STILL_WORKS, RETRIES = 0.03, 2
"""Share of triggered images that may still reach the target, and the maximum number of retries if
more do."""

SearchAgain = Callable[[Run, Key, Suspect, Evidence, str], tuple[Evidence, Seconds]]
"""(run, key, corrected suspect, first evidence of a target, stage name) -> (evidence of a trigger
that still leads to the target, seconds)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a correction of all targets.

    Attributes:
      correction: settings of the correction of one target.
      rounds: how many times the corrected net is searched again and the correction repeated for all
        triggers so far, since an estimate is not the attacker's trigger. Used only with a
        `search_again`.
      false_alarms: share of the target's clean images that a retry or a later round may send to
        another class; 0 to 1. The default 15 % is what the paper allows STRIP.
    """

    correction: bna.Config = bna.Config()
    # Differs from paper: it corrects once, for the one trigger that it estimates
    rounds: int = 2
    false_alarms: float = 0.15

    def __post_init__(self):
        if self.rounds < 0:
            raise UserError(f"rounds must be at least 0, got {self.rounds}")
        if not 0 <= self.false_alarms <= 1:
            raise UserError(f"false_alarms must be a share from 0 to 1, got {self.false_alarms}")


def quick() -> Config:
    """The settings of this project."""
    return Config(correction=bna.quick())


def paper() -> Config:
    """The correction of the paper."""
    return Config(correction=bna.paper())


def released() -> Config:
    """The correction of the released code."""
    return Config(correction=bna.released())


def search_pairs(found: pair_scan.PairScan, search: Batch, config: pair_scan.Config) -> SearchAgain:
    """Makes a `SearchAgain` that repeats the scan `found` with its settings `config` on the clean
    images `search`."""

    def search_again(
        run: Run, key: Key, suspect: Suspect, first: Evidence, name: str
    ) -> tuple[Evidence, Seconds]:
        estimate = found.triggers[first.target]
        more, seconds = pair_scan.search_again(run, key, suspect, search, estimate, config, name)
        return more.evidence, seconds

    return search_again


def repair(
    run: Run,
    key: Key,
    suspect: Suspect,
    clean: Batch | None,
    evidence: Sequence[Evidence],
    method: str,
    config: Config,
    *,
    batch_size: int = 64,
    label: str = "",
    search_again: SearchAgain | None = None,
) -> Repaired:
    """Corrects a suspect for each target of `evidence`; see `pipelines.repair.repair`.

    Several pieces of evidence for one target share one correction. Every correction starts from the
    original suspect.

    Args:
      search_again: searches the corrected net for triggers that still lead to a target, see
        `search_pairs`; None if the triggers are known exactly, so that one correction suffices.
    Returns: the variables of a guarded net; infos are those of the last correction of each target.
    """
    found = methods.find("repair", method)
    repairs.check_needs(method, found.needs, clean, evidence)
    by_target: dict[int, list[Evidence]] = {}
    for each in evidence:
        by_target.setdefault(each.target, []).append(each)
    names = repairs.name_targets(label or method, [known[0] for known in by_target.values()])
    keys = repairs.split_keys(key, len(by_target))
    task = Task(found, run, suspect, clean, config, batch_size)
    results = [
        _correct_in_rounds(task, own_key, known, search_again, name)
        for own_key, known, name in zip(keys, by_target.values(), names, strict=True)
    ]
    return Repaired(
        guard.pack(suspect.variables, [result.variables for result in results]),
        repairs.join_infos(results),
        total_seconds(*(result.seconds for result in results)),
        tuple(by_target),
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """Arguments shared by all corrections of a run; see `repair`."""

    method: methods.Method
    run: Run
    suspect: Suspect
    clean: Batch | None
    config: Config
    batch_size: int


def _correct_in_rounds(
    task: Task,
    key: Key,
    known: list[Evidence],
    search_again: SearchAgain | None,
    label: str,
) -> Repaired:
    """Corrects for one target, in rounds of correcting and searching again.

    The estimated trigger is not the attacker's, and a correction for the estimate may let the
    attacker's through. Each round therefore searches the corrected net, and the next one corrects
    the original suspect for all triggers so far. Once no shortcut is left, the search finds
    features of the class itself, and correcting for these hurts its clean images: a round that
    sends more than `false_alarms` of them elsewhere is undone and ends the loop.
    """
    rounds = task.config.rounds if search_again is not None else 0
    known, spent = list(known), []
    best: Repaired | None = None
    for number in range(rounds + 1):
        name = f"{label}, round {number + 1} of {rounds + 1}" if rounds else label
        joined = mixture.join(known)
        data = repairs.select(task.suspect, task.clean, joined)
        own_key = jax.random.fold_in(key, number) if rounds else key
        repaired = correct(task, own_key, joined, data, name)
        spent.append(repaired.seconds)
        # the first correction is kept at any cost; only later rounds may be undone
        if best is not None and _costs_too_much(task, repaired, data):
            break
        best = repaired
        if number < rounds and search_again is not None:
            corrected = task.suspect._replace(variables=repaired.variables)
            search_key = jax.random.fold_in(key, 100 + number)
            more, seconds = search_again(
                task.run, search_key, corrected, known[0], f"{name}: search again"
            )
            known.append(more)
            spent.append(seconds)
    assert best is not None
    return best._replace(seconds=total_seconds(*spent))


def correct(task: Task, key: Key, known: Evidence, data: RepairData, label: str) -> Repaired:
    """Corrects for one trigger, with retries.

    If more than 3 % of triggered images still reach the target, retries with `keep` halved, at most
    twice. A retry that sends more than `false_alarms` of the target's clean images elsewhere is
    undone and ends the loop.
    """
    settings = repairs.adapt(
        task.method, task.config.correction, task.suspect, data, task.batch_size
    )
    if data.clean_target is None:  # no clean images of the target, so nothing to preserve
        settings = dataclasses.replace(settings, keep=0.0)
    made = repairs.make(task.method, task.suspect.problem(known), settings)
    keep, spent = settings.keep, []
    best: Repaired | None = None
    for attempt in range(1 + (RETRIES if keep else 0)):
        name = f"{label}, keep {keep:g}" if attempt else label
        repaired = _attempt(task, key, made, data, keep, name)
        spent.append(repaired.seconds)
        if best is not None and _costs_too_much(task, repaired, data):
            break
        best = repaired
        if not keep or _share_reaching(task, repaired, known, data) <= STILL_WORKS:
            break
        keep /= 2
    assert best is not None
    return best._replace(seconds=total_seconds(*spent))


def _attempt(
    task: Task, key: Key, made: Repair, data: RepairData, keep: float, label: str
) -> Repaired:
    """Makes one correction with the weight `keep` on the target's clean images."""
    state: Any = repairs.start(made, jax.random.fold_in(key, 0), task.suspect.variables, data)
    # the weight is part of the state, so that all attempts share one compiled step
    state = state._replace(keep=jnp.float32(keep))
    state, infos, seconds = repairs.fit(task.run, key, made, data, state, task.batch_size, label)
    return Repaired(made.extract(state), infos, seconds)


def _costs_too_much(task: Task, repaired: Repaired, data: RepairData) -> bool:
    """Whether a correction misclassifies more than `false_alarms` of the target's clean images that
    the suspect gets right."""
    images = data.clean_target
    if images is None:
        return False
    target = int(images.labels[0])
    recognised = _labels(task.suspect, task.suspect.variables, images) == target
    lost = _labels(task.suspect, repaired.variables, images) != target
    return bool(recognised.any()) and float(lost[recognised].mean()) > task.config.false_alarms


def _share_reaching(task: Task, repaired: Repaired, known: Evidence, data: RepairData) -> float:
    """Share of triggered images of the source classes that still reach the target.

    Counts only images that the suspect does not assign to the target without a trigger.
    """
    images, suspect = data.clean_sources, task.suspect
    if images is None:
        return 0.0
    counted = _labels(suspect, suspect.variables, images) != known.target
    reached = _labels(suspect, repaired.variables, images, known) == known.target
    return float(reached[counted].mean()) if counted.any() else 0.0


def _labels(
    suspect: Suspect, variables: Variables, images: Batch, known: Evidence | None = None
) -> np.ndarray:
    """Classes [N] that the suspect's net predicts for `images`, with the trigger of `known` if
    given."""
    stamp, trigger = (None, ()) if known is None else (known.stamp, known.trigger_params)
    label, key = _labeller(suspect.net), jax.random.key(0)
    return evaluate.per_image(key, label, variables, images, stamp, trigger)


@cached(32)
def _labeller(net: Net) -> Callable[[Key, Variables, Array], Array]:
    """(key, variables, images) -> classes [B]; cached, so that it is traced once per net."""
    return lambda _, variables, images: net.apply(variables, images, train=False)[0].argmax(-1)
