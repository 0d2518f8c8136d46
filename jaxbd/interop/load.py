"""From a model file of any kind to a net with its variables, and back into the file's own form."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxbd.base import Net, UserError, Variables
from jaxbd.interop import beside, fit, folder, guarded, layouts
from jaxbd.interop import container as containers
from jaxbd.interop.container import Container
from jaxbd.interop.files import Limits, quote, refusing, sha256
from jaxbd.interop.layouts import naming
from jaxbd.models import build
from jaxbd.record import replacing

TORCH_SUFFIXES = (".pth", ".pt", ".tar")


class Model(NamedTuple):
    """A net that was read.

    Attributes:
      spec, net, variables: what to build, the built net, its arrays; of a guarded model `spec` is the suspect's.
      sha256: of the file (of a folder's `model.safetensors`).
      path: where it lay.
      container: the file as it was; None for a jaxbd folder.
      layout: how the file's tensors correspond to the variables; None for a jaxbd folder.
      guard: the targets of a guarded model; None for a plain net.
      bounds: name of the file beside it whose activation bounds are applied; None where there is none.
    """

    spec: build.Spec
    net: Net
    variables: Variables
    sha256: str
    path: str
    container: Container | None
    layout: layouts.Layout | None
    guard: guarded.Guard | None = None
    bounds: str | None = None


def open_model(
    path: str | os.PathLike,
    *,
    arch: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_shape: tuple[int, int, int] | None = None,
    allow_nonfinite: bool = False,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Model:
    """Reads a model of any kind without executing anything in it.

    A file with `<stem>.bounds.safetensors` beside it, as `save_model` writes it, gets those activation bounds; a
    guarded model's folder becomes the guarded net.

    Args:
      arch: the architecture, where it cannot be recognised; an Orbax folder needs it.
      mean, std: input normalisation, one number or one per channel; a jaxbd folder's own, otherwise none, when not
        given.
      image_shape: (H, W, C) where the tensors leave it open.
      allow_nonfinite: take weights that are NaN or infinite, which are refused otherwise.
    Raises: UserError naming the file and what is wrong: refused, not recognised, not fitting, not finite.
    """
    path = pathlib.Path(path)
    container = layout = guard = bounds = None
    if path.is_dir() and folder.is_model(path):
        if guarded.is_guarded(path):
            spec, variables, digest, guard = guarded.load(path, limits)
        else:
            spec, variables, digest = folder.load(path, limits)
        _check_stated(path, spec, arch, image_shape)
        tensors = folder.flatten(variables["suspect"] if guard else variables)
    else:
        container = containers.read(path, limits)
        tensors, digest = container.tensors, container.sha256
        try:
            layout, variables = lay_out(container, arch, image_shape)
        except UserError as error:
            raise UserError(f"{path.name}: {error}") from None
        spec = layout.spec
        if (bounds := beside.find(path)) is not None:
            variables = {**variables, "bounds": beside.read(bounds, digest, spec, variables, limits)}
    if not allow_nonfinite:
        _check_finite(path, tensors)
    spec = dataclasses.replace(spec, mean=mean or spec.mean, std=std or spec.std)
    if {len(spec.mean), len(spec.std)} - {1, spec.image_shape[2]}:
        raise UserError(
            f"{path.name}: a normalisation of {len(spec.mean)} channels does not fit a model of "
            f"{spec.image_shape[2]}; give one number for each channel, or one for all"
        )
    net, applied = guarded.net(spec, guard), None if bounds is None else bounds.name
    return Model(spec, net, variables, digest, str(path), container, layout, guard, applied)


def lay_out(
    container: Container, arch: str | None = None, image_shape: tuple[int, int, int] | None = None
) -> tuple[layouts.Layout, Variables]:
    """Recognises a file's tensors, in PyTorch's names or in ours."""
    tensors, bounds = container.tensors, {}
    if _named_as_ours(tensors):
        if arch is None:
            raise UserError(f"arrays in jaxbd's own names do not say what net they are of; give --arch, one of "
                            f"{', '.join(sorted(build.MODULES))}")  # fmt: skip
        bounds = {name: tensor for name, tensor in tensors.items() if name.startswith("bounds/")}
        tensors = _in_torch_names({n: t for n, t in tensors.items() if n not in bounds}, arch)
    layout = layouts.recognise(tensors, arch=arch, image_shape=image_shape)
    variables = layouts.to_variables(tensors, layout)
    if bounds:
        with refusing(pathlib.Path(container.path)):
            fit.check(container.tensors, layout.spec)
        variables = {**variables, "bounds": folder.unflatten(bounds)["bounds"]}
    return layout, variables


def _named_as_ours(tensors: Mapping[str, np.ndarray]) -> bool:
    return all(name.startswith(tuple(f"{collection}/" for collection in folder.COLLECTIONS)) for name in tensors)


def _in_torch_names(tensors: Mapping[str, np.ndarray], arch: str) -> dict[str, np.ndarray]:
    """Arrays named as ours ("params/conv0/kernel") as the state_dict that PyTorch would have."""
    style, named = naming.namings(arch)[0], {}
    for path, array in tensors.items():
        _, *modules, leaf = path.split("/")
        if leaf not in naming.LEAVES:
            raise UserError(f"array {quote(path)} has no counterpart in a net of jaxbd")
        axes = (3, 2, 0, 1) if array.ndim == 4 else None
        named[f"{naming.translate('/'.join(modules), style)}.{naming.LEAVES[leaf]}"] = array.transpose(axes)
    return named


def _check_stated(
    path: pathlib.Path, spec: build.Spec, arch: str | None, image_shape: tuple[int, int, int] | None
) -> None:
    if arch is not None and arch != spec.arch:
        raise UserError(f"{path}: the folder says {spec.arch}, not {arch}; leave --arch out")
    if image_shape is not None and tuple(image_shape) != tuple(spec.image_shape):
        raise UserError(f"{path}: the folder says images of {spec.image_shape}, not {tuple(image_shape)}")


def _check_finite(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        if bad := fit.nonfinite(name, tensor):
            raise UserError(
                f"{path.name}: tensor {quote(name)} holds {bad:,} values that are NaN or infinite; "
                "ask for the file again"
            )


def save_model(path: str | os.PathLike, model: Model, variables: Variables) -> str | None:
    """Writes `variables` in the place of the model's own.

    A path ending in .pth, .pt or .tar becomes a PyTorch file, .safetensors a safetensors file, both with the names,
    order, types and nesting of the file the model was read from; tensors that did not change are bit-identical. Any
    other path becomes a jaxbd folder. A guarded model becomes a folder only.

    Returns: a note where something has no place in the file: activation bounds of a repair go to
      `<stem>.bounds.safetensors` beside it, where `open_model` finds them. Those of a file that is replaced by one
      without bounds are deleted.
    Raises: UserError when it cannot be written, the bounds beside it are another model's, or the model is guarded.
    """
    path = pathlib.Path(path)
    kind = "torch-zip" if path.suffix in TORCH_SUFFIXES else "safetensors" if path.suffix == ".safetensors" else None
    notes = {"source_sha256": model.sha256}
    if model.guard is not None:
        if kind is not None:
            raise UserError(f"{path.name}: a guarded model is a folder with several nets' moments; name a folder")
        guarded.save(path, model.spec, variables, model.guard.targets, notes)
        return None
    if kind is None:
        folder.save(path, model.spec, variables, notes)
        return None
    container = model.container
    # an Orbax folder, or a jaxbd folder's weights on their own, have no state_dict whose form could be kept
    source = container if container and not _named_as_ours(container.tensors) else None
    layout = model.layout or layouts.export_names(model.spec)
    original = None if source is None else source.tensors
    tensors = layouts.to_tensors(variables, layout, original)
    blank = Container(tensors, kind, (), "", {}, (), model.sha256, model.path, 0)
    return _write(path, variables.get("bounds"), lambda at: containers.write(at, source or blank, tensors, kind))


def _write(path: pathlib.Path, bounds: Variables | None, write: Callable[[pathlib.Path], None]) -> str | None:
    """Lets `write` make the model file, with its bounds beside it; an earlier file's bounds do not stay behind."""
    beside.check_free(path)
    if not bounds:
        write(path)
        if (stale := beside.find(path)) is not None:
            with refusing(stale):
                stale.unlink()
        return None
    with refusing(path), replacing(path) as sibling:
        write(sibling)
        # before the model is in place: a file without its bounds must never pass for the repaired model
        with sibling.open("rb") as file:
            return beside.write(path, sha256(file), bounds)
