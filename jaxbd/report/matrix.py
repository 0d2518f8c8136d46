"""The score matrix of a scan over pairs of classes, as inline SVG."""

from collections.abc import Sequence

import numpy as np

from jaxbd.report import plots

MOST_NUMBERS = 12
"""Up to this many classes, cells show their scores and axes show class names."""


def draw(
    scores: np.ndarray,
    *,
    names: Sequence[str] = (),
    detected: Sequence[tuple[int, int]] = (),
    threshold: float | None = None,
    alt: str = "",
) -> str:
    """Scores [K, K] (source, target) as shades of one colour, with `detected` pairs framed; cells
    without a score stay empty.

    Shades run from 0 to twice the threshold, so that outliers are dark whatever the largest score.
    """
    scores = np.asarray(scores, float)
    top = 2 * threshold if threshold else max(plots.finite(scores).max(initial=0), 1e-9)
    beyond = np.nan_to_num(scores).max(initial=0) > top

    def paint(figure):
        axes, bar = figure.subplots(2, 1, height_ratios=(20, 1))
        axes.imshow(_shades(scores, top), interpolation="none")
        _frame(axes, detected, len(scores))
        if len(scores) <= MOST_NUMBERS:
            _write_numbers(axes, scores, top)
        _name_classes(axes, len(scores), names)
        ends = {0: "0", top: f"{top:.3g}" + (" or more" if beyond else "")}
        ticks = dict(
            sorted((ends | ({threshold: f"alarm {threshold:g}"} if threshold else {})).items())
        )
        bar.imshow(
            _shades(np.linspace(0, top, 256)[None], top), extent=(0, top, 0, 1), aspect="auto"
        )
        bar.set_xticks(list(ticks), list(ticks.values()))
        bar.set(yticks=[], xlabel="anomaly score")

    return plots.svg(paint, (3.5, 4.2), alt)


def _shades(values: np.ndarray, top: float) -> np.ndarray:
    """Values [h, w] as RGBA [h, w, 4]: 0 is nearly transparent, `top` or more opaque, nan
    invisible."""
    shade = np.empty((*values.shape, 4))
    shade[..., :3] = np.array(list(bytes.fromhex(plots.PALETTE[0][1:]))) / 255
    shade[..., 3] = np.where(
        np.isnan(values), 0, 0.06 + 0.94 * np.clip(np.nan_to_num(values) / top, 0, 1)
    )
    return shade


def _frame(axes, pairs: Sequence[tuple[int, int]], count: int) -> None:
    """Draws a frame around the cell of each (source, target) pair."""
    from matplotlib.patches import Rectangle

    for source, target in pairs:
        place = target - 0.5, source - 0.5
        width = 2.2 if count <= plots.MOST_CLASSES else 1
        axes.add_patch(
            Rectangle(place, 1, 1, fill=False, edgecolor=plots.HIGHLIGHT, linewidth=width, zorder=3)
        )


def _write_numbers(axes, scores: np.ndarray, top: float) -> None:
    """Writes the scores [K, K] in their cells, in white on dark cells."""
    for source, target in zip(*np.nonzero(~np.isnan(scores)), strict=True):
        score = round(float(scores[source, target]), 1) + 0.0  # turns -0.0 into 0.0
        text = f"{score:.1f}" if abs(score) < 100 else f"{score:.0f}"
        colour = "white" if score > 0.85 * top else plots.INK
        axes.text(target, source, text, ha="center", va="center", fontsize=6, color=colour)


def _name_classes(axes, count: int, names: Sequence[str]) -> None:
    """Labels both axes: with names if there is room, with every tenth number if there are many."""
    ticks = range(0, count, 1 if count <= plots.MOST_CLASSES else 10)
    row = lambda k: {
        "class": k,
        "name": names[k] if k < len(names) and count <= MOST_NUMBERS else "",
    }
    labels = [plots.class_label(row(k)) for k in ticks]
    axes.set_xticks(ticks, labels, rotation=90 if max(map(len, labels), default=0) > 2 else 0)
    axes.set_yticks(ticks, labels)
    axes.set(xlabel="target class", ylabel="source class")
