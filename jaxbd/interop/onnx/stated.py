"""Shapes and element types that a file states for its values, compared with the real ones."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbd.limits import Refusal, quote


class Stated(NamedTuple):
    """What a file states of a value.

    Attributes:
      shape: its dimensions; None for open ones.
      kind: "f", "i", "u" or "b", as `kind_of` gives it; "" if any kind will do.
    """

    shape: tuple[int | None, ...]
    kind: str


def kind_of(dtype: Any) -> str:
    """NumPy's letter for a kind of element type, with "f" for bfloat16 too. Sizes do not count:
    graphs compute in 32 bits."""
    return "f" if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype).kind


def join(one: Stated, other: Stated, name: str) -> Stated:
    """Both statements about the same value as one. Raises Refusal if they differ."""
    kinds = {one.kind, other.kind} - {""}
    fits = len(one.shape) == len(other.shape) and all(
        a is None or b is None or a == b for a, b in zip(one.shape, other.shape, strict=True)
    )
    if not fits or len(kinds) > 1:
        raise Refusal(f"value {quote(name)} is stated as {_text(one)} and as {_text(other)}")
    shape = tuple(b if a is None else a for a, b in zip(one.shape, other.shape, strict=True))
    return Stated(shape, kinds.pop() if kinds else "")


def check(value: Any, stated: Stated, name: str) -> None:
    """Raises Refusal if an array is not what the file states of it."""
    real = Stated(np.shape(value), kind_of(value.dtype))
    fits = len(real.shape) == len(stated.shape) and all(
        b is None or a == b for a, b in zip(real.shape, stated.shape, strict=True)
    )
    if not fits or stated.kind not in ("", real.kind):
        raise Refusal(
            f"the file states value {quote(name)} as {_text(stated)}, but it is {_text(real)}"
        )


def check_all(names: tuple[str, ...], values: Any, stated: Mapping[str, Stated]) -> None:
    """`check` for those values that the file states."""
    for name, value in zip(names, values, strict=False):
        if name in stated:
            check(value, stated[name], name)


def _text(stated: Stated) -> str:
    kinds = {"f": "floats", "i": "integers", "u": "unsigned integers", "b": "booleans"}
    dims = "x".join("?" if dim is None else str(dim)[:12] for dim in stated.shape)
    return f"{kinds.get(stated.kind, 'numbers')} of shape {dims or '()'}"
