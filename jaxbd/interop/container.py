"""Model files as named arrays: what kind a file is, its tensors, and the rest that a writer must put back.

Reading executes nothing from the file. A file's kind is known by its content, never by its name.
"""

import pathlib
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from jaxbd.base import UserError
from jaxbd.interop import safetensors_file, state_dict, torch_legacy, torch_write, torch_zip
from jaxbd.interop.files import Limits, Refusal, opened, quote, refusing, sha256

Kind = Literal["torch-zip", "torch-legacy", "safetensors", "folder", "orbax"]


class Container(NamedTuple):
    """One model file, read.

    Attributes:
      tensors: name -> array in file order, without `prefix`.
      kind: what the file is.
      nesting: keys that lead to the tensors' dictionary, e.g. ("net",).
      prefix: what stood before every name ("module." of DataParallel), or "".
      outer: the plain-Python rest of the file, e.g. {"acc": …, "epoch": …}; of safetensors its `__metadata__`.
      ignored: names of entries that were left out because they hold more than plain Python (an optimiser's tensors, a
        second state_dict). They are not written back either: a repaired file should carry no unrepaired weights.
      sha256: of the file, hexadecimal.
      path: where it lay.
      bytes: its size.
      metadata: `_metadata` of the state_dict (module versions), written back as it was.
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


def read(path: str | pathlib.Path, limits: Limits = Limits()) -> Container:  # noqa: B008 (frozen)
    """Reads a PyTorch file (zip or stream), safetensors, a jaxbd model folder or an Orbax folder.

    Raises: UserError naming the file and what in it is refused.
    """
    path = pathlib.Path(path)
    with refusing(path):
        if path.is_dir():
            return _read_folder(path, limits)
        with opened(path, limits) as (file, size):
            return _read_file(path, file, size, limits)


def _read_file(path: pathlib.Path, file: BinaryIO, size: int, limits: Limits) -> Container:
    kind = _kind(file.read(512), size)
    if kind == "safetensors":
        tensors, notes = safetensors_file.read(file, size, limits)
        prefix = state_dict.common_prefix(tensors)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        return Container(tensors, kind, (), prefix, notes, (), sha256(file), str(path), size)
    value, load = (torch_zip if kind == "torch-zip" else torch_legacy).read(file, size, limits)
    found = state_dict.find(value, limits)
    tensors = state_dict.arrays(found.tensors, load, size, limits)
    return Container(
        tensors, kind, found.nesting, found.prefix, found.outer, found.ignored, sha256(file), str(path), size,
        found.metadata,
    )  # fmt: skip


def _kind(head: bytes, size: int) -> Kind:
    """What a file is, by its first bytes."""
    if head.startswith(torch_zip.MAGIC):
        return "torch-zip"
    if head.startswith(torch_legacy.MAGIC):
        return "torch-legacy"
    if safetensors_file.looks_like(head, size):
        return "safetensors"
    foreign = {
        b"\x89HDF": "an HDF5 (Keras) file; export its weights as safetensors",
        b"\x1f\x8b": "packed with gzip; unpack it first",
        b"\x80": "a bare pickle, which only code can read; save model.state_dict() with torch.save or as safetensors",
        b"<": "a web page or XML; the download went wrong",
        b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    }
    for magic, what in foreign.items():
        if head.startswith(magic):
            raise Refusal(f"it is {what}")
    if head[257:262] == b"ustar":
        raise Refusal("it is a tar archive; unpack it first, or save it again with a newer PyTorch")
    raise Refusal("it is neither a PyTorch file nor safetensors (or its beginning is lost)")


def _read_folder(path: pathlib.Path, limits: Limits) -> Container:
    from jaxbd.interop import folder, orbax_file

    if folder.is_model(path):
        with opened(path / folder.WEIGHTS, limits) as (file, size):
            tensors, notes = safetensors_file.read(file, size, limits)
            return Container(tensors, "folder", (), "", notes, (), sha256(file), str(path), size)
    if orbax_file.is_checkpoint(path):
        tensors, others, digest, size = orbax_file.read(path, limits)
        return Container(tensors, "orbax", (), "", {}, others, digest, str(path), size)
    raise Refusal(f"the folder holds neither {folder.WEIGHTS} with {folder.CONFIG} nor an Orbax checkpoint")


def write(
    path: str | pathlib.Path,
    container_like: Container,
    tensors: dict[str, np.ndarray],
    kind: Literal["torch-zip", "safetensors"] | None = None,
) -> None:
    """Writes `tensors` the way `container_like` was: same keys and order, types, nesting, prefix and outer values.

    A stream of the old format is written as a zip file, which every PyTorch since 1.4 reads. Tensors that shared
    memory get memory of their own. Entries in `container_like.ignored` are left out.

    Args:
      tensors: one array for every name in `container_like.tensors`, of the same shape; cast to the type there.
      kind: "torch-zip" or "safetensors"; the source's own when None.
    Raises: UserError when names or shapes differ, or the kind is a folder's.
    """
    path, kind = pathlib.Path(path), kind or container_like.kind
    _check_same(path, container_like.tensors, tensors)
    named = {
        container_like.prefix + name: np.asarray(tensors[name]).astype(like.dtype)
        for name, like in container_like.tensors.items()
    }
    with refusing(path):
        if kind == "safetensors":
            notes = container_like.outer if container_like.kind == "safetensors" else None
            safetensors_file.write(path, named, notes)
        elif kind in ("torch-zip", "torch-legacy"):
            torch_write.write(path, _nested(container_like, named))
        else:
            raise UserError(f"{path}: a {kind} cannot be written as one file; name a .pth or .safetensors")


def _check_same(path: pathlib.Path, like: dict[str, np.ndarray], tensors: dict[str, np.ndarray]) -> None:
    wrong = [f"{quote(name)} is missing" for name in like if name not in tensors]
    wrong += [f"{quote(name)} is not in the source" for name in tensors if name not in like]
    wrong += [
        f"{quote(name)} has shape {np.shape(tensors[name])} where the source has {array.shape}"
        for name, array in like.items()
        if name in tensors and np.shape(tensors[name]) != array.shape
    ]
    if wrong:
        raise UserError(f"{path.name}: not written, {'; '.join(wrong[:5])}")


def _nested(container: Container, named: dict[str, np.ndarray]) -> Any:
    """The file's whole value: tensors at `nesting` inside `outer`."""
    rest = container.outer if container.kind.startswith("torch") else {}
    inner = rest
    for name in container.nesting:
        inner = inner.get(name, {})
    value: Any = torch_write.StateDict({**named, **inner})
    value.metadata = container.metadata
    for depth in reversed(range(len(container.nesting))):
        around = rest
        for name in container.nesting[:depth]:
            around = around.get(name, {})
        name = container.nesting[depth]
        value = type(around)({name: value, **{key: entry for key, entry in around.items() if key != name}})
    return value
