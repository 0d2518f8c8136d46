"""Model files as named arrays: the kind of file, its tensors, and everything else that is needed to
write it back.

Reading executes nothing from the file. The kind is recognised by content, never by file name.
"""

import io
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxbd.base import UserError
from jaxbd.interop import (
    archive,
    foreign,
    layouts,
    safetensors_file,
    selection,
    state_dict,
    torch_legacy,
    torch_write,
    torch_zip,
)
from jaxbd.limits import BinaryFile, Limits, Refusal, opened, quote, refusing, sha256

Kind = Literal["torch-zip", "torch-legacy", "safetensors", "npz", "folder", "orbax", "onnx", "pt2"]


class Container(NamedTuple):
    """The contents of one model file.

    Attributes:
      tensors: name without `prefix` -> array, in file order.
      kind: the kind of file.
      nesting: keys that lead to the tensors' dictionary, e.g. ("net",).
      prefix: common prefix of all names in the file ("module." of DataParallel), or "".
      outer: the rest of the file as plain Python values, e.g. {"acc": …, "epoch": …}; for
        safetensors its `__metadata__`.
      ignored: names of entries left out because they hold more than plain Python values (an
        optimiser's tensors, a second state_dict). They are not written back either: a repaired file
        should carry no unrepaired weights.
      sha256: SHA-256 of the file, hexadecimal.
      path: path of the file.
      bytes: size of the file.
      metadata: `_metadata` of the state_dict (module versions), written back unchanged.
      files: {name: SHA-256} of every file that was read.
      names: tensor name -> its key in the file, where the key is not just `prefix` + name.
      merged: keys of weights that the file stores in parts (pruning masks, weight_norm). The parts
        are multiplied out and written back as one tensor.
      constants: key -> tensor of the input normalisation, mean then standard deviation; written
        back unchanged.
      config: settings from the folder around the weights: "mean", "std", "image_shape".
      unused: weights of layers that lie in one dictionary with the net's and belong to no net.
    """

    tensors: dict[str, np.ndarray]
    kind: Kind
    nesting: tuple[str, ...]
    prefix: str
    outer: Any
    ignored: tuple[str, ...]
    sha256: str
    path: str
    bytes: int
    metadata: Any = None
    files: Mapping[str, str] = {}
    names: Mapping[str, str] = {}
    merged: tuple[str, ...] = ()
    constants: Mapping[str, np.ndarray] = {}
    config: Mapping[str, Any] = {}
    unused: tuple[str, ...] = ()


class Wanted(NamedTuple):
    """Which of a file's nets to read.

    Attributes:
      fits: tells whether names and shapes are those of an architecture.
      key: the name of the net that the user asked for, or None.
    """

    fits: selection.Fits
    key: str | None = None


def read(
    path: str | pathlib.Path,
    limits: Limits = Limits(),
    wanted: Wanted | None = None,
) -> Container:
    """Reads a PyTorch file (zip or stream), safetensors, an .npz of weights, a jaxbd model folder,
    a Hugging Face Hub folder or an Orbax folder.

    Raises: UserError naming the file and the reason why it is refused.
    """
    path, wanted = pathlib.Path(path), wanted or Wanted(layouts.fits)
    with refusing(path):
        if path.is_dir():
            return _read_folder(path, limits, wanted)
        with opened(path, limits) as (file, size):
            return _read_file(path, file, size, limits, wanted)


def read_bytes(data: bytes, limits: Limits = Limits(), name: str = "bytes") -> Container:
    """Like `read`, for a file given by its content.

    Raises: UserError with `name` as the file's name and the reason why it is refused.
    """
    path = pathlib.Path(name)
    with refusing(path):
        if not data:
            raise Refusal("it is empty")
        return _read_file(path, io.BytesIO(data), len(data), limits, Wanted(layouts.fits))


def _read_file(
    path: pathlib.Path, file: BinaryFile, size: int, limits: Limits, wanted: Wanted
) -> Container:
    file.seek(0)
    kind = _kind(file.read(512), size)
    if kind == "torch-zip":
        archive.check_no_program(file, size, limits)
    # a zip that torch.save did not write: an .npz, or a model file inside a download
    if kind == "torch-zip" and (members := archive.foreign_members(file, size, limits)):
        if archive.is_npz(members):
            kind = "npz"
        else:
            with archive.only_model(file, members, size, limits) as (inner, inner_size):
                found = _read_file(path, inner, inner_size, limits, wanted)
            digest = sha256(file)
            return found._replace(sha256=digest, bytes=size, files={path.name: digest})
    if kind in ("safetensors", "npz"):
        opaque: dict[str, str] = {}
        if kind == "safetensors":
            tensors, notes = safetensors_file.read(file, size, limits, opaque)
        else:
            tensors, notes = archive.read_npz(file, size, limits)
        net = state_dict.find_named(tensors, limits, *wanted, opaque=opaque)
        return _of_arrays(path, kind, net, notes, sha256(file), size)
    value, load = (torch_zip if kind == "torch-zip" else torch_legacy).read(file, size, limits)
    # storages are loaded only for the tensors that are needed
    found = state_dict.find(value, load, size, limits, *wanted)
    digest = sha256(file)
    return Container(
        found.tensors,
        kind,
        found.nesting,
        found.selection.prefix,
        found.outer,
        found.ignored,
        digest,
        str(path),
        size,
        found.metadata,
        {path.name: digest},
        *_names(found.selection),
        found.constants,
        unused=found.selection.unused,
    )


def _of_arrays(
    path: pathlib.Path,
    kind: Kind,
    net: tuple[dict[str, np.ndarray], selection.Selection, dict[str, np.ndarray]],
    notes: Any,
    digest: str,
    size: int,
) -> Container:
    """The container of a `net` that `state_dict.find_named` found in a flat table of arrays."""
    found, chosen, constants = net
    head = (found, kind, (), chosen.prefix, notes, chosen.ignored, digest, str(path), size, None)
    return Container(*head, {path.name: digest}, *_names(chosen), constants, unused=chosen.unused)


def _names(chosen: selection.Selection) -> tuple[dict[str, str], tuple[str, ...]]:
    """(`Container.names`, `Container.merged`) of the chosen net."""
    merged = [
        piece.keys[0] for piece in chosen.names.values() if piece.how in ("mask", "weight_norm")
    ]
    keys = {name: chosen.whole.get(name, piece.keys[0]) for name, piece in chosen.names.items()}
    renamed = {name: key for name, key in keys.items() if key != chosen.prefix + name}
    return renamed, tuple(merged)


def _kind(head: bytes, size: int) -> Kind:
    """The kind of a file, recognised by its first bytes `head`."""
    if head.startswith(torch_zip.MAGIC):
        return "torch-zip"
    if head.startswith(torch_legacy.MAGICS):
        return "torch-legacy"
    if safetensors_file.looks_like(head, size):
        return "safetensors"
    # only after the formats above: PyTorch streams begin with b"\x80" too
    other_kinds = {
        b"\x89HDF": "an HDF5 (Keras) file; export its weights as safetensors",
        b"\x1f\x8b": "packed with gzip; unpack it first",
        b"\x80": (
            "a bare pickle, which cannot be read without running code; save model.state_dict() with"
            " torch.save or as safetensors"
        ),
        b"<": "a web page or XML; the download went wrong",
        b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    }
    for magic, what in other_kinds.items():
        if head.startswith(magic):
            raise Refusal(f"it is {what}")
    # tar has its magic number inside the header
    if head[257:262] == b"ustar":
        raise Refusal("it is a tar archive; unpack it first, or save it again with a newer PyTorch")
    if (other := foreign.name_of(head)) is not None:
        raise Refusal(f"it is {other}")
    raise Refusal("it is neither a PyTorch file nor safetensors (or its beginning is missing)")


def _read_folder(path: pathlib.Path, limits: Limits, wanted: Wanted) -> Container:
    from jaxbd.interop import folder, hub, orbax_file

    if orbax_file.is_checkpoint(path):
        if folder.is_model(path):
            raise Refusal(
                "the folder holds a model of jaxbd and an Orbax checkpoint; give one of them"
            )
        found = orbax_file.read(path, limits)
        return Container(
            found.arrays,
            "orbax",
            (),
            "",
            {},
            found.others,
            found.sha256,
            str(path),
            found.bytes,
            files=found.files,
        )
    if (weights := hub.weights_of(path)) is not None:
        with opened(weights, limits) as (file, size):
            found = _read_file(weights, file, size, limits, wanted)
        config, files = hub.read_config(path, limits)
        # with several weight files, which one a library loads depends on what is installed there
        others = tuple(n for n in hub.FILES if n != weights.name and (path / n).is_file())
        files, ignored = {**found.files, **files}, (*found.ignored, *others)
        return found._replace(config=config, path=str(path), files=files, ignored=ignored)
    if folder.is_model(path):
        with opened(path / folder.WEIGHTS, limits) as (file, size):
            tensors, notes = safetensors_file.read(file, size, limits)
            digest = sha256(file)
        files = {folder.WEIGHTS: digest}
        return Container(tensors, "folder", (), "", notes, (), digest, str(path), size, files=files)
    raise Refusal(
        f"the folder holds neither {folder.WEIGHTS} (with {folder.CONFIG} or on its own),"
        " pytorch_model.bin nor an Orbax checkpoint"
    )


def write(
    path: str | pathlib.Path,
    container_like: Container,
    tensors: dict[str, np.ndarray],
    kind: Literal["torch-zip", "safetensors"] | None = None,
) -> None:
    """Writes `tensors` in the layout of `container_like`: same keys, order, types, nesting, prefix
    and outer values.

    A file in the old stream format is written as a zip, which every PyTorch since 1.4 reads.
    Tensors that shared memory no longer do. Entries in `container_like.ignored` are left out.

    Args:
      tensors: one array for every name in `container_like.tensors`, of the same shape; each is cast
        to the type of the original.
      kind: "torch-zip" or "safetensors"; None for the kind of the source.
    Raises: UserError when names or shapes differ, or the kind is that of a folder.
    """
    path, form = pathlib.Path(path), kind or container_like.kind
    _check_same(path, container_like.tensors, tensors)
    named = {
        container_like.names.get(name, container_like.prefix + name): np.asarray(
            tensors[name]
        ).astype(like.dtype)
        for name, like in container_like.tensors.items()
    } | dict(container_like.constants)
    with refusing(path):
        if form == "safetensors":
            notes = container_like.outer if container_like.kind == "safetensors" else None
            safetensors_file.write(path, named, notes)
        elif form in ("torch-zip", "torch-legacy"):
            torch_write.write(path, _nest(container_like, named))
        else:
            raise UserError(
                f"{path}: a {form} cannot be written as one file; name a .pth or .safetensors"
            )


def changes(container: Container) -> list[str]:
    """How a file written like `container` differs from the source, as phrases for the user."""
    found = []
    if container.merged:
        count, first = len(container.merged), container.merged[0]
        found.append(
            f"{count} weights that were stored in parts ({quote(first)}, …) are written whole"
        )
    if container.kind == "npz":
        found.append("the arrays of the .npz are written as tensors")
    if container.ignored:
        found.append(f"{len(container.ignored)} entries beside the weights are left out")
    if container.config:
        found.append("the folder's config.json stays where it was")
    return found


def _check_same(
    path: pathlib.Path, like: dict[str, np.ndarray], tensors: dict[str, np.ndarray]
) -> None:
    wrong = [f"{quote(name)} is missing" for name in like if name not in tensors]
    wrong += [f"{quote(name)} is not in the source" for name in tensors if name not in like]
    wrong += [
        f"{quote(name)} has shape {np.shape(tensors[name])} where the source has {array.shape}"
        for name, array in like.items()
        if name in tensors and np.shape(tensors[name]) != array.shape
    ]
    if wrong:
        raise UserError(f"{path.name}: not written, {'; '.join(wrong[:5])}")


def _nest(container: Container, named: dict[str, np.ndarray]) -> Any:
    """The complete value to write: the tensors at `nesting` inside `outer`."""
    rest = container.outer if container.kind.startswith("torch") else {}
    return _place(rest, container.nesting, named, container.metadata)


def _place(rest: Any, nesting: tuple[str, ...], named: dict[str, Any], metadata: Any) -> Any:
    if not nesting:
        state = torch_write.StateDict({**named, **(rest or {})})
        state.metadata = metadata
        return state
    name, *deeper = nesting
    if isinstance(rest, (list, tuple)):
        items = list(rest)
        items[int(name)] = _place(items[int(name)], tuple(deeper), named, metadata)
        return type(rest)(items)
    inner = _place(rest.get(name, {}), tuple(deeper), named, metadata)
    return type(rest)({name: inner, **{key: part for key, part in rest.items() if key != name}})
