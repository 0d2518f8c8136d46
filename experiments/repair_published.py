"""Repairs of published backdoored models, judged by the attackers' own triggers on images not used.

Claim: with the best automatic choice, the attack success rate ends at 5 % or below at a cost of at
most 2 points of clean accuracy on at least four fifths of the models, and above 20 % on none.

    python -m experiments.repair_published            # hours on 2 cores; resumes
    python -m experiments.repair_published --smoke    # one model, few steps; checks that it runs
    python -m experiments.repair_published --models badnets_8_02 --methods hold clip

Needs models and images in `shared/` beside the repository. The automatic choice takes the classes
that the scan names, else those that the margins name without data; where neither names one it
clips. Settings were fixed before; no figure below chose anything. The true triggers only judge."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import units
from experiments.margin_published import MODELS
from experiments.papers import ledger
from experiments.true_triggers import SEED, TRIGGERS, images_of, judge, suspect_of, true_trigger
from experiments.verdict.published import are_there
from jaxbd import files, methods
from jaxbd.base import Batch, Evidence, Suspect, UserError
from jaxbd.metrics import relearn
from jaxbd.metrics.relearn import Config as RelearnConfig
from jaxbd.pipelines import evidence, fresh, hold, margin_scan, scan
from jaxbd.pipelines import repair as repairs
from jaxbd.pipelines.hold import Config as HoldConfig
from jaxbd.pipelines.scan import PRESETS, ScanConfig
from jaxbd.repairs import unlearn
from jaxbd.training.run import Checkpoints, Run

NAME, MODULE = "repair/published", "experiments.repair_published"
"""Folder of finished units, and this module, which is `__main__` where it runs as a program."""
HOLD, WITHOUT, BASE = "hold", "clip", "unlearn"
CLEAN, RELEARNED = "clean resnet20", 1000
"""A clean net to relearn beside, and images that judge relearning."""
LEFT_OUT = {"bna": "guards, changes no weights", "dhbe": "needs no data; has its own experiment"}
"""Repairs that have no row, and why."""
LOW, DROP, WORST, SHARE = 0.05, 0.02, 0.20, 0.8
"""The bars: attack success rate and accuracy cost of a repair that holds, highest rate of any,
share of models that must hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything the figures depend on; the scan's are those of `jaxbd scan`.

    Attributes:
      rounds: settings of one round of `hold`; None for those of `jaxbd repair`.
    """

    scan: ScanConfig = PRESETS["quick"]
    hold: HoldConfig = HoldConfig()
    rounds: unlearn.Config | None = None
    relearn: RelearnConfig = RelearnConfig()


SMOKE = Settings(
    scan=scan.ScanConfig(steps=2, locate_steps=2, batch_size=8, levels=(0.9,)),
    hold=hold.Config(rounds=1, search=fresh.Config(steps=2, patch_steps=2, additive_steps=2)),
    rounds=unlearn.rounds(num_steps=2),
    relearn=relearn.Config(every=1, num_steps=1),
)


@functools.cache
def scan_once(name: str, settings: Settings) -> scan.Scan:
    """The scan of a model; its stages are kept under `runs/`."""
    folder = units.RUNS / NAME / f"{name.replace(' ', '-')}-scan"
    saved = Checkpoints(folder, {"model": MODELS[name][0], **units.settings_of(settings.scan)})
    run = Run(progress=units.progress(NAME), checkpoints=saved)
    suspect, (defender, _) = suspect_of(name), images_of(name)
    searched, held_out = (
        Batch(defender.images[rows], defender.labels[rows])
        for rows in np.split(np.arange(len(defender.labels)), [len(defender.labels) * 3 // 4])
    )
    return scan.scan(run, jax.random.key(SEED), suspect.freeze(), searched, held_out, settings.scan)


@functools.cache
def named(name: str, settings: Settings) -> tuple[list[int], str]:
    """(classes to repair, what named them)."""
    found = scan_once(name, settings)
    if found.decision.targets:
        return found.decision.targets, "scan"
    margins = margin_scan.scan(Run(), jax.random.key(SEED), suspect_of(name), margin_scan.Config())
    if margins.outliers.classes:
        return list(margins.outliers.classes), "margins"
    return [], "nothing"


def known_of(found: scan.Scan, target: int) -> list[Evidence]:
    """All triggers that worked; for a class that the scan did not name at least its last mask."""
    try:
        return evidence.every_trigger(found, target)
    except UserError:
        assert found.located is not None
        state = found.located.states
        mask = evidence.Mask(
            jnp.asarray(state.best_mask[target]), jnp.asarray(state.best_pattern[target])
        )
        return [Evidence(target, (), evidence.stamp_mask, mask)]


def describe_scan(name: str, settings: Settings) -> dict[str, Any]:
    """What the record says of a scan."""
    found, (targets, by) = scan_once(name, settings), named(name, settings)
    return {
        "verdict": found.decision.verdict,
        "named": targets,
        "by": by,
        "norms": None if found.located is None else found.located.norms,
        "seconds": found.seconds._asdict(),
        **judge(name, suspect_of(name).variables),
    }


def repair_once(name: str, method: str, settings: Settings) -> dict[str, Any]:
    """A row: one model repaired by one method, judged."""
    suspect, (defender, _) = suspect_of(name), images_of(name)
    targets, by = named(name, settings)
    started, cpu = time.perf_counter(), time.process_time()
    run, key, row = units.start_run(NAME), jax.random.key(SEED + 1), {}
    needs = "trigger" in methods.find("repair", BASE if method == HOLD else method).needs
    if needs and not targets:
        return {"model": name, "method": method, "not run": "no class was named"}
    found = scan_once(name, settings)
    known = [each for target in targets for each in known_of(found, target)] if needs else []
    if method == HOLD:
        norms = None if found.located is None else found.located.norms
        base = (BASE, settings.rounds)
        held = hold.repair(run, key, suspect, defender, known, settings.hold, base, norms=norms)
        variables = held.repaired.variables
        row = {"end": held.end, "rounds": len(held.rounds) - 1, "course": _course(held)}
    else:
        preset = methods.find("repair", method).preset()
        made = repairs.repair(run, key, suspect, defender, known, method, preset)
        variables = made.variables
    spent = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
    row |= {**judge(name, variables), **spent}
    if method in (HOLD, WITHOUT):
        repaired = suspect._replace(variables=variables)
        row["relearn steps"] = relearn_steps(name, repaired, settings)
    return {"model": name, "method": method, "named by": by, **row}


def relearn_steps(name: str, suspect: Suspect, settings: Settings) -> int | None:
    """Steps after which a net obeys the trigger of the model `name`."""
    defender, images = images_of(name)
    _, attack, trigger = true_trigger(name)[0]
    few = Batch(images.images[:RELEARNED], images.labels[:RELEARNED])
    return relearn.relearn(
        Run(),
        jax.random.key(SEED + 2),
        suspect.net,
        suspect.variables,
        defender,
        few,
        attack,
        trigger,
        settings.relearn,
    ).steps


def _course(held: hold.Held) -> list[dict[str, Any]]:
    """What the repair itself saw, round by round."""
    return [
        {
            "accuracy": each.accuracy,
            "known": [rate for _, rate in each.rates],
            "found": [(one.kind, one.size, one.rate) for one in each.found],
            "left": len(each.left),
        }
        for each in held.rounds
    ]


def all_methods() -> list[str]:
    """The repair that checks itself, then those of the table."""
    return [HOLD, *(name for name in methods.names("repair") if name not in LEFT_OUT)]


def check(rows: list[dict[str, Any]], before: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whether the automatic choice holds: `HOLD` where a class was named, else clip. A model that
    was not measured leaves the bars unmet."""
    chosen = {}
    for name, found in before.items():
        method = HOLD if found["named"] else WITHOUT
        own = [r for r in rows if r["model"] == name and r["method"] == method and "asr" in r]
        if own:
            chosen[name] = (own[0]["asr"], found["accuracy"] - own[0]["accuracy"])
    holds = [name for name, (asr, drop) in chosen.items() if asr <= LOW and drop <= DROP]
    worst = max((asr for asr, _ in chosen.values()), default=None)
    missed = [name for name in chosen if name not in holds]
    enough = len(holds) >= SHARE * len(TRIGGERS)
    met = len(chosen) == len(TRIGGERS) and enough and worst is not None and worst <= WORST
    return {"models": len(chosen), "hold": holds, "missed": missed, "worst": worst, "met": met}


def measure(
    models: Sequence[str], wanted: Sequence[str], settings: Settings, folder: str = NAME
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the scan said of each model, a row for each model and method); finished units are kept,
    see `take_or_measure`."""
    before, rows = {}, []
    stated = units.settings_of(settings)
    for name in models:
        short = name.replace(" ", "-")
        came = take_or_measure(
            folder,
            f"{short}-scan",
            {"model": name, "scan": stated["scan"]},
            lambda name=name: describe_scan(name, settings),
        )
        before |= {} if came is None else {name: came}
        for method in wanted:
            own = stated if method == HOLD else {"scan": stated["scan"]}
            row = take_or_measure(
                folder,
                f"{short}-{method}",
                {"model": name, "method": method, **own},
                lambda name=name, method=method: repair_once(name, method, settings),
            )
            rows += [] if row is None else [row]
        if came is not None and folder == NAME and not name.startswith("gtsrb"):
            # there is no clean net of GTSRB's classes
            clean = take_or_measure(
                folder,
                f"{short}-clean-net",
                {"model": name, "relearn": stated["relearn"]},
                lambda name=name: {"steps": relearn_steps(name, suspect_of(CLEAN), settings)},
            )
            came["relearn steps, clean net"] = None if clean is None else clean["steps"]
    return before, rows


def take_or_measure(
    folder: str, name: str, settings: dict[str, Any], function: Callable[[], dict[str, Any]]
) -> dict[str, Any] | None:
    """The unit from `experiments/results/units/`, where any machine's are committed, or the result
    of `function`, which is put there.

    What other code measured is measured again, except where only kept units are asked for: then it
    is taken and marked, and a unit that is missing is None. At toy size nothing is committed.
    """
    if folder != NAME:
        return units.unit(folder, name, settings, function)
    method = settings.get("method", HOLD)
    modules = [MODULE, methods.find("repair", BASE if method == HOLD else method).path]
    unit = ledger.Unit("published/repair", name, settings, tuple(modules))
    stored = ledger.find(unit)
    if stored is not None and (units.KEPT_ONLY[0] or not stored.is_older):
        units.SECONDS[f"{folder}/{name}"] = stored.record["seconds"]
        return {**stored.result, **({"code": "older"} if stored.is_older else {})}
    if units.KEPT_ONLY[0]:
        units.miss(folder, name)
        return None
    units.say(f"{folder}/{name}: running")
    started = time.perf_counter()
    result = files.plain(function())
    ledger.write(unit, result, time.perf_counter() - started)
    return result


def as_tables(before: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """(the models as they came, the models as repaired), a row each."""
    came = [
        {"model": name, **{k: v for k, v in found.items() if k not in ("norms", "seconds")}}
        for name, found in before.items()
    ]
    return came, [{k: v for k, v in row.items() if k != "course"} for row in rows]


def main(models: tuple[str, ...] = (), methods: tuple[str, ...] = (), smoke: bool = False) -> int:
    """Runs the experiment, prints its tables; 1 where a bar is missed.

    `./scripts/reproduce verdict` writes the record.
    """
    if not are_there():
        raise UserError("the published models are not there; put them into shared/models")
    models = models or (("badnets_8_02",) if smoke else tuple(TRIGGERS))
    wanted = methods or ((HOLD,) if smoke else tuple(all_methods()))
    settings, folder = (SMOKE, f"{NAME}-smoke") if smoke else (Settings(), NAME)
    before, rows = measure(models, wanted, settings, folder)
    outcome = check(rows, before)
    for table in as_tables(before, rows):
        print(units.table(table))
    print(outcome)
    return 0 if smoke or outcome["met"] else 1


if __name__ == "__main__":
    units.cli(main)
