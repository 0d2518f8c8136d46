"""Reads the arrays of an Orbax checkpoint folder (StandardCheckpointer of {"params": …,
"batch_stats": …}).

Orbax's own restore is not used because it cannot be confined: it looks up handlers by names from
the folder, restores every entry beside the weights, and allocates whatever an array claims before
any limit can be checked. Here the table of contents (JSON) is parsed, and each array is opened the
way Orbax does it, through TensorStore, in a process with limited memory and time (`orbax_worker`).
TensorStore's formats contain only data, nothing executable. Tests compare the result with Orbax's.
"""

import hashlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import IO, Any, NamedTuple

import numpy as np

from jaxbd.interop.safetensors_file import DTYPES
from jaxbd.limits import Limits, Refusal, opened, parse_json, quote, read_bounded, walk

CONTENTS, DATABASE = "_METADATA", "manifest.ocdbt"
DESCRIPTIONS = (".zarray", "zarr.json")
"""Name of the file that describes an array stored in its own folder, in zarr 2 and in zarr 3."""
WORKER = pathlib.Path(__file__).with_name("orbax_worker.py")
COLLECTIONS = ("params", "batch_stats", "bounds")


class Checkpoint(NamedTuple):
    """The contents of an Orbax folder.

    Attributes:
      arrays: path ("params/conv0/kernel") -> array.
      others: names of top-level entries that are not read.
      sha256: hash of all files: that of the lines "<sha256> <path>", sorted by path.
      files: {path: SHA-256} of each file.
      bytes: total size of all files.
    """

    arrays: dict[str, np.ndarray]
    others: tuple[str, ...]
    sha256: str
    files: dict[str, str]
    bytes: int


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether the folder has Orbax's table of contents."""
    return (path / CONTENTS).is_file()


def read(path: pathlib.Path, limits: Limits) -> Checkpoint:
    """Reads the folder. Raises Refusal if a file is missing, is not a regular file, or could be
    read in two ways."""
    files, size = _hashes(path, limits)
    contents = _contents(path, limits)
    database = _check_one_store(path, files, contents)
    names = [keys for keys in _entries(contents) if keys[0] in COLLECTIONS]
    others = tuple(sorted({keys[0] for keys in _entries(contents)} - set(COLLECTIONS)))
    if not any(keys[0] == "params" for keys in names):
        raise Refusal(
            'the Orbax checkpoint has no "params" at its top; save {"params": …, "batch_stats": …}'
        )
    if len({".".join(keys) for keys in names}) != len(names):
        raise Refusal(f"{CONTENTS} gives two arrays one place")
    if not database:
        for keys in names:
            _check_description(path, keys, contents, limits)
    arrays = _read_arrays(
        path, names, [_spec(path, k, contents, database) for k in names], size, limits
    )
    lines = "".join(f"{digest} {name}\n" for name, digest in files.items())
    return Checkpoint(arrays, others, hashlib.sha256(lines.encode()).hexdigest(), files, size)


def _read_arrays(
    path: pathlib.Path,
    names: list[tuple[str, ...]],
    specs: list[dict[str, Any]],
    size: int,
    limits: Limits,
) -> dict[str, np.ndarray]:
    """Reads the arrays described by `specs`, by name, from a folder of `size` bytes. This happens
    in a worker process, since TensorStore itself has no limit on memory or time."""
    most = limits.unpacked(size)
    seconds = limits.deadline("", size + most).seconds
    process = subprocess.Popen(
        [sys.executable, "-I", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    questions, answers = process.stdin, process.stdout
    assert questions is not None and answers is not None
    try:
        request = {"specs": specs, "bytes": most, "seconds": seconds}
        questions.write(json.dumps(request).encode() + b"\n")
        questions.flush()
        facts = _answer(answers, names)
        kinds = _check_facts(names, facts, most)
        questions.write(b"\n")
        questions.flush()
        return {
            "/".join(keys): _elements(answers, names, shape, kind)
            for keys, (shape, kind) in zip(names, kinds, strict=True)
        }
    except OSError:
        raise Refusal(TOO_MUCH) from None
    finally:
        process.kill()
        process.wait()
        questions.close()
        answers.close()


TOO_MUCH = "its arrays take more memory or time than a folder of its size can need"


def _answer(answers: IO[bytes], names: list[tuple[str, ...]]) -> Any:
    """One line from the worker. Raises Refusal if it reports an array that cannot be read."""
    try:
        found = json.loads(answers.readline())
    except ValueError:  # end of file: the worker has died
        raise Refusal(TOO_MUCH) from None
    if isinstance(found, dict):
        name = quote("/".join(names[found["index"]]))
        raise Refusal(f"array {name} cannot be read: {_reason(found['error'])}")
    return found


def _check_facts(
    names: list[tuple[str, ...]], facts: list[Any], most: int
) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array. Raises Refusal if reading them takes more than `most` bytes in
    total, counting for each array its own size or that of one stored block, whichever is larger."""
    kinds, total, known = [], 0, {dtype.name: dtype for dtype in DTYPES.values()}
    for keys, (shape, kind, block) in zip(names, facts, strict=True):
        if kind not in known:
            raise Refusal(
                f"array {quote('/'.join(keys))} is of type {quote(kind)}, which is not supported"
            )
        total += known[kind].itemsize * max(math.prod(shape), math.prod(block))
        if total > most:
            raise Refusal(
                f"array {quote('/'.join(keys))} of shape {tuple(shape)} claims more than the folder"
                " can hold"
            )
        kinds.append((tuple(shape), known[kind]))
    return kinds


def _elements(
    answers: IO[bytes], names: list[tuple[str, ...]], shape: tuple[int, ...], kind: np.dtype
) -> np.ndarray:
    # an empty line precedes the elements; anything else is an error report
    if answers.peek(1)[:1] != b"\n":  # pyright: ignore[reportAttributeAccessIssue] (a buffer)
        _answer(answers, names)
    answers.read(1)
    data = bytearray(kind.itemsize * math.prod(shape))
    if answers.readinto(data) != len(data):  # pyright: ignore[reportAttributeAccessIssue]
        raise Refusal(TOO_MUCH)
    if kind == np.bool_ and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise Refusal("an array holds booleans that are neither 0 nor 1")
    return np.frombuffer(data, kind).reshape(shape)


def _reason(text: str) -> str:
    """TensorStore's error message without the folder's path and the settings that it repeats."""
    message = text.partition(" [")[0]
    if missing := re.search(r"chunk \{([0-9, ]*)\}.* is missing", message):
        return f"its block {missing[1]} is missing"
    return quote(message.rpartition('": ')[2] or message)


def _hashes(path: pathlib.Path, limits: Limits) -> tuple[dict[str, str], int]:
    """{path in the folder: SHA-256} of each file, and the total size of all files."""
    files, total = {}, 0
    for entry in walk(path, limits):
        name = entry.relative_to(path).as_posix()
        if not entry.stat().st_size:  # `opened` would refuse an empty file
            files[name] = hashlib.sha256().hexdigest()
            continue
        with opened(entry, limits) as (file, size):
            total += size
            if total > limits.file_bytes:
                raise Refusal(f"the folder has more than {limits.file_bytes:,} bytes")
            files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return files, total


def _check_one_store(path: pathlib.Path, files: dict[str, str], contents: dict[str, Any]) -> bool:
    """Whether the arrays are stored in a database (OCDBT) rather than in files.

    Raises Refusal if both are there, or a second checkpoint: which of the two is read would depend
    on the reader.
    """
    inside = {name.rpartition("/")[2] for name in files}
    if sum(name.rpartition("/")[2] == CONTENTS for name in files) > 1:
        raise Refusal("the folder holds several checkpoints; give the folder of one of them")
    for flag in ("use_ocdbt", "use_zarr3"):
        if type(contents.get(flag)) not in (bool, type(None)):
            raise Refusal(f"{CONTENTS}: {flag} is {quote(contents[flag])}")
    has_database, has_files = DATABASE in files, bool(inside & set(DESCRIPTIONS))
    if has_database and has_files:
        raise Refusal("the folder holds the arrays twice, in a database and in files")
    stated = contents.get("use_ocdbt")
    if stated is not None and stated != has_database:
        raise Refusal(f"{CONTENTS} says use_ocdbt {stated}, but {DATABASE} says otherwise")
    return has_database


def _check_description(
    path: pathlib.Path, keys: tuple[str, ...], contents: dict[str, Any], limits: Limits
) -> None:
    """Raises Refusal unless the array's folder describes it exactly once, in the stated format and
    in unambiguous JSON."""
    folder, name = path / ".".join(keys), quote("/".join(keys))
    wanted = DESCRIPTIONS[bool(contents.get("use_zarr3"))]
    found = [one for one in DESCRIPTIONS if (folder / one).exists()]
    if found != [wanted]:
        raise Refusal(f"array {name} is described by {found or 'nothing'}, not by {wanted}")
    parse_json(read_bounded(folder / wanted, limits, limits.header_bytes), wanted, limits)


def _contents(path: pathlib.Path, limits: Limits) -> dict[str, Any]:
    text = read_bounded(path / CONTENTS, limits, limits.header_bytes)
    contents = parse_json(text, CONTENTS, limits)
    if not isinstance(contents, dict) or not isinstance(contents.get("tree_metadata"), dict):
        raise Refusal(f"{CONTENTS} is not that of an Orbax checkpoint")
    if len(contents["tree_metadata"]) > limits.tensors:
        raise Refusal(
            f"it holds {len(contents['tree_metadata']):,} arrays; the limit is {limits.tensors:,}"
        )
    return contents


def _entries(contents: dict[str, Any]) -> list[tuple[str, ...]]:
    """The keys leading to each array; empty branches are left out."""
    found = []
    for entry in contents["tree_metadata"].values():
        try:
            keys = tuple(step["key"] for step in entry["key_metadata"])
            empty = entry["value_metadata"]["skip_deserialize"]
        except (KeyError, TypeError):
            raise Refusal(f"{CONTENTS} is not that of an Orbax checkpoint") from None
        if not keys or not all(
            type(key) is str and key.isprintable() and 0 < len(key) <= 256 for key in keys
        ):
            raise Refusal(f"{CONTENTS} holds an array without a proper name")
        if any("/" in key or key in (".", "..") for key in keys):
            raise Refusal(f"{CONTENTS} names an array {quote('/'.join(keys))}")
        if not empty:
            found.append(keys)
    return found


def _spec(
    path: pathlib.Path, keys: tuple[str, ...], contents: dict[str, Any], database: bool
) -> dict[str, Any]:
    """The TensorStore spec of an array."""
    base = {"driver": "file", "path": f"{path.resolve()}/"}
    name = ".".join(keys) + "/"
    if database:
        store = {"driver": "ocdbt", "base": base, "path": name}
    else:
        store = {**base, "path": base["path"] + name}
    driver = "zarr3" if contents.get("use_zarr3") else "zarr"
    # as in Orbax, a missing block is an error; by default TensorStore would fill in zeros
    return {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
