"""Twenty digit models scanned in full and with cells that retire once their outcome is decided.

Claim: the verdict on each of 10 victims and 10 clean twins is that of the full run, while the
images pushed through the victims fall at least 3-fold; what is unlearned from the retired cells is
unlearned as well.

    python -m experiments.scale.retire
    python -m experiments.scale.retire --smoke   # one victim and its twin, few steps; no claim

Victims and scans are those of `digits_five_seeds`, ten seeds of them. The stopping rule's constants
were chosen on victims of other seeds, 100 and above.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tyro

from experiments import units
from experiments.mesa import digits_five_seeds
from experiments.mesa.digits_five_seeds import SPEC, Settings
from jaxbd.base import Batch, Key, Suspect, Variables
from jaxbd.interop import folder
from jaxbd.inversion import stopping
from jaxbd.models import build
from jaxbd.pipelines import compare, evidence, plant, repair, scan

NAME = "scale/retire"
SEEDS = 10
WAYS = ("full", "retiring")
LEAST_SAVING = 3.0
SHORT = digits_five_seeds.SMOKE
SMOKE = dataclasses.replace(
    SHORT,
    scan=dataclasses.replace(
        SHORT.scan, steps=8, mesa=dataclasses.replace(SHORT.scan.mesa, stop_after=2)
    ),
)


def case_of(seed: int, settings: Settings) -> tuple[Key, compare.Case, Suspect]:
    """One seed's key, its victim and the clean twin; trained once, then stored under `runs/`."""

    def train(name: str, key: Key, images: Batch, attack: Any) -> Variables:
        path = _path(f"seed{seed}-{name}", settings)
        if folder.is_model(path):
            return folder.load(path)[1]
        trained = plant.train(
            units.start_run(NAME),
            name,
            key,
            build.net(SPEC),
            images,
            settings.training,
            attack=attack,
        )
        notes = {"training": units.settings_of(settings.training)}
        folder.save(path, SPEC, trained.variables, notes)
        return trained.variables

    return digits_five_seeds.plant_seed(seed, settings, train)


def _path(name: str, settings: Settings) -> pathlib.Path:
    """Where a model lies that was trained by these settings."""
    training = json.dumps(units.settings_of(settings.training), sort_keys=True)
    digest = hashlib.sha256(training.encode()).hexdigest()
    return units.RUNS / NAME / "models" / f"{name}-{digest[:8]}"


def configs(settings: Settings) -> dict[str, scan.ScanConfig]:
    """The scan without and with the stopping rule."""
    whole = dataclasses.replace(settings.scan.mesa, stop_after=0)
    full = dataclasses.replace(settings.scan, mesa=whole, retire=False)
    return {"full": full, "retiring": dataclasses.replace(settings.scan, retire=True)}


def one_seed(seed: int, settings: Settings) -> dict:
    """Both scans of a victim and of its twin, and what unlearning the victim's triggers comes to
    after each."""
    key, case, twin = case_of(seed, settings)
    run = units.start_run(NAME)
    found: dict[str, Any] = {"seed": seed, "target": case.target}
    for way, config in configs(settings).items():
        for name, suspect in (("victim", case.victim), ("twin", twin)):
            started = time.perf_counter()
            scan_key = jax.random.fold_in(key, 4)
            scanned = scan.scan(run, scan_key, suspect, case.defence, case.test, config)
            found[f"{name} {way}"] = {
                **_summarise(scanned),
                "seconds": time.perf_counter() - started,
            }
            if name == "victim":
                repair_key = jax.random.fold_in(key, 5)
                found[f"repair {way}"] = _repair(repair_key, case, scanned, settings)
    return found


def _summarise(found: scan.Scan) -> dict:
    steps = np.isfinite(found.infos.confidence).sum(0)
    return {
        **digits_five_seeds.summarise(found),
        "steps": steps.reshape(found.level_rates.shape),
        "image_steps": found.image_steps,
    }


def _repair(key: Key, case: compare.Case, found: scan.Scan, settings: Settings) -> dict:
    """Clean accuracy and ASR of the victim after the mixture of its triggers is unlearned."""
    result = repair.repair(
        units.start_run(NAME),
        key,
        case.victim,
        case.defence,
        [evidence.mix_equally(found, case.target)],
        "unlearn",
        settings.repair,
    )
    return dataclasses.asdict(compare.judge(case, result.variables))


def summary(results: list[dict], levels: tuple[float, ...]) -> dict:
    """The table, a row per model, and the figures that are checked."""
    pairs = [
        (result, name, *(result[f"{name} {way}"] for way in WAYS))
        for result in results
        for name in ("victim", "twin")
    ]
    rows = [_row(*pair) for pair in pairs]
    reached = [[np.asarray(one["level_rates"]) >= levels for one in pair[2:]] for pair in pairs]
    total = lambda way: sum(row[f"image-steps, {way}"] for row in rows)
    repaired = {way: [result[f"repair {way}"] for result in results] for way in WAYS}
    mean = lambda way, name: float(np.mean([rates[name] for rates in repaired[way]]))
    return {
        "rows": rows,
        "models": len(rows),
        "same_verdict": sum(row["full"] == row["retiring"] for row in rows),
        "saving": total("full") / total("retiring"),
        "least_saving": min(row["saving"] for row in rows),
        "cells_lost": int(sum((full & ~short).sum() for full, short in reached)),
        "cells_reached": int(sum(full.sum() for full, _ in reached)),
        **{f"asr_after_repair_{way}": mean(way, "attack_success_rate") for way in WAYS},
        **{f"clean_accuracy_after_repair_{way}": mean(way, "clean_accuracy") for way in WAYS},
    }


def _row(result: dict, name: str, full: dict, short: dict) -> dict:
    """The full and the retiring scan of one model."""
    return {
        "model": f"{name} {result['seed']}",
        "target": result["target"] if name == "victim" else "",
        "full": _words(full),
        "retiring": _words(short),
        "highest rate, full": float(np.max(full["rates"])),
        "highest rate, retiring": float(np.max(short["rates"])),
        "image-steps, full": full["image_steps"],
        "image-steps, retiring": short["image_steps"],
        "saving": full["image_steps"] / short["image_steps"],
        "seconds, full": full["seconds_run"],
        "seconds, retiring": short["seconds_run"],
    }


def _words(scan: dict) -> str:
    """The verdict with its targets."""
    return " ".join([scan["verdict"], *map(str, scan["targets"])])


def run(seeds: int = SEEDS) -> dict:
    """All seeds, resumable, and their summary."""
    settings = Settings()
    known = {"settings": units.settings_of(settings), "rule": rule(settings)}
    results = [
        units.unit(NAME, f"seed{seed}", [seed, known], lambda seed=seed: one_seed(seed, settings))
        for seed in range(seeds)
    ]
    return {**known, "seeds": results, **summary(results, settings.scan.levels)}


def rule(settings: Settings) -> dict:
    """The constants of the stopping rule, which the figures depend on too."""
    names = ("RATES", "REACHED", "CALM", "FAR", "RISING", "STILL")
    after = configs(settings)["retiring"].modelled().stop_after
    return {**{name.lower(): getattr(stopping, name) for name in names}, "stop_after": after}


def main(seeds: int = SEEDS, smoke: bool = False) -> int:
    """Runs the experiment and prints its table; 1 where the claim is missed."""
    units.use_cache()
    found = summary([one_seed(0, SMOKE)], SMOKE.scan.levels) if smoke else run(seeds)
    print(units.table(found["rows"]))
    print(
        "\n".join(
            f"{name}: {value}"
            for name, value in found.items()
            if name not in ("rows", "seeds", "settings", "rule")
        )
    )
    return int(
        not smoke and (found["same_verdict"] < found["models"] or found["saving"] < LEAST_SAVING)
    )


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
