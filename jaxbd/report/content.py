"""What a report page can show, as plain values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """The verdict on one model.

    Attributes:
      name: what the reader calls the model.
      verdict: "backdoored", "clean" or "inconclusive".
      targets: classes called attacked.
      classes: one mapping a class, as in scan.json: "class" int, "name", "attack_success_rate" in [0, 1] (of the
        strongest level), "score"; and where known "levels" {level: rate}.
      threshold, doubt: of `detect.Config`; lines in the chart.
      sha256: of the model's weights.
      seconds: {"compile", "run", "total"}, each optional.
      n_images: images the rates were measured on.
      searched: the trigger family in words, e.g. "3x3 patches at random places".
    """

    name: str
    verdict: str
    targets: Sequence[int] = ()
    classes: Sequence[Mapping[str, Any]] = ()
    threshold: float | None = None
    doubt: float | None = None
    sha256: str = ""
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    n_images: int | None = None
    searched: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repaired:
    """One row of the repair table.

    Attributes:
      method: its name.
      clean_accuracy, attack_success_rate: (before, after) in [0, 1]; None where not measured.
      seconds: as in `Scan`.
      n_clean, n_triggered: the rates' denominators.
      note: e.g. what the method was given that a defender would not have.
    """

    method: str
    clean_accuracy: tuple[float | None, float | None] = (None, None)
    attack_success_rate: tuple[float | None, float | None] = (None, None)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    n_clean: int | None = None
    n_triggered: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triggers:
    """Triggers to look at. Images are float in [0, 1] or uint8.

    Attributes:
      samples: {level: [n, h, w, C]}, drawn from the recovered distribution; panel and maps.
      original: [h, w, C], the trigger that was planted, where known.
      clean, stamped: [m, H, W, C] each, the same images without and with a recovered trigger.
    """

    samples: Mapping[Any, np.ndarray] = dataclasses.field(default_factory=dict)
    original: np.ndarray | None = None
    clean: np.ndarray | None = None
    stamped: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """Everything a page can show. What is absent leaves out its section.

    Attributes:
      title: of the page.
      scans, repairs, triggers: see there.
      curves: {name: {"step": [S], "values": {line: [S]}}}, a chart each; `name` is also the axis label, so lines of
        one chart share a unit (e.g. "loss" with one line a level).
      settings: nested, shown as tables.
      seeds: {what: seed}.
      versions, device: of the run; those of this process when None.
      notes: further paragraphs of plain text below the verdict.
    """

    title: str
    scans: Sequence[Scan] = ()
    repairs: Sequence[Repaired] = ()
    triggers: Triggers | None = None
    curves: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] | None = None
    device: str | None = None
    notes: Sequence[str] = ()
