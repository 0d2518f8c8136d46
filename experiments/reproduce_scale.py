"""The scale section: sweeps beside PyTorch's, settled cells retired, executors, memory, start-up."""

import importlib
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from experiments import many_cells, startup, units
from experiments import race as racing
from experiments import retire as retiring
from experiments.reproduce import Check
from jaxbd import record

TIME = (
    "half an hour on 2 cores, a third of it 20 models scanned twice; finished parts are kept, interrupt and start "
    "again as you like; let nothing else run meanwhile, these are measurements of time"
)
QUICK_TIME = "3 minutes on 2 cores: one small sweep beside PyTorch's, 2 models, 90 cells; its figures are rough"
PARTS = ("bench", "retire", "race", "executors", "memory", "startup")
LONG = ("race",)
"""Parts that --quick leaves out."""
SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"
ARCHS = ("wrn16-1", "vgg")
QUICK_CASE = ("--side", 16, "--classes", 3, "--hidden", 64, "--width", 8, "--rounds", 3)
ROUNDS, STEPS = 5, 3
"""Turns of each side, and steps in a turn: a sweep of ours ends with a copy of all states, a scan's after 20 steps."""
RUNTIME_MB = 600
"""What compiler and runtime may add to a process on top of a search's memory budget."""
FEWEST_IMAGES, FEWEST_STEPS, FASTER, HELP_SECONDS = 0.8, 3.0, 3.0, 1.0
"""Stated: share of PyTorch's images/s; image-steps without retiring over those with it; the same of time; seconds."""


def run(quick: bool, parts: tuple[str, ...] = PARTS):
    """(tables by title, checks, details) of the chosen parts."""
    tables, checks, details = {}, [], {}
    ways = dict(zip(PARTS, (bench, retire, race, executors, memory, start), strict=True))
    for part in PARTS:
        if part in parts and not (quick and part in LONG):
            ways[part](quick, tables, checks, details)
    return tables, checks, details


def script(name: str) -> Any:
    """A file of `scripts/` as a module; what it imports lies beside it."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)


def benchmark(folder: str, unit: str, name: str, *flags: Any) -> dict:
    """The record of a benchmark of `scripts/` with these flags; in a process of its own, which compiles everything."""

    def measure() -> dict:
        with tempfile.TemporaryDirectory() as out:
            path = pathlib.Path(out) / "record.json"
            words = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, flags), "--out", str(path)]
            subprocess.run(words, cwd=SCRIPTS.parent, check=True, stdout=sys.stderr)
            return record.read_json(path)

    return units.unit(f"scale/{folder}", unit, [name, *map(str, flags)], measure)


def bench(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """Both sweeps, training and DHBE beside PyTorch's, each case a unit."""
    scale, dhbe = script("bench_scale"), script("bench_dhbe")
    folder, changes = ("bench-quick", QUICK_CASE) if quick else ("bench", ("--rounds", ROUNDS, "--steps", STEPS))
    archs, tasks = (ARCHS[1:], ("mesa",)) if quick else (ARCHS, ("mesa", "cleanse", "training"))
    every = [
        benchmark(folder, f"{task}-{arch}", "bench_scale", "--task", task, "--arch", arch, "--unfolded", *changes)
        for task in tasks
        for arch in archs
    ]
    details["bench"] = [row for found in every for row in found["rows"]]
    details["bench_peak"] = [found["matrix_operations_per_second"] for found in every]
    rows = [shown(row, scale.label(row["case"])) for row in details["bench"]]
    if not quick:
        flags = ("--rounds", ROUNDS, "--iterations", 1)
        erased = [benchmark(folder, f"dhbe-{arch}", "bench_dhbe", "--arch", arch, *flags) for arch in dhbe.CASES]
        details["bench_dhbe"] = [row for found in erased for row in found["rows"]]
        peak = max(found["float32"] for found in details["bench_peak"])
        for row in details["bench_dhbe"]:
            rate = row["jaxbd"]["operations_per_second"]
            row["jaxbd"]["share_of_peak"] = rate and rate / peak
        rows += [shown(row, f"DHBE iteration, {dhbe.label(row['case'])}") for row in details["bench_dhbe"]]
    tables["Sweeps and steps beside plain PyTorch (images/s)"] = rows
    for row in details["bench"]:
        if row["case"]["task"] == "mesa":
            name = f"images/s over PyTorch's, {scale.label(row['case'])}"
            checks.append(Check(name, row["torch_over_jaxbd"]["median"], FEWEST_IMAGES, "at least"))


def shown(row: dict, name: str) -> dict:
    """A row of the table."""
    ours, ratio, share = row["jaxbd"], row["torch_over_jaxbd"], row["jaxbd"].get("share_of_peak")
    low, high = ratio["quartiles"]
    rate = lambda side: f"{row[side]['images_per_second']:.0f}" if side in row else ""
    return {
        "what": name,
        "jaxbd": rate("jaxbd"),
        "jaxbd, one cell after another": rate("loop"),
        "jaxbd, all cells as one batch": rate("vmap"),
        "jaxbd, BatchNorm not folded": rate("unfolded"),
        "PyTorch": rate("torch"),
        "jaxbd / PyTorch": f"{ratio['median']:.2f} ({low:.2f} - {high:.2f})",
        "share of the matrix peak": "" if share is None else f"{share:.0%}",
        "seconds to compile": f"{ours['seconds_compile']:.1f}",
    }


def retire(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """The same verdicts from fewer image-steps."""
    found = retiring.run(1) if quick else retiring.run()
    details["retire"] = found
    tables["Handwritten digits: scans with settled cells retired, beside full ones"] = found["rows"]
    checks.append(
        Check("image-steps of full scans over those with retiring", found["saving"], FEWEST_STEPS, "at least")
    )
    name = f"models of {found['models']} with the verdict of the full scan"
    checks.append(Check(name, found["same_verdict"], found["models"], "exactly"))


def race(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """One program with retiring cells against PyTorch's cells one after another, to the same verdict."""
    found = racing.run()
    details["race"] = found
    tables["To the verdict: retiring cells of one program against PyTorch's cells one after another"] = found["rows"]
    for row in found["rows"]:
        name = f"PyTorch's seconds (per step, times all steps) over ours with retiring, {row['net']}"
        checks.append(Check(name, row["PyTorch / retiring"], FASTER, "at least"))
        same = row["verdict, full"] == row["verdict, retiring"]
        checks.append(Check(f"the verdict of the full scan with retiring, {row['net']}", int(same), 1, "exactly"))


def executors(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """Ways over cells and over time; per-cell weights as grouped convolutions, products of patches, one by one."""
    found = benchmark("executors", "quick" if quick else "usual", "bench_time_loops", *(["--quick"] if quick else []))
    rows = found["rows"]
    details["executors"] = {"rows": rows, "verdicts": found["verdicts"]}
    tables["Ways over cells and over time"] = [
        {
            "task": row["task"],
            "over cells": row["over_cells"],
            "over time": row["over_time"],
            "images/s": f"{row['images_per_second']:.0f}",
            "slower than the fastest": f"{row['slower']:.1f}x",
            "seconds to compile": f"{row['seconds_compile']:.1f}",
        }
        for row in rows
    ]


def memory(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """All pairs of 100 classes within a budget."""
    found = many_cells.run(10, 4) if quick else many_cells.run()
    details["memory"] = found
    tables["Many cells in bounded memory"] = [found]
    checks.append(Check(f"all of {found['cells']} cells done", int(found["all done"]), 1, "exactly"))
    grown = found["peak MB"] - found["peak MB before"] - found["results MB"]
    allowed = found["budget MB"] + RUNTIME_MB
    name = f"MB that the search adds to the process, results apart (budget, and {RUNTIME_MB} for compiler and runtime)"
    checks.append(Check(name, grown, allowed, "at most"))


def start(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """The help, and compiled programs kept between processes."""
    found = startup.run(quick=quick)
    details["startup"] = found
    tables["Start-up: the help"] = found["rows"]
    tables["Start-up: a sweep in two processes"] = found["compile"]
    checks.append(Check("seconds of jaxbd --help", found["rows"][-1]["seconds"], HELP_SECONDS, "at most"))
    first, second = (row["seconds compiling"] for row in found["compile"])
    checks.append(Check("seconds compiling in a second process, share of the first's", second / first, 0.5, "at most"))
