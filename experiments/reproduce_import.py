"""The import section: published models measured and scanned, hostile and mutated files, round trips through PyTorch."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from typing import Any

from experiments import units
from experiments.reproduce import Check
from jaxbd import record
from jaxbd.base import UserError
from jaxbd.cli.main import main as jaxbd

TIME = "about 20 minutes on 2 cores, 5 of them for mutated files; finished parts are kept"
QUICK_TIME = "about 4 minutes on 2 cores: one published model on 2,000 images, a scan of it, fewer mutated files"
ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPECTED = pathlib.Path(__file__).parent / "expected" / "import.json"
NAME = "import"
TRIGGERS = {
    "badnets_8_02": ["--trigger", "white:4x4", "--place", "27,27", "--target", "8"],
    "l2_inv_0_02": ["--trigger", "{models}/l2_inv.png", "--apply", "add", "--target", "0"],
}
"""The triggers that were published with the models."""


def run(quick: bool) -> tuple[dict[str, Any], list[Check], dict[str, Any]]:
    """(tables by title, checks, details)."""
    tables: dict[str, Any] = {}
    checks: list[Check] = []
    details: dict[str, Any] = {}
    if (units.SHARED / "models" / "ibau").is_dir() and (units.SHARED / "data" / "cifar10").is_dir():
        _published(quick, tables, checks, details)
    else:
        units.say("the published models or CIFAR-10 images are not beside the repository: their tables are left out")
    rows = [hostile(), *(suite(*one, quick) for one in SUITES)]
    tables["Reader: hostile files, mutated files, round trips"] = rows
    checks += [Check(f"{row['what']}: failures", row["failed"], 0, "exactly") for row in rows]
    # a suite of which nothing ran has no failures either
    checks += [Check(f"{row['what']}: cases", row["cases"], _least(row, quick), "at least") for row in rows]
    files = rows[0]
    checks.append(Check("slowest refusal in seconds", files["slowest seconds"], 2.0, "at most"))
    checks.append(Check("largest refusal in MB", files["largest MB"], 200.0, "at most"))
    return tables, checks, details


def _published(quick: bool, tables: dict, checks: list[Check], details: dict) -> None:
    expected = record.read_json(EXPECTED)
    names = list(TRIGGERS)[: 1 if quick else 2]
    measured, rows = {name: evaluate(name, 2000 if quick else 10_000) for name in names}, []
    for name, found in measured.items():
        for figure, stated in expected[name].items():
            rows.append({"model": name, "figure": figure, "stated": stated, "measured": found[figure]})
            if not quick:  # the stated figures are over all images
                off = abs(found[figure] - stated)
                checks.append(Check(f"{name} {figure}: distance from stated", off, expected["tolerance"], "at most"))
    tables["Published models: measured and stated"] = rows
    scans = {name: scan(name) for name in names}
    tables["Published models: scan with --method auto"] = [_scan_row(name, one) for name, one in scans.items()]
    found = scans["badnets_8_02"]
    checks.append(Check("scan names class 8 and no other", float(found["targets"] == [8]), 1.0, "exactly"))
    checks.append(Check("scan seconds on 2 cores", found["seconds"]["total"], 240.0, "at most"))
    details |= {"evaluate": measured, "scan": scans}
    if not quick:
        after = repair("badnets_8_02", found)
        after["model"]["path"] = pathlib.Path(after["model"]["path"]).name  # it lay in a temporary folder
        tables["Published models: repaired with what the scan recovered, judged by the true trigger"] = [
            {"badnets_8_02": when, **{figure: rates[figure] for figure in expected["badnets_8_02"]}}
            for when, rates in (("before", measured["badnets_8_02"]), ("after", after))
        ]
        details["repair"] = after


def _scan_row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """One line of the scan table; the class shown is the one with the highest rate."""
    best = max(found["classes"], key=lambda row: row["attack_success_rate"] or 0)
    return {
        "model": name,
        "verdict": found["verdict"],
        "named": " ".join(map(str, found["targets"])) or "none",
        "strongest class": best["class"],
        "its rate": best["attack_success_rate"],
        "its mask L1": best["mask_norm"],
        "place": " ".join(map(str, best["place"])),
        "steps": found["steps"],
        "image-steps": found["image_steps"],
        "seconds": found["seconds"]["total"],
        "of them compiling": found["seconds"]["compile"],
    }


def _command(arguments: list[str], allowed: tuple[int, ...]) -> dict[str, Any]:
    """Runs a verb of the command line that writes JSON; its content."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "result.json"
        code = jaxbd([*arguments, "--out", str(out)])
        if code not in allowed:
            raise UserError(f"jaxbd {' '.join(arguments)}: exit code {code}")
        return record.read_json(out)


def evaluate(name: str, limit: int) -> dict[str, Any]:
    """`jaxbd evaluate` on a published model with its trigger."""
    models, data = units.SHARED / "models" / "ibau", units.SHARED / "data" / "cifar10"
    trigger = [word.format(models=models) for word in TRIGGERS[name]]
    arguments = ["evaluate", str(models / f"{name}_ckpt.pth"), "--data", str(data), "--limit", str(limit), *trigger]
    return units.unit(NAME, f"evaluate-{name}", [limit, TRIGGERS[name]], lambda: _command(arguments, (0,)))


def scan(name: str) -> dict[str, Any]:
    """`jaxbd scan` with 2,000 clean test images, everything else as it comes."""
    models, data = units.SHARED / "models" / "ibau", units.SHARED / "data" / "cifar10"
    arguments = ["scan", str(models / f"{name}_ckpt.pth"), "--data", str(data), "--limit", "2000"]
    return units.unit(NAME, f"scan-{name}", [2000, "auto"], lambda: _command(arguments, (0, 1, 3)))


def repair(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """`jaxbd repair` for the classes a scan named, into a .pth; `jaxbd evaluate` on that file with the true trigger."""
    models, data = units.SHARED / "models" / "ibau", units.SHARED / "data" / "cifar10"

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            earlier, out = pathlib.Path(folder) / "scan.json", pathlib.Path(folder) / "repaired.pth"
            record.write_json(earlier, found)
            # training images, so that all test images can judge
            source = [str(models / f"{name}_ckpt.pth"), "--data", str(data), "--limit", "2000", "--split", "train"]
            code = jaxbd(["repair", *source, "--scan", str(earlier), "--out", str(out)])
            if code != 0:
                raise UserError(f"jaxbd repair: exit code {code}")
            trigger = [word.format(models=models) for word in TRIGGERS[name]]
            return _command(["evaluate", str(out), "--data", str(data), "--limit", "10000", *trigger], (0,))

    return units.unit(NAME, f"repair-{name}", [TRIGGERS[name], found["targets"]], work)


def hostile() -> dict[str, Any]:
    """Every file of the hostile corpus read in a watched process: what became of it, at what cost."""

    def work() -> dict[str, Any]:
        sys.path.insert(0, str(ROOT / "tests"))
        import hostile as corpus

        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            names = corpus.build(root)
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "hostile.py"), folder]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            reports = [json.loads(line) for line in done.stdout.splitlines()]
            left = sorted(entry.name for entry in root.iterdir())
        bad = [r["name"] for r in reports if r["outcome"] != "refused" or r["events"]]
        bad += sorted(set(names) - {r["name"] for r in reports}) + sorted(set(left) ^ set(names))
        return {
            "what": "hostile files refused, nothing executed or written",
            "cases": len(reports),
            "failed": len(bad),
            "slowest seconds": max(r["seconds"] for r in reports),
            "largest MB": max(r["megabytes"] for r in reports),
        }

    return units.unit(NAME, "hostile", "corpus", work, keep=lambda result: not result["failed"])


MUTATED = 20_000
PARITY = "tests/test_layouts.py tests/test_models.py tests/test_round_trip.py"
SUITES = (
    ("mutated files read or refused cleanly", "tests/test_fuzz_reader.py", "many_mutated", "mutated_files"),
    ("file round trips through PyTorch", "tests/test_container.py", "", ""),
    (
        "logits and round trips per architecture against PyTorch",
        PARITY,
        "",
        "",
    ),
)
"""(what, files, tests of a full run, tests of a quick one): chosen by pytest's -k."""


def suite(what: str, files: str, full: str, fast: str, quick: bool) -> dict[str, Any]:
    """A part of the test suite as a figure: test cases and failures."""
    chosen = fast if quick else full

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            report = pathlib.Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", *files.split(), f"--junitxml={report}"]
            command += ["-k", chosen] if chosen else []
            command += [] if quick else ["--slow"]
            subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)
            cases = xml.etree.ElementTree.parse(report).getroot().find("testsuite").attrib
        failed = int(cases["failures"]) + int(cases["errors"])
        ran = int(cases["tests"]) - int(cases["skipped"])
        return {"what": what, "cases": ran * _each(files, quick), "failed": failed}

    name = f"suite-{pathlib.Path(files.split()[0]).stem}{'-quick' if quick else ''}"
    return units.unit(NAME, name, [files, chosen, quick], work, keep=lambda result: not result["failed"])


def _least(row: dict[str, Any], quick: bool) -> int:
    """How many cases a part must have had: 20,000 mutated files are stated for a full run."""
    return MUTATED if row["what"] == SUITES[0][0] and not quick else 1


def _each(files: str, quick: bool) -> int:
    """Inputs behind one test case: each fuzzing test tries many."""
    if "fuzz" not in files:
        return 1
    sys.path.insert(0, str(ROOT / "tests"))
    import test_fuzz_reader

    return test_fuzz_reader.QUICK if quick else test_fuzz_reader.SLOW
