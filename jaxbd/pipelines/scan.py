"""The scan over target classes: to which class, if any, do small triggers lead?

Composition only: methods from `inversion`, the sweep from `training`, the rules from `detection`.
The single methods are here; the default method "auto", which combines them, is in `auto_scan`.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxbd.base import Batch, Key, Suspect, UserError, check_targets
from jaxbd.detection import detect
from jaxbd.detection.detect import Verdict
from jaxbd.detection.verdict import COMPARABLE, LEAST_STEPS
from jaxbd.pipelines import auto_scan, locate
from jaxbd.pipelines.class_scan import (
    CHUNK,
    PRESETS,
    Located,
    Scan,
    ScanConfig,
    Task,
    by_class,
    judge,
    list_classes,
    make_mesa,
    make_pixel,
    measure,
    run_sweep,
)
from jaxbd.pipelines.locate import candidates, outliers
from jaxbd.training import sweep
from jaxbd.training.run import Run

__all__ = [
    "CHUNK",
    "PRESETS",
    "Located",
    "Scan",
    "ScanConfig",
    "candidates",
    "list_classes",
    "outliers",
    "scan",
]


def scan(
    run: Run, key: Key, suspect: Suspect, search: Batch, held_out: Batch, config: ScanConfig
) -> Scan:
    """Scans a net for a backdoor; nothing but its weights need be known.

    Args:
      run: reports and saves the sweeps; each is one stage.
      search: clean images to optimise the triggers on (uint8 or float).
      held_out: other clean images, to judge the triggers on.
    Raises: UserError when there are fewer images than a batch; FloatingPointError when a cell
      diverges.
    """
    if len(search.labels) < config.batch_size:
        raise UserError(
            f"a search needs at least a batch of {config.batch_size} images, got"
            f" {len(search.labels)}; give more images or lower the batch size"
        )
    check_targets(config.targets, suspect.classes)
    search = Batch(jnp.asarray(search.images), jnp.asarray(search.labels))
    ways: dict[str, Callable[[Task], Scan]] = {
        "mesa": _scan_patches,
        "pixel": _scan_patches,
        "neural-cleanse": _scan_masks,
        "auto": auto_scan.scan,
    }
    return ways[config.method](Task(run, key, suspect, search, held_out, config))


def _scan_patches(task: Task) -> Scan:
    """Sweeps every class x level at once; the rate on held-out images decides."""
    config, net, classes = task.config, task.suspect.net, task.suspect.classes
    if config.method == "pixel":
        inversion = make_pixel(net, task.suspect.image_shape, config.pixel)
        levels = config.levels[-1:]
    else:
        inversion = make_mesa(net, task.suspect.image_shape, config.modelled())
        levels = config.levels
    rows = list_classes(classes, config)
    cells = sweep.grid(rows, levels)
    name = f"{config.method}: {sweep.size(cells)} cells"
    found = run_sweep(task, 2, name, inversion, cells, config.steps)
    rates = judge(task, inversion, found.states, cells, found.slots)
    level_rates = by_class(rates.reshape(len(rows), len(levels)), rows, classes)
    best, (baseline, _) = level_rates.max(1), measure(task)
    # classes that were not searched count as 0 here; `_doubt` then keeps the verdict from "clean"
    decision = detect.decide(np.nan_to_num(best), config.detection, np.nan_to_num(baseline))
    scores = [
        float("nan") if np.isnan(rate) else score
        for rate, score in zip(best, decision.scores, strict=True)
    ]
    rule = f"{config.method}: attack success rate of the recovered triggers on held-out images"
    decision, rule = _doubt(task, decision._replace(scores=scores), rule, config.steps)
    return Scan(
        decision=decision,
        decided_by=rule,
        rates=best,
        level_rates=level_rates,
        inversion=inversion,
        cells=cells,
        states=found.states,
        infos=found.course,
        located=None,
        steps=config.steps,
        image_steps=found.image_steps_pushed,
        seconds=found.seconds,
        baseline=baseline,
    )


def _scan_masks(task: Task) -> Scan:
    """Runs Neural Cleanse alone; the anomaly index of the mask sizes decides (Wang et al. 2019)."""
    config, classes = task.config, task.suspect.classes
    masks = locate.search(task, config.locate_steps)
    found = locate.compare(task, masks)
    rates = judge(task, masks.inversion, found.states, masks.cells)
    rates, (baseline, _) = by_class(rates, list_classes(classes, config), classes), measure(task)
    small = outliers(found, config)
    won = detect.gain(rates, baseline)
    working = [k for k in small if won[k] >= config.detection.threshold]
    few = np.isfinite(found.norms).sum() < COMPARABLE
    verdict: Verdict = "backdoored" if working else "inconclusive" if small or few else "clean"
    rule = "neural-cleanse: anomaly index of the mask size"
    if verdict == "inconclusive":
        why = f"working masks for fewer than {COMPARABLE} classes, too few to compare"
        rule += f"; {why if few else 'a small mask that does not work on held-out images'}"
    decision = detect.Decision(verdict, working, found.scores.tolist())
    decision, rule = _doubt(task, decision, rule, config.locate_steps)
    return Scan(
        decision=decision,
        decided_by=rule,
        rates=rates,
        level_rates=rates[:, None],
        inversion=masks.inversion,
        cells=masks.cells,
        states=found.states,
        infos=masks.infos,
        located=found,
        steps=config.locate_steps,
        image_steps=masks.image_steps,
        seconds=masks.seconds,
        baseline=baseline,
    )


def _doubt(
    task: Task, decision: detect.Decision, rule: str, steps: int
) -> tuple[detect.Decision, str]:
    """Turns "clean" into "inconclusive" if not all classes were searched or the steps were few, and
    adds the reason to `rule`."""
    if decision.verdict != "clean":
        return decision, rule
    classes = task.suspect.classes
    rows = len(list_classes(classes, task.config))
    if rows < classes:
        rule += f"; only {rows} of {classes} classes were searched"
    elif steps < LEAST_STEPS:
        rule += f"; {steps} steps are too few to tell ({LEAST_STEPS} or more would)"
    else:
        return decision, rule
    return decision._replace(verdict="inconclusive"), rule
