"""What `repair` knows about triggers: one given by the user, or those that a scan recovers."""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Evidence, Key, Suspect, UserError
from jaxbd.cli import case, common, job, triggers
from jaxbd.pipelines import evidence as evidences
from jaxbd.pipelines import pair_scan
from jaxbd.pipelines.scan import Scan
from jaxbd.repairs import mixture
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run

SearchAgain = Callable[[Run, Key, Suspect, Evidence, str], tuple[Evidence, Seconds]]


class Known(NamedTuple):
    """What is known before a repair.

    Attributes:
      evidence: evidence for every target; one target may have several pieces.
      scan: the result of the scan it comes from; None for a given trigger.
      kind: `by_class` or `by_pair`, the module that ran the scan.
      search_again: searches a repaired net for triggers that still lead to one of the scan's
        targets.
      past: the case the evidence comes from, see `cli.case`.
      norms: sizes [K] of the smallest mask of each class, if the case has them.
    """

    evidence: list[Evidence]
    scan: Any = None
    kind: ModuleType | None = None
    search_again: SearchAgain | None = None
    past: case.Case | None = None
    norms: np.ndarray | None = None

    def verdict(self) -> str | None:
        """The verdict of the scan, this one or an earlier one; None for a given trigger."""
        if self.past is not None:
            return self.past.verdict
        return None if self.kind is None else self.kind.verdict_of(self.scan)


def take_given(opened: common.Opened, flags: Any, loaded: Any, guards: bool) -> Known:
    """The given trigger, as evidence for each class it leads to.

    Args:
      guards: whether the method treats each target separately, so the trigger may have several.
    Raises: UserError if the trigger's place or target is not known.
    """
    config = triggers.settle(opened, flags, loaded, all_to_all=guards)
    attack, pixels = triggers.make_attack(opened, config, loaded)
    labels = np.arange(opened.model.spec.classes)
    aims = np.asarray(attack.relabel(jnp.asarray(labels)))
    stamp = attack.stamp if guards else mixture.mix(attack.stamp)
    params = pixels if guards else mixture.single(pixels)
    found = []
    for target in sorted({*aims.tolist()}):
        sources = tuple(labels[(aims == target) & (labels != target)].tolist())
        if sources:
            found.append(Evidence(target, sources, stamp, params))
    return Known(found)


@contextlib.contextmanager
def _save_as_scans_do(run: Run, kind: ModuleType, flags: job.Flags) -> Iterator[None]:
    """Inside, checkpoints are as far apart as in `jaxbd scan`, unless --save-every says otherwise.

    A scan counts the steps of every cell, so the default of a repair would write one each second.
    """
    saves = run.checkpoints
    if saves is not None and flags.save_every == job.Flags().save_every:
        run.checkpoints = saves._replace(every=kind.SAVE_EVERY)
    try:
        yield
    finally:
        run.checkpoints = saves


def search(
    run: Run,
    kind: ModuleType,
    material: common.Material,
    args: Any,
    named: tuple[int, ...],
    *,
    take_leads: bool = False,
) -> Known:
    """Scans, and takes what was recovered for each attacked class and for the classes `named`.

    Args:
      take_leads: after an inconclusive scan, whether to take what was recovered for the classes
        with one sign.
    """
    key = jax.random.key(args.reading.seed)
    with _save_as_scans_do(run, kind, args.stopping):
        found = kind.search(run, key, material, args.search)
    targets = sorted({*kind.targets_of(found), *named})
    evidence = [each for target in targets for each in _choose_evidence(found, kind, target, args)]
    if take_leads and not targets and kind.verdict_of(found) == "inconclusive":
        evidence = kind.evidence_of_leads(found)
    again = _pair_search(material, args.search, found) if not isinstance(found, Scan) else None
    return Known(evidence, found, kind, again)


def _choose_evidence(found: Any, kind: ModuleType, target: int, args: Any) -> list[Evidence]:
    """What a scan recovered for one class, in the form selected by --evidence."""
    if not isinstance(found, Scan) or args.evidence == "mixture":
        return kind.evidence_of(found, target)
    if args.evidence == "entropy":
        return [evidences.mix_by_entropy(found, target)]
    return [evidences.take_level(found, target, args.search.levels.index(args.level))]


def _pair_search(material: common.Material, config: Any, found: pair_scan.PairScan) -> SearchAgain:
    """The pair search, rerun on a corrected net for one target."""

    def again(
        run: Run, key: Key, suspect: Suspect, first: Evidence, name: str
    ) -> tuple[Evidence, Seconds]:
        estimate = found.triggers[first.target]
        more, seconds = pair_scan.search_again(
            run, key, suspect, material.search, estimate, config, name
        )
        return more.evidence, seconds

    return again


def classes_to_search(args: Any) -> tuple[int, ...]:
    """Classes to search: `--target`, or those of an earlier scan; empty means all.

    Raises: UserError if the file in --scan is not a scan or names no class.
    """
    if args.given.target is not None:
        return (args.given.target,)
    if args.scan is None:
        return args.search.targets
    earlier = case.read(args.scan)
    targets = earlier.get("targets", kind=list)
    if not targets:
        raise UserError(
            f"{args.scan} names no target class, so there is nothing to repair; leave --scan out to"
            " search"
        )
    return tuple(targets)
