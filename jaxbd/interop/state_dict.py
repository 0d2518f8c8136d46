"""Splits the contents of a PyTorch file into the tensors of its net and the remaining plain Python
values."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbd.interop import pieces, selection
from jaxbd.interop.allowed import Foreign, NumpyArray, Storage, Symbol, Tensor
from jaxbd.interop.selection import Candidate, Fits, Selection
from jaxbd.limits import Limits, Refusal, quote

KNOWN_NAMES = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "net",
    "model",
    "network",
    "classifier",
    "weights",
)
"""Keys under which a classifier is usually saved."""
LEAVES = ("weight", "bias", "running_mean", "running_var")
TENSORS = ("a tensor", "torch._utils._rebuild", "torch._tensor.")
"""Prefixes of the names of unsupported values that are tensors."""
OPAQUE = "a tensor of "
"""Prefix of the names of those among them that are unsupported only because of their type."""

Load = Callable[[str, int], np.ndarray]
"""(key, number of bytes) -> a storage as uint8."""


class Found(NamedTuple):
    """The net of a file.

    Attributes:
      tensors: name without prefix -> array, in file order, with weights in parts multiplied out.
      selection: how these names follow from those in the file.
      nesting: keys that lead to the dictionary; "0" for the first item of a list.
      outer, metadata, ignored: as in `container.Container`.
      constants: the input's mean and standard deviation, by their names in the file; may be empty.
    """

    tensors: dict[str, np.ndarray]
    selection: Selection
    nesting: tuple[str, ...]
    outer: Any
    metadata: Any
    ignored: tuple[str, ...]
    constants: dict[str, np.ndarray]


def find(
    value: Any, load: Load, size: int, limits: Limits, fits: Fits, key: str | None = None
) -> Found:
    """Finds the net in `value`, the contents of a file of `size` bytes.

    Raises: Refusal if there is no net, or several and neither `key` nor a known architecture
      singles one out.
    """
    if type(value) is Foreign:
        raise Refusal(
            f"it is a whole pickled {quote(value.name)}, which cannot be read without running its"
            " code; save model.state_dict() instead"
        )
    if not isinstance(value, (dict, list, tuple)):
        raise Refusal(f"it holds a {type(value).__name__.lower()}, not a dictionary of tensors")
    walk = _Walk(limits)
    deadline = limits.deadline("choosing among its tensors", size)
    dictionaries = walk.dictionaries(value)
    if not dictionaries:
        raise Refusal(_nothing_found(value))
    candidates = [
        Candidate(path, selected)
        for path, tensors in dictionaries.items()
        for selected in selection.select(
            {name: _shape(t) for name, t in tensors.items()}, fits, deadline.check
        )
    ]
    read = lambda each, keys: arrays(
        {key: dictionaries[each.path][key] for key in keys}, load, size, limits
    )
    chosen = selection.choose(candidates, key, _is_known, _Equal(read, deadline.check))
    return _make_found(value, walk, chosen, candidates, read)


def _make_found(
    value: Any, walk: "_Walk", chosen: Candidate, candidates: list[Candidate], read: Callable
) -> Found:
    state = _at(value, chosen.path)
    _check_names(chosen.selection.names, walk.limits)
    _check_no_foreign(state)
    keys = [key for piece in chosen.selection.names.values() for key in piece.keys]
    loaded = read(chosen, dict.fromkeys([*keys, *(chosen.selection.constants or ())]))
    tensors = {
        name: pieces.put_together(name, piece, loaded)
        for name, piece in chosen.selection.names.items()
    }
    # everything but the chosen tensors, so that a writer can put it back
    outer = walk.rest(value, chosen.path)
    ignored = [*walk.ignored, *(_path(chosen, key) for key in chosen.selection.ignored)]
    try:
        metadata = walk.plain(getattr(state, "_metadata", None), 0)
    except Refusal:
        metadata = None
    return Found(
        tensors,
        chosen.selection,
        tuple(map(str, chosen.path)),
        outer,
        None if metadata is _DROPPED else metadata,
        tuple(dict.fromkeys(ignored)),
        {name: loaded[name] for name in chosen.selection.constants or ()},
    )


def find_named(
    tensors: Mapping[str, np.ndarray],
    limits: Limits,
    fits: Fits,
    key: str | None = None,
    *,
    opaque: Mapping[str, str] = {},
) -> tuple[dict[str, np.ndarray], Selection, dict[str, np.ndarray]]:
    """The net in a flat table of arrays: its tensors, selection and constants as in `Found`.

    Args:
      opaque: names of tensors that are not read -> their types, which are not supported.
    Raises: Refusal as `find` does, or if an opaque tensor may be part of the net.
    """
    shapes = {name: np.shape(tensor) for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    check = limits.deadline("choosing among its tensors", size).check
    candidates = [Candidate((), each) for each in selection.select(shapes, fits, check)]
    read = lambda each, keys: {key: tensors[key] for key in keys}
    chosen = selection.choose(candidates, key, lambda each: True, _Equal(read, check)).selection
    _check_names(chosen.names, limits)
    keys = [key for piece in chosen.names.values() for key in piece.keys]
    # a body and a head may have different prefixes
    prefix = chosen.prefix if all(key.startswith(chosen.prefix) for key in keys) else ""
    for name, kind in opaque.items():
        if name.startswith(prefix) and pieces.may_be_part(name):
            raise Refusal(f"tensor {quote(name)} is of type {quote(kind)}, which is not supported")
    chosen = chosen._replace(ignored=(*chosen.ignored, *opaque))
    whole = {
        name: pieces.put_together(name, piece, tensors) for name, piece in chosen.names.items()
    }
    return whole, chosen, {name: tensors[name] for name in chosen.constants or ()}


class _Equal(NamedTuple):
    """Tells whether two candidates hold the same values. `read` loads a candidate's tensors by key;
    `check` raises Refusal when the time is up."""

    read: Callable[[Candidate, list[str]], dict[str, np.ndarray]]
    check: Callable[[], None]

    def __call__(self, one: Candidate, other: Candidate) -> bool:
        self.check()
        if one.selection.names.keys() != other.selection.names.keys():
            return False
        loaded = []
        for each in (one, other):
            named = each.selection.names
            found = self.read(each, [key for piece in named.values() for key in piece.keys])
            loaded.append({n: pieces.put_together(n, piece, found) for n, piece in named.items()})
        return all(
            np.array_equal(loaded[0][name], loaded[1][name], equal_nan=True)
            for name in loaded[0]
            # counters of batches do not change what the net computes
            if not name.endswith("num_batches_tracked")
        )


def _is_known(candidate: Candidate) -> bool:
    return bool(candidate.path) and all(part in KNOWN_NAMES for part in candidate.path)


def _path(chosen: Candidate, key: str) -> str:
    return ".".join(map(str, (*chosen.path, key)))[:256]


def _shape(tensor: Tensor | NumpyArray) -> tuple[int, ...]:
    if type(tensor) is Tensor:
        return tensor.shape
    return () if tensor.values is None else tensor.values.shape


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        value = value[part]
    return value


def _nothing_found(value: Any) -> str:
    """Why no dictionary of tensors is found, and what the file holds instead."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for name, entry in entries:
        if type(entry) is Foreign and name != "epoch":
            return (
                f"no dictionary of tensors is found in it; {quote(str(name))} is a pickled"
                f" {quote(entry.name)}, which cannot be read without running its code; save"
                " model.state_dict() instead"
            )
    if not isinstance(value, dict):
        return "it holds a list without a dictionary of tensors; save model.state_dict()"
    return "no dictionary of tensors is found in it"


def _check_names(tensors: Mapping[Any, Any], limits: Limits) -> None:
    if len(tensors) > limits.tensors:
        raise Refusal(f"it holds {len(tensors):,} tensors; the limit is {limits.tensors:,}")
    for name in tensors:
        if (
            type(name) is not str
            or not name.isprintable()
            or not 0 < len(name) <= selection.MOST_NAME
        ):
            raise Refusal(f"a tensor is named {quote(name)}")


def _check_no_foreign(state: dict) -> None:
    """Raises Refusal if an unsupported value has the name of a weight."""
    for name, entry in state.items():
        if type(entry) is not Foreign:
            continue
        has_type = entry.name.startswith(OPAQUE)
        if (
            type(name) is not str
            or name.rpartition(".")[2] in LEAVES
            or (pieces.may_be_part(name) if has_type else entry.name.startswith(TENSORS))
        ):
            what = name if type(name) is str else entry.name
            raise Refusal(
                f"{quote(what)} among the weights is {entry.name}, which is not supported"
            )


_DROPPED = object()


class _TooMany(Refusal):
    """There are more values than may be visited. Entries beside the weights are then left out."""


class _Walk:
    """Visits the values in a file and counts every visit: shared and cyclic values can make a small
    file endless."""

    def __init__(self, limits: Limits):
        self.limits, self.left = limits, limits.values
        self.ignored: list[str] = []

    def visit(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _TooMany(f"it holds more than {self.limits.values:,} values")

    def dictionaries(self, value: Any) -> dict[tuple[str | int, ...], dict[str, Any]]:
        """Path -> tensors of every dictionary that may hold weights (`_may_be_weights`). Skips
        optimiser states (with `param_groups`) and anything nested deeper than the limit."""
        found: dict[tuple[str | int, ...], dict[str, Any]] = {}
        waiting: list[tuple[Any, tuple[str | int, ...]]] = [(value, ())]
        seen: set[int] = set()
        while waiting:
            entry, path = waiting.pop()
            self.visit()
            if id(entry) in seen or len(path) > self.limits.depth:
                continue
            seen.add(id(entry))
            if not isinstance(entry, dict):
                inner = list(enumerate(entry))
            elif "param_groups" in entry:
                continue
            else:
                inner = [(name, part) for name, part in entry.items() if type(name) is str]
                tensors = {name: part for name, part in inner if _is_tensor(part)}
                if _may_be_weights(tensors):
                    found[path] = tensors
            self.left -= len(inner)
            self.visit()
            waiting += [
                (part, (*path, name))
                # reversed, because the stack is popped from its end: entries are visited in file
                # order
                for name, part in reversed(inner)
                if isinstance(part, (dict, list, tuple))
            ]
        return found

    def rest(self, value: Any, nesting: tuple[str | int, ...], path: tuple = ()) -> Any:
        """`value` without the tensors at `nesting` and without entries that are not plain Python;
        the names of the latter go to `ignored`. A list keeps its length, with None for entries left
        out."""
        if not isinstance(value, dict):
            items = list(value)
            for index, entry in enumerate(items):
                if nesting and index == nesting[0]:
                    items[index] = self.rest(entry, nesting[1:], (*path, index))
                else:
                    plain = self._note(entry, (*path, index))
                    items[index] = None if plain is _DROPPED else plain
            return type(value)(items)
        rest = type(value)()
        for name, entry in value.items():
            if nesting and name == nesting[0]:
                inner = self.rest(entry, nesting[1:], (*path, name))
                if inner or not isinstance(entry, dict):
                    rest[name] = inner
            elif nesting or type(name) is not str or not _is_tensor(entry):
                entry = self._note(entry, (*path, name))
                if entry is not _DROPPED:
                    rest[name] = entry
        return rest

    def _note(self, entry: Any, path: tuple) -> Any:
        """`plain(entry)`; if that is `_DROPPED`, records the entry's path in `ignored`."""
        try:
            plain = self.plain(entry, len(path))
        except _TooMany:
            plain = _DROPPED
        if plain is _DROPPED:
            names = [part.name if type(part) is Foreign else str(part) for part in path]
            self.ignored.append(".".join(names)[:256])
        return plain

    def plain(self, value: Any, depth: int) -> Any:
        """A copy of a plain Python value, or `_DROPPED` if it contains a tensor, storage or type at
        any depth, or is nested too deep."""
        self.visit()
        if depth > self.limits.depth:
            return _DROPPED
        if isinstance(value, (Tensor, Storage, Symbol, Foreign, NumpyArray)):
            return _DROPPED
        if isinstance(value, dict):
            items = [
                (name, _DROPPED if type(name) is Foreign else self.plain(entry, depth + 1))
                for name, entry in value.items()
            ]
            return _DROPPED if any(entry is _DROPPED for _, entry in items) else type(value)(items)
        if isinstance(value, (list, tuple)):
            items = [self.plain(entry, depth + 1) for entry in value]
            return _DROPPED if any(entry is _DROPPED for entry in items) else type(value)(items)
        return value


def _may_be_weights(tensors: dict[str, Any]) -> bool:
    """Whether there is a tensor that is not a scalar or, with NumPy arrays only, at least `FEWEST`
    that are named like layers."""
    if any(type(tensor) is Tensor for tensor in tensors.values()):
        return any(_shape(tensor) for tensor in tensors.values())
    return sum("." in name for name in tensors) >= selection.FEWEST


def _is_tensor(entry: Any) -> bool:
    return type(entry) is Tensor or (type(entry) is NumpyArray and entry.values is not None)


def arrays(
    tensors: dict[str, Tensor | NumpyArray],
    load: Load,
    file_size: int,
    limits: Limits,
) -> dict[str, np.ndarray]:
    """Loads every tensor. Each storage is read once; dense tensors on the same storage share its
    memory.

    The total size of all tensors, counting shared memory each time, is limited by the file's size,
    because a view can repeat one element a billion times.
    """
    total = 0
    for name, tensor in tensors.items():
        if type(tensor) is NumpyArray:
            continue
        total += math.prod(tensor.shape) * tensor.storage.dtype.itemsize
        if total > limits.unpacked(file_size):
            raise Refusal(
                f"tensor {quote(name)} of shape {tensor.shape} claims more than a file of this size"
                " can hold"
            )
    storages: dict[str, np.ndarray] = {}
    loaded = {}
    for name, tensor in tensors.items():
        if type(tensor) is NumpyArray:
            # a copy, since arrays over the pickle's bytes are read-only
            loaded[name] = np.array(tensor.values)
            continue
        key, dtype = tensor.storage.key, tensor.storage.dtype
        if key not in storages:
            storages[key] = load(key, tensor.storage.numel * dtype.itemsize)
        loaded[name] = _view(storages[key].view(dtype), tensor)
        if dtype == np.bool_ and (loaded[name].view(np.uint8) > 1).any():
            raise Refusal(f"tensor {quote(name)} holds booleans that are neither 0 nor 1")
    return loaded


def _view(flat: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The view `tensor` of a storage [numel], copied unless it is dense. Its bounds were checked
    when it was described."""
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, flat.dtype)
    strides = tuple(step * flat.itemsize for step in tensor.stride)
    begin = flat[tensor.offset :]
    # second line of defence: `allowed._check_bounds` has compared this index with the storage
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if last >= begin.size:
        raise Refusal("a tensor reaches outside its storage")
    return np.ascontiguousarray(
        np.lib.stride_tricks.as_strided(begin, tensor.shape, strides)
    ).reshape(tensor.shape)
