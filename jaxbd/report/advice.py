"""A page's advice to its reader: the headline, and the sentences below it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbd.report.content import Content, Repaired, Scan

WORKS = 0.1
"""Attack success rate at or above which the page does not recommend a repaired model."""
UNSEEN = (
    "These searches do not cover triggers that depend on the image (a warp, a filter, an object in"
    " the scene), or attacks that lead to many classes at once."
)


def headline(content: Content) -> str:
    """The page's headline: what to do."""
    scans, bad = content.scans, [scan for scan in content.scans if scan.verdict == "backdoored"]
    if not scans:
        return content.title
    if bad:
        which = "this model" if len(scans) == 1 else ", ".join(f"“{scan.name}”" for scan in bad)
        use = "; use the repaired file" if usable(content.repairs) else ""
        return f"Do not deploy {which}{use}"
    if all(scan.verdict == "clean" for scan in scans):
        return "Nothing found" if len(scans) == 1 else f"Nothing found in {len(scans)} models"
    return "Undecided" if len(scans) == 1 else f"Undecided for {_count_open(scans)} models"


def _count_open(scans: Sequence[Scan]) -> str:
    return f"{sum(scan.verdict == 'inconclusive' for scan in scans)} of {len(scans)}"


def usable(repairs: Sequence[Repaired]) -> Repaired | None:
    """The repaired model to use: the first that has a file and on which the trigger fails."""
    for row in repairs:
        rate = row.attack_success_rate[1]
        if row.file and rate is not None and rate < WORKS:
            return row
    return None


def lead(content: Content) -> list[str]:
    """The sentences below the headline: the reason, and the next step."""
    scans = content.scans
    bad = [scan for scan in scans if scan.verdict == "backdoored"]
    lines = [_accuse(scan) for scan in bad]
    repaired = usable(content.repairs)
    if bad and repaired is not None:
        (_, rate), (before, after) = repaired.attack_success_rate, repaired.clean_accuracy
        lines.append(
            f"The repaired file is “{repaired.file}”: the trigger now works on {percent(rate)} of"
            f" images, and accuracy went from {percent(before)} to {percent(after)}."
        )
    elif bad and bad[0].repair:
        lines.append(f"Next: {bad[0].repair}, then scan the repaired file.")
    if bad or not scans:
        return lines
    for scan in scans:
        name = f"{scan.name}: " if len(scans) > 1 else ""
        if scan.verdict != "clean":
            lines.append(name + (scan.remedy or "the searches do not decide it") + ".")
    if all(scan.verdict == "clean" for scan in scans):
        lines += [f"Searched: {scan.searched}." for scan in scans[:1] if scan.searched]
        lines.append(UNSEEN)
    return [line[:1].upper() + line[1:] for line in lines]


def _accuse(scan: Scan) -> str:
    """A sentence on the classes that the backdoor leads to."""
    rows = {row["class"]: row for row in scan.classes}
    classes = ", ".join(class_name(rows.get(k, {"class": k})) for k in scan.targets)
    rates = [rows.get(k, {}).get("attack_success_rate") for k in scan.targets]
    # the mask and the margin can name a class although no small patch works on it
    works = (
        f", on {', '.join(map(percent, rates))} of the images tried"
        if rates and all(does_work(rate) for rate in rates)
        else ""
    )
    return f"It has a backdoor: a trigger turns images of other classes into {classes}{works}."


def highest_rate(row: Mapping[str, Any]) -> float | None:
    """Success rate, in [0, 1], of a class's strongest trigger: patches, mask or perturbation of the
    whole image; None if none was measured.

    Args:
      row: the class's entry in scan.json.
    """
    names = ("attack_success_rate", "mask_rate", "additive_rate")
    rates = [row[name] for name in names if row.get(name) is not None]
    return max((rate for rate in rates if np.isfinite(rate)), default=None)


def does_work(rate: float | None) -> bool:
    """Whether a trigger works on at least half of the images."""
    return rate is not None and rate >= 0.5


def describe_natural(scan: Scan) -> str:
    """Sentences on small patches that nobody is known to have planted; "" if there are none."""
    if not scan.natural:
        return ""
    rows = {row["class"]: row for row in scan.classes}
    each = ", ".join(
        f"{class_name(rows.get(k, {'class': k}))}"
        f" ({percent(rows.get(k, {}).get('attack_success_rate'))})"
        for k in scan.natural
    )
    return (
        f"Small patches also lead to {each}. Neither the trigger size nor the margin of such a"
        " class is unusual, and clean models have such patches too: nobody is known to have planted"
        " them."
    )


def class_name(row: Mapping[str, Any]) -> str:
    """A class as named in a sentence."""
    name = str(row.get("name") or "")
    return f"class {row['class']}" + (f" (“{name}”)" if name not in ("", str(row["class"])) else "")


def percent(rate: float | None) -> str:
    """0.123 -> "12.3 %" with a non-breaking space; a dash if there is no number."""
    return "–" if rate is None or not np.isfinite(rate) else f"{100 * rate:.1f}\N{NO-BREAK SPACE}%"
