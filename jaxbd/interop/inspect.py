"""What is in a model file, without executing anything in it."""

import os
import pathlib
from typing import Any

import jax

from jaxbd.base import UserError, Variables
from jaxbd.interop import beside, fit, folder, guarded, load
from jaxbd.interop import container as containers
from jaxbd.interop.files import Limits, Refusal, opened, sha256
from jaxbd.models import build

NOT_TRAINED = ("running_mean", "running_var", "num_batches_tracked")


def describe(path: str | os.PathLike, *, arch: str | None = None) -> dict[str, Any]:
    """Facts on a model file, as plain Python.

    Returns: `path`, `kind`, `sha256`, `bytes`; `architecture` and its `options`, or `not_recognised` (why);
      `tensors` [(name, shape, dtype)]; `parameters`, the number of trained scalars; `nonfinite` {name: count};
      `ignored`, `nesting`, `prefix`; `bounds`, the name of the file beside it whose activation bounds are applied;
      `guard` {targets, sha256, arrays} of a guarded model; `refused`, why it is not read. What is not known is None or
      empty.
    Raises: UserError only when there is no such file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    facts: dict[str, Any] = dict.fromkeys(("kind", "sha256", "bytes", "architecture", "options", "not_recognised"))
    facts |= {"path": str(path), "tensors": [], "parameters": 0, "nonfinite": {}, "ignored": [], "nesting": []}
    facts |= {"prefix": "", "bounds": None, "guard": None, "refused": None}
    try:
        found = containers.read(path)
    except UserError as error:
        return {**facts, "refused": str(error), **_size_and_hash(path)}
    facts |= {"kind": found.kind, "sha256": found.sha256, "bytes": found.bytes, "prefix": found.prefix}
    facts |= {"nesting": list(found.nesting), "ignored": list(found.ignored)}
    facts["tensors"] = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in found.tensors.items()]
    facts["parameters"] = sum(tensor.size for name, tensor in found.tensors.items() if _is_trained(name))
    facts["nonfinite"] = {name: bad for name, tensor in found.tensors.items() if (bad := fit.nonfinite(name, tensor))}
    return facts | _architecture(found, arch)


def _architecture(found: containers.Container, arch: str | None) -> dict[str, Any]:
    try:
        if found.kind == "folder" and guarded.is_guarded(pathlib.Path(found.path)):
            return _guarded(found.path)
        if found.kind == "folder":
            spec, _, _ = folder.load(found.path)
        else:
            layout, variables = load.lay_out(found, arch)
            spec = layout.spec
    except UserError as error:
        return {"not_recognised": str(error)}
    facts = {"architecture": _name(spec), "options": dict(spec.options)}
    return facts if found.kind == "folder" else facts | _bounds(found, spec, variables)


def _guarded(path: str) -> dict[str, Any]:
    """A guarded model is read whole or not at all: its suspect alone would be taken for what it is not."""
    try:
        spec, variables, _, guard = guarded.load(path)
    except UserError as error:
        return {"refused": str(error)}
    arrays = len(jax.tree.leaves(variables["corrected"])) * len(guard.targets)
    facts = {"targets": list(guard.targets), "sha256": guard.sha256, "arrays": arrays}
    return {"architecture": _name(spec), "options": dict(spec.options), "guard": facts}


def _bounds(found: containers.Container, spec: build.Spec, variables: Variables) -> dict[str, Any]:
    """Of the file beside a model file; where it is refused, so is the model."""
    path = beside.find(pathlib.Path(found.path))
    if path is None:
        return {}
    try:
        beside.read(path, found.sha256, spec, variables, Limits())
    except UserError as error:
        return {"refused": str(error)}
    return {"bounds": path.name}


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
