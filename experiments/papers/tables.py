"""The papers' tables as data, and the printer: measured, published, distance, and what is missing.

Published numbers are facts from the papers, of their full size; bodies that are not in the papers'
texts are left blank. A table is made from whatever units the ledger holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.papers import grid, images, ledger
from experiments.papers.victim import Victim

MEASURES = {
    "ACC": "accuracy",
    "ASR": "asr",
    "ASR eq. 9": "asr_eq9",
    "SIA": "sia",
    "ASR x4": "x4",
    "ASR x9": "x9",
    "TPR": "tpr",
    "FPR": "fpr",
}
"""Title of a figure -> its name in a unit's result."""
ORACLE = {"oracle ACC": "accuracy", "oracle ASR": "asr"}
"""Figures at the best value of a dial, chosen with test images: an upper bound, never a result."""
MISSING = "missing"
"""Of a row that nobody has measured."""
Published = Mapping[str, float]
"""Title of a figure -> number as a share."""


class Line(NamedTuple):
    """A row of a table.

    Attributes:
      labels: its first columns.
      victim: of seed 0.
      published: column of the table -> numbers.
    """

    labels: dict[str, str]
    victim: Victim
    published: Mapping[str, Published] = {}


class Table(NamedTuple):
    """One table of a paper.

    Attributes:
      name: for the record and `--tables`.
      title: what it shows.
      columns: title -> defence; None for the victim itself.
      measures: titles of `MEASURES` that are shown.
      lines: its rows.
      note: what the reader has to know.
      seeds: victims of each row.
    """

    name: str
    title: str
    columns: Mapping[str, str | None]
    measures: tuple[str, ...]
    lines: Sequence[Line]
    note: str = ""
    seeds: int = 1


class Spread(NamedTuple):
    """A figure over many triggers: each row is a defence, with mean, lowest and highest ASR.

    Attributes:
      entries: (title, defence, level or None, published "mean", "lowest", "highest").
    """

    name: str
    title: str
    victims: Sequence[Victim]
    entries: Sequence[tuple[str, str | None, str | None, Published]]
    note: str = ""


def jobs_of(table: Table | Spread) -> list[grid.Job]:
    """Every unit that a table is made of; of data sets that are not here too."""
    if isinstance(table, Spread):
        return [grid.plan(one, each[1]) for one in table.victims for each in table.entries]
    return [
        grid.plan(line.victim.with_seed(seed), defence)
        for seed in range(table.seeds)
        for line in table.lines
        for defence in table.columns.values()
        if defence is None or grid.fits(line.victim, defence)
    ]


def rows(table: Table | Spread) -> list[dict[str, Any]]:
    """Every line of a table, as cells by the title of their column."""
    if isinstance(table, Spread):
        return _spread_rows(table)
    found = []
    for line in table.lines:
        for title, defence in table.columns.items():
            if defence is None or grid.fits(line.victim, defence):
                found.append({**line.labels, "column": title, **_cells(table, line, title)})
    return found


def _cells(table: Table, line: Line, title: str) -> dict[str, Any]:
    """Measured, published and distance of one column of a row."""
    defence, published = table.columns[title], line.published.get(title, {})
    stored = [
        ledger.find(grid.plan(line.victim.with_seed(seed), defence).unit)
        for seed in range(table.seeds)
    ]
    there = [each for each in stored if each is not None]
    cells: dict[str, Any] = {"seeds": f"{len(there)} of {table.seeds}" if there else MISSING}
    for measure in table.measures:
        values = [each.result.get(MEASURES[measure]) for each in there]
        cells |= compare(measure, [v for v in values if v is not None], published.get(measure))
    cells |= _oracle(there)
    notes = {each.result["note"] for each in there if each.result.get("note")}
    notes |= {f"failed: {each.result['failed']}" for each in there if "failed" in each.result}
    notes |= {"older code" for each in there if each.is_older}
    return {**cells, **({"note": "; ".join(sorted(notes))} if notes else {})}


def compare(measure: str, values: list[float], published: float | None) -> dict[str, Any]:
    """Cells of one figure: the mean of the seeds with their range, the published number, and how
    far the mean is from it in points."""
    mean = float(np.mean(values)) if values else None
    shown = "" if mean is None else f"{mean:.4f}"
    if len(values) > 1:
        shown += f" ({min(values):.4f} to {max(values):.4f})"
    cells = {
        measure: shown,
        f"published {measure}": "" if published is None else f"{published:.4f}",
    }
    far = "" if mean is None or published is None else f"{100 * (mean - published):+.2f}"
    return {**cells, f"{measure} distance": far}


def _oracle(there: Iterable[ledger.Stored]) -> dict[str, str]:
    found = [each.result["oracle"] for each in there if each.result.get("oracle")]
    if not found:
        return {}
    return {t: f"{np.mean([one[name] for one in found]):.4f}" for t, name in ORACLE.items()}


def _spread_rows(table: Spread) -> list[dict[str, Any]]:
    """Mean, lowest and highest ASR of every entry over the triggers that were measured."""
    found = []
    for title, defence, level, published in table.entries:
        values = []
        for victim in table.victims:
            stored = ledger.find(grid.plan(victim, defence).unit)
            values += [] if stored is None else _rates(stored.result, level)
        cells: dict[str, Any] = {
            "column": title,
            "triggers": f"{len(values)} of {len(table.victims)}",
        }
        for name, function in (("mean", np.mean), ("lowest", np.min), ("highest", np.max)):
            own = [float(function(values))] if values else []
            cells |= compare(f"{name} ASR", own, published.get(name))
        found.append(cells)
    return found


def _rates(result: Mapping[str, Any], level: str | None) -> list[float]:
    """The ASR of a result, or of one way to unlearn; nothing where it failed."""
    one = result if level is None else result.get("levels", {}).get(level, {})
    rate = one.get("asr")
    return [] if rate is None else [float(rate)]


def list_absent(table: Table | Spread) -> list[str]:
    """A sentence for each data set that is not here."""
    found = table.victims if isinstance(table, Spread) else [line.victim for line in table.lines]
    absent = dict.fromkeys(v.data for v in found if images.find_source(v.data) is None)
    return [images.say_missing(data) for data in absent]


def drop_blank(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that were measured or have a published number, without columns that are blank in
    all of them."""
    has_number = lambda line: any(v for name, v in line.items() if name.startswith("published"))
    is_missing = lambda line: MISSING in (line.get("seeds"), line.get("triggers"))
    kept = [line for line in cells if has_number(line) or not is_missing(line)]
    names = dict.fromkeys(name for line in kept for name in line)
    filled = [name for name in names if any(line.get(name, "") != "" for line in kept)]
    return [{name: line.get(name, "") for name in filled} for line in kept]


def count(table: Table | Spread) -> tuple[int, int, list[str]]:
    """(measured, all) units of a table, and the names of those that are missing."""
    names: dict[str, bool] = {}
    for job in jobs_of(table):
        names[job.name] = ledger.find(job.unit) is not None
    return sum(names.values()), len(names), [name for name, there in names.items() if not there]
