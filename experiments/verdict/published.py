"""`jaxbd scan` of published models as a user runs it: one process each, nothing known but the file.

The seconds are those of the whole process, with programs compiled before ("warm") or not ("cold").
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from experiments import units
from jaxbd import files

NAME = "verdict/published"
CIFAR10 = pathlib.Path("data/cifar10/test.parquet")
GTSRB = pathlib.Path("data/gtsrb/defender.npz")


class Published(NamedTuple):
    """A model of `shared/models`: its file, images to scan with, and target; None for a model
    without a working backdoor."""

    file: str
    data: pathlib.Path
    target: int | None


MODELS = {
    "badnets_8_02": Published("ibau/badnets_8_02_ckpt.pth", CIFAR10, 8),
    "l2_inv_0_02": Published("ibau/l2_inv_0_02_ckpt.pth", CIFAR10, 0),
    "trojan_sq_2_02": Published("ibau/trojan_sq_2_02_ckpt.pth", CIFAR10, 2),
    "gtsrb badnets_8_02": Published("ibau/gtsrbbadnets_8_02_ckpt.pth", GTSRB, 8),
    "nad WRN-16-1-S": Published("nad/WRN-16-1-S-model_best.pth.tar", CIFAR10, 5),
    "nad WRN-16-1-T": Published("nad/WRN-16-1-T-model_best.pth.tar", CIFAR10, None),
    "clean resnet20": Published("clean/resnet20-12fca82f.th", CIFAR10, None),
    "clean resnet32": Published("clean/resnet32-d509ac18.th", CIFAR10, None),
}
MEASURE = (
    "import resource, runpy, sys; sys.argv = sys.argv[1:]; code = 0\n"
    "try: runpy.run_module('jaxbd', run_name='__main__')\n"
    "except SystemExit as end: code = end.code\n"
    "used = resource.getrusage(resource.RUSAGE_SELF)\n"
    "print('USED', used.ru_maxrss, used.ru_utime + used.ru_stime, file=sys.stderr)\n"
    "sys.exit(code)"
)
"""Runs the command line and says what it took: peak memory in KiB, CPU seconds."""


def are_there() -> bool:
    """Whether models and images lie beside the repository."""
    return (units.SHARED / "models" / "clean").is_dir() and (units.SHARED / CIFAR10).exists()


def scan(words: list[str], cache: pathlib.Path) -> dict[str, Any]:
    """What `jaxbd scan` with these words writes, and what the process took.

    Args:
      cache: folder of compiled programs; an empty one for a cold start.
    """
    with tempfile.TemporaryDirectory() as place:
        out = pathlib.Path(place) / "scan.json"
        command = [sys.executable, "-c", MEASURE, "jaxbd", "scan", *words, "--out", str(out)]
        environment = {**units.environment(), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - started
        if done.returncode == 2:
            return {"exit": 2, "said": done.stderr.strip().splitlines()[-1:]}
        used = done.stderr.rpartition("USED ")[2].split()
        found = files.read_json(out)
    return {
        "exit": done.returncode,
        "wall_s": seconds,
        "cpu_s": float(used[1]),
        "peak_mb": int(used[0]) // 1024,
        **{name: found.get(name) for name in FIELDS},
    }


FIELDS = (
    "verdict",
    "targets",
    "leads",
    "natural",
    "signs",
    "power_lacks",
    "margin",
    "image_steps",
    "seconds",
    "stages",
    "decided_by",
)


def one(name: str) -> dict[str, Any]:
    """The scan of one published model."""
    model = MODELS[name]
    words = [str(units.SHARED / "models" / model.file), "--data", str(units.SHARED / model.data)]
    return units.unit(
        NAME,
        name.replace(" ", "-"),
        {"model": model.file, "data": str(model.data), "scan": units.scan_settings()},
        lambda: scan(words, units.RUNS / "xla-scan"),
        keep=lambda found: found["exit"] != 2,
    )


def row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    target = MODELS[name].target
    expected = [] if target is None else [target]
    right = found.get("targets") == expected and (found.get("verdict") == "backdoored") == bool(
        expected
    )
    margin = found.get("margin") or {}
    return {
        "model": name,
        "target": "none" if target is None else target,
        "verdict": found.get("verdict", "not read"),
        "named": found.get("targets"),
        "one sign": found.get("leads"),
        "patches that nobody is known to have planted": found.get("natural"),
        "margin p": margin.get("p_value"),
        "right": "yes" if right else "NO",
        "image-steps": found.get("image_steps"),
        "wall s": round(found.get("wall_s", 0)),
        "CPU s": round(found.get("cpu_s", 0)),
        "compiling s": round((found.get("seconds") or {}).get("compile", 0)),
        "peak MB": found.get("peak_mb"),
    }
