"""Describes the contents of a model file without executing anything in it."""

import functools
import os
import pathlib
from typing import Any

import jax

from jaxbd.base import UserError, Variables
from jaxbd.interop import beside, fit, folder, graph_model, guarded, layouts, load, manifest
from jaxbd.interop import container as containers
from jaxbd.limits import Limits, Refusal, opened, quote, sha256
from jaxbd.models import build

NOT_TRAINED = ("running_mean", "running_var", "num_batches_tracked")


def describe(
    path: str | os.PathLike, *, arch: str | None = None, key: str | None = None
) -> dict[str, Any]:
    """Facts about a model file, as plain Python values.

    Returns: `path`, `kind`, `sha256`, `bytes`; `architecture` and its `options`, or
      `not_recognised` (the reason); `tensors` [(name, shape, dtype)]; `parameters`, the number of
      trained scalars; `nonfinite` {name: count}; `ignored`, `nesting`, `prefix` as in
      `container.Container`; `forms`, other forms that fit the weights equally well; `merged`,
      weights stored in parts; `normalisation` {mean, std, divided_by} stated by the file;
      `bounds`, the name of the bounds file that is applied; `guard` {targets, sha256, arrays} of a
      guarded model;
      `manifest`, all files that decide what the model computes (see `manifest`); `refused`, the
      reason why it is not read. Unknown facts are None or empty.
    Raises: UserError only when there is no such file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    facts: dict[str, Any] = dict.fromkeys(
        ("kind", "sha256", "bytes", "architecture", "options", "not_recognised")
    )
    facts |= {
        "path": str(path),
        "tensors": [],
        "parameters": 0,
        "nonfinite": {},
        "ignored": [],
        "nesting": [],
        "forms": [],
        "merged": [],
        "normalisation": None,
    }
    facts |= {"prefix": "", "bounds": None, "guard": None, "refused": None, "manifest": None}
    try:
        # values that are not finite are counted below, not refused
        is_graph = graph_model.is_graph(path)
        model = load.open_model(path, key=key, allow_nonfinite=True) if is_graph else None
        wanted = containers.Wanted(functools.partial(layouts.fits, arch=arch), key)
        found: Any = containers.read(path, wanted=wanted) if model is None else model.container
    except UserError as error:
        return {**facts, "refused": str(error), **_size_and_hash(path)}
    facts |= {
        "kind": found.kind,
        "sha256": found.sha256,
        "bytes": found.bytes,
        "prefix": found.prefix,
    }
    facts |= {"nesting": list(found.nesting), "ignored": list(found.ignored)}
    facts |= {"merged": list(found.merged), "normalisation": _constants(found)}
    facts["tensors"] = [
        (name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in found.tensors.items()
    ]
    facts["parameters"] = sum(
        tensor.size for name, tensor in found.tensors.items() if _is_trained(name)
    )
    facts["nonfinite"] = {
        name: bad for name, tensor in found.tensors.items() if (bad := fit.nonfinite(name, tensor))
    }
    if model is None:
        return facts | _architecture(found, arch)
    if arch is not None:
        return facts | {"not_recognised": "the file describes its own net; leave --arch out"}
    return facts | _graph(model)


def _architecture(found: containers.Container, arch: str | None) -> dict[str, Any]:
    try:
        if found.kind == "folder" and guarded.is_guarded(pathlib.Path(found.path)):
            return _read_guarded(found.path, arch)
        if found.kind == "folder":
            whole = folder.read(found.path)
            spec, digests = whole.spec, whole.files
            _check_stated(spec, arch)
        else:
            layout, variables = load.lay_out(found, arch)
            spec, digests = layout.spec, found.files
    except UserError as error:
        return {"not_recognised": str(error)}
    facts = {"architecture": _name(spec), "options": dict(spec.options)}
    if found.kind != "folder":
        facts["forms"] = [
            " ".join(f"{n}={v}" for n, v in form.options.items() if v != spec.options.get(n))
            for form in layout.forms[1:]
        ]
    facts["manifest"] = manifest.statement(pathlib.Path(found.path).name, digests)
    # a folder holds its own bounds
    return facts if found.kind == "folder" else facts | _bounds(found, spec, variables)


def _check_stated(spec: build.Spec, arch: str | None) -> None:
    """Raises UserError if a folder, which names its own architecture, is to be compared with
    another."""
    if arch not in (None, spec.arch):
        raise UserError(f"the folder says {spec.arch}, not {arch}; leave --arch out")


def _constants(found: containers.Container) -> dict[str, Any] | None:
    """The normalisation stated by the file or its folder, for pixels in [0, 1]; `divided_by` is 255
    if it is stated for pixels from 0 to 255, else 1."""
    try:
        mean, std = load.stated_constants(found)
    except UserError:
        return None
    if mean is None or std is None:
        return None
    scale = 255 if load.is_for_bytes(found) else 1
    return {"mean": list(mean), "std": list(std), "divided_by": scale}


def _graph(model: load.Model) -> dict[str, Any]:
    """Facts about an ONNX file or a torch.export archive: its size, and what the graph itself does
    to images and logits."""
    opened: Any = model.graph
    options: dict[str, Any] = {"opset": opened.graph.opset, "nodes": len(opened.graph.nodes)}
    if opened.graph.answer:
        options["last"] = f"{opened.graph.answer}, left out: its input is used as the logits"
    if len(opened.graph.outputs) > 1:
        options["logits"] = f"from output {quote(opened.graph.chosen)}"
    if opened.mean is not None:
        options["normalises"] = f"by mean {list(opened.mean)} and std {list(opened.std)} itself"
    whole = manifest.statement(pathlib.Path(model.path).name, model.files)
    facts = {"architecture": f"graph of {_name(model.spec)}", "options": options}
    return {**facts, "manifest": whole}


def _read_guarded(path: str, arch: str | None) -> dict[str, Any]:
    """Facts about a guarded model. It is read as a whole or refused: described alone, its suspect
    would pass for the guarded model."""
    try:
        (spec, variables, digests), guard = guarded.read(path)
        _check_stated(spec, arch)
    except UserError as error:
        return {"refused": str(error)}
    whole = manifest.statement(pathlib.Path(path).name, digests)
    arrays = len(jax.tree.leaves(variables["corrected"])) * len(guard.targets)
    facts = {"targets": list(guard.targets), "sha256": guard.sha256, "arrays": arrays}
    options = dict(spec.options)
    return {"architecture": _name(spec), "options": options, "guard": facts, "manifest": whole}


def _bounds(found: containers.Container, spec: build.Spec, variables: Variables) -> dict[str, Any]:
    """Facts about the bounds file beside a model file. If the bounds are refused, so is the
    model."""
    path = beside.find(pathlib.Path(found.path))
    if path is None:
        return {}
    try:
        _, digest = beside.read(path, found.sha256, spec, variables, Limits())
    except UserError as error:
        return {"refused": str(error)}
    files = {**found.files, path.name: digest}
    return {
        "bounds": path.name,
        "manifest": manifest.statement(pathlib.Path(found.path).name, files),
    }


def _name(spec: build.Spec) -> str:
    height, width, channels = spec.image_shape
    return f"{build.title(spec)}, {spec.classes} classes, images {height}x{width}x{channels}"


def _is_trained(name: str) -> bool:
    return (
        not name.startswith(("batch_stats/", "bounds/"))
        and name.rpartition(".")[2] not in NOT_TRAINED
    )


def _size_and_hash(path: pathlib.Path) -> dict[str, Any]:
    """Hash and size of a refused file; empty for a folder or a file that cannot be opened."""
    try:
        with opened(path, Limits()) as (file, size):
            return {"sha256": sha256(file), "bytes": size}
    except (Refusal, OSError):
        return {}
