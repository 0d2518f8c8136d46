"""From a model file of any kind to a net with its variables, and back into the file's own form."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbd.base import Net, UserError, Variables
from jaxbd.interop import container as containers
from jaxbd.interop import folder, layouts, safetensors_file
from jaxbd.interop.container import Container
from jaxbd.interop.files import Limits, quote, refusing
from jaxbd.interop.layouts import naming
from jaxbd.models import build

TORCH_SUFFIXES = (".pth", ".pt", ".tar")


class Model(NamedTuple):
    """A net that was read.

    Attributes:
      spec, net, variables: what to build, the built net, its arrays.
      sha256: of the file (of a folder's `model.safetensors`).
      path: where it lay.
      container: the file as it was; None for a jaxbd folder.
      layout: how the file's tensors correspond to the variables; None for a jaxbd folder.
    """

    spec: build.Spec
    net: Net
    variables: Variables
    sha256: str
    path: str
    container: Container | None
    layout: layouts.Layout | None


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

    Args:
      arch: the architecture, where it cannot be recognised; an Orbax folder needs it.
      mean, std: input normalisation, one number or one per channel; a jaxbd folder's own, otherwise none, when not
        given.
      image_shape: (H, W, C) where the tensors leave it open.
      allow_nonfinite: take weights that are NaN or infinite, which are refused otherwise.
    Raises: UserError naming the file and what is wrong: refused, not recognised, not fitting, not finite.
    """
    path = pathlib.Path(path)
    if path.is_dir() and folder.is_model(path):
        spec, variables, digest = folder.load(path, limits)
        _check_stated(path, spec, arch, image_shape)
        tensors, container, layout = folder.flatten(variables), None, None
    else:
        container = containers.read(path, limits)
        tensors, digest = container.tensors, container.sha256
        try:
            layout, variables = lay_out(container, arch, image_shape)
        except UserError as error:
            raise UserError(f"{path.name}: {error}") from None
        spec = layout.spec
    if not allow_nonfinite:
        _check_finite(path, tensors)
    spec = dataclasses.replace(spec, mean=mean or spec.mean, std=std or spec.std)
    if {len(spec.mean), len(spec.std)} - {1, spec.image_shape[2]}:
        raise UserError(
            f"{path.name}: a normalisation of {len(spec.mean)} channels does not fit a model of "
            f"{spec.image_shape[2]}; give one number for each channel, or one for all"
        )
    return Model(spec, build.net(spec), variables, digest, str(path), container, layout)


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
            folder.check_fit(container.tensors, layout.spec)
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
        # a bound of infinity does not clip; only NaN is wrong there
        bad = int(np.isnan(tensor).sum()) if name.startswith("bounds/") else nonfinite(tensor)
        if bad:
            raise UserError(
                f"{path.name}: tensor {quote(name)} holds {bad:,} values that are NaN or infinite; "
                "ask for the file again"
            )


def nonfinite(tensor: np.ndarray) -> int:
    """How many values of a tensor are NaN or infinite; 0 for integers."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return 0
    return int(tensor.size - np.isfinite(tensor).sum())


def save_model(path: str | os.PathLike, model: Model, variables: Variables) -> str | None:
    """Writes `variables` in the place of the model's own.

    A path ending in .pth, .pt or .tar becomes a PyTorch file, .safetensors a safetensors file, both with the names,
    order, types and nesting of the file the model was read from; tensors that did not change are bit-identical. Any
    other path becomes a jaxbd folder.

    Returns: a note where something has no place in the file: activation bounds of a repair go to
      `<stem>.bounds.safetensors` beside it.
    """
    path = pathlib.Path(path)
    kind = "torch-zip" if path.suffix in TORCH_SUFFIXES else "safetensors" if path.suffix == ".safetensors" else None
    if kind is None:
        folder.save(path, model.spec, variables, {"source_sha256": model.sha256})
        return None
    container = model.container
    # an Orbax folder, or a jaxbd folder's weights on their own, have no state_dict whose form could be kept
    source = container if container and not _named_as_ours(container.tensors) else None
    layout = model.layout or layouts.export_names(model.spec)
    original = None if source is None else source.tensors
    tensors = layouts.to_tensors(variables, layout, original)
    # the bounds first: a file without them must never pass for the repaired model
    note = _write_bounds(path, variables)
    blank = Container(tensors, kind, (), "", {}, (), model.sha256, model.path, 0)
    containers.write(path, source or blank, tensors, kind)
    return note


def _write_bounds(path: pathlib.Path, variables: Variables) -> str | None:
    if not variables.get("bounds"):
        return None
    beside = path.with_name(f"{path.stem}.bounds.safetensors")
    with refusing(beside):
        safetensors_file.write(beside, folder.flatten({"bounds": variables["bounds"]}))
    return (
        f"a state_dict has no place for activation bounds; they are in {beside.name}, "
        f"and without them {path.name} is not repaired"
    )
