"""The two published models: measured, scanned, repaired, and one of them by way of ONNX."""

import pathlib
import tempfile
from typing import Any

from experiments import units
from experiments.reproduce import Check
from jaxbd import files
from jaxbd.base import UserError
from jaxbd.cli.main import main as jaxbd

NAME = "import"
EXPECTED = pathlib.Path(__file__).parents[1] / "expected" / "import.json"
TRIGGERS = {
    "badnets_8_02": ["--trigger", "white:4x4", "--place", "27,27", "--target", "8"],
    "l2_inv_0_02": ["--trigger", "{models}/l2_inv.png", "--apply", "add", "--target", "0"],
}
"""The triggers that were published with the models."""
MEASURED = "Published models: measured and stated"
SCANNED = "Published models: scan with --method auto"
REPAIRED = "Published models: repaired with what the scan recovered, judged by the true trigger"


def are_there() -> bool:
    """Whether the models and the images lie beside the repository."""
    folders = (units.SHARED / "models" / "ibau", units.SHARED / "data" / "cifar10")
    return all(folder.is_dir() for folder in folders)


def run(quick: bool) -> tuple[dict[str, Any], list[Check]]:
    """(tables, checks)."""
    if not are_there():
        units.say("the published models or CIFAR-10 are not beside the repository: left out")
        return {}, []
    expected = files.read_json(EXPECTED)
    names = list(TRIGGERS)[: 1 if quick else 2]
    rates = {name: evaluate(name, 2000 if quick else 10_000) for name in names}
    scans = {name: scan(name) for name in names}
    after = None if quick else repair("badnets_8_02", scans["badnets_8_02"])
    tables: dict[str, Any] = {}
    rows = [
        {"model": name, "figure": figure, "stated": stated, "measured": found[figure]}
        for name, found in rates.items()
        if found
        for figure, stated in expected[name].items()
    ]
    if rows:
        tables[MEASURED] = rows
    # the stated figures are over all images
    checks = [] if quick else [_distance(row, expected["tolerance"]) for row in rows]
    if any(scans.values()):
        tables[SCANNED] = [scan_row(name, one) for name, one in scans.items() if one]
    if found := scans["badnets_8_02"]:
        checks += _scan_checks(found)
    if after and (before := rates["badnets_8_02"]):
        tables[REPAIRED] = [
            {"badnets_8_02": when, **{figure: one[figure] for figure in expected["badnets_8_02"]}}
            for when, one in (("before", before), ("after", after))
        ]
    return tables, checks


def _scan_checks(found: dict[str, Any]) -> list[Check]:
    return [
        Check("scan names class 8 and no other", float(found["targets"] == [8]), 1.0, "exactly"),
        Check("scan seconds on 2 cores", found["seconds"]["total"], 240.0, "at most"),
    ]


def _distance(row: dict[str, Any], tolerance: float) -> Check:
    """How far a measured figure is from the stated one."""
    name = f"{row['model']} {row['figure']}: distance from stated"
    return Check(name, abs(row["measured"] - row["stated"]), tolerance, "at most")


def scan_row(name: str, found: dict[str, Any]) -> dict[str, Any]:
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


def command(arguments: list[str], allowed: tuple[int, ...]) -> dict[str, Any]:
    """Runs a verb of the command line that writes JSON; its content."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "result.json"
        call([*arguments, "--out", str(out)], allowed)
        return files.read_json(out)


def call(arguments: list[str], allowed: tuple[int, ...] = (0,)) -> None:
    """Runs a verb of the command line. Raises: UserError on another exit code."""
    code = jaxbd(arguments)
    if code not in allowed:
        raise UserError(f"jaxbd {' '.join(arguments)}: exit code {code}")


def model_of(name: str) -> pathlib.Path:
    """The file of a published model."""
    return units.SHARED / "models" / "ibau" / f"{name}_ckpt.pth"


def clean_images(limit: int, split: str = "test") -> list[str]:
    """Flags that name CIFAR-10 images."""
    data = str(units.SHARED / "data" / "cifar10")
    return ["--data", data, "--limit", str(limit), "--split", split]


def _trigger(name: str) -> list[str]:
    return [word.format(models=units.SHARED / "models" / "ibau") for word in TRIGGERS[name]]


def evaluate(name: str, limit: int) -> dict[str, Any] | None:
    """`jaxbd evaluate` on a published model with its trigger."""
    arguments = ["evaluate", str(model_of(name)), *clean_images(limit), *_trigger(name)]
    return units.kept_or_none(
        NAME, f"evaluate-{name}", [limit, TRIGGERS[name]], lambda: command(arguments, (0,))
    )


def scan(name: str) -> dict[str, Any] | None:
    """`jaxbd scan` with 2,000 clean test images, everything else as it comes."""
    return units.kept_or_none(
        NAME, f"scan-{name}", [2000, "auto"], lambda: scan_file(model_of(name))
    )


def scan_file(model: pathlib.Path) -> dict[str, Any]:
    """The same for any file of a model."""
    return command(["scan", str(model), *clean_images(2000)], (0, 1, 3))


def repair_file(model: pathlib.Path, out: pathlib.Path) -> None:
    """`jaxbd scan` into a case, then `jaxbd repair` of the case."""
    with tempfile.TemporaryDirectory() as folder:
        case = pathlib.Path(folder) / "case"
        # training images, so that all test images can judge
        call(["scan", str(model), *clean_images(2000, "train"), "--out", str(case)], (1, 3))
        call(["repair", str(case), "--no-rescan", "--out", str(out)])


def repair(name: str, found: dict[str, Any] | None) -> dict[str, Any] | None:
    """`jaxbd repair` of the case of a model that a scan called backdoored, into a .pth; `jaxbd
    evaluate` on that file with the true trigger."""

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "repaired.pth"
            repair_file(model_of(name), out)
            arguments = ["evaluate", str(out), *clean_images(10_000), *_trigger(name)]
            after = command(arguments, (0,))
        # it lay in a temporary folder
        after["model"]["path"] = pathlib.Path(after["model"]["path"]).name
        return after

    targets = found["targets"] if found else []
    return units.kept_or_none(NAME, f"repair-{name}", [TRIGGERS[name], targets, "case"], work)
