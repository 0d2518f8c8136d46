"""Loads a model file of any kind as a net with its variables, and saves it back in the file's own
format."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxbd.base import Net, Suspect, UserError, Variables
from jaxbd.files import replacing
from jaxbd.interop import beside, fit, folder, graph_model, guarded, hub, layouts, one_output
from jaxbd.interop import container as containers
from jaxbd.interop.container import Container
from jaxbd.interop.layouts import naming
from jaxbd.limits import Limits, quote, refusing, sha256
from jaxbd.models import build

TORCH_SUFFIXES = (".pth", ".pt", ".th", ".tar", ".ckpt", ".bin")
FILE_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".onnx")
"""Suffixes for which a model is written as one file; any other name becomes a folder."""


class Model(NamedTuple):
    """A net loaded from a file.

    Attributes:
      spec, net, variables: how to build the net, the built net, its arrays; for a guarded model
        `spec` is the suspect's.
      sha256: SHA-256 of the file (for a folder, of its `model.safetensors`).
      path: path of the file or folder.
      container: the contents of the file; None for a jaxbd folder.
      layout: how the file's tensors correspond to the variables; None for a jaxbd folder or a
        graph.
      guard: the targets of a guarded model; None for a plain net.
      bounds: name of the bounds file beside it that is applied; None if there is none.
      files: {name: SHA-256} of every file that decides what the net computes.
      forms: the specs that fit the file equally well, the likeliest first. They differ in things
        that leave no trace in the weights, see `forms.choose`. Empty if there is only one.
      graph: the graph of an ONNX file or a torch.export archive; None for one of jaxbd's own
        architectures.
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
    files: Mapping[str, str] = {}
    forms: tuple[build.Spec, ...] = ()
    graph: graph_model.Opened | None = None

    def states_normalisation(self) -> bool:
        """Whether the file, or the folder around it, states the net's input normalisation."""
        container = self.container
        return container is None or bool(container.constants) or "mean" in container.config


def open_model(
    path: str | os.PathLike,
    *,
    arch: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_shape: tuple[int, int, int] | None = None,
    key: str | None = None,
    allow_nonfinite: bool = False,
    limits: Limits = Limits(),
) -> Model:
    """Reads a model of any kind without executing anything in it.

    If `save_model` left a `<stem>.bounds.safetensors` beside the file, its activation bounds are
    applied. A guarded model's folder gives the guarded net.

    Args:
      arch: the architecture, if it cannot be recognised; an Orbax folder needs it.
      mean, std: input normalisation, one number or one per channel. Default: what the file or its
        folder states, otherwise none.
      image_shape: (H, W, C), if the tensors do not determine it.
      key: name of the net in a file that holds several, e.g. "netC", "ema.module" or "student.";
        for an ONNX file, name of the output with the logits.
      allow_nonfinite: accept weights that are NaN or infinite, which are refused otherwise.
    Raises: UserError naming the file and what is wrong: refused, not recognised, not fitting, not
      finite.
    """
    path = pathlib.Path(path)
    if graph_model.is_graph(path):
        return _open_graph(path, arch, (mean, std), image_shape, key, allow_nonfinite)
    container = layout = guard = bounds = None
    if path.is_dir() and folder.is_model(path) and hub.weights_of(path) is None:
        if guarded.is_guarded(path):
            (spec, variables, digests), guard = guarded.read(path, limits)
        else:
            spec, variables, digests = folder.read(path, limits, arch)
        digest = digests[folder.WEIGHTS]
        _check_stated(path, spec, arch, image_shape)
        tensors = folder.flatten(variables["suspect"] if guard else variables)
    else:
        wanted = containers.Wanted(
            functools.partial(layouts.fits, arch=arch, image_shape=image_shape), key
        )
        container = containers.read(path, limits, wanted)
        image_shape = image_shape or container.config.get("image_shape")
        tensors, digest, digests = container.tensors, container.sha256, dict(container.files)
        try:
            layout, variables = lay_out(container, arch, image_shape)
        except UserError as error:
            raise UserError(f"{path.name}: {error}") from None
        spec = layout.spec
        if (bounds := beside.find(path)) is not None:
            clipped, digests[bounds.name] = beside.read(bounds, digest, spec, variables, limits)
            variables = {**variables, "bounds": clipped}
    if not allow_nonfinite:
        _check_finite(path, tensors)
    forms = () if layout is None or len(layout.forms) < 2 else layout.forms
    if layout is not None and layout.spec.classes == 1:
        spec, variables = one_output.widen(spec, variables)
        forms = tuple(map(one_output.widen_spec, forms))
    stated = (None, None) if container is None else stated_constants(container)
    mean, std = (
        next(value for value in values if value is not None)
        for values in ((mean, stated[0], spec.mean), (std, stated[1], spec.std))
    )
    spec = _with_normalisation(path, spec, mean, std)
    net, applied = guarded.net(spec, guard), None if bounds is None else bounds.name
    return Model(
        spec, net, variables, digest, str(path), container, layout, guard, applied, digests, forms
    )


def _open_graph(
    path: pathlib.Path,
    arch: str | None,
    given: tuple[tuple[float, ...] | None, tuple[float, ...] | None],
    image_shape: tuple[int, int, int] | None,
    output: str | None,
    allow_nonfinite: bool,
) -> Model:
    """`open_model` for an ONNX file or a torch.export archive, which itself describes its net."""
    if arch is not None:
        raise UserError(f"{path.name}: the file describes its own net; leave --arch out")
    graph = graph_model.open_graph(path, image_shape, output)
    spec = graph_model.spec_of(graph)
    container = graph_model.container_of(graph, spec)
    if not allow_nonfinite:
        _check_finite(path, container.tensors)
    mean, std = (
        own if value is None else value
        for value, own in zip(given, (spec.mean, spec.std), strict=True)
    )
    spec = _with_normalisation(path, spec, mean, std)
    net, variables = graph_model.to_net(graph, spec)
    digest, files = graph.sha256, graph.files
    return Model(spec, net, variables, digest, str(path), container, None, files=files, graph=graph)


def _with_normalisation(
    path: pathlib.Path, spec: build.Spec, mean: tuple[float, ...], std: tuple[float, ...]
) -> build.Spec:
    spec = dataclasses.replace(spec, mean=mean, std=std)
    per_image = len(spec.mean) == len(spec.std) == 0
    if not per_image and {len(spec.mean), len(spec.std)} - {1, spec.image_shape[2]}:
        raise UserError(
            f"{path.name}: a normalisation of {len(spec.mean)} channels does not fit a model with "
            f"{spec.image_shape[2]}; give one number for each channel, or one for all"
        )
    return spec


def net_of(model: Model, spec: build.Spec) -> Net:
    """The net of `model`, rebuilt with the normalisation and compute type of `spec`.

    Raises: UserError for a graph if the compute type differs, since a graph's type is fixed.
    """
    if model.graph is None:
        return guarded.net(spec, model.guard)
    return graph_model.to_net(model.graph, spec)[0]


def suspect_of(model: Model) -> Suspect:
    """The `Suspect` of a model; it keeps a reference to `model`."""
    spec = model.spec
    shape = spec.image_shape
    return Suspect(model.net, model.variables, shape, spec.classes, spec.mean, spec.std, model)


Constants = tuple[tuple[float, ...] | None, tuple[float, ...] | None]


def stated_constants(container: Container) -> Constants:
    """(mean, std), for pixels in [0, 1], of the normalisation stored in a file or stated by the
    folder around it; (None, None) if there is none. Raises: UserError if it makes no sense."""
    mean, std = _constants_of(container)
    if not is_for_bytes(container):
        return mean, std
    in_unit = lambda values: values and tuple(value / 255 for value in values)
    return in_unit(mean), in_unit(std)


def is_for_bytes(container: Container) -> bool:
    """Whether the stated normalisation is for pixels from 0 to 255. Raises: UserError if it makes
    no sense."""
    mean, std = _constants_of(container)
    return max(mean or (0,)) > 2 or min(std or (0,)) > 2


def _constants_of(container: Container) -> Constants:
    """(mean, std) as they are stated."""
    if not container.constants:
        return container.config.get("mean"), container.config.get("std")
    mean, std = (
        tuple(float(number) for number in np.ravel(np.asarray(array, np.float32)))
        for array in container.constants.values()
    )
    if not all(np.isfinite((*mean, *std))) or min(std) <= 0:
        raise UserError(
            f"{container.path}: the normalisation in the file is not valid: mean {mean}, standard"
            f" deviation {std}"
        )
    return mean, std


def lay_out(
    container: Container, arch: str | None = None, image_shape: tuple[int, int, int] | None = None
) -> tuple[layouts.Layout, Variables]:
    """Recognises the architecture of a file's tensors, named the PyTorch way or ours; returns the
    layout and the variables."""
    tensors, bounds = container.tensors, {}
    if _has_our_names(tensors):
        if arch is None:
            raise UserError(
                "arrays in jaxbd's own names do not say which net they belong to; give --arch, one"
                f" of {', '.join(sorted(build.MODULES))}"
            )
        bounds = {name: tensor for name, tensor in tensors.items() if name.startswith("bounds/")}
        tensors = _in_torch_names({n: t for n, t in tensors.items() if n not in bounds}, arch)
    layout = layouts.recognise(tensors, arch=arch, image_shape=image_shape)
    variables = layouts.to_variables(tensors, layout)
    if bounds:
        with refusing(pathlib.Path(container.path)):
            fit.check(container.tensors, layout.spec)
        variables = {**variables, "bounds": folder.unflatten(bounds)["bounds"]}
    return layout, variables


def _has_our_names(tensors: Mapping[str, np.ndarray]) -> bool:
    return all(
        name.startswith(tuple(f"{collection}/" for collection in folder.COLLECTIONS))
        for name in tensors
    )


def _in_torch_names(tensors: Mapping[str, np.ndarray], arch: str) -> dict[str, np.ndarray]:
    """Converts arrays with our names ("params/conv0/kernel") to PyTorch's names and axis order."""
    style, named = naming.namings(arch)[0], {}
    for path, array in tensors.items():
        _, *modules, leaf = path.split("/")
        if leaf not in naming.LEAVES:
            raise UserError(f"array {quote(path)} has no counterpart in jaxbd's nets")
        # kernels: [H, W, I, O] -> [O, I, H, W]; None reverses [I, O] to [O, I]
        axes = (3, 2, 0, 1) if array.ndim == 4 else None
        named[f"{naming.translate('/'.join(modules), style)}.{naming.LEAVES[leaf]}"] = (
            array.transpose(axes)
        )
    return named


def _check_stated(
    path: pathlib.Path, spec: build.Spec, arch: str | None, image_shape: tuple[int, int, int] | None
) -> None:
    if arch is not None and arch != spec.arch:
        raise UserError(f"{path}: the folder says {spec.arch}, not {arch}; leave --arch out")
    if image_shape is not None and tuple(image_shape) != spec.image_shape:
        raise UserError(
            f"{path}: the folder says images of {spec.image_shape}, not {tuple(image_shape)}"
        )


def _check_finite(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        if bad := fit.complaint(name, tensor):
            raise UserError(f"{path.name}: tensor {quote(name)} {bad}; get the file again")


def save_model(path: str | os.PathLike, model: Model, variables: Variables) -> str | None:
    """Writes the model with `variables` instead of its own.

    The suffix of `path` decides the format. One of `TORCH_SUFFIXES` gives a PyTorch file,
    .safetensors a safetensors file; both keep the names, order, types and nesting of the file that
    the model was read from, and unchanged tensors are bit-identical. .onnx gives an ONNX file,
    whatever the source. Any other path becomes a jaxbd folder. A guarded model can only become a
    folder or an ONNX file.

    A repair's activation bounds have no place in a state_dict. They go to
    `<stem>.bounds.safetensors` beside the file, where `open_model` finds them; stale bounds of a
    replaced file are deleted.

    Returns: a note for the user if the file differs in form from the source (see
      `container.changes`) or its bounds are in a file of their own; otherwise None.
    Raises: UserError when the file cannot be written, when the bounds beside it belong to another
      model, or when a guarded model would become a PyTorch or safetensors file.
    """
    path = pathlib.Path(path)
    if path.suffix == ".onnx":
        return save_onnx(path, model, variables, () if model.guard is None else model.guard.targets)
    if model.graph is not None:
        return _save_weights(path, model.graph, variables)
    kind = (
        "torch-zip"
        if path.suffix in TORCH_SUFFIXES
        else "safetensors"
        if path.suffix == ".safetensors"
        else None
    )
    notes = {"source_sha256": model.sha256}
    if model.guard is not None:
        if kind is not None:
            raise UserError(
                f"{path.name}: a guarded model is a folder with the moments of several nets; give"
                " the name of a folder"
            )
        guarded.save(path, model.spec, variables, model.guard.targets, notes)
        return None
    if kind is None:
        folder.save(path, model.spec, variables, notes)
        return None
    container = model.container
    # arrays in jaxbd's names (an Orbax folder, a jaxbd folder's weights on their own) have no
    # state_dict form to preserve
    source = container if container and not _has_our_names(container.tensors) else None
    layout = model.layout or layouts.export_names(model.spec)
    if layout.spec.classes == 1:
        variables = one_output.narrow(layout.spec, variables)
    original = None if source is None else source.tensors
    tensors = layouts.to_tensors(variables, layout, original)
    blank = Container(tensors, kind, (), "", {}, (), model.sha256, model.path, 0)
    note = _write(
        path,
        variables.get("bounds"),
        lambda at: containers.write(at, source or blank, tensors, kind),
    )
    remarks = [*([note] if note else []), *([] if source is None else containers.changes(source))]
    return "; ".join(remarks) or None


def save_onnx(
    path: pathlib.Path, model: Model, variables: Variables, targets: tuple[int, ...] = ()
) -> str:
    """Writes an ONNX file: the graph that was read, with new weights, or one of jaxbd's own nets.

    Args:
      variables: the net's variables; with `targets`, those of a guarded net, as `guard.pack` makes
        them.
      targets: the classes of a guarded net; empty for a plain one.
    Returns: a note on what images the file takes.
    """
    if model.graph is None:
        layout = model.layout or layouts.export_names(model.spec)
        write = graph_model.writer_of_net(model.spec, layout.names, variables, targets)
    else:
        write = graph_model.writer(model.graph, variables, targets)
    _write(path, None, write)
    return graph_model.note(model.spec, model.graph, guarded=bool(targets))


def _save_weights(
    path: pathlib.Path, graph: graph_model.Opened, variables: Variables
) -> str | None:
    """Writes only the weights of a graph, under the names they have in it."""
    if path.suffix not in FILE_SUFFIXES:
        raise UserError(
            f"{path.name}: a graph cannot become a model folder; write .onnx, or only its weights "
            "as .safetensors or .pth"
        )
    kind = "safetensors" if path.suffix == ".safetensors" else "torch-zip"
    tensors = graph_model.tensors(graph, variables)
    blank = Container(tensors, kind, (), "", {}, (), graph.sha256, graph.path, 0)
    note = _write(
        path, variables.get("bounds"), lambda at: containers.write(at, blank, tensors, kind)
    )
    return note or f"{path.name} holds only the weights, not the graph"


def _write(
    path: pathlib.Path, bounds: Variables | None, write: Callable[[pathlib.Path], None]
) -> str | None:
    """Calls `write` to make the model file and stores `bounds` beside it; without bounds, deletes
    those of an earlier file. Returns the note of `beside.write`."""
    beside.check_free(path)
    if not bounds:
        write(path)
        if (stale := beside.find(path)) is not None:
            with refusing(stale):
                stale.unlink()
        return None
    with refusing(path), replacing(path) as sibling:
        write(sibling)
        # bounds first, then the model: without its bounds the file must never pass for the repaired
        # model
        with sibling.open("rb") as file:
            return beside.write(path, sha256(file), bounds)
