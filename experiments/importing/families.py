"""Every family in every form: how far jaxbd's graph is from PyTorch and onnxruntime."""

from typing import Any

from experiments import import_families, units
from experiments.reproduce import Check

TITLE = "Families: largest differences as shares of the largest value"
LOGITS, GRADIENT, ROUND_TRIP = 1e-5, 1e-3, 1e-5
LEAST = 36
"""Twelve families in three forms."""
QUICK = ("ResNet", "MobileNetV2", "ViT")


def run(quick: bool) -> tuple[dict[str, Any], list[Check]]:
    """(tables, checks)."""
    from experiments import torch_families

    families = QUICK if quick else tuple(torch_families.FAMILIES)
    found = [_measured(family, form) for family in families for form in import_families.FORMS]
    rows = [row for row in found if row]
    if not rows:
        return {}, []
    checks = [
        Check("families: rows", len(rows), len(QUICK) * 3 if quick else LEAST, "at least"),
        Check("families: logits, the worst", _worst(rows, "logits"), LOGITS, "at most"),
        Check("families: gradient, the worst", _worst(rows, "gradient"), GRADIENT, "at most"),
        Check("families: round trip, the worst", _worst(rows, "round_trip"), ROUND_TRIP, "at most"),
    ]
    size = {"part": "reads and runs ONNX and .pt2", "lines": import_families.lines()}
    return {TITLE: [_shown(row) for row in rows], "Interpreter: lines of Python": [size]}, checks


def _measured(family: str, form: str) -> dict[str, Any] | None:
    name = f"family-{family}-{form.replace(' ', '-')}"
    settings = [import_families.SIDE, import_families.IMAGES]
    return units.kept_or_none(
        "import", name, settings, lambda: import_families.measure(family, form)
    )


def _worst(rows: list[dict[str, Any]], figure: str) -> float:
    return max(row[figure] for row in rows)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its small figures as text, which four digits would hide."""
    small = ("logits", "gradient", "round_trip")
    return {
        name.replace("_", " "): f"{value:.1e}" if name in small else value
        for name, value in row.items()
    }
