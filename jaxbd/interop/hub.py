"""Folders in the format of the Hugging Face Hub and timm: weights, and a `config.json` that is not
jaxbd's."""

import json
import math
import pathlib
from typing import Any

from jaxbd.interop import folder
from jaxbd.limits import Limits, Refusal, opened, parse_json, read_exactly, sha256

FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors")
PROCESSOR = "preprocessor_config.json"


def weights_of(path: pathlib.Path) -> pathlib.Path | None:
    """The weights file of such a folder; None if `path` is jaxbd's or another kind of folder."""
    if (path / folder.CONFIG).is_file() and _is_ours(path / folder.CONFIG):
        return None
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None and path.is_dir():
        alone = [entry for entry in sorted(path.iterdir()) if entry.suffix == ".safetensors"]
        found = alone[0] if len(alone) == 1 and alone[0].is_file() else None
    return found


def _is_ours(config: pathlib.Path) -> bool:
    """Whether a `config.json` is jaxbd's, or too large or damaged to tell."""
    if config.stat().st_size > Limits().header_bytes:
        return True
    try:
        value = json.loads(config.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError, OSError):
        return True
    hub_keys = ("architecture", "architectures", "model_type", "pretrained_cfg", "num_classes")
    return not isinstance(value, dict) or "format" in value or not any(k in value for k in hub_keys)


def read_config(path: pathlib.Path, limits: Limits) -> tuple[dict[str, Any], dict[str, str]]:
    """The folder's image settings, and the SHA-256 of each file they were read from.

    The settings are "mean" and "std" (tuples of numbers) and "image_shape" (H, W, C); those that
    the folder does not state are absent.
    """
    digests: dict[str, str] = {}
    config = _json(path / folder.CONFIG, limits, digests)
    known = config.get("pretrained_cfg")
    known = known if isinstance(known, dict) else config
    processor = _json(path / PROCESSOR, limits, digests)
    stated: dict[str, Any] = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        numbers = _numbers(known.get(ours, processor.get(theirs)))
        if numbers is not None:
            stated[ours] = numbers
    size = known.get("input_size")
    if isinstance(size, list) and len(size) == 3 and all(_is_size(each) for each in size):
        stated["image_shape"] = (size[1], size[2], size[0])  # timm writes (C, H, W)
    if ("mean" in stated) != ("std" in stated) or min(stated.get("std", (1.0,))) <= 0:
        raise Refusal(f"{folder.CONFIG} states a normalisation that makes no sense")
    return stated, digests


def _json(path: pathlib.Path, limits: Limits, digests: dict[str, str]) -> dict[str, Any]:
    """Reads a small JSON object and records its hash in `digests`; empty if there is no such
    file."""
    if not path.is_file():
        return {}
    with opened(path, limits, limits.header_bytes) as (file, size):
        value = parse_json(read_exactly(file, 0, size, path.name), path.name, limits)
        digests[path.name] = sha256(file)
    if not isinstance(value, dict):
        raise Refusal(f"{path.name} is not a JSON object")
    return value


def _numbers(value: Any) -> tuple[float, ...] | None:
    if not isinstance(value, list) or not 1 <= len(value) <= 64:
        return None
    if not all(type(each) in (int, float) and math.isfinite(each) for each in value):
        return None
    return tuple(float(each) for each in value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 4096
