"""Trade-off of accuracy and attack success (Yan et al. 2023, Figs. 3 and 4): every defence over its
learning rate or its dial, on 1 % and 4 % of clean data, in five draws each.

    python -m experiments.papers.tradeoff --size small --attack dhbe-badnets-3 --minutes 300 \
        --out tradeoff.png
    python -m experiments.papers.tradeoff --size small --minutes 0 --out tradeoff.png
    python -m experiments.papers.tradeoff --smoke

A defence with a dial gives its curve by the dial, all others by learning rates of 0.002 to 0.02.
Units are those of the ledger: what was measured is found again, by whichever machine. The points
lie on test images and choose nothing.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments import units
from experiments.papers import defences, grid, ledger, runs
from experiments.papers.defence import Defence, method_of
from experiments.papers.fit import Logistic, fit_logistic
from experiments.papers.sizes import SIZES, SizeName
from experiments.papers.victim import Victim
from jaxbd.base import UserError

ATTACK = "dhbe-badnets-3"
RATES = (0.002, 0.005, 0.01, 0.02)
SHARES, DRAWS = (0.01, 0.04), 5
"""Of the images of an attacker, and draws of each."""
NAMES = (
    "finetune",
    "ft-sam",
    "fine-pruning",
    "mcr",
    "nad",
    "argd",
    "anp",
    "ibau",
    "nc-unlearn-told",
    "unlearn-told",
)
Jobs = dict[tuple[str, float], list[grid.Job]]
"""(defence, share) -> its units, all draws."""
Results = dict[tuple[str, float], list[dict[str, Any]]]


class Points(NamedTuple):
    """Points of a defence on one share of the data: accuracy [N] and ASR [N]."""

    accuracy: np.ndarray
    asr: np.ndarray


def vary(name: str, size: SizeName, share: float, draw: int) -> list[Defence]:
    """The defences whose points make the curve: one with a dial, else one for each learning rate.

    Raises: UserError for a defence that has neither.
    """
    base = defences.named(name)
    held = max(4, round(share * SIZES[size].train))
    base = dataclasses.replace(base, held=(held, draw))
    config = method_of(base.method).config
    if has_dial(base.method):
        return [base]
    if "learning_rate" not in {field.name for field in dataclasses.fields(config)}:
        raise UserError(f"{name} has neither a dial nor a learning rate; choose another defence")
    return [dataclasses.replace(base, changes=(("learning_rate", rate),)) for rate in RATES]


def has_dial(method: str) -> bool:
    """Whether a repair has settings that stay free after training."""
    names = {field.name for field in dataclasses.fields(method_of(method).config)}
    return bool({"points", "ratio_step"} & names)


def list_jobs(victim: Victim, names: tuple[str, ...] = NAMES) -> Jobs:
    """The units of some defences on a victim."""
    return {
        (name, share): [
            _job(victim, each)
            for draw in range(DRAWS)
            for each in vary(name, victim.size, share, draw)
        ]
        for name in names
        for share in SHARES
    }


def _job(victim: Victim, own: Defence) -> grid.Job:
    unit = defences.unit(victim, own)
    return grid.Job(victim, own.name, unit, lambda: defences.measure(victim, own))


def by_draw(jobs: Jobs) -> list[grid.Job]:
    """Every unit, the first draw of everything first."""
    return [
        each
        for _, each in sorted(
            (
                (number * DRAWS // len(own), each)
                for own in jobs.values()
                for number, each in enumerate(own)
            ),
            key=lambda pair: pair[0],
        )
    ]


def collect(results: list[dict[str, Any]]) -> Points:
    """The points of some rows: the dial's curve where there is one."""
    found = []
    for result in results:
        curve = (result.get("oracle") or {}).get("curve")
        found += curve or ([result] if result.get("asr") is not None else [])
    pairs = [(each["accuracy"], each["asr"]) for each in found]
    return Points(*np.array(pairs, float).reshape(-1, 2).T)


def row(name: str, share: float, points: Points, count: int, of: int) -> dict[str, Any]:
    """A line of the table."""
    fitted = fit_logistic(points.accuracy, points.asr)
    first = {"defence": name, "clean data": f"{share:.0%}", "units": f"{count} of {of}"}
    if not len(points.asr):
        return {**first, "points": 0}
    shown = {
        "points": len(points.asr),
        "ACC mean": float(points.accuracy.mean()),
        "ASR mean": float(points.asr.mean()),
        "ASR highest": float(points.asr.max()),
    }
    if fitted is None:
        return {**first, **shown}
    return {
        **first,
        **shown,
        "half at ACC": fitted.middle,
        "slope": fitted.slope,
        "fit error": fitted.error,
    }


def rows(jobs: Jobs, found: Results) -> list[dict[str, Any]]:
    """The table: a line for each defence and share."""
    return [row(*key, collect(own), len(own), len(jobs[key])) for key, own in found.items()]


def plot(curves: dict[tuple[str, float], Points], out: pathlib.Path) -> None:
    """One plot: a panel for each share of clean data, points and fits of all defences.

    Raises: UserError when the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = sorted({share for _, share in curves})
    figure, axes = pyplot.subplots(1, len(shares), figsize=(6 * len(shares), 4.5), squeeze=False)
    for axis, share in zip(axes[0], shares, strict=True):
        for (name, own), points in curves.items():
            if own == share and len(points.asr):
                _draw(axis, name, points, fit_logistic(points.accuracy, points.asr))
        axis.set(
            xlabel="clean accuracy",
            ylabel="attack success rate",
            ylim=(-0.02, 1.02),
            title=f"{share:.0%} of clean data",
        )
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written: {error.strerror}; choose another"
        ) from None
    finally:
        pyplot.close(figure)


def _draw(axis: Any, name: str, points: Points, fitted: Logistic | None) -> None:
    (line,) = axis.plot(points.accuracy, points.asr, ".", label=name)
    if fitted is not None:
        along = np.linspace(points.accuracy.min(), points.accuracy.max(), 100)
        axis.plot(along, fitted.at(along), color=line.get_color())


def main(
    size: SizeName = "small",
    attack: str = ATTACK,
    defences: tuple[str, ...] = NAMES,
    seed: int = 0,
    minutes: float | None = None,
    out: pathlib.Path | None = None,
    smoke: bool = False,
) -> None:
    """Measures what is missing, prints the table, writes the plot.

    Args:
      size: full, small or digits.
      attack: on the victim.
      defences: repairs with a dial or a learning rate.
      seed: of the victim.
      minutes: after which nothing more is begun, and what runs is saved and stopped; 0 measures
        nothing.
      out: file of the plot, .png, .pdf or .svg; none is written by default.
      smoke: one defence, one draw, in seconds; stores nothing.
    """
    units.use_cache()
    if smoke:
        size, defences = "smoke", ("finetune",)
    jobs = list_jobs(Victim(attack=attack, size=size, seed=seed), defences)
    if smoke:
        first = {key: own[:2] for key, own in list(jobs.items())[:1]}
        found = {key: [job.run() for job in own] for key, own in first.items()}
    else:
        grid.run(by_draw(jobs), deadline=runs.stop_after(minutes))
        found = find_stored(jobs)
    print(units.table(rows(jobs, found)))
    if out is not None:
        plot({key: collect(results) for key, results in found.items()}, out)
        print(f"written to {out}")


def find_stored(jobs: Jobs) -> Results:
    """Results of those jobs that the ledger holds."""
    stored = {key: [ledger.find(job.unit) for job in own] for key, own in jobs.items()}
    return {key: [each.result for each in own if each is not None] for key, own in stored.items()}


if __name__ == "__main__":
    units.cli(main)
