"""BNA by its presets on one digit victim, the trigger being known: this project's, the paper's, the
released code's.

    python -m experiments.bna.bna_presets            # about a minute each on 2 cores
    python -m experiments.bna.bna_presets --smoke

Lengths are the presets' own. "bounds moved" counts the channels that have an upper bound, and those
where it is not where it started: of the released preset few, see `bna.released`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments import units
from experiments.bna import bna_cases, bna_rows
from experiments.bna.bna_cases import Planting
from jaxbd.base import Variables
from jaxbd.pipelines import compare
from jaxbd.repairs import bna

NAME = "bna/presets"
PRESETS = {"quick": bna.quick(), "paper": bna.paper(), "released": bna.released()}
VICTIM = Planting(attack="badnets")


def count_moved(corrected: Variables, start: float) -> str:
    """Upper bounds of `corrected` that are not at `start`, and all of them."""
    upper = [
        np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(corrected["bounds"])
        if getattr(path[-1], "key", None) == "upper"
    ]
    return f"{sum(int((each != start).sum()) for each in upper)} of {sum(map(np.size, upper))}"


def measure(planting: Planting, config: bna.Config) -> dict[str, Any]:
    """ACC, ASR and SIA before and after one correction with the attacker's own trigger, and how
    many bounds it moved."""
    case = bna_cases.victim(planting)
    known = bna_rows.true_triggers(case, all_to_all=False)
    nets, seconds = bna_rows.correct_known(case, known, config)
    start = config.start_upper
    return {
        "before": dataclasses.asdict(compare.judge(case, case.victim.variables)),
        "after": bna_rows.judge(case, nets),
        "moved": "" if start is None else count_moved(nets[case.target], start),
        "seconds": seconds,
    }


def row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    before, after = result["before"], result["after"]
    return {
        "preset": name,
        "ACC before": before["clean_accuracy"],
        "ASR before": before["attack_success_rate"],
        "ACC": after["clean_accuracy"],
        "ASR": after["attack_success_rate"],
        "SIA": after["source_inference_accuracy"],
        "bounds moved": result["moved"],
    }


def unit(name: str, planting: Planting = VICTIM) -> dict[str, Any]:
    """`measure` of one preset, kept under `runs/`."""
    config = PRESETS[name]
    wanted = [bna_cases.settings(planting), units.settings_of(config)]
    folder = f"{planting.name}-{name}"
    return units.unit(NAME, folder, wanted, lambda: measure(planting, config))


def run() -> list[dict[str, Any]]:
    """The table; resumable, a unit for each preset."""
    return [row(name, unit(name)) for name in PRESETS]


def main(smoke: bool = False) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    if smoke:
        short = bna.released(num_steps=2, epochs=None)
        print(units.table([row("released", measure(VICTIM, short))]))
        return
    print(units.table(run()))


if __name__ == "__main__":
    units.cli(main)
