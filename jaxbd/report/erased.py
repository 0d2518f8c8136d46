"""The section of a page on an erasure without data (DHBE), from plain values."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbd.report import plots
from jaxbd.report.content import Content, Erased, Moment, Repaired

CHARTS = {
    "erasure: logit difference": {
        "student and teacher": "discrepancy",
        "student with and without trigger": "regulariser",
    },
    "erasure: loss of generators": {"samples": "generator_loss", "triggers": "trigger_loss"},
}
"""Chart -> label of a line -> field of `repairs.dhbe.Info`; the lines of a chart share a unit."""
COLUMNS = 6
RESUMED = (
    "This run was stopped at iteration {step} after {seconds:.0f} s and then resumed. Images"
    " generated earlier are not shown, and the time in the table counts from there; the losses"
    " cover all iterations."
)


def curves(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The losses of an erasure over its iterations, for `Content.curves`.

    Args:
      values: "step" [S] and fields of `repairs.dhbe.Info`, each [S]; the "curves" of a repair.json.
    """
    found = {}
    for chart, lines in CHARTS.items():
        known = {label: values[name] for label, name in lines.items() if name in values}
        if known:
            found[chart] = {"step": values["step"], "values": known}
    return found


def content(
    figures: Mapping[str, Any],
    *,
    name: str,
    moments: Sequence[Moment] = (),
    amplified: Mapping[int, tuple[float | None, float | None]] | None = None,
) -> Content:
    """A whole page about one erasure.

    Args:
      figures: content of repair.json: "curves" (see `curves`), "config", "model", "seed",
        "seconds", "versions", "device"; "before", "after" (rates), "data" and "trigger" are None
        if nothing was measured, and "resumed" is None for a run that was not resumed.
      name: name of the model for the reader.
      moments: see `Erased`.
      amplified: see `Erased`.
    """
    before, after = figures.get("before") or {}, figures.get("after") or {}
    rates = lambda field: (before.get(field), after.get(field))
    row = Repaired(
        method="DHBE",
        clean_accuracy=rates("clean_accuracy"),
        attack_success_rate=rates("attack_success_rate"),
        source_inference_accuracy=after.get("source_inference_accuracy"),
        seconds=figures["seconds"],
        n_clean=after.get("n_clean"),
        n_triggered=after.get("n_triggered"),
        note="no data was used" if after else "no data was used, and nothing was measured",
    )
    known = {part: figures[part] for part in ("model", "data", "trigger") if figures.get(part)}
    resumed = figures.get("resumed")
    return Content(
        title=f"Backdoors erased from {name} without data",
        repairs=[row],
        erased=Erased(
            moments=moments,
            amplified=amplified or {},
            note=RESUMED.format(**resumed) if resumed else "",
        ),
        curves=curves(figures["curves"]),
        settings={"erasure": figures["config"], **known},
        seeds={"erasure": figures["seed"]},
        versions=figures["versions"],
        device=figures["device"],
    )


def view(erased: Erased) -> dict[str, Any]:
    """The template's values: (iteration, count, samples, triggers) per moment, and the chart and
    rows of the rates."""
    rows = [(copies, *pair) for copies, pair in sorted(erased.amplified.items())]
    known = [row for row in rows if any(rate is not None for rate in row[1:])]
    description = "; ".join(
        f"{copies} times: {_percent(before)} before, {_percent(after)} after"
        for copies, before, after in known
    )
    return {
        "note": erased.note,
        "moments": [
            (
                moment.step,
                len(moment.samples),
                plots.grid(moment.samples, columns=COLUMNS, side=54, gap=3),
                plots.grid(moment.triggers, columns=COLUMNS, side=36, gap=9),
            )
            for moment in erased.moments
            if len(moment.samples) and len(moment.triggers)
        ],
        "chart": (
            amplified_bars(known, alt=f"Attack success rate with the trigger {description}.")
            if known
            else None
        ),
        "rows": known,
    }


def amplified_bars(rows: Sequence[tuple[int, float | None, float | None]], *, alt: str = "") -> str:
    """Bars of the attack success rate before and after, one pair per row (copies of the trigger,
    before, after), as inline SVG.

    A rate that is None or nan has no bar.
    """

    def draw(figure):
        axes, place, depth = figure.subplots(), np.arange(len(rows)), 0.38
        for i, label in enumerate(("before", "after")):
            rates = 100 * np.array(
                [np.nan if row[1 + i] is None else row[1 + i] for row in rows], float
            )
            at = place + (i - 0.5) * depth
            axes.barh(at, np.nan_to_num(rates), depth * 0.92, color=plots.PALETTE[i], label=label)
            for y, rate in zip(at, rates, strict=True):
                if np.isfinite(rate):
                    axes.text(rate + 1, y, f"{rate:.1f}", va="center", fontsize=7, clip_on=False)
        axes.set(xlim=(0, 106), ylim=(len(rows) - 0.5, -0.5), xlabel="attack success rate, %")
        axes.set_xticks(range(0, 101, 20))
        axes.set_yticks(place, [f"×{copies}" for copies, *_ in rows])
        axes.set_ylabel("copies of the trigger")
        plots.legend(figure)

    return plots.svg(draw, (3.5, 0.9 + 0.5 * len(rows)), alt)


def _percent(rate: float | None) -> str:
    return "not measured" if rate is None or not np.isfinite(rate) else f"{100 * rate:.1f} %"
