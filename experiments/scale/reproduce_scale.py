"""The scale section: sweeps beside PyTorch's, retiring cells, executors, memory, start-up."""

import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from experiments import units
from experiments.reproduce import Check
from experiments.scale import many_cells, startup
from experiments.scale import race as racing
from experiments.scale import retire as retiring
from jaxbd import files

TIME = (
    "half an hour on 2 cores, a third of it 20 models scanned twice; finished parts are kept,"
    " interrupt and start again as you like; let nothing else run meanwhile, these are measurements"
    " of time"
)
QUICK_TIME = (
    "3 minutes on 2 cores: one small sweep beside PyTorch's, 2 models, 90 cells; its figures are"
    " rough"
)
PARTS = ("bench", "retire", "race", "executors", "memory", "startup")
LONG = ("race",)
"""Parts that --quick leaves out."""
ARCHS = ("wrn16-1", "vgg")
QUICK_CASE = ("--side", 16, "--classes", 3, "--hidden", 64, "--width", 8, "--rounds", 3)
ROUNDS, STEPS = 5, 3
"""Turns of each side, and steps in a turn: a sweep of ours ends with a copy of all states, a scan's
after 20 steps."""
RUNTIME_MB = 600
"""What compiler and runtime may add to a process on top of a search's memory budget."""
FEWEST_IMAGES, FEWEST_STEPS, FASTER, HELP_SECONDS = 0.8, 3.0, 3.0, 1.0
"""Stated: share of PyTorch's images/s; image-steps without retiring over those with it; the same of
time; seconds."""


def run(quick: bool, parts: tuple[str, ...] = PARTS):
    """(tables by title, checks, details) of the chosen parts."""
    tables, checks, details = {}, [], {}
    ways = dict(zip(PARTS, (bench, retire, race, executors, memory, start), strict=True))
    for part in PARTS:
        if part in parts and not (quick and part in LONG):
            ways[part](quick, tables, checks, details)
    return tables, checks, details


def benchmark(folder: str, unit: str, name: str, *flags: Any) -> dict:
    """The record of a benchmark of `scripts/` with these flags; in a process of its own, which
    compiles everything."""

    def measure() -> dict:
        with tempfile.TemporaryDirectory() as out:
            path = pathlib.Path(out) / "record.json"
            words = [
                sys.executable,
                str(units.SCRIPTS / f"{name}.py"),
                *map(str, flags),
                "--out",
                str(path),
            ]
            subprocess.run(words, cwd=units.ROOT, check=True, stdout=sys.stderr)
            return files.read_json(path)

    return units.unit(f"scale/{folder}", unit, [name, *map(str, flags)], measure)


def bench(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """Both sweeps, training and DHBE beside PyTorch's, each case a unit."""
    label = units.script("bench_scale").label
    every = _bench_sweeps(quick)
    details["bench"] = [row for found in every for row in found["rows"]]
    details["bench_peak"] = [found["matrix_operations_per_second"] for found in every]
    rows = [tabulate(row, label(row["case"])) for row in details["bench"]]
    if not quick:
        peak = max(found["float32"] for found in details["bench_peak"])
        details["bench_dhbe"] = _bench_dhbe(peak)
        label_dhbe = units.script("bench_dhbe").label
        rows += [
            tabulate(row, f"DHBE iteration, {label_dhbe(row['case'])}")
            for row in details["bench_dhbe"]
        ]
    tables["Sweeps and steps beside plain PyTorch (images/s)"] = rows
    for row in details["bench"]:
        if row["case"]["task"] == "mesa":
            name = f"images/s over PyTorch's, {label(row['case'])}"
            checks.append(Check(name, row["torch_over_jaxbd"]["median"], FEWEST_IMAGES, "at least"))


def _bench_sweeps(quick: bool) -> list[dict]:
    """Records of every task and architecture."""
    tasks, archs = ("mesa", "cleanse", "training"), ARCHS
    folder, changes = "bench", ("--rounds", ROUNDS, "--steps", STEPS)
    if quick:
        tasks, archs, folder, changes = tasks[:1], ARCHS[1:], "bench-quick", QUICK_CASE
    return [
        benchmark(
            folder,
            f"{task}-{arch}",
            "bench_scale",
            "--task",
            task,
            "--arch",
            arch,
            "--unfolded",
            *changes,
        )
        for task in tasks
        for arch in archs
    ]


def _bench_dhbe(peak: float) -> list[dict]:
    """Rows of DHBE's iterations, with their share of `peak` operations per second."""
    flags = ("--rounds", ROUNDS, "--iterations", 1)
    archs = units.script("bench_dhbe").CASES
    found = [
        benchmark("bench", f"dhbe-{arch}", "bench_dhbe", "--arch", arch, *flags) for arch in archs
    ]
    rows = [row for each in found for row in each["rows"]]
    for row in rows:
        rate = row["jaxbd"]["operations_per_second"]
        row["jaxbd"]["share_of_peak"] = rate and rate / peak
    return rows


def tabulate(row: dict, name: str) -> dict:
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
        "PyTorch, channels last": rate("torch_channels_last"),
        "PyTorch, bfloat16": rate("torch_bfloat16"),
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
        Check(
            "image-steps of full scans over those with retiring",
            found["saving"],
            FEWEST_STEPS,
            "at least",
        )
    )
    name = f"models of {found['models']} with the verdict of the full scan"
    checks.append(Check(name, found["same_verdict"], found["models"], "exactly"))


def race(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """One program with retiring cells against PyTorch's cells one after another, to the same
    verdict."""
    found = racing.run()
    details["race"] = found
    tables[
        "To the verdict: retiring cells of one program against PyTorch's cells one after another"
    ] = found["rows"]
    for row in found["rows"]:
        name = (
            f"PyTorch's seconds (per step, times all steps) over ours with retiring, {row['net']}"
        )
        checks.append(Check(name, row["PyTorch / retiring"], FASTER, "at least"))
        same = row["verdict, full"] == row["verdict, retiring"]
        checks.append(
            Check(
                f"the verdict of the full scan with retiring, {row['net']}", int(same), 1, "exactly"
            )
        )


def executors(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """Ways over cells and over time; per-cell weights as grouped convolutions, products of patches,
    one by one."""
    found = benchmark(
        "executors",
        "quick" if quick else "usual",
        "bench_time_loops",
        *(["--quick"] if quick else []),
    )
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
    checks.append(
        Check(f"all of {found['cells']} cells done", int(found["all done"]), 1, "exactly")
    )
    grown = found["peak MB"] - found["peak MB before"] - found["results MB"]
    allowed = found["budget MB"] + RUNTIME_MB
    name = (
        f"MB that the search adds to the process, results apart (budget, and {RUNTIME_MB} for"
        " compiler and runtime)"
    )
    checks.append(Check(name, grown, allowed, "at most"))


def start(quick: bool, tables: dict, checks: list, details: dict) -> None:
    """The help, and compiled programs kept between processes."""
    found = startup.run(quick=quick)
    details["startup"] = found
    tables["Start-up: the help"] = found["rows"]
    tables["Start-up: a sweep in two processes"] = found["compile"]
    checks.append(
        Check("seconds of jaxbd --help", found["rows"][-1]["seconds"], HELP_SECONDS, "at most")
    )
    first, second = (row["seconds compiling"] for row in found["compile"])
    checks.append(
        Check(
            "seconds compiling in a second process, share of the first's",
            second / first,
            0.5,
            "at most",
        )
    )
