"""`badnets_8_02` as ONNX, written by jaxbd and by PyTorch: scanned, repaired, and the repaired ONNX
judged in onnxruntime.
"""

import importlib
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from experiments import import_families, units
from experiments.importing import published
from experiments.reproduce import Check
from jaxbd import files

MODEL, TARGET, WIDTH = "badnets_8_02", 8, 32
CORNER, SIDE = 27, 4
"""The published trigger: a white square, its top-left row and column."""
WRITERS = ("jaxbd", "torch")
BATCH = 500
EXPORTED = "ONNX exports of badnets_8_02: judged in onnxruntime by the true trigger"
SCANNED = "ONNX exports of badnets_8_02: scan with default settings"
REPAIRED = "ONNX exports of badnets_8_02: repaired into ONNX, judged in onnxruntime"


def run(quick: bool) -> tuple[dict[str, Any], list[Check]]:
    """(tables, checks)."""
    if not published.are_there() or quick:
        return {}, []
    reference = published.scan(MODEL)
    plain = {writer: judge_export(writer) for writer in WRITERS}
    scans = {writer: scan(writer) for writer in WRITERS}
    after = {writer: repair(writer, found) for writer, found in scans.items()}
    named = {".pth": reference, **{f"ONNX of {writer}": one for writer, one in scans.items()}}
    exported = [{"written by": writer, **one} for writer, one in plain.items() if one]
    tables = {
        EXPORTED: exported,
        SCANNED: [published.scan_row(name, one) for name, one in named.items() if one],
        REPAIRED: [
            {"written by": writer, "when": when, **one}
            for writer in WRITERS
            for when, one in (("before", plain[writer]), ("after", after[writer]))
            if one and after[writer]
        ],
    }
    checks = [check for writer in WRITERS for check in _checks(writer, scans[writer], reference)]
    checks += [
        Check(f"ONNX of {one['written by']} in onnxruntime: {name}, off", off, 1e-3, "at most")
        for one in exported
        for name, off in _distances(one).items()
    ]
    return {title: rows for title, rows in tables.items() if rows}, checks


def _checks(
    writer: str, found: dict[str, Any] | None, reference: dict[str, Any] | None
) -> list[Check]:
    """What the scan of an export must say: the planted class, and what it says of the .pth."""
    if not found:
        return []
    alone = float(found["targets"] == [TARGET])
    name = f"ONNX of {writer}: scan names class {TARGET} and no other"
    checks = [Check(name, alone, 1.0, "exactly")]
    if reference:
        same = all(found[key] == reference[key] for key in ("verdict", "targets"))
        name = f"ONNX of {writer}: same verdict and class as the .pth"
        checks.append(Check(name, float(same), 1.0, "exactly"))
    return checks


def _distances(judged: dict[str, Any]) -> dict[str, float]:
    """How far an export is from what is stated of the published file."""
    stated = files.read_json(published.EXPECTED)[MODEL]
    return {name: abs(judged[name] - figure) for name, figure in stated.items()}


def judge_export(writer: str) -> dict[str, Any] | None:
    """An export as it is, judged with the true trigger."""

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return judge(export(writer, pathlib.Path(folder) / f"{writer}.onnx"))

    return units.kept_or_none("import", f"judge-onnx-{writer}", [CORNER, SIDE], work)


def export(writer: str, path: pathlib.Path) -> pathlib.Path:
    """The published model as ONNX."""
    if writer == "jaxbd":
        published.call(["convert", str(published.model_of(MODEL)), "--out", str(path)])
        return path
    import torch

    sys.path.insert(0, str(units.ROOT / "tests"))
    twins: Any = importlib.import_module("torch_twins")
    twin = twins.SmallVGG(10, WIDTH)
    stored = torch.load(published.model_of(MODEL), map_location="cpu", weights_only=True)["net"]
    twin.load_state_dict(_as_named(stored, twin.state_dict()))
    return import_families.export(twin.eval(), "onnx dynamo", path)


def _as_named(stored: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """Weights in the order of the twin, whose layers may be counted otherwise."""
    if set(stored) == set(names):
        return stored
    return dict(zip(names, stored.values(), strict=True))


def scan(writer: str) -> dict[str, Any] | None:
    """`jaxbd scan` of an export, as of the .pth."""

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            found = published.scan_file(export(writer, pathlib.Path(folder) / f"{writer}.onnx"))
        # it lay in a temporary folder
        found["model"]["path"] = pathlib.Path(found["model"]["path"]).name
        return found

    return units.kept_or_none("import", f"scan-onnx-{writer}", [2000, "auto"], work)


def repair(writer: str, found: dict[str, Any] | None) -> dict[str, Any] | None:
    """`jaxbd repair CASE --out X.onnx` of an export that a scan called backdoored, judged by the
    true trigger."""

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            source = export(writer, pathlib.Path(folder) / f"{writer}.onnx")
            out = pathlib.Path(folder) / "repaired.onnx"
            published.repair_file(source, out)
            return judge(out)

    if not (found and found["targets"]):
        units.miss("import", f"repair-onnx-{writer}")
        return None
    return units.kept_or_none("import", f"repair-onnx-{writer}", [found["targets"], "case"], work)


def judge(path: pathlib.Path) -> dict[str, float]:
    """What onnxruntime says of all test images, with and without the true trigger."""
    images, labels = _images()
    stamped = images.copy()
    stamped[:, CORNER : CORNER + SIDE, CORNER : CORNER + SIDE] = 255
    others = labels != TARGET
    after = _classes(path, stamped[others])
    return {
        "clean_accuracy": float((_classes(path, images) == labels).mean()),
        "attack_success_rate": float((after == TARGET).mean()),
        "source_inference_accuracy": float((after == labels[others]).mean()),
    }


def _images() -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 32, 32, 3], uint8; labels [N]) of the test set."""
    from jaxbd.data import load

    data = load.load(str(units.SHARED / "data" / "cifar10"), split="test", image_shape=(32, 32, 3))
    return np.asarray(data.images), np.asarray(data.labels)


def _classes(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """onnxruntime's answer to uint8 images [N, H, W, C], laid out as the graph takes them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    first = session.get_inputs()[0]
    size = first.shape[0] if isinstance(first.shape[0], int) else BATCH
    found = []
    for start in range(0, len(images), size):
        x = images[start : start + size].astype(np.float32) / 255
        x = x.transpose(0, 3, 1, 2) if first.shape[1] == images.shape[-1] else x
        logits = np.asarray(session.run(None, {first.name: np.ascontiguousarray(x)})[0])
        found.append(logits.argmax(1))
    return np.concatenate(found)
