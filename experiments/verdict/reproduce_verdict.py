"""The verdict section: published models, digit models, searches without power, repaired models."""

import pathlib
import tempfile
from typing import Any

from experiments import repair_published, units
from experiments.reproduce import Check
from experiments.verdict import digits_models, published

TIME = (
    "about 40 minutes on 2 cores for the scans, hours for the repairs (--parts scans leaves them"
    " out); finished units are kept"
)
QUICK_TIME = "about 3 minutes on 2 cores: one published model, four digit models"
POWERLESS = {
    "one class of ten, two steps": (
        ["--targets", "8", "--steps", "2", "--locate-steps", "2", "--limit", "200"],
        "badnets_8_02",
    ),
    "one class of ten": (["--targets", "0"], "badnets_8_02"),
    "ten steps": (["--steps", "10", "--locate-steps", "10"], "clean resnet20"),
}
"""Searches that must not end in "clean": flags, model."""
VERDICTS = "Published models: verdicts"
DIGITS = "Twenty digit models: verdicts"
POWER = "Searches without power"
TIMES = "badnets_8_02: seconds of the whole command"
STAGES = "badnets_8_02: what the stages of the scan take"
SUSPECTS = "Published models: what repairs start from"
REPAIRED = "Published models: repairs judged by the attackers' triggers"
PARTS = ("scans", "repairs")


def run(
    quick: bool, parts: tuple[str, ...] = PARTS
) -> tuple[dict[str, Any], list[Check], dict[str, Any]]:
    """(tables by title, checks, details)."""
    tables: dict[str, Any] = {}
    checks: list[Check] = []
    details: dict[str, Any] = {}
    if "scans" in parts:
        found, checks = _run_scans(quick)
        tables |= found
    if "repairs" in parts and not quick:
        if published.are_there():
            found, more, details = _run_repairs()
            tables, checks = {**tables, **found}, [*checks, *more]
        else:
            units.say("the published models are not beside the repository: no repairs of them")
    return tables, checks, details


def _run_repairs() -> tuple[dict[str, Any], list[Check], dict[str, Any]]:
    """Every repair of every published model with a working backdoor."""
    before, rows = repair_published.measure(
        tuple(repair_published.TRIGGERS),
        repair_published.all_methods(),
        repair_published.Settings(),
    )
    came, repaired = repair_published.as_tables(before, rows)
    outcome, count = repair_published.check(rows, before), len(repair_published.TRIGGERS)
    worst = 1.0 if outcome["worst"] is None else outcome["worst"]
    least = repair_published.SHARE * count
    checks = [
        Check(
            "published models repaired by the automatic choice", outcome["models"], count, "exactly"
        ),
        Check("of them at 5 % and 2 points", len(outcome["hold"]), least, "at least"),
        Check("highest success rate after it", worst, repair_published.WORST, "at most"),
    ]
    courses = {f"{row['model']} {row['method']}": row["course"] for row in rows if "course" in row}
    tables = {SUSPECTS: came, REPAIRED: repaired}
    if units.MISSING:
        tables["Repairs left out: not measured yet"] = [{"unit": name} for name in units.MISSING]
    return tables, checks, {"courses": courses, "automatic": outcome}


def _run_scans(quick: bool) -> tuple[dict[str, Any], list[Check]]:
    """Published models, searches without power, seconds, digit models."""
    tables: dict[str, Any] = {}
    checks: list[Check] = []
    if published.are_there():
        names = list(published.MODELS)[: 1 if quick else None]
        tables[VERDICTS] = [published.row(name, published.one(name)) for name in names]
        checks += _count_wrong("published models judged wrongly", tables[VERDICTS])
        if not quick:
            tables[POWER] = [_powerless(name) for name in POWERLESS]
            calm = sum(row["verdict"] == "clean" for row in tables[POWER])
            checks.append(Check("searches without power called clean", calm, 0, "exactly"))
            tables[TIMES], tables[STAGES] = _times()
            checks += [
                Check(f"{row['start']} seconds", row["wall s"], limit, "at most")
                for row, limit in zip(tables[TIMES], (100.0, 60.0), strict=True)
            ]
            cold = tables[TIMES][0]
            share = cold["compiling s"] / cold["wall s"]
            checks.append(Check("share of the cold seconds that compile", share, 0.25, "at most"))
    else:
        units.say("the published models or CIFAR-10 are not beside the repository: left out")
    seeds = range(digits_models.FIRST, digits_models.FIRST + 4)
    tables[DIGITS] = digits_models.rows(seeds) if quick else digits_models.rows()
    checks += _count_wrong("digit models judged wrongly", tables[DIGITS])
    return tables, checks


def _count_wrong(name: str, rows: list[dict[str, Any]]) -> list[Check]:
    return [Check(name, sum(row["right"] in ("NO", False) for row in rows), 0, "exactly")]


def _powerless(name: str) -> dict[str, Any]:
    """What a scan with these flags says."""
    flags, model = POWERLESS[name]
    known = published.MODELS[model]
    words = [str(units.SHARED / "models" / known.file), "--data", str(units.SHARED / known.data)]
    found = units.unit(
        "verdict/power",
        name.replace(" ", "-").replace(",", ""),
        {"flags": flags, "model": known.file, "scan": units.scan_settings()},
        lambda: published.scan([*words, *flags], units.RUNS / "xla-scan"),
        keep=lambda found: found["exit"] != 2,
    )
    return {
        "search": name,
        "model": model,
        "verdict": found.get("verdict"),
        "named": found.get("targets"),
        "lacks": "; ".join(found.get("power_lacks") or []),
    }


def _times() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the whole command with nothing compiled before and again with all of it, their stages)."""
    known = published.MODELS["badnets_8_02"]
    words = [str(units.SHARED / "models" / known.file), "--data", str(units.SHARED / known.data)]

    def both() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            cold, warm = (published.scan(words, pathlib.Path(place)) for _ in range(2))
        return {"cold": cold, "warm": warm}

    found = units.unit("verdict/times", "badnets_8_02", {"scan": units.scan_settings()}, both)
    whole = [
        {
            "start": start,
            "wall s": one["wall_s"],
            "CPU s": one["cpu_s"],
            "compiling s": one["seconds"]["compile"],
            "image-steps": one["image_steps"],
            "peak MB": one["peak_mb"],
        }
        for start, one in found.items()
    ]
    stages = [
        {
            "start": start,
            "stage": stage["stage"],
            "image-steps": stage["image_steps"],
            "compiling s": stage["seconds"]["compile"],
            "running s": stage["seconds"]["run"],
            "peak MB so far": stage["peak_mb"],
        }
        for start, one in found.items()
        for stage in one["stages"]
    ]
    return whole, stages


def summarise_repairs(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each published model that `jaxbd repair` repaired by default: before and after."""
    after = {
        row["model"]: row
        for row in record["tables"][REPAIRED]
        if row["method"] == repair_published.HOLD
    }
    return [
        {
            "model": row["model"],
            "verdict": row["verdict"],
            "class named": ", ".join(map(str, row["named"])),
            "accuracy before": row["accuracy"],
            "accuracy after": after[row["model"]]["accuracy"],
            "ASR before": row["asr"],
            "ASR after": after[row["model"]]["asr"],
        }
        for row in record["tables"][SUSPECTS]
        if row["model"] in after
    ]


def compare_repairs(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each method: "ASR, accuracy" on every published model after the repair; the first
    row has the models as they came."""
    cell = lambda row: f"{row['asr']:.3f}, {row['accuracy']:.3f}"
    before = {row["model"]: cell(row) for row in record["tables"][SUSPECTS]}
    rows: dict[str, dict[str, Any]] = {}
    for row in record["tables"][REPAIRED]:
        own = rows.setdefault(row["method"], {"method": row["method"], **dict.fromkeys(before, "")})
        own[row["model"]] = cell(row) if "asr" in row else row["not run"]
    return [{"method": "as it came", **before}, *rows.values()]
