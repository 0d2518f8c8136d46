"""Converts torch.export programs, given as JSON, to graphs: each aten operator becomes ONNX
nodes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxbd.interop.onnx.build import Builder
from jaxbd.interop.onnx.graph import MISFITS
from jaxbd.limits import Refusal, quote

TYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float16),
    7: np.dtype(np.float32),
    8: np.dtype(np.float64),
    12: np.dtype(np.bool_),
    13: np.dtype(ml_dtypes.bfloat16),
}
"""Number of an element type in torch.export's schema -> NumPy dtype."""
VIEWS = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "contiguous",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "alias",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "narrow",
        "dropout",
        "to",
    ]
)
"""Operators that may return a view of their input's memory."""
IGNORED = ("as_device", "as_layout", "as_memory_format")


class Meta(NamedTuple):
    """A tensor's shape and element type as stated in the program; dimensions that depend on the
    batch are None."""

    shape: tuple[Any, ...]
    dtype: np.dtype


class Tensor(NamedTuple):
    """A tensor argument, by its name in the program."""

    name: str


class Converter(Builder):
    """A graph under construction from a program.

    Attributes:
      metas: name of a tensor in the program -> its stated shape and type.
      values: name in the program -> name in the graph.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], metas: Mapping[str, Meta]):
        super().__init__(weights)
        self.metas, self.values = metas, dict[str, str]()
        # name of a view -> name of the tensor that owns its memory
        self._group: dict[str, str] = {}
        # names of values whose memory an in-place operator has changed since
        self._stale: set[str] = set()

    def value(self, argument: Any, like: Tensor | None = None) -> str:
        """The graph's name for an argument. A number becomes a constant with the type of `like`."""
        if isinstance(argument, Tensor):
            if argument.name in self._stale:
                raise Refusal(
                    f"value {quote(argument.name)} shares memory that is changed in place"
                )
            if argument.name not in self.values:
                raise Refusal(f"value {quote(argument.name)} is used before it is computed")
            return self.values[argument.name]
        dtype = self.meta(like).dtype if like is not None else np.dtype(np.float32)
        if isinstance(argument, float) and dtype.kind in "iub":
            dtype = np.dtype(np.float32)
        return self.constant(argument, dtype)

    def meta(self, tensor: Tensor) -> Meta:
        """Shape and type of a tensor."""
        graph_name = self.values.get(tensor.name, "")
        for found in (self.known.get(graph_name), self.tensors.get(graph_name)):
            if found is not None:
                return Meta(found.shape, found.dtype)
        if tensor.name not in self.metas:
            raise Refusal(f"the shape of {quote(tensor.name)} is not stated")
        return self.metas[tensor.name]

    def rank(self, tensor: Tensor) -> int:
        return len(self.meta(tensor).shape)

    def axis(self, tensor: Tensor, axis: int) -> int:
        """A possibly negative axis of `tensor` as one in 0..rank-1."""
        rank = max(self.rank(tensor), 1)
        if not -rank <= axis < rank:
            raise Refusal(f"axis {axis} of {quote(tensor.name)}")
        return axis % rank

    def size(self, tensor: Tensor, axis: int) -> int:
        """The size of an axis, which must be a fixed number."""
        found = self.meta(tensor).shape[self.axis(tensor, axis)]
        if found is None:
            raise Refusal(f"axis {axis} of {quote(tensor.name)} has no fixed size")
        return found

    def dims(self, sizes: list[Any]) -> str:
        """A vector of sizes, some of which may be symbolic. A single symbolic size is written as
        -1, unless -1 is already used."""
        open_sizes = [size for size in sizes if not isinstance(size, int)]
        if not open_sizes:
            return self.integers(sizes)
        if len(open_sizes) == 1 and -1 not in sizes:
            return self.integers([size if isinstance(size, int) else -1 for size in sizes])
        return self.vector(sizes)

    def vector(self, sizes: list[Any]) -> str:
        """A vector of sizes, some of which may be symbolic."""
        parts = [
            self.integers([s]) if isinstance(s, int) else self._row(self.value(s)) for s in sizes
        ]
        return self.add("Concat", parts, axis=0)

    def _row(self, scalar: str) -> str:
        return self.add("Reshape", [scalar, self.integers([1])])

    def run(
        self,
        target: str,
        arguments: dict[str, Any],
        outputs: list[str],
        handlers: Mapping[str, Any],
    ) -> None:
        """Converts one operator. Raises Refusal naming it if it is not known."""
        base = target.removeprefix("torch.ops.aten.").removeprefix("_operator.").split(".")[0]
        in_place = base.endswith("_") and not base.startswith("__")
        handler = handlers.get(base) or (handlers.get(base[:-1]) if in_place else None)
        if handler is None:
            raise Refusal(
                f"operator {quote(target)} (of {quote(outputs[0] if outputs else '')}) is not known"
            )
        try:
            result = handler(self, arguments)
        except MISFITS as error:
            reason = quote(str(error).partition("\n")[0])
            raise Refusal(
                f"operator {quote(target)} does not fit its arguments: {reason}"
            ) from None
        results = result if isinstance(result, list | tuple) else [result]
        if len(results) < len(outputs):
            raise Refusal(
                f"operator {quote(target)} has {len(outputs)} outputs where {len(results)} are "
                "known"
            )
        own = next((each for each in arguments.values() if isinstance(each, Tensor)), None)
        self._bind(base, own, outputs, list(results), in_place)

    def _bind(
        self, base: str, own: Tensor | None, outputs: list[str], results: list[str], in_place: bool
    ) -> None:
        """Assigns the results to `outputs`. An in-place operator also rebinds its input, and marks
        everything that shares the input's memory as stale."""
        self.values |= dict(zip(outputs, results, strict=False))
        if own is None:
            return
        root = self._group.get(own.name, own.name)
        if base.rstrip("_") in VIEWS or in_place:
            self._group |= dict.fromkeys(outputs, root)
        # known arrays are changed themselves, so their views stay valid
        if in_place and self.values[own.name] not in self.known:
            others = {name for name, group in self._group.items() if group == root} | {root}
            self._stale |= others - {own.name, *outputs}
            self.values[own.name] = results[0]


def decode(argument: Any) -> Any:
    """An argument's value: a number, string, None, `Tensor`, or a list of these. Raises Refusal for
    other kinds."""
    if type(argument) is not dict or len(argument) != 1:
        raise Refusal(f"an argument is {quote(argument)}")
    ((kind, value),) = argument.items()
    if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
        return _read_value(value)
    if kind in ("as_tensors", "as_sym_ints", "as_optional_tensors", "as_sym_floats"):
        return [_read_value(each) for each in _list(value)]
    if kind == "as_none" or kind in IGNORED:
        return None
    plain = {
        "as_int": int,
        "as_float": float,
        "as_bool": bool,
        "as_string": str,
        "as_scalar_type": int,
    }
    if kind == "as_float" and type(value) in (int, str):
        return float(value)  # "Infinity" and "NaN" are stored as strings
    if kind in plain and type(value) is plain[kind]:
        return value
    lists = {"as_ints": int, "as_floats": float, "as_bools": bool}
    if kind in lists and all(type(each) in (int, float, bool) for each in _list(value)):
        return [lists[kind](each) for each in value]
    raise Refusal(f"an argument of kind {quote(kind)} is not supported")


def _read_value(value: Any) -> Any:
    """A tensor or symbolic number: {"name": …}, {"as_name": …}, {"as_int": …}, {"as_tensor": …} or
    {"as_none": …}."""
    if type(value) is dict and type(value.get("name", value.get("as_name"))) is str:
        return Tensor(str(value.get("name", value.get("as_name"))))
    if type(value) is dict and len(value) == 1:
        return decode(value)
    raise Refusal(f"an argument is {quote(value)}")


def _list(value: Any) -> list[Any]:
    if type(value) is not list or len(value) > 4096:
        raise Refusal(f"an argument is {quote(value)}")
    return value
