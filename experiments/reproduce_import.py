"""The import section: families of nets as ONNX and .pt2, published models by their own files and by
way of ONNX, inputs that once failed, a large net, hostile and mutated files.
"""

from typing import Any

from experiments import units
from experiments.importing import cases, exports, families, large, published, reader
from experiments.reproduce import Check

TIME = "about 50 minutes on 2 cores, 20 of them for scans; finished units are kept"
QUICK_TIME = (
    "about 4 minutes on 2 cores: three families, one published model on 2,000 images, a scan of it,"
    " fewer mutated files"
)
MODULES = {
    "published": published,
    "families": families,
    "exports": exports,
    "large": large,
    "cases": cases,
    "reader": reader,
}
PARTS = tuple(MODULES)


def run(
    quick: bool, parts: tuple[str, ...] = PARTS
) -> tuple[dict[str, Any], list[Check], dict[str, Any]]:
    """(tables by title, checks, details)."""
    tables: dict[str, Any] = {}
    checks: list[Check] = []
    for part in parts:
        found, judged = MODULES[part].run(quick)
        tables |= found
        checks += judged
    if units.MISSING:
        tables["Left out: not measured yet"] = [{"unit": name} for name in units.MISSING]
    return tables, checks, {"missing": units.MISSING}
