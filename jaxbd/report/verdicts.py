"""The section of a page on one verdict, from plain values."""

from typing import Any

import numpy as np

from jaxbd.detection import verdict
from jaxbd.report import advice, plots
from jaxbd.report.advice import class_name, percent
from jaxbd.report.content import Scan

MOST_SIGNS = 12
"""Most classes in the table of signs."""


def view(scan: Scan) -> dict[str, Any]:
    """The template's values for one scan; `chart` is SVG, or None."""
    tones = {"backdoored": "bad", "clean": "good"}
    levels = list(dict.fromkeys(level for row in scan.classes for level in row.get("levels") or ()))
    sentence = describe_reason(scan)
    alt = (
        f"Attack success rate per class of {scan.name}. {sentence} The table below has all numbers."
    )
    lines: dict[str, Any] = dict(targets=scan.targets, threshold=scan.threshold, doubt=scan.doubt)
    rows = [{"levels": {}, "score": None, "name": "", **row} for row in scan.classes]
    tried = [row for row in rows if row["attack_success_rate"] is not None]
    return {
        "scan": scan,
        "tone": tones.get(scan.verdict, "unsure"),
        "sentence": sentence,
        "natural": advice.describe_natural(scan),
        "signs": [] if scan.signs is None else sign_rows(scan),
        "levels": levels,
        "rows": rows,
        "chart": plots.class_bars(tried, alt=alt, **lines) if tried else None,
        "hidden": max(0, len(tried) - plots.MOST_CLASSES),
        "shown": len(tried) if len(tried) < len(rows) else None,
    }


def sign_rows(scan: Scan) -> list[dict[str, Any]]:
    """Per class, what each search found and whether it is a sign; if there are many classes, only
    those with the most signs and the highest scores."""
    signs = scan.signs or {}
    shows = lambda name, k: k in signs.get(name, ())
    rows = [
        {
            "label": plots.class_label(row),
            "target": row["class"] in scan.targets,
            "natural": row["class"] in scan.natural,
            "signs": sum(shows(name, row["class"]) for name in verdict.SIGNS),
            "small": (row.get("mask_norm"), row.get("score"), shows("small", row["class"])),
            "patch": (
                row.get("attack_success_rate"),
                row.get("rate_without_trigger"),
                shows("patch", row["class"]),
            ),
            "margin": (row.get("margin_p"), shows("margin", row["class"])),
        }
        for row in scan.classes
    ]
    if len(rows) <= MOST_SIGNS:
        return rows
    return sorted(rows, key=lambda row: (-row["signs"], -(row["small"][1] or 0)))[:MOST_SIGNS]


def is_measured(rate: float | None) -> bool:
    """Whether `rate` is a finite number."""
    return rate is not None and bool(np.isfinite(rate))


SIGN_WORDS = {
    "small": "the mask that leads there is far smaller than the others",
    "patch": "small patches lead there on images that no search saw",
    "margin": "its margin stands out",
}
"""Sign -> what it says about the class that shows it."""


def _describe_leads(scan: Scan) -> str:
    """Which classes an inconclusive verdict points to, and by which sign; "" if none."""
    shows = lambda name, k: k in (scan.signs or {}).get(name, ())
    found = [
        f"{class_name(row)}: {SIGN_WORDS[name]}"
        for row in scan.classes
        for name in verdict.SIGNS
        if row["class"] in scan.leads and shows(name, row["class"])
    ]
    if not found:
        return ""
    return (
        "The answer is not clear-cut: one sign of three, which clean models sometimes show too,"
        f" points to {'; to '.join(found)}."
    )


def describe_reason(scan: Scan) -> str:
    """The reason for the verdict, in one or two sentences."""
    ranked = sorted(scan.classes, key=lambda row: -np.nan_to_num(row["attack_success_rate"] or 0))
    if not ranked:
        return ""
    rate = lambda row: percent(row["attack_success_rate"])
    hits = [row for row in ranked if row["class"] in scan.targets]
    if scan.signs and hits and not any(advice.does_work(r["attack_success_rate"]) for r in hits):
        named = ", ".join(class_name(row) for row in hits)
        return f"The signs below name {named}; small patches hardly reach it."
    if scan.verdict == "backdoored" and hits:
        found = "; ".join(
            f"{rate(row)} of images of other classes turn into {class_name(row)}" for row in hits
        )
        others = [row for row in ranked if row["class"] not in scan.targets]
        # a search that ended early has no rates for the other classes
        rest = next((row for row in others if is_measured(row["attack_success_rate"])), None)
        text = f"With the recovered triggers, {found}."
        return text + (
            f" The next highest class, {class_name(rest)}, reaches {rate(rest)}." if rest else ""
        )
    if scan.verdict == "inconclusive" and (leads := _describe_leads(scan)):
        return leads
    line = "" if scan.threshold is None else f" The alarm is at {100 * scan.threshold:.0f} %."
    opening = (
        "No class stands out: the"
        if scan.verdict == "clean"
        else "The answer is not clear-cut: the"
    )
    return (
        f"{opening} strongest triggers found, for {class_name(ranked[0])}, reach"
        f" {rate(ranked[0])}.{line}"
    )
