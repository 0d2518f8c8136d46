"""`./scripts/accelerator`: packs, runs and merges measurements on an accelerator.

--pack                       makes .device/: what a machine without a network lacks
--run --minutes M --out DIR  runs the queue there, the most valuable first
--merge DIR                  puts what came back into experiments/results/accelerator/
--dry                        the same queue on the CPU at toy size
"""

import argparse
import pathlib
import sys
import tempfile

from experiments import units
from experiments.accelerator import merge, pack, queue, records, run
from jaxbd.base import UserError

PACKED = units.ROOT / pack.FOLDER
WORK = units.RUNS / "accelerator"
DRY_MINUTES = 120.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="./scripts/accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pack", action="store_true", help="make the pack")
    what.add_argument("--run", action="store_true", help="run the queue on this machine")
    what.add_argument("--dry", action="store_true", help="run it on the CPU at toy size")
    what.add_argument("--merge", type=pathlib.Path, metavar="DIR", help="take records")
    what.add_argument("--list", action="store_true", help="print the queue")
    parser.add_argument("--minutes", type=float, help="that --run or --dry may take")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the records")
    parser.add_argument("--only", nargs="+", default=[], help="items, also those with a record")
    parser.add_argument("--shared", type=pathlib.Path, help="where images and models lie")
    parser.add_argument("--code", help="hash of the code whose records are merged")
    parser.add_argument("--allow-cpu", action="store_true", help="merge records of a CPU too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 where an item failed, 2 where nothing could be done."""
    given = parse(argv)
    try:
        if given.pack:
            return _pack(given)
        if given.merge:
            return _merge(given)
        if given.list:
            return _list()
        return _run(given)
    except UserError as error:
        units.say(f"accelerator: {error}")
        return 2


def _list() -> int:
    done = {name: record["status"] for name, record in records.committed().items()}
    rows = [
        {"item": item.name, "seconds at most": item.seconds, "record": done.get(item.name, "")}
        for item in queue.queue()
    ]
    print(units.table(rows))
    return 0


def _pack(given: argparse.Namespace) -> int:
    found = pack.make(given.shared or units.SHARED, WORK / "archives", PACKED)
    for name, size in found["in"].items():
        print(f"{size:>12,}  {name}")
    for name, why in found["left out"].items():
        print(f"    left out  {name}: {why}")
    travels, limit = found["bytes"] + found["sources"], found["limit"]
    print(f"{found['bytes']:>12,}  in {pack.FOLDER}")
    print(f"{travels:>12,}  with the sources; {limit:,} may travel")
    return 0


def _merge(given: argparse.Namespace) -> int:
    code = given.code or records.code_hash()
    written = merge.merge(
        given.merge, records.RESULTS, queue.queue(), code, WORK / "archives", given.allow_cpu
    )
    print("\n".join(written) or "nothing new")
    return 0


def _chosen(given: argparse.Namespace) -> list[queue.Item]:
    items, done = queue.queue(), records.committed()
    unknown = set(given.only) - {item.name for item in items}
    if unknown:
        raise UserError(f"no item is called {', '.join(sorted(unknown))}; --list names them")
    finished = {name for name, record in done.items() if record["status"] == "done"}
    return queue.pending(items, () if given.dry else finished, given.only)


def _run(given: argparse.Namespace) -> int:
    if given.run and (given.minutes is None or given.out is None):
        raise UserError("--run needs --minutes and --out")
    packed = PACKED / "shared"
    shared = given.shared or (packed if packed.is_dir() else units.SHARED)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        site = work / "site"
        installed = [] if given.dry else pack.install(PACKED, site)
        place = run.Place(
            out=(given.out or work / "out").resolve(),
            work=work,
            shared=shared.resolve(),
            site=site if installed else None,
            toy=given.dry,
        )
        run.unpack_parts(PACKED / "parts", work)
        machine = run.probe(place)
        if given.run and machine.backend == "cpu":
            raise UserError("JAX sees no accelerator here; --dry runs the queue on a CPU")
        seconds = 60 * (given.minutes or DRY_MINUTES)
        found = run.run(_chosen(given), place, machine, seconds)
    rows = [{"item": r["name"], "status": r["status"], "seconds": r["seconds"]} for r in found]
    print(units.table(rows))
    return int(any(record["status"] == "failed" for record in found))


if __name__ == "__main__":
    sys.exit(main())
