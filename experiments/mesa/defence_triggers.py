"""Does unlearning hold for every trigger? The 51 binary 3x3 patterns (Qiao et al. 2019, Fig. 4).

Claim of the paper (CIFAR-10, ResNet-18, c = 0): ASR of 92.3-99.8 % falls to at most 9.1 % with any
sub-model, to a mean of 3.4 % and at most 5.9 % with the 0.9 sub-model; retraining with the true
trigger leaves 2.4 % on average, with single reversed triggers 2.4-51.4 % over their runs.

    python -m experiments.mesa.defence_triggers --size digits            # all 51, about 25 minutes
    python -m experiments.mesa.defence_triggers --size cpu --count 4     # about 15 minutes
    python -m experiments.mesa.defence_triggers --smoke

Times are on 2 cores.
"""

import dataclasses

import jax
import numpy as np

from experiments import units
from experiments.scale import bench
from jaxbd.attacks import badnets
from jaxbd.pipelines import compare

NAME = "mesa/defence-triggers"


def one_trigger(
    setting: bench.Bench, pattern: int, seed: int, baseline_runs: int, steps: int | None = None
) -> dict:
    """Plants one pattern with target 0 and repairs the victim in every way."""
    key = jax.random.fold_in(jax.random.key(seed), pattern)
    case, _ = bench.victim(setting, key, badnets.Config(pattern=pattern, target=0))
    scan_config = dataclasses.replace(setting.size.scan, steps=steps or setting.size.scan.steps)
    found = bench.sub_models(jax.random.fold_in(key, 3), case, scan_config)
    repair = dataclasses.replace(
        setting.size.repair, num_steps=steps or setting.size.repair.num_steps
    )
    comparison = compare.Comparison(
        unlearning=repair,
        levels=scan_config.levels,
        runs=baseline_runs,
        batch_size=setting.size.batch_size,
    )
    rows, _ = compare.repair_all(
        units.start_run(NAME), jax.random.fold_in(key, 4), case, found, comparison
    )
    return {
        "pattern": pattern,
        "sub-model rates": found.level_rates[0],
        "repairs": [dataclasses.asdict(row) for row in rows],
    }


def summary(results: list[dict]) -> list[dict]:
    """Per method: mean, lowest and highest ASR over triggers (over all runs for the single
    triggers), accuracy."""
    rows = []
    for position, first in enumerate(results[0]["repairs"]):
        mine = [result["repairs"][position] for result in results]
        rows.append(
            {
                "repair": first["method"],
                "triggers": len(mine),
                "clean accuracy": float(np.mean([row["clean_accuracy"] for row in mine])),
                "ASR mean": float(np.mean([row["attack_success_rate"] for row in mine])),
                "ASR lowest": float(min(row["attack_success_rate"] for row in mine)),
                "ASR highest": float(max(row["worst"] for row in mine)),
            }
        )
    return rows


def run(
    size: bench.SizeName,
    count: int = 51,
    data: str | None = None,
    seed: int = 0,
    baseline_runs: int = 3,
) -> dict:
    """The first `count` patterns, spread evenly over the 51; resumable."""
    setting = bench.make(size, data, seed)
    patterns = badnets.binary_patterns()
    chosen = [
        patterns[i] for i in np.unique(np.linspace(0, len(patterns) - 1, count).round().astype(int))
    ]
    settings = [units.settings_of(setting.size), seed, baseline_runs]
    results = [
        units.unit(
            f"{NAME}-{size}",
            f"trigger{pattern}",
            [settings, pattern],
            lambda pattern=pattern: one_trigger(setting, pattern, seed, baseline_runs),
        )
        for pattern in chosen
    ]
    return {
        "size": size,
        "seed": seed,
        "settings": settings[0],
        "patterns": chosen,
        "rows": summary(results),
        "results": results,
    }


def main(
    size: bench.SizeName = "digits",
    count: int = 51,
    data: str | None = None,
    seed: int = 0,
    baseline_runs: int = 3,
    smoke: bool = False,
) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    if smoke:
        rows = summary([one_trigger(bench.make("digits", seed=seed), 170, seed, 1, steps=3)])
    else:
        rows = run(size, count, data, seed, baseline_runs)["rows"]
    print(units.table(rows))


if __name__ == "__main__":
    units.cli(main)
