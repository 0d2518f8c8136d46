"""Writes the README's tables from the records in `experiments/results/`: no figure there is typed by hand.

    python scripts/readme_tables.py           # rewrites README.md
    python scripts/readme_tables.py --check   # exit code 1 when README.md differs from the records

A table stands between `<!-- table: RECORD / TITLE -->` and `<!-- end -->`, RECORD being the record's name without
`.json` and TITLE the table's title in it.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import units  # noqa: E402
from jaxbd import record  # noqa: E402

BLOCK = re.compile(r"(<!-- table: (\S+) / (.+?) -->\n)(.*?)(<!-- end -->)", re.S)


def filled(text: str) -> str:
    """`text` with every table block rewritten."""

    def block(match: re.Match) -> str:
        kept = record.read_json(units.RESULTS / f"{match[2]}.json")
        table = units.table(kept["tables"][match[3]])
        source = f"`{kept['command']}`, {kept['device']}, jax {kept['versions']['jax']}"
        return f"{match[1]}{table}\n\n<sub>{source}</sub>\n{match[5]}"

    return BLOCK.sub(block, text)


def main() -> int:
    """Rewrites or checks README.md."""
    path = ROOT / "README.md"
    text = path.read_text()
    wanted = filled(text)
    if "--check" in sys.argv[1:]:
        if wanted != text:
            print("README.md differs from experiments/results; run python scripts/readme_tables.py", file=sys.stderr)
        return int(wanted != text)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
