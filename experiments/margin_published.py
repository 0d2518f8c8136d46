"""The first answer without data, on published models: does the backdoor's target have an unusual
margin?

Claim: the target's largest margin stands out (corrected p <= 0.05) in all five models with a
working backdoor, no class stands out in the three without one (two clean ResNets, one fine-tuned
until its trigger fails), for two seeds each, at 600 image-steps a class and without an image.

    python -m experiments.margin_published            # 17 s of CPU a model, 60 s with 43 classes
    python -m experiments.margin_published --smoke    # one model, few steps; checks that it runs

Needs the models in `shared/` beside the repository. Starts and steps were chosen on digit nets
trained for it (seeds 100 to 165), none of which is below; no figure below chose anything."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np

from experiments import units
from experiments.verdict import published
from jaxbd import files
from jaxbd.base import UserError
from jaxbd.interop import load
from jaxbd.pipelines import margin_scan
from jaxbd.training.run import Run

NAME = "margin/published"
SEEDS = (0, 1)
MODELS = {name: (model.file, model.target) for name, model in published.MODELS.items()}
"""File and target; None without a working backdoor."""


def one_model(name: str, seed: int, config: margin_scan.Config) -> dict[str, Any]:
    """A row: what stands out, and what it cost."""
    path, target = MODELS[name]
    row = {"model": name, "seed": seed, "target": "none" if target is None else target}
    try:
        suspect = load.suspect_of(load.open_model(units.SHARED / "models" / pathlib.Path(path)))
    except UserError as error:
        return {**row, "not read": str(error)}
    started = time.process_time()
    found = margin_scan.scan(Run(), jax.random.key(seed), suspect, config)
    outliers, statistics = found.outliers, found.statistics
    order = np.argsort(-np.nan_to_num(statistics, nan=-np.inf))
    expected = [] if target is None else [target]
    return {
        **row,
        "p": outliers.p_value,
        "p of the paper": outliers.nominal,
        "named": outliers.classes,
        "beside": outliers.beside,
        "right": outliers.classes == expected,
        "largest": int(order[0]),
        "margin": statistics[order[0]],
        "next": statistics[order[1]],
        "median": np.nanmedian(statistics),
        "needed": outliers.needed,
        "excess": outliers.excess,
        "image_steps": found.image_steps,
        "compile_s": found.seconds.compile,
        "run_s": found.seconds.run,
        "cpu_s": time.process_time() - started,
        "statistics": statistics,
    }


def main(smoke: bool = False) -> None:
    """Runs the experiment, prints its table and writes `results/margin.json`."""
    if not published.are_there():
        raise UserError("the published models are not there; put them into shared/models")
    config = margin_scan.Config()
    if smoke:
        config = margin_scan.Config(starts=1, steps=2)
        rows = [one_model("badnets_8_02", 0, config)]
    else:
        rows = [
            units.unit(
                NAME,
                f"{name.replace(' ', '-')}-{seed}",
                {"config": units.settings_of(config), "seed": seed, "model": MODELS[name]},
                lambda name=name, seed=seed: one_model(name, seed, config),
                keep=lambda row: "not read" not in row,
            )
            for seed in SEEDS
            for name in MODELS
        ]
        record = {
            "config": dataclasses.asdict(config),
            "rows": rows,
            "versions": files.versions(),
            "device": files.device(),
        }
        files.write_json(units.RESULTS / "margin.json", record)
    shown = [{k: v for k, v in row.items() if k != "statistics"} for row in rows]
    print(units.table(shown))


if __name__ == "__main__":
    units.cli(main)
