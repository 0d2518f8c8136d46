"""The content of a report page, as plain values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """The verdict on one model.

    Attributes:
      name: name of the model for the reader.
      verdict: "backdoored", "clean" or "inconclusive".
      targets: attacked classes.
      classes: one mapping per class, as in scan.json: "class" int, "name", "attack_success_rate" in
        [0, 1] (of the strongest level), "score"; and if known "levels" {level: rate},
        "mask_norm", "rate_without_trigger" in [0, 1] and "margin_p", the p-value of its margin.
      threshold, doubt: of `detect.Config`; drawn as lines in the chart.
      sha256: of the model's weights.
      seconds: {"compile", "run", "total"}, each optional.
      n_images: number of images the rates were measured on.
      searched: the trigger family as text, e.g. "3x3 patches at random places".
      signs: the classes that show each sign of `detection.verdict.SIGNS`; None if the scan did not
        look for signs, {} if it found none.
      p_value: p-value of the hypothesis that no margin stands out.
      leads: classes with one sign; natural: classes reached by small patches that nobody is known
        to have planted, see `detection.verdict.Judgement`.
      decided_by: what decided the verdict, as text.
      remedy: what would decide an inconclusive verdict; repair: the command that repairs the model.
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
      method: name of the method.
      clean_accuracy, attack_success_rate: (before, after) in [0, 1]; None where not measured.
      source_inference_accuracy: share in [0, 1] of triggered images that the repaired net assigns
        to their true class.
      true_positive_rate, false_positive_rate: shares in [0, 1] of triggered images, and of clean
        images of the target, that a guarded net flags. A column is shown if any row has a value.
      seconds: as in `Scan`.
      n_clean, n_triggered: denominators of the rates.
      note: e.g. information the method used that a defender would not have.
      file: path of the repaired model; "" if the row is not a usable model.
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
      search: name of the search, e.g. "neural-cleanse".
      scores: [K, K] (source, target), anomaly scores; nan where there is none, as on the diagonal.
      names: K class names, or () for the numbers only.
      detected: attacked pairs (source, target).
      threshold: score above which a pair is suspected.
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
      net: name of the net for the reader.
      channel: channel within the layer.
      clean, triggered: activations [n] and [m]; values that are not finite are not drawn.
      total_variation: distance between the two distributions, in [0, 1].
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
      layer: name of the layer.
      suspect, corrected: the same neuron before and after.
      others: further nets to compare with, such as a clean one.
    """

    layer: str
    suspect: Panel
    corrected: Panel
    others: Sequence[Panel] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """Output of an erasure's two generators at one step. Images are float in [0, 1] or uint8.

    Attributes:
      step: iterations done so far.
      samples: [n, H, W, C], from the sample generator.
      triggers: [n, h, w, C], from the trigger generator; mid-grey changes nothing, see
        `erase.triggers`.
    """

    step: int
    samples: np.ndarray
    triggers: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erased:
    """An erasure without data (DHBE).

    Attributes:
      moments: generated images over time; see `erase.Album`.
      amplified: {copies of the planted trigger on an image: attack success rate (before, after) in
        [0, 1]}; None where not measured.
      note: a paragraph below the heading, e.g. which net it refers to.
    """

    moments: Sequence[Moment] = ()
    amplified: Mapping[int, tuple[float | None, float | None]] = dataclasses.field(
        default_factory=dict
    )
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """The smallest working mask of one class.

    Attributes:
      mask: [H, W, 1] in [0, 1]; pattern: [H, W, C], what the mask blends in.
      norm: L1 norm of the mask; median: median norm over all searched classes, None if unknown.
    """

    mask: np.ndarray
    pattern: np.ndarray
    norm: float
    median: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triggers:
    """Triggers to display. Images are float in [0, 1] or uint8.

    Attributes:
      samples: {level: [n, h, w, C]}, drawn from the recovered distribution; shown in the panel and
        on the maps.
      original: [h, w, C], the planted trigger, if known.
      clean, stamped: [m, H, W, C] each, the same images without and with a recovered trigger.
      captions: m pairs (true class, model's answer to the stamped image), as display names; () if
        unknown.
      target: display name of the class they lead to.
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
    """Everything a page can show. A missing part leaves out its section.

    Attributes:
      title: title of the page.
      scans, pairs, repairs, activations, erased, triggers: see these classes.
      curves: {name: {"step": [S], "values": {line: [S]}}}, one chart each; `name` is also the axis
        label, so all lines of a chart share a unit (e.g. "loss" with one line per level).
      settings: nested mapping, shown as tables.
      seeds: {use: seed}.
      versions, device: of the run; None for those of this process.
      notes: further plain-text paragraphs below the headline.
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
