"""Rows of the papers' tables that are no repairs: STRIP's, and MESA's comparison of sub-models.

"strip" tells triggered images apart at test time (BNA Table 5). "mesa-levels" unlearns with every
level's sub-model, their mixture, single reversed triggers and the true one (MESA Fig. 4, appendix
B); the attacked class is told, as in the paper.
"""

import dataclasses
from typing import Any

import jax

from experiments import units
from experiments.bna import bna_rows
from experiments.papers import ledger, runs, victims
from experiments.papers.sizes import Size
from experiments.papers.victim import Victim
from experiments.papers.victim import modules as victim_modules
from experiments.papers.victim import settings as victim_settings
from jaxbd import files
from jaxbd.detection import strip
from jaxbd.pipelines import compare, scan
from jaxbd.repairs import unlearn

NAMES = ("strip", "mesa-levels")
MODULES = {
    "strip": ("jaxbd.detection.strip",),
    "mesa-levels": ("jaxbd.pipelines.scan", "jaxbd.repairs.unlearn", "jaxbd.inversion.pixel"),
}


def _settings(name: str, size: Size) -> Any:
    """(settings of the method, …) of a row."""
    if name == "strip":
        return strip.Config(), size.strip_images
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
    run = runs.start_run(f"{victim.size}-{victim.name}-{name}", ledger.work(unit(victim, name)))
    key = jax.random.key(9000 + victim.seed)
    search, held = bna_rows.divide(case)
    config = dataclasses.replace(first, targets=(victim.aim,))
    found = scan.scan(run, jax.random.fold_in(key, 0), case.victim, search, held, config)
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
