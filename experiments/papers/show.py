"""Prints the papers' tables from the units that are there.

python -m experiments.papers.show --size small
python -m experiments.papers.show --size full --tables dhbe-3 mesa-fig-4
"""

from typing import Any

from experiments import units
from experiments.papers import (
    images,
    tables,
    tables_bna,
    tables_dhbe,
    tables_mesa,
    tables_presets,
)
from experiments.papers.sizes import SizeName
from experiments.papers.tables import Spread, Table
from jaxbd.base import UserError

NAMED = 3
"""Missing units that a line names."""


def all_tables(size: SizeName) -> list[Table | Spread]:
    """Every table of the three papers at a size."""
    papers = (tables_bna, tables_dhbe, tables_mesa, tables_presets)
    return [table for paper in papers for table in paper.build(size)]


def choose(size: SizeName, names: tuple[str, ...]) -> list[Table | Spread]:
    """The tables of these names, all by default. Raises: UserError on an unknown one."""
    found = {table.name: table for table in all_tables(size)}
    for name in names:
        if name not in found:
            raise UserError(f"unknown table {name!r}; choose from {', '.join(found)}")
    return [found[name] for name in names or found]


def describe(table: Table | Spread) -> tuple[str, list[dict[str, Any]], list[str]]:
    """(title, lines, sentences below) of a table."""
    measured, whole, missing = tables.count(table)
    below = [f"{measured} of {whole} units measured", *tables.list_absent(table)]
    below += [table.note] if table.note else []
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        below.append(f"missing: {', '.join(missing[:NAMED])}{more}")
    lines = tables.drop_blank(tables.rows(table))
    return table.title, lines or [{"column": "nothing measured"}], below


def main(
    size: SizeName = "small", tables: tuple[str, ...] = (), data: tuple[str, ...] = ()
) -> None:
    """Prints tables; measures nothing.

    Args:
      size: full, small or digits.
      tables: by name, all by default.
      data: NAME=SOURCE of data sets that do not lie beside the repository.
    """
    images.name_sources(data)
    for table in choose(size, tables):
        title, lines, below = describe(table)
        print(f"\n{title}\n\n{units.table(lines)}")
        print("\n".join(below))


if __name__ == "__main__":
    units.cli(main)
