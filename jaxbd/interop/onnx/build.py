"""Builds a graph node by node. Values that do not depend on an image are computed immediately."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbd.interop.onnx.graph import Node
from jaxbd.interop.onnx.interpret import compute
from jaxbd.interop.onnx.values import Budget
from jaxbd.limits import Refusal, quote

OPSET = 20
"""Opset of the graphs built here: the first with Gelu."""


class Builder:
    """A graph under construction. Values are referred to by name.

    Attributes:
      nodes, tensors: the graph's nodes and tensors so far.
      fixed: names of tensors that are not weights.
      known: name -> value of everything that depends only on constants.
      taken: all names in use.
    """

    def __init__(self, weights: Mapping[str, np.ndarray] | None = None):
        self.nodes: list[Node] = []
        self.tensors: dict[str, np.ndarray] = dict(weights or {})
        self.fixed: set[str] = set()
        self.known: dict[str, np.ndarray] = {}
        self.taken: set[str] = set(self.tensors)
        self._budget = Budget()

    def name(self, wish: str) -> str:
        """Reserves an unused name, `wish` if possible."""
        number, free = 1, wish
        while free in self.taken:
            number, free = number + 1, f"{wish}_{number}"
        self.taken.add(free)
        return free

    def constant(self, value: Any, dtype: Any = None, wish: str = "constant") -> str:
        """Adds a constant; returns its name."""
        name = self.name(wish)
        self.known[name] = np.asarray(value, dtype)
        self._budget.spend(self.known[name])
        return name

    def integers(self, values: Sequence[int]) -> str:
        """Adds a constant vector of integers, e.g. a shape or axes; returns its name."""
        return self.constant(list(values), np.int64, "shape")

    def add(
        self, op: str, inputs: Sequence[str], wish: str = "", count: int = 1, /, **attributes: Any
    ) -> Any:
        """Adds a node; returns the name of its output, or a tuple of names if `count` > 1. A node
        with only known inputs is computed instead."""
        outputs = tuple(self.name(wish or op.lower()) for _ in range(count))
        node = Node(op, outputs[0], tuple(inputs), outputs, attributes, OPSET)
        # constants are folded as the graph is built
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
        """Stores the current state of a known value as a tensor of the graph."""
        if name not in self.tensors:
            # a copy, because an in-place operator may still change the value
            self.tensors[name] = np.array(self.known[name])
            self.fixed.add(name)
        elif not np.array_equal(
            self.tensors[name], self.known[name], equal_nan=self.known[name].dtype.kind == "f"
        ):
            raise Refusal(f"value {quote(name)} is changed in place between two uses")
