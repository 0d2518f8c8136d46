"""One defence of the papers' tables: a repair, where its trigger comes from, and its settings."""

import dataclasses
import functools
from typing import Any, Literal

from jaxbd import methods

Source = Literal["none", "found", "told", "known"]
"""Where a repair's trigger comes from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defence:
    """One repair with its settings.

    Attributes:
      method: of `jaxbd methods`.
      source: of the trigger.
      preset: another than the size's own.
      changes: (field, value) of its Config.
      held: (number of the defender's images, number of the draw); all of them by default.
    """

    method: str
    source: Source = "none"
    preset: str | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    held: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """What tables and files call it."""
        parts = [self.method, *([self.source] if self.source in ("told", "known") else [])]
        parts += [self.preset] if self.preset is not None else []
        parts += [f"{name}{_word(value)}" for name, value in self.changes]
        return "-".join([*parts, *([f"{self.held[0]}of{self.held[1]}"] if self.held else [])])


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is True else str(value)


@functools.cache
def method_of(name: str) -> methods.Method:
    """A repair of `jaxbd methods`; looked up once, since packages are searched each time."""
    return methods.find("repair", name)
