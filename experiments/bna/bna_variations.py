"""BNA under other settings and stronger attacks, the trigger being known: what the correction alone
is sensitive to.

Claims (Li et al. 2023): tau and the interval width matter little (Table 4), nor does the form of
the divergence (Table 10); the correction declines slightly with the number of poisoned images and
the size of the perturbation (Table 2). The paper estimates the trigger; here it is the attacker's
own, so that nothing else varies.

    python -m experiments.bna.bna_variations            # digits
    python -m experiments.bna.bna_variations --smoke
"""

import dataclasses
from typing import Any

from experiments import units
from experiments.bna import bna_cases, bna_rows
from experiments.bna.bna_cases import Planting
from jaxbd.pipelines import compare
from jaxbd.repairs import bna

NAME = "bna/variations"
BASE = bna.Config()
INTERVALS = [(tau, width) for tau in (50.0, 150.0, 500.0) for width in (0.05, 0.1, 0.2)]
COUNTS, STRENGTHS = (3, 10, 30), (2, 4, 8, 16)


def measure(planting: Planting, config: bna.Config) -> dict[str, Any]:
    """ACC, ASR, SIA before and after, and the divergences of Table 9, for one victim and one
    setting."""
    case = bna_cases.victim(planting)
    before = compare.judge(case, case.victim.variables)
    known = bna_rows.true_triggers(case, all_to_all=False)
    nets, _ = bna_rows.correct_known(case, known, config)
    after = bna_rows.judge(case, nets)
    return {
        "ASR before": before.attack_success_rate,
        "ACC before": before.clean_accuracy,
        "ACC": after["clean_accuracy"],
        "ASR": after["attack_success_rate"],
        "SIA": after["source_inference_accuracy"],
        "divergence": bna_rows.divergence(case, nets[case.target])["penultimate"],
        "divergence before": bna_rows.divergence(case, case.victim.variables)["penultimate"],
    }


def unit(name: str, planting: Planting, config: bna.Config) -> dict[str, Any]:
    """`measure`, kept under `runs/`."""
    wanted = [bna_cases.settings(planting), units.settings_of(config)]
    return units.unit(NAME, name, wanted, lambda: measure(planting, config))


def intervals(pairs: list[tuple[float, float]] = INTERVALS) -> list[dict[str, Any]]:
    """Table 4: BadNets, over tau and width."""
    rows = []
    for tau, width in pairs:
        config = dataclasses.replace(BASE, tau=tau, width=width)
        found = unit(f"tau{tau:g}-width{width:g}", Planting(attack="badnets"), config)
        rows.append({"tau": tau, "width": width, **_rates(found)})
    return rows


def forms() -> list[dict[str, Any]]:
    """Table 10: chessboard, corrected by each divergence, measured in all three at the penultimate
    layer."""
    rows: list[dict[str, Any]] = []
    for form in ("tv", "js", "kl"):
        found = unit(
            form, Planting(attack="chessboard"), dataclasses.replace(BASE, divergence=form)
        )
        if not rows:
            rows.append({"minimised": "none (before)", **found["divergence before"]})
        rows.append({"minimised": form, **found["divergence"], **_rates(found)})
    return rows


def strengths(
    counts: tuple[int, ...] = COUNTS, sizes: tuple[int, ...] = STRENGTHS
) -> list[dict[str, Any]]:
    """Table 2: chessboard, over poisoned images per source class and over the perturbation's
    size."""
    plantings = [Planting(attack="chessboard", count=count) for count in counts]
    plantings += [Planting(attack="chessboard", strength=size) for size in sizes]
    rows = []
    for planting in plantings:
        found = unit(planting.name, planting, BASE)
        stated = bna_cases.settings(planting)
        row = {"images per class": stated["count"], "size in 1/255": stated["strength"]}
        rows.append({**row, "ASR before": found["ASR before"], **_rates(found)})
    return rows


def _rates(found: dict[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in ("ACC", "ASR", "SIA")}


def main(smoke: bool = False) -> None:
    """Runs the experiment and prints its tables."""
    units.use_cache()
    if smoke:
        found = measure(
            Planting(attack="chessboard"), dataclasses.replace(BASE, num_steps=2, epochs=None)
        )
        print(units.table([_rates(found)]))
        return
    for rows in (intervals(), forms(), strengths()):
        print(units.table(rows), "\n")


if __name__ == "__main__":
    units.cli(main)
