"""From a scan to the page that `--report` writes."""

import pathlib
from typing import Any

import jax
import numpy as np

from jaxbd import pairs, workflow
from jaxbd.base import Batch
from jaxbd.cli import common, show
from jaxbd.images import to_float
from jaxbd.report import content as parts
from jaxbd.report import page

SAMPLES, SHOWN = 400, 6
"""Triggers drawn per level for the maps, and images shown with and without one."""


def write(
    path: pathlib.Path,
    content: dict[str, Any],
    found: workflow.Scan,
    opened: common.Opened,
    held_out: Batch,
    config: workflow.ScanConfig,
) -> None:
    """Writes the page of one scan; `content` is its scan.json."""
    name = pathlib.Path(content["model"]["path"]).name
    summary = parts.Scan(
        name=name,
        verdict=content["verdict"],
        targets=content["targets"],
        classes=[row for row in content["classes"] if row["attack_success_rate"] is not None],
        threshold=config.detection.threshold,
        doubt=config.detection.doubt,
        sha256=content["model"]["sha256"],
        seconds=content["seconds"],
        n_images=len(held_out.labels),
        searched=show.searched(config),
    )
    text = parts.Content(
        title=f"Backdoor scan of {name}",
        scans=[summary],
        triggers=_triggers(found, held_out),
        curves=_curves(found),
        settings={"scan": content["config"], "model": content["model"], "data": content["data"]},
        seeds={"scan": content["seed"]},
        versions=content["versions"],
        device=content["device"],
    )
    page.write(path, text)


def write_pairs(
    path: pathlib.Path, content: dict[str, Any], found: pairs.PairScan, held_out: Batch, config: pairs.Config, says: str
) -> None:
    """Writes the page of a scan over pairs of classes; `content` is its scan.json, `says` its verdict in words."""
    name = pathlib.Path(content["model"]["path"]).name
    names = [row["name"] for row in content["classes"]]
    summary = parts.Scan(
        name=name,
        verdict=content["verdict"],
        targets=content["targets"],
        classes=[row for row in content["classes"] if row["attack_success_rate"] is not None],
        sha256=content["model"]["sha256"],
        seconds=content["seconds"],
        n_images=len(held_out.labels),
        searched=f"a trigger for every pair of classes ({', '.join(found.scores)})",
    )
    matrices = [
        parts.PairScores(search=search, scores=scores, names=names, detected=found.pairs, threshold=config.threshold)
        for search, scores in found.scores.items()
    ]
    text = parts.Content(
        title=f"Backdoor scan of {name}",
        scans=[summary],
        pairs=matrices,
        triggers=_estimated(found, held_out),
        settings={"scan": content["config"], "model": content["model"], "data": content["data"]},
        seeds={"scan": content["seed"]},
        versions=content["versions"],
        device=content["device"],
        notes=[says],
    )
    page.write(path, text)


def _estimated(found: pairs.PairScan, held_out: Batch) -> parts.Triggers | None:
    """A few images of its sources with and without the trigger that works best; None where none was found."""
    if not found.triggers:
        return None
    best = max(found.triggers.values(), key=lambda trigger: trigger.attack_success_rate)
    rows = np.flatnonzero(np.isin(np.asarray(held_out.labels), best.sources))[:SHOWN]
    clean = to_float(held_out.images[rows])
    stamped = best.stamp(jax.random.key(0), best.model, clean)
    return parts.Triggers(clean=np.asarray(clean), stamped=np.asarray(stamped))


def _strongest(found: workflow.Scan) -> tuple[int, np.ndarray]:
    """The class whose triggers work best, and its cells' positions in the sweep."""
    target = int(np.nanargmax(found.rates))
    return target, np.flatnonzero(np.asarray(found.cells.target) == target)


def _triggers(found: workflow.Scan, held_out: Batch) -> parts.Triggers:
    """Samples per level of the class whose triggers work best, and a few images with and without them."""
    target, rows = _strongest(found)
    key, samples = jax.random.key(0), {}
    for row in rows:
        state = jax.tree.map(lambda leaf, row=row: leaf[row], found.states)
        samples[f"{float(found.cells.level[row]):g}"] = np.asarray(found.inversion.sample(key, state, SAMPLES))
    others = np.flatnonzero(np.asarray(held_out.labels) != target)[:SHOWN]
    clean = to_float(held_out.images[others])
    stamped = found.inversion.stamp(key, state, clean)
    return parts.Triggers(samples=samples, clean=np.asarray(clean), stamped=np.asarray(stamped))


def _curves(found: workflow.Scan) -> dict[str, Any]:
    """Every per-step figure of the same cells, one chart each and one line a level."""
    _, rows = _strongest(found)
    steps = np.arange(1, len(found.infos[0]) + 1)
    name = lambda row: f"level {float(found.cells.level[row]):g}"
    return {
        field.replace("_", " "): {"step": steps, "values": {name(row): values[:, row] for row in rows}}
        for field, values in found.infos._asdict().items()
    }
