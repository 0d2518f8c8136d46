"""What is in a model file, without executing anything in it."""

import os
import pathlib
from typing import Any

from jaxbd.base import UserError
from jaxbd.interop import container as containers
from jaxbd.interop import folder, load
from jaxbd.interop.files import Limits, Refusal, opened, sha256
from jaxbd.models import build

NOT_TRAINED = ("running_mean", "running_var", "num_batches_tracked")


def describe(path: str | os.PathLike, *, arch: str | None = None) -> dict[str, Any]:
    """Facts on a model file, as plain Python.

    Returns: `path`, `kind`, `sha256`, `bytes`; `architecture` and its `options`, or `not_recognised` (why);
      `tensors` [(name, shape, dtype)]; `parameters`, the number of trained scalars; `nonfinite` {name: count};
      `ignored`, `nesting`, `prefix`; `refused`, why nothing of it was read. What is not known is None or empty.
    Raises: UserError only when there is no such file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    facts: dict[str, Any] = dict.fromkeys(("kind", "sha256", "bytes", "architecture", "options", "not_recognised"))
    facts |= {"path": str(path), "tensors": [], "parameters": 0, "nonfinite": {}, "ignored": [], "nesting": []}
    facts |= {"prefix": "", "refused": None}
    try:
        found = containers.read(path)
    except UserError as error:
        return {**facts, "refused": str(error), **_size_and_hash(path)}
    facts |= {"kind": found.kind, "sha256": found.sha256, "bytes": found.bytes, "prefix": found.prefix}
    facts |= {"nesting": list(found.nesting), "ignored": list(found.ignored)}
    facts["tensors"] = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in found.tensors.items()]
    facts["parameters"] = sum(tensor.size for name, tensor in found.tensors.items() if _is_trained(name))
    facts["nonfinite"] = {name: bad for name, tensor in found.tensors.items() if (bad := load.nonfinite(tensor))}
    return facts | _architecture(found, arch)


def _architecture(found: containers.Container, arch: str | None) -> dict[str, Any]:
    try:
        if found.kind == "folder":
            spec, _, _ = folder.load(found.path)
        else:
            spec = load.lay_out(found, arch)[0].spec
    except UserError as error:
        return {"not_recognised": str(error)}
    return {"architecture": _name(spec), "options": dict(spec.options)}


def _name(spec: build.Spec) -> str:
    height, width, channels = spec.image_shape
    return f"{spec.arch}, {spec.classes} classes, images {height}x{width}x{channels}"


def _is_trained(name: str) -> bool:
    return not name.startswith(("batch_stats/", "bounds/")) and name.rpartition(".")[2] not in NOT_TRAINED


def _size_and_hash(path: pathlib.Path) -> dict[str, Any]:
    """Of a refused file, if it can be read at all; a folder has none."""
    try:
        with opened(path, Limits()) as (file, size):
            return {"sha256": sha256(file), "bytes": size}
    except (Refusal, OSError):
        return {}
