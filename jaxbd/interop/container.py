"""Model files as named arrays: what kind a file is, its tensors, and the rest that a writer must
put back.

Reading executes nothing from the file. A file's kind is known by its content, never by its name.
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
    """One model file, read.

    Attributes:
      tensors: name -> array in file order, without `prefix`.
      kind: what the file is.
      nesting: keys that lead to the tensors' dictionary, e.g. ("net",).
      prefix: what stood before every name ("module." of DataParallel), or "".
      outer: the plain-Python rest of the file, e.g. {"acc": …, "epoch": …}; of safetensors its
        `__metadata__`.
      ignored: names of entries that were left out because they hold more than plain Python (an
        optimiser's tensors, a second state_dict). They are not written back either: a repaired file
        should carry no unrepaired weights.
      sha256: of the file, hexadecimal.
      path: where it lay.
      bytes: its size.
      metadata: `_metadata` of the state_dict (module versions), written back as it was.
      files: {name: SHA-256} of every file that was read.
      names: name of each tensor -> its key in the file, where that is not `prefix` before it.
      merged: keys of weights that the file keeps in parts (pruning masks, weight_norm); they are
        multiplied out, and written back as one.
      constants: tensors by their keys that normalise the input, mean and then standard deviation;
        written back as they were.
      config: what the folder around the weights says: "mean", "std", "image_shape".
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


class Wanted(NamedTuple):
    """Which net of a file is wanted.

    Attributes:
      fits: whether names and shapes are those of an architecture.
      key: the name that the user gives the net, or None.
    """

    fits: selection.Fits
    key: str | None = None


def read(
    path: str | pathlib.Path,
    limits: Limits = Limits(),
    wanted: Wanted | None = None,
) -> Container:
    """Reads a PyTorch file (zip or stream), safetensors, an .npz of weights, a jaxbd model folder,
    a folder of the Hugging Face hub or an Orbax folder.

    Raises: UserError naming the file and what in it is refused.
    """
    path, wanted = pathlib.Path(path), wanted or Wanted(layouts.fits)
    with refusing(path):
        if path.is_dir():
            return _read_folder(path, limits, wanted)
        with opened(path, limits) as (file, size):
            return _read_file(path, file, size, limits, wanted)


def read_bytes(data: bytes, limits: Limits = Limits(), name: str = "bytes") -> Container:
    """What `read` makes of a file with this content.

    Raises: UserError naming `name` and what is refused.
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
    if kind == "torch-zip" and (members := archive.foreign_members(file, size, limits)):
        if archive.is_npz(members):
            kind = "npz"
        else:
            with archive.only_model(file, members, size, limits) as (inner, inner_size):
                found = _read_file(path, inner, inner_size, limits, wanted)
            digest = sha256(file)
            return found._replace(sha256=digest, bytes=size, files={path.name: digest})
    if kind in ("safetensors", "npz"):
        reader = safetensors_file.read if kind == "safetensors" else archive.read_npz
        tensors, notes = reader(file, size, limits)
        net = state_dict.find_named(tensors, limits, *wanted)
        return _of_arrays(path, kind, net, notes, sha256(file), size)
    value, load = (torch_zip if kind == "torch-zip" else torch_legacy).read(file, size, limits)
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
    )


def _of_arrays(
    path: pathlib.Path,
    kind: Kind,
    net: tuple[dict[str, np.ndarray], selection.Selection, dict[str, np.ndarray]],
    notes: Any,
    digest: str,
    size: int,
) -> Container:
    """The `net` that `state_dict.find_named` found among arrays, which lie in no other
    dictionary."""
    found, chosen, constants = net
    head = (found, kind, (), chosen.prefix, notes, chosen.ignored, digest, str(path), size, None)
    return Container(*head, {path.name: digest}, *_names(chosen), constants)


def _names(chosen: selection.Selection) -> tuple[dict[str, str], tuple[str, ...]]:
    """The keys that are not the prefix and the name, and those of weights in parts."""
    keys, merged = {}, []
    for name, piece in chosen.names.items():
        key = piece.keys[0]
        if piece.how in ("mask", "weight_norm"):
            merged.append(key)
            # the prefix of the part, before the name of the whole
            stem = name.rpartition(".")[0]
            key = key[: key.find(stem)] + name if stem in key else chosen.prefix + name
        if key != chosen.prefix + name:
            keys[name] = key
    return keys, tuple(merged)


def _kind(head: bytes, size: int) -> Kind:
    """What a file is, by its first bytes."""
    if head.startswith(torch_zip.MAGIC):
        return "torch-zip"
    if head.startswith(torch_legacy.MAGICS):
        return "torch-legacy"
    if safetensors_file.looks_like(head, size):
        return "safetensors"
    other_kinds = {
        b"\x89HDF": "an HDF5 (Keras) file; export its weights as safetensors",
        b"\x1f\x8b": "packed with gzip; unpack it first",
        b"\x80": (
            "a bare pickle, which only code can read; save model.state_dict() with torch.save or as"
            " safetensors"
        ),
        b"<": "a web page or XML; the download went wrong",
        b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    }
    for magic, what in other_kinds.items():
        if head.startswith(magic):
            raise Refusal(f"it is {what}")
    if head[257:262] == b"ustar":
        raise Refusal("it is a tar archive; unpack it first, or save it again with a newer PyTorch")
    if (other := foreign.name_of(head)) is not None:
        raise Refusal(f"it is {other}")
    raise Refusal("it is neither a PyTorch file nor safetensors (or its beginning is lost)")


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
        # which of several a library loads depends on what is installed there
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
    """Writes `tensors` the way `container_like` was: same keys and order, types, nesting, prefix
    and outer values.

    A stream of the old format is written as a zip file, which every PyTorch since 1.4 reads.
    Tensors that shared memory get memory of their own. Entries in `container_like.ignored` are left
    out.

    Args:
      tensors: one array for every name in `container_like.tensors`, of the same shape; cast to the
        type there.
      kind: "torch-zip" or "safetensors"; the source's own when None.
    Raises: UserError when names or shapes differ, or the kind is a folder's.
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
    """In what a file that is written like `container` differs from it, in sentences' parts."""
    found = []
    if container.merged:
        count, first = len(container.merged), container.merged[0]
        found.append(
            f"{count} weights that were kept in parts ({quote(first)}, …) are written whole"
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
    """The file's whole value: tensors at `nesting` inside `outer`."""
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
