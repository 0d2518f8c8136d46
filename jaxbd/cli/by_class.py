"""The scan of one target class at a time, for `scan` and `repair`: its record, words and page."""

import pathlib
import time
from typing import Any

import numpy as np

from jaxbd.base import Evidence, Key
from jaxbd.cli import common, first_answer, show
from jaxbd.pipelines import evidence
from jaxbd.pipelines import scan as scanning
from jaxbd.pipelines.scan import Scan, ScanConfig
from jaxbd.report import results
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run

SAVE_EVERY = 15_000
"""Steps, of all cells together, between two checkpoints where no flag says otherwise."""
ROWS = 20
"""Most classes in a table."""


def default(preset: str | None = None) -> ScanConfig:
    """The settings of a preset; the usual ones where there is none of that name."""
    return scanning.PRESETS.get(preset or "", scanning.PRESETS["quick"])


def search(run: Run, key: Key, material: common.Material, config: ScanConfig) -> Scan:
    """The scan; its seconds are those one waits, with starting up and judging."""
    started = time.perf_counter()
    found = scanning.scan(run, key, material.suspect, material.search, material.held_out, config)
    waited = time.perf_counter() - started
    return found._replace(seconds=Seconds(found.seconds.compile, waited - found.seconds.compile))


def verdict_of(found: Scan) -> str:
    """clean, backdoored or inconclusive."""
    return found.decision.verdict


def targets_of(found: Scan) -> list[int]:
    """The classes called attacked."""
    return found.decision.targets


def evidence_of(found: Scan, target: int) -> list[Evidence]:
    """What the scan recovered for one class: an equal mixture of what reached its level."""
    return [evidence.mix_equally(found, target)]


def as_record(
    found: Scan, material: common.Material, config: ScanConfig, reading: common.Reading
) -> dict[str, Any]:
    """The content of scan.json."""
    content = results.scan(found, config, **common.describe(material, reading))
    content["searched"] = searched(config)
    return content


def summary(found: Scan, config: ScanConfig) -> dict[str, Any]:
    """What repair.json holds of the scan behind it."""
    return {
        "verdict": found.decision.verdict,
        "targets": found.decision.targets,
        "decided_by": found.decided_by,
        "searched": searched(config),
        "config": results.settings(config),
        "steps": found.steps,
        "seconds": results.seconds(found.seconds),
    }


def say(content: dict[str, Any], config: ScanConfig) -> None:
    """Classes, verdict, what the verdict means, time."""
    rows, listed = content["classes"], content["classes"]
    if len(rows) > ROWS:
        listed = sorted(rows, key=lambda row: -(row["attack_success_rate"] or 0))[:ROWS]
    columns, body = ["class", "name", "attack success rate", "score"], []
    masks = any("mask_norm" in row for row in rows)
    for row in listed:
        score = "–" if row["score"] is None else f"{row['score']:z.2f}"
        cells = [str(row["class"]), row["name"], show.percent(row["attack_success_rate"]), score]
        if masks:
            cells.append("–" if row["mask_norm"] is None else f"{row['mask_norm']:.1f}")
        body.append(tuple(cells))
    show.table((*columns, *(["mask size"] if masks else [])), body, left=2)
    if len(listed) < len(rows):
        show.say(f"({len(rows) - len(listed)} classes with lower rates are not listed)")
    show.say(
        verdict(content),
        f"Decided by {content['decided_by']}.",
        *_describe_margin(content),
        *_describe_natural(content),
        *_describe_calibration(content),
        f"Searched: {searched(config)}.",
    )
    show.say(
        "Not ruled out: backdoors of any other kind. “Clean” means that nothing of the searched"
        " kind works."
    )
    steps = f"{content['steps']} steps{' at most' if config.retire else ''}"
    times = show.seconds(content["seconds"])
    show.say(f"{content['cells']} cells, {steps}, {times}, {content['device']}.")


def verdict(content: dict[str, Any]) -> str:
    """The verdict in one sentence."""
    names = tuple(row["name"] for row in content["classes"])
    if content["verdict"] == "backdoored":
        return _name_targets(content, names)
    best = max(content["classes"], key=lambda row: row["attack_success_rate"] or 0)
    reach = (
        f"the strongest patches found lead {show.percent(best['attack_success_rate'])} to class"
        f" {common.class_label(best['class'], names)}"
    )
    if content["verdict"] == "clean":
        return f"CLEAN: no class stands out; {reach}."
    return f"INCONCLUSIVE: {_name_remedy(content, names, reach)}."


def _name_targets(content: dict[str, Any], names: tuple[str, ...]) -> str:
    """Which classes triggers lead to, how well those that were recovered work."""
    rows = {row["class"]: row for row in content["classes"]}
    held_out = content["data"].get("held_out")
    each = "; ".join(
        f"{show.percent(rows[target]['attack_success_rate'])} of them to class"
        f" {common.class_label(target, names)}"
        for target in content["targets"]
    )
    return (
        f"BACKDOORED: the recovered triggers send images of other classes ({held_out} held out):"
        f" {each}."
    )


def _name_remedy(content: dict[str, Any], names: tuple[str, ...], reach: str) -> str:
    """Why nothing was decided, and what would decide it."""
    leads, lacks = content.get("leads") or [], content.get("power_lacks") or []
    if lacks and not leads:
        return f"the search could not have found a backdoor: {'; '.join(lacks)}"
    if leads:
        labels = ", ".join(common.class_label(k, names) for k in leads)
        return (
            f"class {labels} shows one sign of a backdoor, {reach}; more images, more --steps and"
            " --locate-steps, other --mesa.patch sizes or --method pairs may decide it"
        )
    if content["method"] == "neural-cleanse":
        return (
            "the sizes of the masks do not tell; try --method auto, other --targets or"
            " --locate-steps"
        )
    best = max(row["attack_success_rate"] or 0 for row in content["classes"])
    if best < content["config"]["detection"]["doubt"]:
        return f"{reach}; search all classes, with more --steps"
    return f"{reach}, too much for clean and too little for an alarm; try more images and --steps"


def _describe_margin(content: dict[str, Any]) -> list[str]:
    """What the margins said, which need no images; nothing where none were searched."""
    names = tuple(row["name"] for row in content["classes"])
    if content.get("margin") is None:
        return []
    line = first_answer.headline(content["margin"], names, "")
    return [f"Margins, without images: {line}"]


def _describe_natural(content: dict[str, Any]) -> list[str]:
    """Classes that small patches reach, though no other sign tells of a backdoor."""
    names = tuple(row["name"] for row in content["classes"])
    labels = ", ".join(common.class_label(k, names) for k in content.get("natural") or [])
    if not labels:
        return []
    return [
        f"Small patches lead to class {labels} too, which nobody is known to have planted: neither"
        " its mask nor its margin is unusual."
    ]


def _describe_calibration(content: dict[str, Any]) -> list[str]:
    """How often the rule alarms on clean models; nothing without a calibration."""
    known = content.get("calibration")
    if not known or "backdoored" not in known["false_alarms"]:
        return []
    rate = known["false_alarms"]["backdoored"]
    return [
        f"Of {known['models']} clean models of the calibration {rate['alarms']} are called"
        f" backdoored ({show.percent(rate['low'])} to {show.percent(rate['high'])} of all such, at"
        " 95 % confidence)."
    ]


def explain_clean(found: Scan, config: ScanConfig, names: tuple[str, ...]) -> str:
    """What a clean or inconclusive scan means for a repair."""
    best = int(np.nanargmax(found.rates))
    rate, label = show.percent(found.rates[best]), common.class_label(best, names)
    return (
        f"(verdict {found.decision.verdict}, the strongest triggers lead {rate} to {label};"
        f" --target {best} repairs that class all the same. Searched: {searched(config)}.)"
    )


def searched(config: ScanConfig) -> str:
    """The family of triggers that a scan searches, in words."""
    patch, place = (
        f"square patches of {config.mesa.patch}x{config.mesa.patch} pixels",
        _place(config.mesa),
    )
    levels = ", ".join(f"{level:g}" for level in config.levels)
    mask = "one static trigger per class of any shape and place, the smaller the likelier"
    words = {
        "mesa": f"distributions of {patch} {place}, at confidence levels {levels}",
        "pixel": (
            f"one patch of {config.pixel.patch}x{config.pixel.patch} pixels per class"
            f" {_place(config.pixel)}"
        ),
        "neural-cleanse": mask,
        "auto": (
            f"the largest margin of every class; {mask}; then, for the likeliest classes,"
            f" distributions of {patch} where that trigger lies, at confidence levels {levels}"
        ),
    }
    only = f"; only classes {', '.join(map(str, config.targets))}" if config.targets else ""
    return words[config.method] + only


def _place(config: Any) -> str:
    """Where a method's patches are pasted."""
    if config.place == "fixed":
        return f"at row {config.row}, column {config.column}"
    return "at a place that is searched too" if config.place == "searched" else "at random places"


def write_page(
    path: pathlib.Path,
    content: dict[str, Any],
    found: Scan,
    material: common.Material,
    config: ScanConfig,
) -> None:
    """Writes the page of one scan; `content` is its scan.json."""
    from jaxbd.cli import class_page

    class_page.write(path, content, found, material, config, remedy(content))


def remedy(content: dict[str, Any]) -> str:
    """Why a verdict is open and what would decide it; "" where it is not."""
    if content["verdict"] != "inconclusive":
        return ""
    return verdict(content).removeprefix("INCONCLUSIVE: ").removesuffix(".")
