"""From what a PyTorch file holds to its one dictionary of tensors, the plain rest, and NumPy arrays."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxbd.interop.allowed import Storage, Symbol, Tensor
from jaxbd.interop.files import Limits, Refusal, quote

KNOWN_NAMES = ("state_dict", "model_state_dict", "model_state", "net", "model", "network", "classifier", "weights")
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every key."""


class Found(NamedTuple):
    """tensors in file order without prefix; nesting, prefix, outer, metadata, ignored as in `container.Container`."""

    tensors: dict[str, Tensor]
    nesting: tuple[str, ...]
    prefix: str
    outer: Any
    metadata: Any
    ignored: tuple[str, ...]


def find(value: Any, limits: Limits) -> Found:
    """The state_dict inside `value`. Raises Refusal when there is none, or several and no name tells which."""
    if not isinstance(value, dict):
        raise Refusal(f"it holds a {type(value).__name__.lower()}, not a dictionary of tensors")
    walk = _Walk(limits)
    nesting = _choose(walk.candidates(value, ()))
    state = value
    for name in nesting:
        state = state[name]
    tensors = {name: entry for name, entry in state.items() if type(entry) is Tensor}
    _check_names(tensors, limits)
    prefix = common_prefix(tensors)
    outer = walk.rest(value, nesting)
    metadata = walk.plain(getattr(state, "_metadata", None), 0)
    metadata = None if metadata is _DROPPED else metadata
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return Found(tensors, nesting, prefix, outer, metadata, tuple(walk.ignored))


def _choose(candidates: list[tuple[str, ...]]) -> tuple[str, ...]:
    if not candidates:
        raise Refusal("no dictionary of tensors is found in it")
    known = [path for path in candidates if path and all(name in KNOWN_NAMES for name in path)]
    chosen = known if len(candidates) > 1 else candidates
    if len(chosen) != 1:
        names = ", ".join(quote(".".join(path) or "the file itself") for path in candidates[:8])
        raise Refusal(f"it holds several dictionaries of tensors ({names}); save the one to be read on its own")
    return chosen[0]


def _check_names(tensors: dict[Any, Tensor], limits: Limits) -> None:
    if len(tensors) > limits.tensors:
        raise Refusal(f"it holds {len(tensors):,} tensors; the limit is {limits.tensors:,}")
    for name in tensors:
        if type(name) is not str or not name.isprintable() or not 0 < len(name) <= 256:
            raise Refusal(f"a tensor is named {quote(name)}")


def common_prefix(tensors: dict[str, Any]) -> str:
    """The longest run of `PREFIXES` that every name begins with."""
    prefix = ""
    while True:
        longer = [prefix + more for more in PREFIXES if all(name.startswith(prefix + more) for name in tensors)]
        if not longer or any(name == longer[0] for name in tensors):
            return prefix
        prefix = longer[0]


_DROPPED = object()


class _Walk:
    """Visits what a file holds, counting every visit: shared and cyclic values make small files endless."""

    def __init__(self, limits: Limits):
        self.limits, self.left = limits, limits.entries
        self.ignored: list[str] = []

    def visit(self, depth: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Refusal(f"it holds more than {self.limits.entries:,} values")
        if depth > self.limits.depth:
            raise Refusal(f"it is nested more than {self.limits.depth} deep")

    def candidates(self, value: dict, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Paths of all dictionaries that hold a tensor with axes; optimiser states (with `param_groups`) are none."""
        self.visit(len(path))
        if "param_groups" in value:
            return []
        found = [path] if any(type(entry) is Tensor and entry.shape for entry in value.values()) else []
        for name, entry in value.items():
            self.visit(len(path))
            if isinstance(entry, dict) and type(name) is str:
                found += self.candidates(entry, (*path, name))
        return found

    def rest(self, value: dict, nesting: tuple[str, ...], path: tuple[str, ...] = ()) -> dict:
        """`value` without the tensors at `nesting`, and without entries that are not plain; the latter are noted."""
        kept = type(value)()
        for name, entry in value.items():
            if nesting and name == nesting[0]:
                inner = self.rest(entry, nesting[1:], (*path, name))
                if inner:
                    kept[name] = inner
            elif nesting or type(entry) is not Tensor:
                entry = self.plain(entry, len(path))
                if entry is _DROPPED:
                    self.ignored.append(".".join((*path, str(name)))[:256])
                else:
                    kept[name] = entry
        return kept

    def plain(self, value: Any, depth: int) -> Any:
        """A copy of plain Python, or `_DROPPED` where a tensor, storage or type lies anywhere in it."""
        self.visit(depth)
        if isinstance(value, (Tensor, Storage, Symbol)):
            return _DROPPED
        if isinstance(value, dict):
            items = [(name, self.plain(entry, depth + 1)) for name, entry in value.items()]
            return _DROPPED if any(entry is _DROPPED for _, entry in items) else type(value)(items)
        if isinstance(value, (list, tuple)):
            items = [self.plain(entry, depth + 1) for entry in value]
            return _DROPPED if any(entry is _DROPPED for entry in items) else type(value)(items)
        return value


def arrays(
    tensors: dict[str, Tensor], load: Callable[[str, int], np.ndarray], file_size: int, limits: Limits
) -> dict[str, np.ndarray]:
    """Loads every tensor; each storage is read once, and tensors that share one share memory.

    `load(key, bytes)` gives a storage as uint8. What all tensors together take, shared memory counted each time, is
    bounded by the file's size: a view may repeat one element a billion times.
    """
    total = 0
    for name, tensor in tensors.items():
        total += math.prod(tensor.shape) * tensor.storage.dtype.itemsize
        if total > limits.unpacked(file_size):
            raise Refusal(f"tensor {quote(name)} of shape {tensor.shape} claims more than a file of this size can hold")
    storages: dict[str, np.ndarray] = {}
    loaded = {}
    for name, tensor in tensors.items():
        key, dtype = tensor.storage.key, tensor.storage.dtype
        if key not in storages:
            storages[key] = load(key, tensor.storage.numel * dtype.itemsize)
        loaded[name] = _view(storages[key].view(dtype), tensor)
        if dtype == np.bool_ and (loaded[name].view(np.uint8) > 1).any():
            raise Refusal(f"tensor {quote(name)} holds truth values that are neither 0 nor 1")
    return loaded


def _view(flat: np.ndarray, tensor: Tensor) -> np.ndarray:
    """`tensor` of a storage [numel]; its bounds were checked when it was described. Copied unless it lies dense."""
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, flat.dtype)
    strides = tuple(step * flat.itemsize for step in tensor.stride)
    begin = flat[tensor.offset :]
    # the last element's index was held against the storage's size before; this is the guard behind it
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if last >= begin.size:
        raise Refusal("a tensor reaches outside its storage")
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(begin, tensor.shape, strides)).reshape(tensor.shape)
