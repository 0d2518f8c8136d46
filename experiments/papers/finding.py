"""Triggers that a repair gets: found by a scan, searched for the class that is told, or known."""

import dataclasses
import functools
from typing import Any

import jax

from experiments.bna import bna_rows
from experiments.papers import ledger, runs, victims
from experiments.papers.defence import Defence, method_of
from experiments.papers.victim import Victim, identify
from jaxbd.base import Evidence, Key
from jaxbd.data import draw
from jaxbd.pipelines import compare, correct, evidence, pair_scan, scan
from jaxbd.pipelines.repair import Repaired
from jaxbd.repairs import mixture
from jaxbd.training.run import Run


def search_of(victim: Victim, defence: Defence) -> Any:
    """The settings of the scan that finds a defence's triggers: over pairs for BNA and for
    all-to-all attacks, whatever the attack's kind, else over classes.

    A defence with the released or the paper's settings searches by those too, where its class is
    told.
    """
    size, method = victim.made_of, method_of(defence.method)
    if defence.source == "told":
        kind = "neural-cleanse" if method.search == "neural-cleanse" else "mesa"
        changes = {**size.scans.get("class", {}), "method": kind, "targets": (victim.aim,)}
        preset = defence.preset if defence.preset in scan.PRESETS else size.told
        return dataclasses.replace(scan.PRESETS[preset], **changes)
    if method.search == "pairs" or victim.is_all_to_all:
        return pair_scan.Config(**size.scans.get("pairs", {}))
    changes = {**size.scans.get("class", {}), "method": method.search}
    return dataclasses.replace(scan.PRESETS["quick"], **changes)


def unused(victim: Victim, defence: Defence) -> tuple[str, ...]:
    """Modules that this one imports but a defence's row does not run: all of it without a search
    or a correction, the search over pairs where classes are searched."""
    if method_of(defence.method).guards:
        return ()
    if defence.source not in ("found", "told"):
        return (__name__,)
    over_pairs = isinstance(search_of(victim, defence), pair_scan.Config)
    return () if over_pairs else (pair_scan.__name__, correct.__name__)


@functools.lru_cache(4)
def _scan(victim: Victim, config: Any, drawn: tuple[int, int] | None) -> Any:
    """A scan of a victim with the defender's images; its stages are kept under `runs/`."""
    kind = ledger.digest(str(config), str(drawn))[:6]
    depends = [identify(victim), str(config), ledger.code_hash((__name__,))]
    run = runs.start_run(f"{victim.size}-{victim.name}-scan-{kind}", depends)
    case = victims.open_case(victim, drawn)
    search, held = bna_rows.divide(case)
    ways: Any = pair_scan if isinstance(config, pair_scan.Config) else scan
    return ways.scan(run, jax.random.key(7000 + victim.seed), case.victim, search, held, config)


def find_triggers(
    victim: Victim, case: compare.Case, defence: Defence
) -> tuple[list[Evidence], dict[str, Any]]:
    """The triggers a defence gets, and what its row says of them."""
    if defence.source == "none":
        return [], {}
    if defence.source == "known":
        return bna_rows.true_triggers(case, victim.is_all_to_all), {}
    config = search_of(victim, defence)
    found = _scan(victim, config, defence.held)
    seconds = sum(found.seconds)
    if defence.source == "told":
        triggers = (
            evidence.take_mask(found, victim.aim)
            if config.method == "neural-cleanse"
            else [evidence.mix_equally(found, victim.aim)]
        )
        return triggers, {"named": [victim.aim], "search_seconds": seconds}
    if isinstance(config, pair_scan.Config):
        known = [e.evidence for t in found.targets for e in pair_scan.estimates(found, t)]
        return known, {"named": found.targets, "search_seconds": seconds}
    targets = found.decision.targets
    known = [mixture.join(evidence.every_trigger(found, t)) for t in targets]
    return known, {"named": targets, "search_seconds": seconds}


def correct_all(
    run: Run,
    key: Key,
    victim: Victim,
    defence: Defence,
    case: compare.Case,
    known: list[Evidence],
    config: Any,
) -> Repaired:
    """BNA for every target; a trigger that was found is searched for again in the corrected net."""
    sources = [each.all_sources(case.victim.classes) for each in known]
    least = min(len(draw.of_classes(case.defence, own).labels) for own in sources)
    again = None
    if defence.source == "found":
        scanned = search_of(victim, defence)
        again = correct.search_pairs(_scan(victim, scanned, defence.held), case.defence, scanned)
    return correct.repair(
        run,
        key,
        case.victim,
        case.defence,
        known,
        defence.method,
        config,
        batch_size=min(victim.made_of.batch_size, least),
        search_again=again,
    )
