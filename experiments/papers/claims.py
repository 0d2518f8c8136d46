"""Whether the papers' numbers hold at a size: what a repair does here beside what it did there.

The published numbers are of the papers' nets, which are larger and were trained for longer. At
another size, a number holds if the repair leaves an ASR at most `ASR` above it, and costs at most
`COST` more accuracy than it cost the paper's net. A number that does not hold is a finding, and no
error.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.papers import grid, ledger
from experiments.papers.attacks import BNA_KINDS
from experiments.papers.sizes import SIZES, SizeName
from experiments.papers.tables import MEASURES, Spread, Table
from experiments.papers.victim import Victim

ASR, COST = 0.03, 0.02
"""How far an ASR and a cost may be above the published ones, as shares."""
BNA_ASR = 0.013
"""BNA leaves less than this, as Li et al. 2023 say of all their other data sets (section 5.2)."""


class Claim(NamedTuple):
    """A published number of a repair.

    Attributes:
      source: paper and table.
      victim: of seed 0.
      defence: by its name here.
      measure: title of the ASR in `tables.MEASURES`.
      asr: published, as a share.
      cost: of clean accuracy, published, as a share; None if it is not.
    """

    source: str
    victim: Victim
    defence: str
    measure: str
    asr: float
    cost: float | None


def list_claims(size: SizeName, tables: list[Table | Spread]) -> list[Claim]:
    """Every published pair of accuracy and ASR in `tables`, and what BNA's prose has; a number that
    two tables repeat stands once, with the first."""
    lines = [(table, line) for table in tables if isinstance(table, Table) for line in table.lines]
    before = {
        line.victim: line.published[title]["ACC"]
        for table, line in lines
        for title, defence in table.columns.items()
        if defence is None and "ACC" in line.published.get(title, {})
    }
    found = [
        Claim(
            table.title.partition(":")[0],
            line.victim,
            defence,
            "ASR eq. 9",
            published["ASR eq. 9"],
            before[line.victim] - published["ACC"],
        )
        for table, line in lines
        for title, published in line.published.items()
        if (defence := table.columns[title]) and {"ACC", "ASR eq. 9"} <= set(published)
    ]
    first: dict[tuple[Any, ...], Claim] = {}
    for claim in (*found, *_of_bna(size)):
        first.setdefault(claim[1:], claim)
    return list(first.values())


def _of_bna(size: SizeName) -> Iterator[Claim]:
    for kind in BNA_KINDS:
        victim = Victim(attack=f"bna-{kind}", size=size)
        yield Claim("BNA section 5.2", victim, "bna", "ASR", BNA_ASR, None)


def judge(claim: Claim) -> dict[str, Any] | None:
    """A claim beside the mean of the seeds that were measured; None if none was."""
    pairs, seeds = [], SIZES[claim.victim.size].seeds
    for seed in range(seeds):
        victim = claim.victim.with_seed(seed)
        before, after = (
            ledger.find(grid.plan(victim, name).unit) for name in (None, claim.defence)
        )
        if before and after and after.result.get(MEASURES[claim.measure]) is not None:
            pairs.append((before.result, after.result))
    if not pairs:
        return None
    asr = float(np.mean([after[MEASURES[claim.measure]] for _, after in pairs]))
    cost = float(np.mean([before["accuracy"] - after["accuracy"] for before, after in pairs]))
    holds = asr <= claim.asr + ASR and (claim.cost is None or cost <= claim.cost + COST)
    return {
        "source": claim.source,
        "victim": claim.victim.attack,
        "repair": claim.defence,
        "seeds": f"{len(pairs)} of {seeds}",
        "published ASR": claim.asr,
        "ASR": asr,
        "published cost": "" if claim.cost is None else claim.cost,
        "cost": cost,
        "holds": "yes" if holds else "no",
    }


def rows(size: SizeName, tables: list[Table | Spread]) -> list[dict[str, Any]]:
    """A line for every claim that was measured at a size."""
    judged = (judge(claim) for claim in list_claims(size, tables))
    return [row for row in judged if row is not None]
