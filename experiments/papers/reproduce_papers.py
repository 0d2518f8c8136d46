"""The papers section: every table of the three papers from the units that are there.

Nothing is trained but with `--quick`, which measures a few units on digits that nobody has measured
yet: `python -m experiments.papers.grid` is what fills the tables.
"""

from typing import Any, Literal

from experiments import units
from experiments.papers import claims, grid, runs, show, tables, tradeoff
from experiments.papers.sizes import SIZES, SizeName
from experiments.papers.victim import Victim
from experiments.reproduce import Check

TIME = "seconds: tables are made of units that were measured before, and say what is missing"
QUICK_TIME = (
    "at most 4 minutes on 2 cores: one digit victim and four repairs of it, as many as are done by"
    " then; a test of the machinery, no result of the papers"
)
OVERVIEW = "Units measured"
CLAIMS = (
    f"Published numbers within {100 * claims.ASR:.0f} points of ASR"
    f" and {100 * claims.COST:.0f} of accuracy"
)
TRADE_OFF = "Trade-off of accuracy and ASR (DHBE Figs. 3 and 4)"
SIDE_BY_SIDE: dict[str, Literal["accuracy", "asr"]] = {
    "Defences side by side: ASR": "asr",
    "Defences side by side: ACC": "accuracy",
}
PARTS = ("full", "small", "digits")
QUICK, DEFENCES, SECONDS = "dhbe-badnets-3", ("finetune", "anp", "unlearn-known", "clip"), 200


def run(
    quick: bool, parts: tuple[str, ...] = PARTS[:2]
) -> tuple[dict[str, Any], list[Check], dict[str, Any]]:
    """(tables by title, checks, details)."""
    if quick:
        return _run_quick()
    found: dict[str, Any] = {OVERVIEW: []}
    for size in map(_size, parts):
        for title, measure in SIDE_BY_SIDE.items():
            rows = grid.compare(size, measure)
            if any(row["measured"] for row in rows):
                found[f"{title}, size {size}"] = rows
        every = show.all_tables(size)
        if judged := claims.rows(size, every):
            found[f"{CLAIMS}, size {size}"] = judged
        if curves := _trade_off(size):
            found[f"{TRADE_OFF}, size {size}"] = curves
        for table in every:
            title, lines, below = show.describe(table)
            measured, whole, _ = tables.count(table)
            here = {"table": title, "size": size, "measured": measured, "units": whole}
            found[OVERVIEW].append(here)
            found[f"{title}, size {size}"] = [*lines, *({"column": each} for each in below)]
    return found, [], {"sizes": parts}


def _size(name: str) -> SizeName:
    return next(size for size in SIZES if size == name)


def _trade_off(size: SizeName) -> list[dict[str, Any]]:
    """The lines of the trade-off that have a unit."""
    jobs = tradeoff.list_jobs(Victim(attack=tradeoff.ATTACK, size=size))
    found = tradeoff.find_stored(jobs)
    return tradeoff.rows(jobs, {key: own for key, own in found.items() if own})


def _run_quick() -> tuple[dict[str, Any], list[Check], dict[str, Any]]:
    """A few units on digits; what time does not allow stays missing and is called so."""
    jobs = grid.list_jobs([Victim(attack=QUICK, size="digits")], DEFENCES, (0,))
    outcome = grid.run(jobs, deadline=runs.stop_after(SECONDS / 60))
    rows = [grid.row(job) for job in jobs]
    details = {
        "done": [job.name for job in outcome.done],
        "missing": [job.name for job in (*outcome.waiting, *outcome.failed)],
    }
    checks = [Check("units measured", len(outcome.done) + len(outcome.found), 1, "at least")]
    units.say(f"{len(details['missing'])} of {len(jobs)} units missing")
    return {f"Handwritten digits, {QUICK}: repairs": rows}, checks, details
