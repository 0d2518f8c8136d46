"""jaxbd finds and removes backdoors in image classifiers.

    suspect = jaxbd.open_model("model.pth", images, labels)
    found = jaxbd.scan(suspect, images, labels)
    repaired = jaxbd.repair(suspect, images, labels, found)

Names are imported on first use, so that `import jaxbd` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxbd.api import evaluate, guard, open_model, repair, save_model, scan
    from jaxbd.base import Batch, Evidence, Suspect, UserError

_HOMES = {
    "jaxbd.api": ("evaluate", "guard", "open_model", "repair", "save_model", "scan"),
    "jaxbd.base": ("Batch", "Evidence", "Suspect", "UserError"),
}
__all__ = [
    "Batch",
    "Evidence",
    "Suspect",
    "UserError",
    "evaluate",
    "guard",
    "open_model",
    "repair",
    "save_model",
    "scan",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'jaxbd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
