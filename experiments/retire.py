"""Twenty digit models scanned in full and with cells that retire once their outcome is decided.

Claim: the verdict on each of 10 victims and 10 clean twins is that of the full run, while the images pushed through the
victims fall at least 3-fold; what is unlearned from the retired cells is unlearned as well.

    python -m experiments.retire
    python -m experiments.retire --smoke      # one victim and its twin, few steps; checks that it runs, not the claim

Victims and scans are those of `digits_five_seeds`, ten seeds of them. The stopping rule's constants were chosen on
victims of other seeds, 100 and above.
"""

import dataclasses
import hashlib
import json
import time

import jax
import numpy as np
import tyro

from experiments import units
from experiments.digits_five_seeds import SHAPE, SPEC, Settings
from experiments.digits_five_seeds import SMOKE as smoke
from jaxbd import study, supervised, workflow
from jaxbd.attacks import badnets
from jaxbd.base import Key, Variables
from jaxbd.data import digits
from jaxbd.interop import folder
from jaxbd.inversion import mesa
from jaxbd.models import build

NAME = "scale/retire"
SEEDS = 10
WAYS = ("full", "retiring")
LEAST_SAVING = 3.0
SMOKE = dataclasses.replace(
    smoke, scan=dataclasses.replace(smoke.scan, steps=8, mesa=dataclasses.replace(smoke.scan.mesa, stop_after=2))
)


def case_of(seed: int, settings: Settings) -> tuple[Key, study.Case, dict[str, Variables]]:
    """One seed's case, and the weights of the victim and of its clean twin; trained once, then kept under `runs/`."""
    parts = study.divide(digits.load(SHAPE[0]), settings.train_rows, settings.defence_rows, seed=1000 + seed)
    net, key, target = build.net(SPEC), jax.random.key(1000 + seed), seed % 10
    attack = badnets.make(SHAPE, 10, dataclasses.replace(settings.attack, target=target))
    trigger = attack.init(jax.random.fold_in(key, 1))
    poisoning = {"victim": (2, dict(attack=attack, trigger=trigger)), "twin": (3, {})}
    models = {}
    for name, (number, how) in poisoning.items():
        train = lambda number=number, how=how: study.train(
            jax.random.fold_in(key, number), net, parts.train, settings.training, **how
        )
        models[name] = _kept(f"seed{seed}-{name}", settings.training, train)
    case = study.Case(net, models["victim"], SHAPE, attack, trigger, target, parts.defence, parts.test)
    return key, case, models


def _kept(name: str, training: supervised.Config, train) -> Variables:
    """The stored weights of a model that was trained like this before, or those that `train` makes."""
    known = hashlib.sha256(json.dumps(units.settings_of(training), sort_keys=True).encode()).hexdigest()
    path = units.RUNS / NAME / "models" / f"{name}-{known[:8]}"
    if not folder.is_model(path):
        variables, _, _ = train()
        folder.save(path, SPEC, variables, {"training": units.settings_of(training)})
    return folder.load(path)[1]


def configs(settings: Settings) -> dict[str, workflow.ScanConfig]:
    """The scan without and with the stopping rule."""
    whole = dataclasses.replace(settings.scan.mesa, stop_after=0)
    full = dataclasses.replace(settings.scan, mesa=whole, retire=False)
    return {"full": full, "retiring": dataclasses.replace(settings.scan, retire=True)}


def one_seed(seed: int, settings: Settings) -> dict:
    """Both scans of a victim and of its twin, and what unlearning the victim's triggers comes to after each."""
    key, case, models = case_of(seed, settings)
    found = {"seed": seed, "target": case.target}
    for way, config in configs(settings).items():
        for name, variables in models.items():
            started = time.perf_counter()
            scan = workflow.scan(
                jax.random.fold_in(key, 4), case.net, variables, SHAPE, 10, case.defence, case.test, config,
                units.progress(NAME),
            )  # fmt: skip
            found[f"{name} {way}"] = {**_summary(scan), "seconds": time.perf_counter() - started}
            if name == "victim":
                found[f"repair {way}"] = _repaired(jax.random.fold_in(key, 5), case, scan, settings)
    return found


def _summary(scan: workflow.Scan) -> dict:
    made = np.isfinite(scan.infos.confidence).sum(0)
    return {
        "verdict": scan.decision.verdict,
        "targets": scan.decision.targets,
        "rates": scan.rates,
        "level_rates": scan.level_rates,
        "steps": made.reshape(scan.level_rates.shape),
        "image_steps": scan.image_steps,
        "seconds_compile": scan.seconds.compile,
        "seconds_run": scan.seconds.run,
    }


def _repaired(key: Key, case: study.Case, scan: workflow.Scan, settings: Settings) -> dict:
    """Clean accuracy and ASR of the victim after the mixture of its triggers is unlearned."""
    result = workflow.unlearn_trigger(
        key, case.net, case.variables, scan.inversion.stamp, workflow.equal_mixture(scan, case.target), case.defence,
        settings.repair, progress=units.progress(NAME),
    )  # fmt: skip
    return dataclasses.asdict(study.judge(case, result.variables))


def summary(results: list[dict], levels: tuple[float, ...]) -> dict:
    """The table, a row per model, and the figures that are checked."""
    rows, early = [], []
    for result in results:
        for name in ("victim", "twin"):
            full, short = (result[f"{name} {way}"] for way in WAYS)
            rows.append(
                {
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
            )
            reached, lost = (np.asarray(one["level_rates"]) >= np.array(levels) for one in (full, short))
            early.append((reached & ~lost, reached))
    total = lambda way: sum(row[f"image-steps, {way}"] for row in rows)
    repaired = {way: [result[f"repair {way}"] for result in results] for way in WAYS}
    mean = lambda way, name: float(np.mean([rates[name] for rates in repaired[way]]))
    return {
        "rows": rows,
        "models": len(rows),
        "same_verdict": sum(row["full"] == row["retiring"] for row in rows),
        "saving": total("full") / total("retiring"),
        "least_saving": min(row["saving"] for row in rows),
        "cells_lost": int(sum(lost.sum() for lost, _ in early)),
        "cells_reached": int(sum(reached.sum() for _, reached in early)),
        **{f"asr_after_repair_{way}": mean(way, "attack_success_rate") for way in WAYS},
        **{f"clean_accuracy_after_repair_{way}": mean(way, "clean_accuracy") for way in WAYS},
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
    return {**{name.lower(): getattr(mesa, name) for name in names}, "stop_after": after}


def main(seeds: int = SEEDS, smoke: bool = False) -> int:
    """Runs the experiment and prints its table; 1 where the claim is missed."""
    units.use_cache()
    found = summary([one_seed(0, SMOKE)], SMOKE.scan.levels) if smoke else run(seeds)
    print(units.table(found["rows"]))
    print(
        "\n".join(
            f"{name}: {value}" for name, value in found.items() if name not in ("rows", "seeds", "settings", "rule")
        )
    )
    return int(not smoke and (found["same_verdict"] < found["models"] or found["saving"] < LEAST_SAVING))


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
