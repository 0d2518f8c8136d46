"""The result of a repair: measured on held-out images, written to disk, and printed."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import files
from jaxbd.base import Attack, Batch, Evidence, Net, Suspect
from jaxbd.cli import case, common, outputs, show
from jaxbd.interop import guarded
from jaxbd.interop import load as models
from jaxbd.metrics import evaluate, paired
from jaxbd.pipelines.repair import Repaired
from jaxbd.report import results


class Row(NamedTuple):
    """Figures on held-out images, under one trigger or none.

    Attributes:
      evidence: the trigger; None without one, or if the repair did not use it.
      before, after: rates of the suspect, and of the repaired net.
      change: of clean accuracy from the one to the other, which no trigger influences.
      detection: how well the guard detects triggered images; None for nets without a guard.
    """

    evidence: Evidence | None
    before: evaluate.Rates
    after: evaluate.Rates
    change: paired.Change
    detection: evaluate.Detection | None = None


def measure(
    suspect: Suspect, repaired: Repaired, evidence: list[Evidence], images: Batch, seed: int
) -> list[Row]:
    """Figures under each trigger, highest attack success rate first; only accuracy without any."""
    key = jax.random.key(seed)
    targets = repaired.guarded
    net = guarded.make(suspect.net, targets) if targets else suspect.net
    change = _compare(suspect, net, repaired, images)

    def one(known: Evidence | None) -> Row:
        attack = None if known is None else as_attack(known, suspect.classes)
        params = None if known is None else known.trigger_params
        before = evaluate.rates(key, suspect.net, suspect.variables, images, attack, params)
        after = evaluate.rates(key, net, repaired.variables, images, attack, params)
        if attack is None or not targets:
            return Row(known, before, after, change)
        flag = guarded.flag(suspect.net, targets)
        found = evaluate.detection(key, flag, repaired.variables, images, attack, params)
        return Row(known, before, after, change, found)

    rows = [one(known) for known in evidence] or [one(None)]
    return sorted(rows, key=lambda row: -(row.before.attack_success_rate or 0))


def measure_attack(
    suspect: Suspect, repaired: Repaired, attack: tuple[Attack, Any], images: Batch, seed: int
) -> Row:
    """Figures under (attack, its trigger), which may lead to several targets; only for repairs
    without a guard."""
    key = jax.random.key(seed)
    before, after = (
        evaluate.rates(key, suspect.net, variables, images, *attack)
        for variables in (suspect.variables, repaired.variables)
    )
    return Row(None, before, after, _compare(suspect, suspect.net, repaired, images))


def _compare(suspect: Suspect, net: Net, repaired: Repaired, images: Batch) -> paired.Change:
    """The change of clean accuracy from the suspect to the repaired `net`."""
    right = (
        evaluate.logits(one, variables, images).argmax(-1) == np.asarray(images.labels)
        for one, variables in ((suspect.net, suspect.variables), (net, repaired.variables))
    )
    return paired.compare(*right)


def as_attack(known: Evidence, classes: int) -> Attack:
    """The trigger as an attack on images of its source classes; all others count as clean."""
    sources = jnp.asarray(known.all_sources(classes))
    relabel = lambda labels: jnp.where(jnp.isin(labels, sources), known.target, labels)
    return Attack(
        lambda key: known.trigger_params, known.stamp, lambda key, trigger, batch: batch, relabel
    )


def figures(path: pathlib.Path) -> pathlib.Path:
    """Where the figures of a repaired model at `path` go: the case it is in, else the model folder,
    else beside the model file."""
    if case.is_case(path.parent):
        return path.parent / case.REPAIR
    if outputs.is_folder(path):
        return path / "repair.json"
    return path.with_name(f"{path.stem}.repair.json")


def save(
    path: pathlib.Path, model: models.Model, repaired: Repaired, content: dict[str, Any]
) -> dict[str, Any]:
    """Writes the repaired net in the format of `model`, then the figures; prints what the model
    file cannot hold. A guarded net is a folder or an ONNX file.

    Returns: the content of the figures file.
    """
    if not outputs.is_folder(path):
        if repaired.guarded:
            note = models.save_onnx(path, model, repaired.variables, tuple(repaired.guarded))
        else:
            note = outputs.write_model(path, model, repaired.variables)
        show.say(*outputs.list_notes(path, model, note))
        content = files.plain({**content, "repaired": common.output_record(path, path)})
        files.write_json(figures(path), content)
        return content
    written = files.plain(content)

    def fill(new: pathlib.Path) -> None:
        if repaired.guarded:
            notes = {"source_sha256": model.sha256}
            guarded.save(new, model.spec, repaired.variables, repaired.guarded, notes)
        else:
            models.save_model(new, model, repaired.variables)
        written["repaired"] = files.plain(common.output_record(new, path))
        files.write_json(new / "repair.json", written)

    outputs.write_folder(path, fill)
    if case.is_case(path.parent):
        of_case = {**written["repaired"], "path": path.name}
        files.write_json(figures(path), written | {"repaired": of_case})
    return written


def describe_rows(rows: list[Row]) -> dict[str, Any]:
    """What repair.json says about the figures; `before`, `after` and `detection` belong to the
    trigger with the highest attack success rate before the repair."""
    classes = []
    for row in rows:
        if row.evidence is None:
            continue
        one = {
            "class": row.evidence.target,
            "sources": list(row.evidence.sources),
            "before": results.rates(row.before),
            "after": results.rates(row.after),
        }
        if row.detection is not None:
            one["detection"] = results.detection(row.detection)
        classes.append(one)
    best = rows[0]
    found = {
        "before": results.rates(best.before),
        "after": results.rates(best.after),
        "accuracy_change": best.change._asdict(),
        "target": None if best.evidence is None else best.evidence.target,
        "targets": sorted({row["class"] for row in classes}),
        "classes": classes,
    }
    if best.detection is not None:
        found["detection"] = results.detection(best.detection)
    return found


def say(
    rows: list[Row], content: dict[str, Any], names: tuple[str, ...], trigger_name: str
) -> None:
    """Prints the figures before and after, what is flagged, and which triggers they refer to."""
    table, flags = [], []
    for row in rows:
        label = "images" if row.evidence is None else _label(row.evidence, names)
        table += [
            (f"{label}, before", results.rates(row.before)),
            (f"{label}, after", results.rates(row.after)),
        ]
        if row.detection is not None:
            found = dataclasses.astuple(row.detection)[:3]
            flags.append((label, *map(show.percent, found)))
    show.rates(table)
    if flags:
        columns = ("flagged", "triggered images", "clean images of the class", "all clean images")
        show.table(columns, flags)
    judged, change = content["data"]["held_out"], rows[0].change
    low, high = (f"{100 * end:+.1f}" for end in (change.low, change.high))
    show.say(
        f"Clean accuracy changed by {100 * change.change:+.1f} points on {judged} held-out images"
        f" (95 % interval {low} to {high})."
    )
    if rows[0].before.attack_success_rate is not None:
        show.say(f"Attack success rates use {trigger_name}, on {judged} held-out images.")


def _label(known: Evidence, names: tuple[str, ...]) -> str:
    return f"class {common.class_label(known.target, names)}"
