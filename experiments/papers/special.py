"""Rows of the papers' tables that are no single repair: STRIP's, MESA's comparison of sub-models,
and what `jaxbd repair` does by default.

"strip" tells triggered images apart at test time (BNA Table 5). "mesa-levels" unlearns with every
level's sub-model, their mixture, single reversed triggers and the true one (MESA Fig. 4, appendix
B); the attacked class is told, as in the paper. "default" scans for classes and unlearns in rounds
that check themselves; after an inconclusive scan it repairs the classes with one sign, and without
a trigger it clips.
"""

import dataclasses
from typing import Any

import jax

from experiments import units
from experiments.bna import bna_rows
from experiments.papers import ledger, runs, victims
from experiments.papers.judge import judge
from experiments.papers.sizes import Size
from experiments.papers.victim import Victim
from experiments.papers.victim import modules as victim_modules
from experiments.papers.victim import settings as victim_settings
from jaxbd import files
from jaxbd.detection import strip
from jaxbd.pipelines import compare, evidence, hold, repair, scan
from jaxbd.repairs import unlearn

DEFAULT = "default"
NAMES = ("strip", "mesa-levels", DEFAULT)
MODULES = {
    "strip": ("jaxbd.detection.strip",),
    "mesa-levels": ("jaxbd.pipelines.scan", "jaxbd.repairs.unlearn", "jaxbd.inversion.pixel"),
    DEFAULT: (
        "experiments.papers.judge",
        "jaxbd.attacks.amplified",
        "jaxbd.pipelines.hold",
        "jaxbd.pipelines.scan",
        "jaxbd.repairs.clip",
        "jaxbd.repairs.unlearn",
    ),
}


def _settings(name: str, size: Size) -> Any:
    """(settings of the method, …) of a row."""
    if name == "strip":
        return strip.Config(), size.strip_images
    if name == DEFAULT:
        search = dataclasses.replace(scan.PRESETS["quick"], **size.scans.get("class", {}))
        return search, hold.Config()
    changes = {**size.scans.get("class", {}), "method": "mesa"}
    searching = dataclasses.replace(scan.PRESETS[size.told], **changes)
    preset = unlearn.released if size.told == "released" else unlearn.quick
    return searching, preset(**size.repairs.get("unlearn", {}))


def unit(victim: Victim, name: str) -> ledger.Unit:
    """The unit of a row."""
    first, second = _settings(name, victim.made_of)
    stated = {
        "victim": victim_settings(victim),
        "method": name,
        "config": [
            units.settings_of(first),
            second if isinstance(second, int) else units.settings_of(second),
        ],
        "batch_size": victim.made_of.batch_size,
    }
    modules = (*victim_modules(victim), __name__, *MODULES[name])
    folder = f"{victim.size}/special"
    return ledger.Unit(folder, f"{victim.name}-{name}", files.plain(stated), modules)


def measure(victim: Victim, name: str) -> dict[str, Any]:
    """The row."""
    case, (first, second) = victims.make(victim), _settings(name, victim.made_of)
    if name == "strip":
        few = jax.tree.map(lambda leaf: leaf[:second], case.test)
        found = bna_rows.measure_strip(case._replace(test=few), first)
        return {"tpr": found["true_positive_rate"], "fpr": found["false_positive_rate"]}
    if name == DEFAULT:
        return _repair_by_default(victim, case, first, second)
    run = runs.start_run(f"{victim.size}-{victim.name}-{name}", ledger.work(unit(victim, name)))
    key = jax.random.key(9000 + victim.seed)
    search, held = bna_rows.divide(case)
    config = dataclasses.replace(first, targets=(victim.aim,))
    found = scan.scan(run, jax.random.fold_in(key, 0), case.victim, search, held, config)
    # Differs from paper: three single reversed triggers instead of ten
    comparison = compare.Comparison(
        unlearning=second, levels=config.levels, runs=3, batch_size=victim.made_of.batch_size
    )
    rows, _ = compare.repair_all(run, jax.random.fold_in(key, 1), case, found, comparison)
    runs.forget_run(f"{victim.size}-{victim.name}-{name}")
    return {
        "levels": {
            row.method: {
                "accuracy": row.clean_accuracy,
                "asr": row.attack_success_rate,
                "worst": row.worst,
                "seconds": row.seconds_run,
            }
            for row in rows
        },
        "named_rate": float(found.rates[victim.aim]),
    }


def _repair_by_default(
    victim: Victim, case: compare.Case, search: scan.ScanConfig, config: hold.Config
) -> dict[str, Any]:
    """The row of `jaxbd repair` without flags, after its scan."""
    name = f"{victim.size}-{victim.name}-{DEFAULT}"
    run = runs.start_run(name, ledger.work(unit(victim, DEFAULT)))
    key = jax.random.key(9000 + victim.seed)
    searched, held = bna_rows.divide(case)
    found = scan.scan(run, jax.random.fold_in(key, 0), case.victim, searched, held, search)
    named = found.decision.targets
    known = [each for target in named for each in evidence.every_trigger(found, target)]
    known = known or evidence.of_leads(found)
    targets = list(dict.fromkeys(each.target for each in known))
    row: dict[str, Any] = {
        "verdict": found.decision.verdict,
        "named": targets,
        "search_seconds": sum(found.seconds),
    }
    made, repairing = None, jax.random.fold_in(key, 1)
    if known:
        norms = None if found.located is None else found.located.norms
        done = hold.repair(
            run, repairing, case.victim, searched, known, config, held=held, norms=norms
        )
        made = done.repaired
        row |= {"end": done.end, "rounds": len(done.rounds) - 1}
    elif row["verdict"] != "clean":
        method, settings = hold.without_trigger(config.max_drop)
        made = repair.repair(run, repairing, case.victim, searched, [], method.name, settings)
        row["note"] = f"no trigger found, {method.name} instead"
    else:
        row["note"] = "called clean"
    runs.forget_run(name)
    seconds = {} if made is None else {"seconds": sum(made.seconds)}
    return {**judge(case, made, patch=victim.plan.is_patch), **row, **seconds}
