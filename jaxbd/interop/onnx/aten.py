"""Converts torch.export programs, given as JSON, to graphs: each aten operator becomes ONNX
nodes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbd.interop.onnx.aten_arguments import Arguments, Recorded, Tensor
from jaxbd.interop.onnx.aten_pixels import VIEWS, passes_on
from jaxbd.interop.onnx.build import Builder
from jaxbd.interop.onnx.graph import MISFITS
from jaxbd.interop.onnx.stated import Stated, check, join, kind_of
from jaxbd.limits import Refusal, quote


class Meta(NamedTuple):
    """A tensor's shape and element type as stated in the program; dimensions that depend on the
    batch are None."""

    shape: tuple[Any, ...]
    dtype: np.dtype


class Converter(Builder):
    """A graph under construction from a program.

    Attributes:
      metas: name of a tensor in the program -> its stated shape and type.
      values: name in the program -> name in the graph.
      stated: name in the graph -> what the program states of the value.
      pixels: names in the program of values that hold the integers of an integer image.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], metas: Mapping[str, Meta]):
        super().__init__(weights)
        self.metas, self.values = metas, dict[str, str]()
        self.stated, self.pixels = dict[str, Stated](), set[str]()
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
            if not self.values[argument.name]:
                raise Refusal(f"value {quote(argument.name)} is an output that is not supported")
            return self.values[argument.name]
        dtype = self.meta(like).dtype if like is not None else np.dtype(np.float32)
        if isinstance(argument, float) and kind_of(dtype) != "f":
            dtype = np.dtype(np.float32)
        elif type(argument) is int and dtype.kind == "b":
            dtype = np.dtype(np.int64)
        return self.constant(argument, widened(dtype))

    def meta(self, tensor: Tensor) -> Meta:
        """Shape and type of a tensor."""
        graph_name = self.values.get(tensor.name, "")
        for found in (self.known.get(graph_name), self.tensors.get(graph_name)):
            if found is not None:
                return Meta(found.shape, found.dtype)
        if tensor.name not in self.metas:
            raise Refusal(f"the shape of {quote(tensor.name)} is not stated")
        return self.metas[tensor.name]

    def kind(self, argument: Any) -> str:
        """The kind of a tensor's elements, or of a number, as `kind_of` gives it."""
        if isinstance(argument, Tensor):  # sizes are integers, and not among the tensors
            return kind_of(self.meta(argument).dtype) if argument.name in self.metas else "i"
        return np.asarray(argument).dtype.kind

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
        arguments: Arguments,
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
        own = arguments.get("self", arguments.get("input"))
        own = own if isinstance(own, Tensor) else None
        recorded = Recorded(arguments)
        try:
            if passes_on(base, arguments, self.pixels, self.kind):
                self.pixels |= set(outputs)
            result = handler(self, recorded)
            recorded.check_all_read()
        except Refusal as refusal:
            raise Refusal(f"operator {quote(target)}: {refusal}") from None
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
        self._bind(base, own, outputs, list(results), in_place)
        for name in [*outputs, *([own.name] if own is not None and in_place else [])]:
            self.expect(name)

    def expect(self, name: str) -> None:
        """Compares what the program states of the value `name` with what is known of it, now or,
        through `stated`, when the graph is computed.

        Raises: Refusal if they differ: handlers rely on what is stated.
        """
        value, meta = self.values.get(name), self.metas.get(name)
        if not value or meta is None:
            return
        stated = Stated(meta.shape, "" if name in self.pixels else kind_of(meta.dtype))
        found = self.known.get(value, self.tensors.get(value))
        if found is not None:
            check(found, stated, name)
            # NumPy computes with integers in float64, PyTorch in float32
            if found.dtype == np.float64 != meta.dtype and value in self.known:
                self.known[value] = found.astype(np.float32)
        elif value in self.stated:
            self.stated[value] = join(self.stated[value], stated, name)
        else:
            self.stated[value] = stated

    def _bind(
        self, base: str, own: Tensor | None, outputs: list[str], results: list[str], in_place: bool
    ) -> None:
        """Assigns the results to `outputs`. An in-place operator also rebinds its input, and marks
        everything that shares the input's memory as stale."""
        self.values |= {name: value for name, value in zip(outputs, results, strict=False) if name}
        if own is None:
            return
        root = self._group.get(own.name, own.name)
        if base.rstrip("_") in VIEWS or in_place:
            self._group |= dict.fromkeys(outputs, root)
        if not in_place:
            return
        others = {name for name, group in self._group.items() if group == root} | {root}
        others -= {own.name, *outputs}
        array, result = self.known.get(self.values[own.name]), self.known.get(results[0])
        if array is not None and result is not None:
            # a known array is changed itself, and with it the views that NumPy made of it
            if array.shape != result.shape or not array.flags.writeable:
                raise Refusal(f"value {quote(own.name)} is changed in place")
            array[...] = result
            others = {name for name in others if not self._shares(name, array)}
            results = [self.values[own.name]]
        self._stale |= others
        self.values |= dict.fromkeys([own.name, *outputs], results[0])

    def _shares(self, name: str, array: np.ndarray) -> bool:
        """Whether the value `name` is a view of `array`, or the array itself."""
        found = self.known.get(self.values.get(name, ""))
        return found is not None and np.may_share_memory(found, array)


def widened(dtype: np.dtype) -> np.dtype:
    """`dtype`, or float32 for a shorter float: PyTorch does not round the numbers in a program to
    them either."""
    return np.dtype(np.float32) if kind_of(dtype) == "f" and dtype.itemsize < 4 else dtype
