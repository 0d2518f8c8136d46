"""Writes the tables of README.md and docs/results.md from the records in `experiments/results/`.

No figure there is typed by hand.

    python scripts/readme_tables.py           # rewrites the pages
    python scripts/readme_tables.py --check   # exit code 1 when a page differs from the records

A table stands between `<!-- table: RECORD / TITLE -->` and `<!-- end -->`, RECORD being the
record's name without `.json` and TITLE the table's title in it, or in `DERIVED`. Records of
accelerators stand between `<!-- accelerator: NAME -->` and `<!-- end -->`, see
`experiments.accelerator.tables`; where there are none, the block says so.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import units  # noqa: E402
from experiments.accelerator import tables  # noqa: E402
from experiments.dhbe import denominators  # noqa: E402
from experiments.verdict import reproduce_verdict  # noqa: E402
from jaxbd import files  # noqa: E402
from jaxbd.base import UserError  # noqa: E402

PAGES = tuple(ROOT / name for name in ("README.md", "docs/results.md", "docs/accelerators.md"))
HERE = "python scripts/readme_tables.py"
DERIVED = {
    (
        "verdict-repairs",
        "Published models: found and repaired",
    ): reproduce_verdict.summarise_repairs,
    (
        "verdict-repairs",
        "Published models: repairs side by side",
    ): reproduce_verdict.compare_repairs,
    ("dhbe", "Handwritten digits, BadNets 3x3: ASR by both denominators"): denominators.table,
}
"""(record, title) -> the table made of the record's details, where its own tables lack it."""
BLOCK = re.compile(r"(<!-- table: (\S+) / (.+?) -->\n)(.*?)(<!-- end -->)", re.S)
ACCELERATOR = re.compile(r"(<!-- accelerator: (\w+) -->)(\n?)(.*?)(<!-- end -->)", re.S)


def filled(text: str) -> str:
    """`text` with every table block rewritten."""

    def block(match: re.Match) -> str:
        kept = files.read_json(units.RESULTS / f"{match[2]}.json")
        derive = DERIVED.get((match[2], match[3]))
        if derive is None and match[3] not in kept["tables"]:
            raise UserError(
                f"{match[2]}.json has no table {match[3]!r}; run {kept['command']} where its"
                " data is"
            )
        table = units.table(derive(kept) if derive else kept["tables"][match[3]])
        source = f"`{kept['command']}`, {kept['device']}, jax {kept['versions']['jax']}"
        return f"{match[1]}{table}\n\n<sub>{source}</sub>\n{match[5]}"

    def accelerator(match: re.Match) -> str:
        if match[2] not in {"words", *tables.TABLES}:
            names = ", ".join(["words", *tables.TABLES])
            raise UserError(f"no table of accelerators is called {match[2]!r}; there are {names}")
        # within a sentence the block has no line of its own
        return f"{match[1]}{match[3]}{tables.filled(match[2])}{match[3]}{match[5]}"

    return ACCELERATOR.sub(accelerator, BLOCK.sub(block, text))


def main() -> int:
    """Rewrites or checks the pages."""
    stale = []
    for page in PAGES:
        text = page.read_text()
        wanted = filled(text)
        if wanted != text:
            stale.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(wanted)
    if stale and "--check" in sys.argv[1:]:
        print(f"{', '.join(stale)}: differs from experiments/results; run {HERE}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        sys.exit(2)
