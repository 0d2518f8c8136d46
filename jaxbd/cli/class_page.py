"""The page of a scan by class: builds `report.content` values from a scan and its scan.json."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Batch, Suspect
from jaxbd.cli import common
from jaxbd.images import to_float
from jaxbd.metrics import evaluate
from jaxbd.pipelines.scan import Scan, ScanConfig, list_classes
from jaxbd.report import content as parts

SAMPLES, IMAGES = 400, 6
"""Triggers drawn per level for the maps; example images, each with and without a trigger."""


def write(
    path: pathlib.Path,
    record: dict[str, Any],
    found: Scan,
    material: common.Material,
    config: ScanConfig,
    remedy: str,
) -> None:
    """Writes the page of one scan.

    Args:
      record: its scan.json.
      remedy: what would decide an inconclusive verdict.
    """
    from jaxbd.report import page

    name = pathlib.Path(record["model"]["path"]).name
    names = tuple(row["name"] for row in record["classes"])
    repair = f"`jaxbd repair {name} --data … --scan scan.json --out …`"
    summary = describe(name, record, config, len(material.held_out.labels))
    text = parts.Content(
        title=f"Backdoor scan of {name}",
        scans=[dataclasses.replace(summary, remedy=remedy, repair=repair)],
        triggers=show_triggers(found, material.suspect, material.held_out, names, config),
        curves=curves(found),
        settings={"scan": record["config"], "model": record["model"], "data": record["data"]},
        seeds={"scan": record["seed"]},
        versions=record["versions"],
        device=record["device"],
    )
    page.write(path, text)


def describe(name: str, record: Mapping[str, Any], config: ScanConfig, images: int) -> parts.Scan:
    """The verdict with its signs; `images` is the number of images triggers were measured on."""
    margin = record.get("margin") or {}
    p_values = margin.get("class_p_values") or [None] * len(record["classes"])
    rows = [{**row, "margin_p": p} for row, p in zip(record["classes"], p_values, strict=True)]
    signs = record.get("signs")
    if signs is None:  # a single search has nothing to show for classes that it skipped
        rows = [row for row in rows if row["attack_success_rate"] is not None]
    return parts.Scan(
        name=name,
        verdict=record["verdict"],
        targets=record["targets"],
        classes=rows,
        threshold=config.detection.threshold,
        doubt=config.detection.doubt,
        sha256=record["model"]["sha256"],
        seconds=record["seconds"],
        n_images=images,
        searched=record.get("searched", ""),
        signs=signs,
        p_value=margin.get("p_value"),
        leads=record.get("leads") or (),
        natural=record.get("natural") or (),
        decided_by=record["decided_by"],
    )


def choose_class(found: Scan) -> int:
    """The class to show triggers of: a target, else a class with one sign, else the class with the
    highest attack success rate."""
    if found.decision.targets:
        return found.decision.targets[0]
    if found.judgement is not None and found.judgement.leads:
        return found.judgement.leads[0]
    return int(np.nanargmax(found.rates))


def show_triggers(
    found: Scan,
    suspect: Suspect,
    held_out: Batch,
    names: tuple[str, ...],
    config: ScanConfig,
) -> parts.Triggers:
    """Samples at every level, the mask, and a few images with and without a trigger, all of one
    class, plus the suspect's answers."""
    target, key = choose_class(found), jax.random.key(0)
    rows, samples, state = _cells_of(found, target), {}, None
    for row in rows:
        state = jax.tree.map(lambda leaf, row=row: leaf[row], found.states)
        if config.method != "neural-cleanse":  # one fixed mask: no distribution to draw from
            level = f"{float(found.cells.level[row]):g}"
            samples[level] = np.asarray(found.inversion.sample(key, state, SAMPLES))
    labels, mask = np.asarray(held_out.labels), show_mask(found, target, config)
    chosen = _one_of_each(labels, target)
    clean = to_float(held_out.images[chosen])
    if len(rows):
        stamped = found.inversion.stamp(key, state, clean)
    elif mask is not None:  # no patches were modelled for this class
        stamped = clean * (1 - mask.mask) + mask.pattern * mask.mask
    else:
        stamped = None
    answers = _ask(suspect, stamped, names)
    return parts.Triggers(
        samples=samples,
        clean=None if stamped is None else np.asarray(clean),
        stamped=None if stamped is None else np.asarray(stamped),
        captions=[*zip((names[t] for t in labels[chosen]), answers, strict=False)],
        target=f"class {common.class_label(target, names)}",
        mask=mask,
    )


def _ask(suspect: Suspect, images: Any, names: tuple[str, ...]) -> list[str]:
    """Names of the classes the suspect predicts for float images [n, H, W, C]; [] for None."""
    if images is None:
        return []
    data = Batch(jnp.asarray(images), jnp.zeros(len(images), jnp.int32))
    answers = evaluate.logits(suspect.net, suspect.variables, data).argmax(-1)
    return [names[int(answer)] for answer in answers]


def _one_of_each(labels: np.ndarray, target: int) -> np.ndarray:
    """Positions of at most IMAGES images of other classes, from as many classes as possible."""
    others = np.flatnonzero(labels != target)
    # sorted by (rank within the class, class): the first image of every class, then the second
    rank = np.zeros(len(others), int)
    for k in np.unique(labels[others]):
        same = labels[others] == k
        rank[same] = np.arange(same.sum())
    return others[np.lexsort((labels[others], rank))][:IMAGES]


def show_mask(found: Scan, target: int, config: ScanConfig) -> parts.Mask | None:
    """The smallest mask of a class; None if no search found one."""
    if found.located is None or not np.isfinite(found.located.norms[target]):
        return None
    row = list_classes(len(found.located.norms), config).index(target)
    states = found.located.states
    return parts.Mask(
        mask=np.asarray(states.best_mask[row]),
        pattern=np.asarray(states.best_pattern[row]),
        norm=float(found.located.norms[target]),
        median=float(np.nanmedian(found.located.norms)),
    )


def _cells_of(found: Scan, target: int) -> np.ndarray:
    """Positions of a class's cells in the sweep."""
    return np.flatnonzero(np.asarray(found.cells.target) == target)


def curves(found: Scan) -> dict[str, Any]:
    """All per-step infos of the class from `choose_class`: one chart per field, one line per
    level."""
    rows = _cells_of(found, choose_class(found))
    steps = np.arange(1, len(found.infos[0]) + 1)
    name = lambda row: f"level {float(found.cells.level[row]):g}"
    if not len(rows):
        return {}
    return {
        field.replace("_", " "): {
            "step": steps,
            "values": {name(row): values[:, row] for row in rows},
        }
        for field, values in found.infos._asdict().items()
    }
