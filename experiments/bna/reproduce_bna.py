"""The BNA section: pair detection, correction, test-time detection, on digits, published models and
CIFAR-10 images.
"""

from typing import Any

import numpy as np

from experiments import units
from experiments.bna import (
    activation_histograms,
    adaptive,
    bna_presets,
    bna_published,
    bna_rows,
    bna_variations,
)
from experiments.bna.bna_cases import Planting
from experiments.reproduce import Check

TIME = (
    "an estimate, never timed as a whole: 2 to 3 hours on 2 cores, about 30 minutes of it on the"
    " two published models; CIFAR-10 images are used where there are some; finished parts are kept,"
    " interrupt and start again as you like"
)
QUICK_TIME = (
    "about 4 minutes on 2 cores: one digit victim, chessboard, corrected once, and its clean twin"
)
SEEDS = 5
ATTACKS = ("badnets", "chessboard")


REPORTED = "Handwritten digits: figures that are reported, with no bar"
"""Their first bars were guesses about a toy, and only digits missed them."""
PARTS = ("digits", "variations", "presets", "published", "cifar", "adaptive")


def run(
    quick: bool, parts: tuple[str, ...] = PARTS
) -> tuple[dict[str, Any], list[Check], dict[str, Any]]:
    """(tables by title, checks, details)."""
    tables: dict[str, Any] = {}
    checks: list[Check] = []
    details: dict[str, Any] = {}
    if quick:
        once = lambda planting: bna_rows.unit(
            planting, bna_rows.settings_for(planting)._replace(rounds=0), "bna/quick"
        )
        _digits(ATTACKS[1:], 1, once, tables, checks, details)
        return tables, checks, details
    if "digits" in parts:
        _digits(ATTACKS, SEEDS, bna_rows.unit, tables, checks, details)
        _all_to_all(tables, checks, details)
        tables[
            "Handwritten digits: one penultimate neuron, clean and triggered images (Fig. 1)"
        ] = activation_histograms.run()
    if "variations" in parts:
        _variations(tables)
    if "presets" in parts:
        tables["Handwritten digits, BadNets, known trigger: presets"] = bna_presets.run()
    if "published" in parts:
        if bna_published.available():
            bna_published.add(tables, checks, details)
        else:
            units.say(
                "the published models or CIFAR-10 images are not beside the repository: their"
                " tables are left out"
            )
    if "cifar" in parts:
        if (units.SHARED / "data" / "cifar10").is_dir():
            _narrow(tables, details)
        else:
            units.say("CIFAR-10 images are not beside the repository: their tables are left out")
    if "adaptive" in parts:
        tables["Adaptive attack that matches latent distributions (section 5.4)"] = adaptive.run(
            "digits"
        )["rows"]
    return tables, checks, details


def _variations(tables: dict) -> None:
    """What the correction alone is sensitive to."""
    tables[
        "Handwritten digits, BadNets, known trigger: sharpness and width of the intervals (Table 4)"
    ] = bna_variations.intervals()
    tables["Handwritten digits, chessboard, known trigger: poisoned images and size (Table 2)"] = (
        bna_variations.strengths()
    )
    tables[
        "Handwritten digits, chessboard, known trigger: which divergence is minimised (Table 10)"
    ] = bna_variations.forms()


def _digits(attacks, seeds: int, unit, tables: dict, checks: list[Check], details: dict) -> None:
    """Victims of the attacks and clean twins of every seed, all to one; `unit(planting)` examines
    one."""
    names = (*attacks, None)
    found = {a: [unit(Planting(attack=a, seed=seed)) for seed in range(seeds)] for a in names}
    every = [result for attack in names for result in found[attack]]
    tables["Handwritten digits: detection over class pairs (Fig. 4)"] = [
        bna_rows.detection_row(r) for r in every
    ]
    attacked = [result for attack in attacks for result in found[attack]]
    tables["Handwritten digits: correction (Table 1)"] = [
        row for attack in attacks for row in average(attack, found[attack])
    ]
    tables["Handwritten digits: triggered images told apart at test time (Table 5)"] = [
        bna_rows.strip_row(r) for r in attacked
    ]
    tables["Handwritten digits: mean divergence of penultimate activations (Table 9)"] = [
        row for r in attacked for row in bna_rows.divergence_rows(r)
    ]
    for attack in attacks:
        checks += _check_digits(attack, found[attack], tables)
    named = sum(bool(r["scan"]["targets"]) for r in found[None])
    checks.append(Check("digits: clean twins in which a target is named", named, 0, "exactly"))
    details["digits"] = every


def _check_digits(attack: str, results: list[dict[str, Any]], tables: dict) -> list[Check]:
    """The stated figures of one attack's victims; adds to `tables` the one that no bar judges."""
    right = sum(r["scan"]["targets"] == [r["target"]] for r in results)
    name = f"digits, {attack}: victims with the right target and no other"
    checks = [Check(name, right, len(results), "exactly")]
    missing = sum(r["estimated"] is None for r in results)
    name = f"digits, {attack}: victims without an estimated trigger"
    checks.append(Check(name, missing, 0, "exactly"))
    pairs = [(r["before"], r["estimated"]) for r in results if r["estimated"] is not None]
    if not pairs:
        return checks
    rate = max(after["attack_success_rate"] for _, after in pairs)
    below = lambda figure: float(
        np.mean([before["clean_accuracy"] - after[figure] for before, after in pairs])
    )
    gap, drop = below("source_inference_accuracy"), below("clean_accuracy")
    figure = f"{attack}, estimated trigger: worst ASR"
    if attack == "badnets":
        tables.setdefault(REPORTED, []).append({"figure": figure, "value": rate})
    else:
        checks.append(Check(f"digits, {figure}", rate, 0.05, "at most"))
    return [
        *checks,
        Check(f"digits, {attack}: mean SIA below clean accuracy", gap, 0.05, "at most"),
        Check(f"digits, {attack}: mean drop of clean accuracy", drop, 0.01, "at most"),
    ]


def average(attack: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Table 1's rows of an attack: means over victims, and the worst ASR."""
    rows = []
    for which in ("before", "known", "estimated"):
        found = [r[which] for r in results if r.get(which)]
        if not found:
            continue
        mean = lambda figure, found=found: float(np.mean([one[figure] for one in found]))
        rows.append(
            {
                "attack": attack,
                "trigger": {"before": "(before)"}.get(which, which),
                "victims": len(found),
                "ACC": mean("clean_accuracy"),
                "ASR": mean("attack_success_rate"),
                "ASR worst": max(one["attack_success_rate"] for one in found),
                "SIA": mean("source_inference_accuracy"),
            }
        )
    return rows


def _all_to_all(tables: dict, checks: list[Check], details: dict) -> None:
    """Every class leads to the next one."""
    found = [
        bna_rows.unit(Planting(attack=attack, all_to_all=True))
        for attack in ("badnets", "chessboard")
    ]
    tables["Handwritten digits, all-to-all: detection over class pairs (Fig. 5)"] = [
        bna_rows.detection_row(r) for r in found
    ]
    tables["Handwritten digits, all-to-all: correction"] = [
        row for r in found for row in bna_rows.correction_rows(r)
    ]
    for result in found:
        missed = 10 - len(
            {tuple(p) for p in result["scan"]["pairs"]} & {tuple(p) for p in result["planted"]}
        )
        checks.append(Check(f"{result['name']}: pairs missed", missed, 0, "exactly"))
    details["all_to_all"] = found


def _narrow(tables: dict, details: dict) -> None:
    """Table 1's rows that two cores can do."""
    found = [bna_rows.unit(Planting(size="narrow", attack=attack)) for attack in bna_rows.ATTACKS]
    tables["CIFAR-10 images, ResNet-18 of width 8: detection over class pairs"] = [
        bna_rows.detection_row(r) for r in found
    ]
    tables["CIFAR-10 images, ResNet-18 of width 8: correction (Table 1)"] = [
        row for r in found for row in bna_rows.correction_rows(r)
    ]
    tables["CIFAR-10 images, ResNet-18 of width 8: told apart at test time (Table 5)"] = [
        bna_rows.strip_row(r) for r in found
    ]
    details["narrow"] = found
