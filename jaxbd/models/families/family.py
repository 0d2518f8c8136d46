"""Builds a Flax module from a table of layers and the name of their family."""

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array, UserError
from jaxbd.models.families import branched, chain, dense, mobile, residual, separable
from jaxbd.models.families.layers import Layers, Mismatch, Shape

FAMILIES: dict[str, ModuleType] = {
    "branched": branched,
    "densenet": dense,
    "inverted": mobile,
    "separable": separable,
    "residual": residual,
    "chain": chain,
}
"""Name of a family -> the module with its `forms`, `forward`, `side` and `title`, the most specific
first."""

SIZE = re.compile(r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5}){0,3}[+]?")
"""Entry of the table for one layer: the shape of its weight, then "+" if it has a bias (for
BatchNorm: scale and shift)."""
MOST_LAYERS = 10_000
MOST_NUMBERS = 1 << 31


def parse(table: Mapping[str, str]) -> tuple[dict[str, Shape], frozenset[str]]:
    """Shapes and biased layers of a table. Raises UserError when an entry is not a layer or the net
    is too large."""
    shapes, total = {}, 0
    for name, text in table.items():
        if not isinstance(text, str) or not SIZE.fullmatch(text) or not name.isprintable():
            raise UserError(f"the layer {name[:80]!r} is described by {str(text)[:40]!r}")
        shape, count = tuple(int(size) for size in text.rstrip("+").split("x")), 1
        for size in shape:
            count *= size
        total += count
        shapes[name] = shape
    if len(shapes) > MOST_LAYERS or total > MOST_NUMBERS:
        raise UserError(
            f"a net of {len(shapes):,} layers and {total:,} numbers is not built: too large"
        )
    return shapes, frozenset(name for name, text in table.items() if text.endswith("+"))


def open_table(table: Mapping[str, str]) -> Layers:
    """The layers of a table, for looking up names and shapes only: they cannot be applied."""
    return Layers(*parse(table), jnp.float32, False)


class Family(nn.Module):
    """A net of the family `family`: images [B, H, W, C], already normalised -> logits [B, K].

    Attributes:
      layers: name of each layer -> its size, see `SIZE`.
      form: what the weights do not determine, one of the family's `forms`.
    """

    classes: int
    family: str
    layers: Mapping[str, str]
    form: Mapping[str, Any]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        net = Layers(*parse(self.layers), self.dtype, train)
        try:
            logits = FAMILIES[self.family].forward(net, x, dict(self.form))
        except (KeyError, ValueError) as error:
            raise Mismatch(f"the form {dict(self.form)} does not fit: {error}") from None
        left = sorted(set(net.shapes) - net.used)
        if left:
            raise Mismatch(f"the family does not use {left[0]}")
        if logits.shape[-1] != self.classes:
            raise Mismatch(f"it has {logits.shape[-1]} classes, not {self.classes}")
        return logits
