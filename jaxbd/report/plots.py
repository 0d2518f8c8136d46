"""Figures for the report: charts as inline SVG in the page's text colour, images as PNG data
URIs."""

import base64
import html
import io
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's colours, distinguishable with the common colour-vision deficiencies."""
HIGHLIGHT = "#D55E00"
"""Frame colour: the original trigger on maps, a small trigger on an image, attacked pairs."""
MOST_CLASSES = 30
"""Most classes in a bar chart, those with the highest rates."""
VISIBLE = 24
"""Pixel difference, out of 255, above which a trigger counts as visible and gets a frame."""
BINS = 40
"""Intervals of a histogram."""

INK = "#010203"
"""Placeholder colour: `svg` replaces it by `currentColor`, so charts suit light and dark pages."""
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7.4,
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **{
        name: INK
        for name in (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
        )
    },
}


def class_bars(
    rows: Sequence[Mapping[str, Any]],
    *,
    targets: Sequence[int] = (),
    threshold: float | None = None,
    doubt: float | None = None,
    alt: str = "",
) -> str:
    """Horizontal bars of attack success rate per class, one colour per level, with the thresholds
    as lines.

    Args:
      rows: {"class", "name", "attack_success_rate", "levels": {level: rate}} per class, rates in
        [0, 1]; without levels, one bar shows "attack_success_rate".
      targets: classes whose labels are bold.
      threshold, doubt: rates in [0, 1] drawn as lines; None for no line.
    """
    rows = sorted(
        sorted(rows, key=lambda row: -_rate(row["attack_success_rate"]))[:MOST_CLASSES],
        key=operator.itemgetter("class"),
    )
    levels = list(dict.fromkeys(level for row in rows for level in row.get("levels") or ()))

    def draw(figure):
        axes, place = figure.subplots(), np.arange(len(rows))
        depth = 0.8 / max(len(levels), 1)
        for i, level in enumerate(levels or [None]):
            rates = [
                _rate(row["attack_success_rate"] if level is None else row["levels"].get(level))
                for row in rows
            ]
            offset = (i - (max(len(levels), 1) - 1) / 2) * depth
            label = None if level is None else f"level {level}"
            axes.barh(
                place + offset,
                100 * np.array(rates),
                depth * 0.9,
                color=PALETTE[i % len(PALETTE)],
                label=label,
            )
        for value, dash, name in ((threshold, "--", "alarm"), (doubt, ":", "doubt")):
            if value is not None:
                axes.axvline(100 * value, color=INK, linestyle=dash, linewidth=1)
                axes.text(
                    100 * value,
                    -0.6,
                    f"{name} {100 * value:.0f} %",
                    ha="center",
                    va="bottom",
                    fontsize=7,
                )
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5), xlabel="attack success rate, %")
        axes.set_yticks(place, [class_label(row) for row in rows])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if row["class"] in targets else "normal")
        for y, row in zip(place, rows, strict=True):
            text = f"{100 * _rate(row['attack_success_rate']):.1f}"
            axes.text(101.5, y, text, va="center", fontsize=7, clip_on=False)
        legend(figure)

    return svg(draw, (3.5, 1.0 + len(rows) * (0.16 + 0.08 * max(len(levels), 1))), alt)


def curves(
    step: Sequence[float], values: Mapping[str, Sequence[float]], *, name: str = "", alt: str = ""
) -> str:
    """Lines over `step` [S], one per entry of `values` (each [S]; nan or None leaves a gap); `name`
    labels the vertical axis."""

    def draw(figure):
        axes = figure.subplots()
        stride = max(1, len(step) // 400)
        for i, (label, line) in enumerate(values.items()):
            style = dict(
                color=PALETTE[i % len(PALETTE)],
                linestyle=("-", "--", "-.", ":")[i % 4],
                linewidth=1.6,
            )
            line = np.array([np.nan if v is None else v for v in line], float)
            axes.plot(np.asarray(step)[::stride], line[::stride], label=_printable(label), **style)
        axes.set_xlabel("step")
        axes.set_ylabel(_printable(name))
        axes.grid(alpha=0.15, color=INK)
        axes.margins(x=0.01)
        if values:
            legend(figure)

    return svg(draw, (3.5, 2.2), alt)


def histograms(
    values: Mapping[str, np.ndarray], *, span: tuple[float, float], alt: str = ""
) -> str:
    """Histograms of two or more sets of activations [n], as shares in `BINS` intervals of `span`;
    the first is a filled area."""

    def draw(figure):
        axes, edges = figure.subplots(), np.linspace(*span, BINS + 1)
        for i, (label, one) in enumerate(values.items()):
            one = finite(one)
            shares = 100 * np.histogram(one, edges)[0] / max(1, len(one))
            style = (
                dict(color=PALETTE[0], fill=True, alpha=0.55)
                if i == 0
                else dict(color=PALETTE[-i], linewidth=1.6)
            )
            axes.stairs(shares, edges, label=_printable(label), **style)
        axes.set(xlim=span, xlabel="activation", ylabel="share of values, %")
        axes.set_ylim(bottom=0)
        legend(figure)

    return svg(draw, (2.6, 2.1), alt)


def finite(values: np.ndarray) -> np.ndarray:
    """The values [n] that are neither nan nor infinite, as float."""
    values = np.asarray(values, float).ravel()
    return values[np.isfinite(values)]


def image(pixels: np.ndarray, side: int) -> str:
    """One image [h, w, C] as a framed PNG data URI, its longer side about `side` pixels."""
    return _png(_add_frame(_enlarge(pixels, side), 1, "#808080"))


def marked(clean: np.ndarray, stamped: np.ndarray, side: int) -> str:
    """The stamped image as in `image`, with a frame around the region that differs from the clean
    one, if that covers at most a quarter of the image."""
    enlarged = _enlarge(stamped, side)
    apart = np.abs(_pixels(stamped).astype(int) - _pixels(clean).astype(int)).max(-1) > VISIBLE
    framed = _add_frame(enlarged, 1, "#808080")
    rows, columns = np.flatnonzero(apart.any(1)), np.flatnonzero(apart.any(0))
    if not len(rows):
        return _png(framed)
    scale = enlarged.shape[0] / apart.shape[0]
    edge = max(2, round(side / 96))
    top, left = (int(each[0] * scale) + 1 - edge for each in (rows, columns))
    bottom, right = (int((each[-1] + 1) * scale) + 1 + edge for each in (rows, columns))
    if (bottom - top) * (right - left) <= 0.25 * enlarged.shape[0] * enlarged.shape[1]:
        _draw_frame(framed, (top, left, bottom, right), edge)
    return _png(framed)


def _draw_frame(canvas: np.ndarray, box: tuple[int, int, int, int], width: int) -> None:
    """Draws the frame of a box (top, left, bottom, right), clipped to the canvas."""
    top, left, bottom, right = box
    inside = np.zeros(canvas.shape[:2], bool)
    inside[max(top, 0) : bottom, max(left, 0) : right] = True
    inside[max(top + width, 0) : bottom - width, max(left + width, 0) : right - width] = False
    canvas[inside] = [*bytes.fromhex(HIGHLIGHT[1:]), 255]


def grid(images: Iterable[np.ndarray], *, columns: int, side: int, gap: int = 4) -> str:
    """Images [h, w, C] of equal size, row by row in one PNG data URI; each has about `side` pixels
    on its longer side, with transparent gaps between them."""
    tiles = [_add_frame(_enlarge(one, side), 1, "#808080") for one in images]
    height, width = tiles[0].shape[:2]
    lines = -(-len(tiles) // columns)
    columns = min(columns, len(tiles))
    canvas = np.zeros((lines * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for i, tile in enumerate(tiles):
        _put(canvas, tile, i // columns * (height + gap), i % columns * (width + gap))
    return _png(canvas)


def trigger_map(
    points: np.ndarray,
    triggers: np.ndarray,
    thumbnails: np.ndarray,
    colour: str,
    original=None,
    *,
    size: int = 720,
) -> str:
    """Every point as a dot, some of them as thumbnails of their triggers, in one square PNG data
    URI.

    Args:
      points: [n, 2] in the unit square, second axis upwards.
      triggers: [n, h, w, C].
      thumbnails: indices [m] of the points drawn as thumbnails.
      colour: "#rrggbb" of dots and frames.
      original: None or (point [2], trigger [h, w, C]), drawn last with a heavy frame.
      size: side of the picture in pixels; displayed at half that size, so it is sharp on dense
        screens.
    """
    canvas = np.zeros((size, size, 4), np.uint8)
    dot = _add_frame(np.zeros((2, 2, 3), np.uint8), 4, colour)
    dot[2:-2, 2:-2] = dot[0, 0]
    marks = [(point, dot) for point in points]
    marks += [(points[i], _add_frame(_enlarge(triggers[i], 48), 3, colour)) for i in thumbnails]
    if original is not None:
        marks.append(
            (
                original[0],
                _add_frame(_add_frame(_enlarge(original[1], 60), 3, "#ffffff"), 8, HIGHLIGHT),
            )
        )
    margin = 44
    for point, mark in marks:
        column, row = margin + np.array([point[0], 1 - point[1]]) * (size - 2 * margin)
        _put(canvas, mark, round(row - mark.shape[0] / 2), round(column - mark.shape[1] / 2))
    return _png(canvas)


def svg(draw, size: tuple[float, float], alt: str) -> str:
    """The chart drawn by `draw(figure)` as an inline <svg>, without metadata or comments."""
    import matplotlib
    from matplotlib.figure import Figure

    # ids are hashed with `alt`, so they are reproducible and do not clash with another chart's
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": alt}
    with matplotlib.rc_context(style):
        figure, file = Figure(size, layout="constrained"), io.StringIO()
        draw(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    text = re.sub(
        r' width="[\d.]+pt" height="[\d.]+pt"| height="[\d.]+pt"| width="[\d.]+pt"',
        "",
        text,
        count=2,
    )
    text = text.replace(INK, "currentColor")
    opening = (
        f'<svg role="img" aria-label="{html.escape(alt)}" style="max-width:{size[0] * 140:.0f}px"'
    )
    return opening + text[len("<svg") :]


def legend(figure) -> None:
    """Adds one legend above the axes, unless no line or bar has a label."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside upper left", ncols=3, handlelength=2.2, columnspacing=1.2
        )


def _rate(value: float | None) -> float:
    """A rate to draw: None and non-finite values count as 0."""
    return float(value) if value is not None and np.isfinite(value) else 0.0


def class_label(row: Mapping[str, Any]) -> str:
    """Class number and name, shortened."""
    number, name = str(row["class"]), _printable(row.get("name") or "")
    name = name if len(name) <= 16 else name[:15] + "…"
    return number if name in ("", number) else f"{number}  {name}"


def _printable(text: Any) -> str:
    """`text` with characters missing from the chart's font replaced by "?", and "$" escaped, which
    would start matplotlib's math mode."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    safe = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in str(text))
    return safe.replace("$", r"\$")


def _pixels(image: np.ndarray) -> np.ndarray:
    """An image [h, w, C] in [0, 1] or uint8 as uint8 [h, w, 3]; with other than 3 channels, it is
    averaged to grey."""
    image = np.asarray(image)
    if image.dtype != np.uint8:
        image = np.round(np.clip(np.nan_to_num(image.astype(float)), 0, 1) * 255).astype(np.uint8)
    if image.shape[-1] != 3:
        image = np.round(image.mean(-1, keepdims=True)).astype(np.uint8).repeat(3, -1)
    return image


def _enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """`_pixels(image)` enlarged by repeating pixels so that the longer side is at most `side`; a
    larger image is box-averaged down."""
    pixels = _pixels(image)
    longest = max(pixels.shape[:2])
    if longest > side:
        from PIL import Image

        return np.asarray(Image.fromarray(pixels).reduce(-(-longest // side)))
    factor = side // longest
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _add_frame(pixels: np.ndarray, width: int, colour: str) -> np.ndarray:
    """Pixels [h, w, 3 or 4] uint8 with an opaque frame, [h + 2 width, w + 2 width, 4]."""
    height, breadth = pixels.shape[0] + 2 * width, pixels.shape[1] + 2 * width
    framed = np.full((height, breadth, 4), 255, np.uint8)
    framed[..., :3] = list(bytes.fromhex(colour[1:]))
    framed[width:-width, width:-width, :3] = pixels[..., :3]
    return framed


def _put(canvas: np.ndarray, tile: np.ndarray, row: int, column: int) -> None:
    """Writes `tile` [h, w, 4] into `canvas` [H, W, 4] at a position where it fits."""
    canvas[row : row + tile.shape[0], column : column + tile.shape[1]] = tile


def _png(pixels: np.ndarray) -> str:
    """uint8 [H, W, 4] as a PNG data URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
