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
      classes: one mapping a class, as in scan.json: "class" int, "name", "attack_success_rate" in
        [0, 1] (of the strongest level), "score"; and where known "levels" {level: rate},
        "mask_norm", "rate_without_trigger" in [0, 1] and "margin_p", the p-value of its margin.
      threshold, doubt: of `detect.Config`; lines in the chart.
      sha256: of the model's weights.
      seconds: {"compile", "run", "total"}, each optional.
      n_images: images the rates were measured on.
      searched: the trigger family in words, e.g. "3x3 patches at random places".
      signs: classes that show each sign, of `detection.verdict.SIGNS`; None where none were asked
        for, {} is not the same.
      p_value: that no margin stands out.
      leads: classes with one sign; natural: classes that small patches lead to and nobody is known
        to have planted, see `detection.verdict.Judgement`.
      decided_by: what decided, in words.
      remedy: what would decide an open verdict; repair: the command that repairs the model.
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
    signs: Mapping[str, Sequence[int]] | None = None
    p_value: float | None = None
    leads: Sequence[int] = ()
    natural: Sequence[int] = ()
    decided_by: str = ""
    remedy: str = ""
    repair: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repaired:
    """One row of the repair table.

    Attributes:
      method: its name.
      clean_accuracy, attack_success_rate: (before, after) in [0, 1]; None where not measured.
      source_inference_accuracy: share in [0, 1] of triggered images that the repaired net gives
        their own class.
      true_positive_rate, false_positive_rate: shares in [0, 1] of triggered images, and of clean
        images of the target, that a guarded net flags. A column is shown where one row has a value.
      seconds: as in `Scan`.
      n_clean, n_triggered: the rates' denominators.
      note: e.g. what the method was given that a defender would not have.
      file: where the repaired model lies; "" for a row that is no model to use.
    """

    method: str
    clean_accuracy: tuple[float | None, float | None] = (None, None)
    attack_success_rate: tuple[float | None, float | None] = (None, None)
    source_inference_accuracy: float | None = None
    true_positive_rate: float | None = None
    false_positive_rate: float | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    n_clean: int | None = None
    n_triggered: int | None = None
    note: str = ""
    file: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairScores:
    """How far each pair of classes stands out in one search.

    Attributes:
      search: its name, e.g. "neural-cleanse".
      scores: [K, K] (source, target), anomaly scores; nan where there is none, as on the diagonal.
      names: K names of classes, or () for their numbers alone.
      detected: (source, target) pairs called attacked.
      threshold: score above which a pair is taken for one.
    """

    search: str
    scores: np.ndarray
    names: Sequence[str] = ()
    detected: Sequence[tuple[int, int]] = ()
    threshold: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One neuron of one net: its activations on clean and on triggered images.

    Attributes:
      net: what the reader calls the net.
      channel: which one of the layer.
      clean, triggered: activations [n] and [m]; values that are not finite are not drawn.
      total_variation: between the two distributions, in [0, 1].
      note: a sentence for the panel's caption.
    """

    net: str
    channel: int
    clean: np.ndarray
    triggered: np.ndarray
    total_variation: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """What a correction of activations (BNA) did to one neuron.

    Attributes:
      layer: its name.
      suspect, corrected: the same neuron before and after.
      others: further nets to compare with, such as a clean one.
    """

    layer: str
    suspect: Panel
    corrected: Panel
    others: Sequence[Panel] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """What the two generators of an erasure made at one time. Images are float in [0, 1] or uint8.

    Attributes:
      step: iterations done.
      samples: [n, H, W, C], of the sample generator.
      triggers: [n, h, w, C], of the trigger generator; mid-grey changes nothing, see
        `erase.triggers`.
    """

    step: int
    samples: np.ndarray
    triggers: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erased:
    """An erasure without data (DHBE).

    Attributes:
      moments: what was generated, in order of time; see `erase.Album`.
      amplified: {copies of the planted trigger on an image: attack success rate (before, after) in
        [0, 1]}; None where not measured.
      note: a paragraph below the heading, e.g. which net it is about.
    """

    moments: Sequence[Moment] = ()
    amplified: Mapping[int, tuple[float | None, float | None]] = dataclasses.field(
        default_factory=dict
    )
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """The smallest mask that works, of one class.

    Attributes:
      mask: [H, W, 1] in [0, 1]; pattern: [H, W, C], what it blends in.
      norm: its L1 norm; median: that of the masks of all classes searched, None where unknown.
    """

    mask: np.ndarray
    pattern: np.ndarray
    norm: float
    median: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triggers:
    """Triggers to look at. Images are float in [0, 1] or uint8.

    Attributes:
      samples: {level: [n, h, w, C]}, drawn from the recovered distribution; panel and maps.
      original: [h, w, C], the trigger that was planted, where known.
      clean, stamped: [m, H, W, C] each, the same images without and with a recovered trigger.
      captions: m pairs (true class, class that the model answers to the stamped image), as people
        read them; () where unknown.
      target: the class they lead to, as people read it.
      mask: the smallest mask of that class.
    """

    samples: Mapping[Any, np.ndarray] = dataclasses.field(default_factory=dict)
    original: np.ndarray | None = None
    clean: np.ndarray | None = None
    stamped: np.ndarray | None = None
    captions: Sequence[tuple[str, str]] = ()
    target: str = ""
    mask: Mask | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """Everything a page can show. What is absent leaves out its section.

    Attributes:
      title: of the page.
      scans, pairs, repairs, activations, erased, triggers: see there.
      curves: {name: {"step": [S], "values": {line: [S]}}}, a chart each; `name` is also the axis
        label, so lines of one chart share a unit (e.g. "loss" with one line a level).
      settings: nested, shown as tables.
      seeds: {what: seed}.
      versions, device: of the run; those of this process when None.
      notes: further paragraphs of plain text below the verdict.
    """

    title: str
    scans: Sequence[Scan] = ()
    pairs: Sequence[PairScores] = ()
    repairs: Sequence[Repaired] = ()
    activations: Activations | None = None
    erased: Erased | None = None
    triggers: Triggers | None = None
    curves: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] | None = None
    device: str | None = None
    notes: Sequence[str] = ()
