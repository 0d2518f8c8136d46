"""The reader section: mutated files read by jaxbd and by the formats' own readers, hostile files,
kills.

Every part of the fuzzing is kept; of an unfinished run the record says how much of it is done.
"""

from typing import Any

from experiments import units
from experiments.importing import reader
from experiments.reader import fuzz, part
from experiments.reproduce import Check

TIME = "about an hour on 2 idle cores: 1,000,000 mutated files in parts, which are kept"
QUICK_TIME = "about 3 minutes on 2 cores: 20,000 mutated files, the hostile files, three kills"
PARTS = ("done",)
"""`--parts done` makes the record of the parts that are finished, and runs no others."""
FILES, QUICK_FILES = 1_000_000, 20_000


def run(quick: bool, parts: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[Check], dict]:
    """(tables by title, checks, details)."""
    wanted = fuzz.plan(QUICK_FILES if quick else FILES)
    if parts:
        wanted = [one for one in wanted if fuzz.finished(*one)]
    results = [fuzz.unit(*one) for one in wanted]
    by_kind = {
        kind: [one for one in results if one["kind"] == kind]
        for kind in (*fuzz.SHARES, *fuzz.RARER)
    }
    rows = [{"files of": kind, **fuzz.total(of)} for kind, of in by_kind.items() if of]
    whole, now = fuzz.total(results), part.readers_digest()
    current = sum(one["files"] for one in results if one["readers"] == now)
    kills = 3 if quick or parts else 10
    killed = units.unit("reader", f"kills-{kills}", "", lambda: fuzz.kills(kills))
    hostile = reader.hostile()
    whole["with the readers as they are now"] = current
    tables = {
        "Mutated files: jaxbd against PyTorch (mapped and not) and safetensors": [
            *rows,
            {"files of": "all", **whole},
        ],
        "Parts killed at a random moment and run again": [killed],
        "Hostile files": [hostile],
    }
    checks = [
        *(
            Check(f"{bad} files", whole[bad], 0, "exactly")
            for bad in ("unequal", "crashed", "hung")
        ),
        Check("programs run, files written", whole["executed"], 0, "exactly"),
        Check("files tried", whole["files"], QUICK_FILES if quick else FILES, "at least"),
        Check("files read and equal elsewhere", whole["read, equal elsewhere"], 1_000, "at least"),
        Check("kills survived", killed["survived"], killed["kills"], "exactly"),
        Check("hostile files answered wrongly", hostile["failed"], 0, "exactly"),
        Check("slowest file in ms of a processor", whole["slowest ms"], 2_000.0, "at most"),
        Check("memory that a part grew by, in MB", whole["most MB"], 500.0, "at most"),
    ]
    bad = [one for one in results if one["unequal"] or one["crashed"] or one["hung"]]
    return tables, checks, {"readers": now, "parts with faults": bad}
