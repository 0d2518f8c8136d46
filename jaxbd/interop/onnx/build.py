"""Builds a graph node by node; what depends on no image is computed at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbd.interop.onnx.graph import Node
from jaxbd.interop.onnx.interpret import compute
from jaxbd.interop.onnx.values import Budget
from jaxbd.limits import Refusal, quote

OPSET = 20
"""Opset of the graphs that are built here: the first with Gelu."""


class Builder:
    """Nodes and tensors of a graph under construction. Values go by name.

    Attributes:
      nodes, tensors: what the graph will hold; fixed: names of tensors that are no weights.
      known: values that depend on nothing but constants.
    """

    def __init__(self, weights: Mapping[str, np.ndarray] | None = None):
        self.nodes: list[Node] = []
        self.tensors: dict[str, np.ndarray] = dict(weights or {})
        self.fixed: set[str] = set()
        self.known: dict[str, np.ndarray] = {}
        self.taken: set[str] = set(self.tensors)
        self._budget = Budget()

    def name(self, wish: str) -> str:
        """A name that no value has yet, `wish` if possible."""
        number, free = 1, wish
        while free in self.taken:
            number, free = number + 1, f"{wish}_{number}"
        self.taken.add(free)
        return free

    def constant(self, value: Any, dtype: Any = None, wish: str = "constant") -> str:
        """A constant value, as an array."""
        name = self.name(wish)
        self.known[name] = np.asarray(value, dtype)
        self._budget.spend(self.known[name])
        return name

    def integers(self, values: Sequence[int]) -> str:
        """A constant vector of integers, such as a shape or axes."""
        return self.constant(list(values), np.int64, "shape")

    def add(
        self, op: str, inputs: Sequence[str], wish: str = "", count: int = 1, /, **attributes: Any
    ) -> Any:
        """The name of the output of a new node, or names where it has `count` > 1 of them."""
        outputs = tuple(self.name(wish or op.lower()) for _ in range(count))
        node = Node(op, outputs[0], tuple(inputs), outputs, attributes, OPSET)
        if all(name in self.known for name in inputs if name):
            results = compute(node, [self.known[name] if name else None for name in inputs])
            for name, result in zip(outputs, results, strict=True):
                self._budget.spend(result)
                self.known[name] = np.asarray(result)
        else:
            for name in inputs:
                if name in self.known:
                    self.store(name)
            self.nodes.append(node)
        return outputs[0] if count == 1 else outputs

    def store(self, name: str) -> None:
        """Makes a known value a tensor of the graph, as it is now."""
        if name not in self.tensors:
            self.tensors[name] = np.array(self.known[name])
            self.fixed.add(name)
        elif not np.array_equal(
            self.tensors[name], self.known[name], equal_nan=self.known[name].dtype.kind == "f"
        ):
            raise Refusal(f"value {quote(name)} is changed in place between two uses")
