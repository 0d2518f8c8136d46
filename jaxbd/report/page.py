"""One self-contained HTML page with the results of a demo, scan or repair; it loads nothing and
runs no script."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbd import files
from jaxbd.limits import clean_text
from jaxbd.report import advice, erased, maps, matrix, plots, verdicts
from jaxbd.report.advice import class_name, headline, percent
from jaxbd.report.content import (
    Activations,
    Content,
    Erased,
    Mask,
    PairScores,
    Panel,
    Scan,
    Triggers,
)

PCA_LIMIT = 2000
"""Most samples a PCA map is fitted on (Qiao et al. 2019, Fig. 3 uses 2,000)."""
THUMBNAIL_DISTANCE = 0.085
"""Minimum distance between two thumbnails, as a fraction of the map's side: about one thumbnail
(released code: 0.022, on a larger plot)."""
EXAMPLE_SIDE = 288
"""Side of an example image in pixels; displayed at half that size or more, so that it is sharp."""
MOST_PAIRS = 20
"""Most pairs of classes listed in a table."""
LIMITS = {
    "detected": (
        "A detector can find only the trigger families it searches. “Clean” means that the search"
        " found no trigger of its kind that works on this model; it does not prove that there is no"
        " backdoor of another kind."
    ),
    "measured": (
        "Rates are measured on a finite set of images that neither search nor repair saw. A model"
        " meant for other images, or for other preprocessing, needs figures on those."
    ),
    "repaired": (
        "Repair lowers the success rate of the triggers that were found and measured here. Scan the"
        " repaired model again before you use it."
    ),
    "erased": (
        "Losses on generated images do not show whether a backdoor is gone: an erasure can fail"
        " without any sign of it in the losses. Scan or measure the repaired model before you use"
        " it."
    ),
}


def write(path: str | os.PathLike, content: Content) -> None:
    """Writes the page under a temporary name beside `path`, then renames it.

    Raises: UserError if the folder cannot be written.
    """
    files.write_text(path, render(content))  # names from files may hold lone surrogates


def _strip_controls(value: Any) -> Any:
    """Removes control characters from plain strings; `Markup` (the charts) passes unchanged."""
    return clean_text(value, allow="\n") if type(value) is str else value


def render(content: Content) -> str:
    """The page as text. All strings in `content` are escaped; only SVG made by this package is
    inserted as mark-up."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_strip_controls
    )
    environment.filters.update(percent=percent, seconds=duration, commands=_mark_commands)
    template = environment.from_string(
        pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    )
    triggers = content.triggers or Triggers()
    return template.render(
        content=content,
        headline=headline(content),
        lead=advice.lead(content),
        limits=limits(content),
        scans=[_scan_view(scan) for scan in content.scans],
        pairs=[_pairs_view(one) for one in content.pairs],
        guards=any(row.true_positive_rate is not None for row in content.repairs),
        sources=any(row.source_inference_accuracy is not None for row in content.repairs),
        neuron=None if content.activations is None else _neuron_view(content.activations),
        erased=None if content.erased is None else _view_erasure(content.erased),
        panel=_panel_view(triggers),
        maps=_map_views(triggers),
        curves=[_curve_view(name, one) for name, one in content.curves.items()],
        settings=_tables(content.settings),
        versions=files.versions() if content.versions is None else content.versions,
        device=files.device() if content.device is None else content.device,
    )


def _mark_commands(text: str):
    """Escapes a sentence and turns text between backticks into <code>."""
    import markupsafe

    parts = [markupsafe.escape(part) for part in _strip_controls(text).split("`")]
    marked = (f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
    return markupsafe.Markup("".join(marked))


def limits(content: Content) -> list[str]:
    """Sentences on the limits of this page; a page with only an erasure says nothing about
    detectors."""
    alone = content.erased is not None and not content.scans
    measured = any(rate is not None for row in content.repairs for rate in row.clean_accuracy)
    says = {"detected": not alone, "measured": measured or not alone, "repaired": not alone}
    return [text for name, text in LIMITS.items() if says.get(name, content.erased is not None)]


def duration(seconds: Mapping[str, float]) -> str:
    """{"compile", "run", "total"} as text, compile time in brackets; a dash if nothing is known."""
    known = {
        name: float(seconds[name])
        for name in ("total", "run", "compile")
        if seconds.get(name) is not None
    }
    parts = [f"{value:.1f} s {name}" for name, value in known.items()]
    return f"{parts[0]} ({', '.join(parts[1:])})" if len(parts) > 1 else "".join(parts) or "–"


def _scan_view(scan: Scan) -> dict[str, Any]:
    """The template's values for one scan."""
    view = verdicts.view(scan)
    return {**view, "chart": view["chart"] and _markup(view["chart"])}


def _pairs_view(pairs: PairScores) -> dict[str, Any]:
    """Chart and table of one search over pairs."""
    scores, detected = (
        np.asarray(pairs.scores, float),
        {tuple(map(int, pair)) for pair in pairs.detected},
    )
    row = lambda k: {"class": k, "name": pairs.names[k] if k < len(pairs.names) else ""}
    cells = [(score, s, t) for (s, t), score in np.ndenumerate(scores) if not np.isnan(score)]
    ranked = sorted(cells, key=lambda cell: (-cell[0], *cell[1:]))
    what = f"{len(detected)} of {len(cells)} pairs are called attacked"
    alt = (
        f"Anomaly score of every pair of classes in the search {pairs.search}. {what}. The table"
        " below lists the pairs."
    )
    lines: dict[str, Any] = dict(
        names=pairs.names, detected=sorted(detected), threshold=pairs.threshold
    )
    return {
        "search": pairs.search,
        "what": what,
        "threshold": pairs.threshold,
        "chart": _markup(matrix.draw(scores, alt=alt, **lines)) if cells else None,
        "rows": [
            (class_name(row(s)), class_name(row(t)), v, (s, t) in detected)
            for v, s, t in ranked[:MOST_PAIRS]
        ],
        "hidden": max(0, len(ranked) - MOST_PAIRS),
    }


def _neuron_view(neuron: Activations) -> dict[str, Any]:
    """One histogram per net on common axes, and the two total variations."""
    panels = (neuron.suspect, neuron.corrected, *neuron.others)
    values = np.concatenate(
        [plots.finite(part) for panel in panels for part in (panel.clean, panel.triggered)]
    )
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    margin = 0.03 * (high - low) or 0.5
    both = [neuron.suspect.total_variation, neuron.corrected.total_variation]
    return {
        "layer": neuron.layer,
        "channel": neuron.suspect.channel,
        "before_after": None if None in both else tuple(f"{value:.2f}" for value in both),
        "panels": [
            _panel_of(neuron.layer, panel, (low - margin, high + margin)) for panel in panels
        ],
    }


def _panel_of(layer: str, panel: Panel, span: tuple[float, float]) -> dict[str, Any]:
    """Chart and caption for one net."""
    moved = (
        "" if panel.total_variation is None else f", total variation {panel.total_variation:.2f}"
    )
    caption = f"Channel {panel.channel}{moved}."
    alt = (
        f"Histograms of the activations of {layer} in {panel.net}, clean and triggered images."
        f" {caption}"
    )
    values = {"clean": panel.clean, "triggered": panel.triggered}
    chart = _markup(plots.histograms(values, span=span, alt=alt))
    return {"net": panel.net, "caption": caption, "note": panel.note, "chart": chart}


def _view_erasure(erasure: Erased) -> dict[str, Any]:
    """Pictures and chart for the section on an erasure."""
    view = erased.view(erasure)
    return {**view, "chart": view["chart"] and _markup(view["chart"])}


def _panel_view(triggers: Triggers) -> dict[str, Any]:
    """Pictures for the trigger section; its fields are empty if there is nothing to show."""
    return {
        "original": None if triggers.original is None else plots.image(triggers.original, 120),
        "samples": [
            (level, len(samples), plots.grid(samples[:24], columns=6, side=36, gap=9))
            for level, samples in triggers.samples.items()
            if len(samples)
        ],
        "pairs": _example_views(triggers),
        "target": triggers.target,
        "mask": None if triggers.mask is None else _mask_view(triggers.mask),
    }


def _example_views(triggers: Triggers) -> list[dict[str, Any]]:
    """Example images without and with a trigger, side by side."""
    if triggers.clean is None or triggers.stamped is None:
        return []
    captions = triggers.captions or [("", "")] * len(triggers.clean)
    return [
        {
            "clean": plots.image(clean, EXAMPLE_SIDE),
            "stamped": plots.marked(clean, stamped, EXAMPLE_SIDE),
            "true": true,
            "predicted": predicted,
        }
        for clean, stamped, (true, predicted) in zip(
            triggers.clean, triggers.stamped, captions, strict=True
        )
    ]


def _mask_view(mask: Mask) -> dict[str, Any]:
    """Pictures of a mask, and of its pattern multiplied by the mask."""
    height, width = mask.mask.shape[:2]
    return {
        "mask": plots.image(mask.mask, EXAMPLE_SIDE),
        "seen": plots.image(_unit(mask.pattern) * mask.mask, EXAMPLE_SIDE),
        "norm": mask.norm,
        "median": mask.median,
        "pixels": height * width,
    }


def _map_views(triggers: Triggers) -> list[dict[str, Any]]:
    """PCA and t-SNE maps of the samples of all levels together, one picture per level; [] without
    samples."""
    samples = {level: np.asarray(some) for level, some in triggers.samples.items() if len(some)}
    if len({some.shape[1:] for some in samples.values()}) != 1:
        return []  # no samples, or samples of different sizes, which have no common space
    original = triggers.original
    if original is not None and np.shape(original) != next(iter(samples.values())).shape[1:]:
        original = None
    recipes = ("PCA", maps.pca, PCA_LIMIT), ("t-SNE", maps.tsne, maps.TSNE_LIMIT - 1)
    return [
        {"name": name, "pictures": _map(samples, original, place, most)}
        for name, place, most in recipes
    ]


def _map(samples: dict[Any, np.ndarray], original, place, most: int) -> list[tuple[Any, str, str]]:
    """(level, colour, picture) per level of one map; `place` lays out at most `most` samples."""
    parts = {level: _unit(some[: max(1, most // len(samples))]) for level, some in samples.items()}
    joined = np.concatenate(list(parts.values())).reshape(sum(map(len, parts.values())), -1)
    points = maps.unit_square(
        place(joined, None if original is None else _unit(original).reshape(1, -1))
    )
    mark = None if original is None else (points[-1], original)
    pictures, start = [], 0
    for number, (level, some) in enumerate(parts.items()):
        here = points[start : start + len(some)]
        colour = plots.PALETTE[number % (len(plots.PALETTE) - 1)]
        rows = maps.spread_out(here, THUMBNAIL_DISTANCE)
        pictures.append((level, colour, plots.trigger_map(here, some, rows, colour, mark)))
        start += len(some)
    return pictures


def _unit(images: np.ndarray) -> np.ndarray:
    """Images as float in [0, 1]."""
    images = np.asarray(images)
    return images / 255 if images.dtype == np.uint8 else images.astype(float)


def _curve_view(name: str, curve: Mapping[str, Any]) -> dict[str, Any]:
    """Chart and caption for one entry of `Content.curves`."""
    ends = {
        label: next((v for v in reversed(list(line)) if v is not None), None)
        for label, line in curve["values"].items()
    }
    last = ", ".join(f"{label}: {value:.3g}" for label, value in ends.items() if value is not None)
    alt = f"{name} over {len(curve['step'])} recorded steps. Last values: {last or 'none'}."
    return {
        "name": name,
        "last": last,
        "chart": _markup(plots.curves(curve["step"], curve["values"], name=name, alt=alt)),
    }


def _tables(settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, rows) per top-level entry that is a mapping; single values come first, under
    "general"."""
    plain = files.plain(dict(settings))
    nested = {name: value for name, value in plain.items() if isinstance(value, dict)}
    tables = {
        "general": {name: value for name, value in plain.items() if name not in nested},
        **nested,
    }
    return [(name, list(_flat(value))) for name, value in tables.items() if value]


def _flat(value: Mapping[str, Any], prefix: str = ""):
    """Yields (dotted name, text) for every leaf."""
    for name, entry in value.items():
        if isinstance(entry, dict) and entry:
            yield from _flat(entry, f"{prefix}{name}.")
        else:
            yield (
                prefix + name,
                ", ".join(map(str, entry)) if isinstance(entry, list) else str(entry),
            )


def _markup(svg: str):
    """Marks SVG from `plots` as safe; `plots` escapes the text it is given."""
    import markupsafe

    return markupsafe.Markup(svg)
