"""The scan by target class, for `scan` and `repair`: its record, printed summary and page."""

import pathlib
import time
from typing import Any

import numpy as np

from jaxbd.base import Evidence, Key
from jaxbd.cli import common, first_answer, show
from jaxbd.pipelines import evidence
from jaxbd.pipelines import scan as scanning
from jaxbd.pipelines.scan import Scan, ScanConfig
from jaxbd.report import advice, results
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run

SAVE_EVERY = 15_000
"""Default steps, summed over all cells, between two checkpoints."""
ROWS = 20
"""Most classes listed in a table."""


def default(preset: str | None = None) -> ScanConfig:
    """The settings of a preset, or of "quick" if there is none of that name."""
    return scanning.PRESETS.get(preset or "", scanning.PRESETS["quick"])


def search(run: Run, key: Key, material: common.Material, config: ScanConfig) -> Scan:
    """Runs the scan; its seconds are wall-clock time, including start-up and measuring."""
    started = time.perf_counter()
    found = scanning.scan(run, key, material.suspect, material.search, material.held_out, config)
    waited = time.perf_counter() - started
    return found._replace(seconds=Seconds(found.seconds.compile, waited - found.seconds.compile))


def verdict_of(found: Scan) -> str:
    """clean, backdoored or inconclusive."""
    return found.decision.verdict


def targets_of(found: Scan) -> list[int]:
    """The attacked classes."""
    return found.decision.targets


def evidence_of(found: Scan, target: int) -> list[Evidence]:
    """What the scan recovered for one class: a mixture, in equal shares, of all triggers that
    reached their level."""
    return [evidence.mix_equally(found, target)]


def evidence_of_leads(found: Scan) -> list[Evidence]:
    """What the scan recovered for the classes with one sign."""
    return evidence.of_leads(found)


def as_record(
    found: Scan, material: common.Material, config: ScanConfig, reading: common.Reading
) -> dict[str, Any]:
    """The content of scan.json."""
    content = results.scan(found, config, **common.describe(material, reading))
    content["searched"] = searched(config)
    return content


def summary(found: Scan, config: ScanConfig) -> dict[str, Any]:
    """What repair.json says about the scan it is based on."""
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
    """Prints the classes, the verdict, what it means, and the time."""
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
        "Other kinds of backdoor are not ruled out. “Clean” means that no trigger of the searched"
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
        f"the strongest patches found send {show.percent(best['attack_success_rate'])} of images to"
        f" class {common.class_label(best['class'], names)}"
    )
    if content["verdict"] == "clean":
        return f"CLEAN: no class stands out; {reach}."
    return f"INCONCLUSIVE: {_name_remedy(content, names, reach)}."


def _name_targets(content: dict[str, Any], names: tuple[str, ...]) -> str:
    """Which classes the triggers lead to, and how well the recovered ones work."""
    rows = {row["class"]: row for row in content["classes"]}
    held_out = content["data"].get("held_out")
    each = "; ".join(
        f"{show.percent(advice.highest_rate(rows[target]))} of them to class"
        f" {common.class_label(target, names)}"
        for target in content["targets"]
    )
    return (
        f"BACKDOORED: the recovered triggers send images of other classes ({held_out} held out):"
        f" {each}."
    )


def _name_remedy(content: dict[str, Any], names: tuple[str, ...], reach: str) -> str:
    """Why the scan is inconclusive, and what would decide it."""
    leads, lacks = content.get("leads") or [], content.get("power_lacks") or []
    if lacks and not leads:
        return f"the search could not have found a backdoor: {'; '.join(lacks)}"
    if leads:
        labels = ", ".join(common.class_label(k, names) for k in leads)
        return (
            f"class {labels} shows one sign of a backdoor; {reach}; more images, more --steps and"
            " --locate-steps, other --mesa.patch sizes, --method pairs, or --calibration with clean"
            " models of this kind may decide it"
        )
    if content["method"] == "neural-cleanse":
        return (
            "the mask sizes do not decide it; try --method auto, other --targets or --locate-steps"
        )
    best = max(row["attack_success_rate"] or 0 for row in content["classes"])
    if best < content["config"]["detection"]["doubt"]:
        return f"{reach}; search all classes, with more --steps"
    return f"{reach}, too much for clean and too little for an alarm; try more images and --steps"


def _describe_margin(content: dict[str, Any]) -> list[str]:
    """What the margins say, which need no images; empty if none were searched."""
    names = tuple(row["name"] for row in content["classes"])
    if content.get("margin") is None:
        return []
    line = first_answer.headline(content["margin"], names, "")
    return [f"Margins, without images: {line}"]


def _describe_natural(content: dict[str, Any]) -> list[str]:
    """Classes that small patches reach although no other sign points to a backdoor."""
    names = tuple(row["name"] for row in content["classes"])
    labels = ", ".join(common.class_label(k, names) for k in content.get("natural") or [])
    if not labels:
        return []
    return [
        f"Small patches also lead to class {labels}, but neither its mask nor its margin is"
        " unusual: nobody is known to have planted them."
    ]


def _describe_calibration(content: dict[str, Any]) -> list[str]:
    """How often the rule raises a false alarm on clean models; empty without a calibration."""
    known = content.get("calibration")
    if not known or "backdoored" not in known["false_alarms"]:
        return []
    rate = known["false_alarms"]["backdoored"]
    return [
        f"The rule calls {rate['alarms']} of the calibration's {known['models']} clean models"
        f" backdoored (95 % interval {show.percent(rate['low'])} to {show.percent(rate['high'])})."
    ]


def explain_clean(found: Scan, config: ScanConfig, names: tuple[str, ...]) -> str:
    """What a clean or inconclusive scan means for a repair."""
    best = int(np.nanargmax(found.rates))
    rate, label = show.percent(found.rates[best]), common.class_label(best, names)
    return (
        f"(Verdict {found.decision.verdict}; the strongest triggers send {rate} of images to class"
        f" {label}; --target {best} repairs that class anyway. Searched: {searched(config)}.)"
    )


def searched(config: ScanConfig) -> str:
    """The family of triggers that a scan searches, as text."""
    patch, place = (
        f"square patches of {config.mesa.patch}x{config.mesa.patch} pixels",
        _place(config.mesa),
    )
    levels = ", ".join(f"{level:g}" for level in config.levels)
    mask = "one static trigger per class, of any shape and place, as small as possible"
    words = {
        "mesa": f"distributions of {patch} {place}, at confidence levels {levels}",
        "pixel": (
            f"one patch of {config.pixel.patch}x{config.pixel.patch} pixels per class"
            f" {_place(config.pixel)}"
        ),
        "neural-cleanse": mask,
        "auto": (
            f"the largest margin of every class; {mask}; then, for the most suspicious classes,"
            f" distributions of {patch} at that trigger's place, at confidence levels {levels}"
        ),
    }
    only = f"; only classes {', '.join(map(str, config.targets))}" if config.targets else ""
    return words[config.method] + only


def _place(config: Any) -> str:
    """Where a method's patches are pasted."""
    if config.place == "fixed":
        return f"at row {config.row}, column {config.column}"
    return "at a place found by the search" if config.place == "searched" else "at random places"


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
    """Why a verdict is inconclusive and what would decide it; "" for any other verdict."""
    if content["verdict"] != "inconclusive":
        return ""
    return verdict(content).removeprefix("INCONCLUSIVE: ").removesuffix(".")
