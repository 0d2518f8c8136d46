"""The content of `scan.json`, `repair.json` and `evaluate.json` as plain dictionaries;
`files.write_json` writes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbd import files
from jaxbd.detection.verdict import Judgement, Signs
from jaxbd.metrics.evaluate import Detection, Rates
from jaxbd.pipelines.margin_scan import Config as MarginConfig
from jaxbd.pipelines.margin_scan import MarginScan
from jaxbd.pipelines.pair_scan import Config as PairConfig
from jaxbd.pipelines.pair_scan import Estimate, PairScan
from jaxbd.pipelines.scan import Scan, ScanConfig
from jaxbd.pipelines.spent import Spent
from jaxbd.training.program import Seconds

SCHEMA = "jaxbd/1"


def seconds(times: Seconds) -> dict[str, float]:
    """{"compile", "run", "total"} in seconds."""
    return {"compile": times.compile, "run": times.run, "total": times.compile + times.run}


def settings(config: Any) -> dict[str, Any]:
    """The fields of a frozen Config, by name."""
    return dataclasses.asdict(config)


def provenance(seed: int) -> dict[str, Any]:
    """Seed, device and versions, included in every result."""
    return {"seed": seed, "device": files.device(), "versions": files.versions()}


def rates(found: Rates) -> dict[str, Any]:
    """The content of `evaluate.json`, without provenance."""
    return dataclasses.asdict(found)


def detection(found: Detection) -> dict[str, Any]:
    """How well triggered images are distinguished from clean ones, with the denominators."""
    return dataclasses.asdict(found)


def pair_scan(
    found: PairScan,
    config: PairConfig,
    *,
    model: dict[str, Any],
    data: dict[str, Any],
    class_names: tuple[str, ...],
    seed: int,
) -> dict[str, Any]:
    """The content of `scan.json` for a scan over all ordered pairs of classes.

    Args:
      model, data, class_names, seed: see `scan`.
    Returns: the fields of every scan, plus `pairs` [[source, target]] and, per method, the matrices
      `statistics` and `scores` [K][K] (source, target). Both are None on the diagonal and for pairs
      not searched; an infinite score is also None, but its statistic is a number.
    """
    best = np.stack([np.asarray(scores, float) for scores in found.scores.values()])
    best = np.where(np.isnan(best), -np.inf, best).max((0, 1))
    rates = {target: trigger.attack_success_rate for target, trigger in found.triggers.items()}
    return {
        "schema": f"{SCHEMA}/scan",
        "verdict": found.verdict,
        "targets": found.targets,
        "leads": found.leads,
        "pairs": [list(pair) for pair in found.pairs],
        "setting": found.setting,
        "decided_by": found.decided_by,
        "margin": None if found.margin is None else margin(found.margin),
        "classes": [
            {"class": k, "name": name, "attack_success_rate": rates.get(k), "score": best[k]}
            for k, name in enumerate(class_names)
        ],
        "triggers": estimates(found),
        "statistics": found.statistics,
        "scores": found.scores,
        "method": config.method,
        "config": settings(config),
        "model": model,
        "data": data,
        "missing": found.missing,
        "cells": sum(int(np.isfinite(searched).sum()) for searched in found.statistics.values()),
        "steps": found.steps,
        "image_steps": found.image_steps,
        "seconds": seconds(found.seconds),
        **provenance(seed),
    }


def estimates(found: PairScan) -> dict[int, dict[str, Any]]:
    """What a record says about each target's trigger; the other search's trigger, if any, is under
    "other"."""
    others = {target: {"other": estimate(other)} for target, other in found.others.items()}
    return {
        target: {**estimate(trigger), **others.get(target, {})}
        for target, trigger in found.triggers.items()
    }


def estimate(found: Estimate) -> dict[str, Any]:
    """What a record says about one estimated trigger."""
    return {
        "method": found.method,
        "sources": list(found.evidence.sources),
        "norm": found.norm,
        "attack_success_rate": found.attack_success_rate,
    }


def scan(
    found: Scan,
    config: ScanConfig,
    *,
    model: dict[str, Any],
    data: dict[str, Any],
    class_names: tuple[str, ...],
    seed: int,
) -> dict[str, Any]:
    """The content of `scan.json`.

    Args:
      model: {"path", "sha256", "arch"} and further facts about the file.
      data: where the clean images came from, and how many were used for each purpose.
      class_names: K names; class numbers replace missing ones.
    """
    levels = [float(level) for level in config.levels] if found.level_rates.shape[1] > 1 else []
    classes = []
    for number, rate in enumerate(found.rates):
        row = {
            "class": number,
            "name": class_names[number] if number < len(class_names) else str(number),
            "attack_success_rate": rate,
            "score": found.decision.scores[number],
        }
        if levels:
            row["levels"] = dict(zip(map(str, levels), found.level_rates[number], strict=True))
        if found.located is not None:
            row["mask_norm"] = found.located.norms[number]
            row["place"] = found.located.places[number]
        if found.mask_rates is not None:
            row["mask_rate"] = found.mask_rates[number]
        if found.anywhere is not None:
            row["rate_at_random_places"] = found.anywhere[number]
        row["rate_without_trigger"] = found.baseline[number]
        if found.additive is not None:
            row["additive_norm"] = found.additive.norms[number]
            row["additive_rate"] = found.additive.rates[number]
        classes.append(row)
    return {
        "schema": f"{SCHEMA}/scan",
        "verdict": found.decision.verdict,
        "targets": found.decision.targets,
        "decided_by": found.decided_by,
        **judgement(found.judgement, found.signs),
        "margin": None if found.margin is None else margin(found.margin),
        "classes": classes,
        "method": config.method,
        "config": settings(config),
        "model": model,
        "data": data,
        "cells": int(np.size(found.cells.target)),
        "steps": found.steps,
        "image_steps": found.image_steps,
        "seconds": seconds(found.seconds),
        "stages": stages(found.spent),
        **provenance(seed),
    }


def stages(spent: Mapping[str, Spent]) -> list[dict[str, Any]]:
    """What a record says about the stages of a scan: one row each."""
    return [
        {
            "stage": name,
            "image_steps": each.image_steps,
            "seconds": seconds(each.seconds),
            "peak_mb": each.peak_bytes // 2**20,
        }
        for name, each in spent.items()
    ]


def judgement(found: Judgement | None, signs: Signs | None) -> dict[str, Any]:
    """What a record says about a verdict: leads, natural triggers, the classes that show each sign,
    and what the searches lacked."""
    if found is None or signs is None:
        return {}
    return {
        "leads": found.leads,
        "natural": found.natural,
        "signs": {name: np.flatnonzero(which) for name, which in signs._asdict().items()},
        "power_lacks": found.lacks,
    }


def margin(found: MarginScan) -> dict[str, Any]:
    """What a record says about the search without data; margins are in logits."""
    tested = found.outliers
    return {
        "p_value": tested.p_value,
        "p_value_of_the_paper": tested.nominal,
        "classes": tested.classes,
        "beside": tested.beside,
        "class_p_values": tested.class_p,
        "statistics": found.statistics,
        "needed": tested.needed,
        "excess": tested.excess,
        "reached": found.reached,
        "image_steps": found.image_steps,
        "seconds": seconds(found.seconds),
    }


def first_answer(
    found: MarginScan | None,
    why_not: str,
    config: MarginConfig,
    *,
    model: dict[str, Any],
    class_names: tuple[str, ...],
    seed: int,
) -> dict[str, Any]:
    """The content of `scan.json` for a scan without data, which is never more than a first answer.

    Args:
      found: None if the margins could not be tested; `why_not` gives the reason.
      model, class_names, seed: see `scan`.
    """
    return {
        "schema": f"{SCHEMA}/scan",
        "verdict": "inconclusive",
        "targets": [],
        "decided_by": "margins, without data" if found is not None else why_not,
        "margin": None if found is None else margin(found),
        "classes": [{"class": k, "name": name} for k, name in enumerate(class_names)],
        "method": "margin",
        "config": settings(config),
        "model": model,
        "data": None,
        **provenance(seed),
    }


def repair(
    method: str,
    config: Any,
    times: Seconds,
    *,
    model: dict[str, Any],
    data: dict[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """The content of `repair.json` without the figures; `config` is the method's frozen Config,
    `data` is None if nothing was measured."""
    return {
        "schema": f"{SCHEMA}/repair",
        "method": method,
        "before": None,
        "after": None,
        "config": settings(config),
        "model": model,
        "data": data,
        "seconds": seconds(times),
        **provenance(seed),
    }
