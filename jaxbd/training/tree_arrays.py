"""Converts a state to named NumPy arrays, as stored in a checkpoint, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import ArrayTree

Signature = tuple[Any, list[tuple[tuple[int, ...], str]]]
"""Structure of a tree; shape and type of each leaf as stored."""


class Mismatch(Exception):
    """Stored arrays do not match the expected state. The message names the first difference."""


def to_arrays(prefix: str, tree: ArrayTree) -> dict[str, np.ndarray]:
    """Leaves by path ("state/variables/params/head/bias"); typed keys become their key data."""
    leaves = map(np.asarray, jax.device_get(jax.tree.leaves(_without_keys(tree))))
    return dict(zip(_names(prefix, tree), leaves, strict=True))


def to_infos(arrays: dict[str, np.ndarray]) -> dict[str, ArrayTree]:
    """Rebuilds infos by field; a field that is a dictionary becomes a nested one."""
    infos: dict[str, ArrayTree] = {}
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        field, _, key = rest.partition("/")
        if kind == "infos" and key:
            infos.setdefault(field, {})[key] = value
        elif kind == "infos":
            infos[field] = value
    return infos


def to_state(like: ArrayTree, arrays: dict[str, np.ndarray]) -> ArrayTree:
    """`like` with its leaves replaced by the arrays of the same names, on the devices to which
    `like` is committed, if any.

    Raises: Mismatch when a name, shape or type differs.
    """
    structure, shapes = signature(like)
    wanted = dict(zip(_names("state", like), shapes, strict=True))
    # arrays of size zero are not stored: rebuild them from their shape
    arrays = {**{name: np.zeros(*kind) for name, kind in wanted.items() if 0 in kind[0]}, **arrays}
    found = {
        name: (value.shape, str(value.dtype))
        for name, value in arrays.items()
        if name.startswith("state/")
    }
    for name in sorted(wanted.keys() | found.keys()):
        theirs, ours = found.get(name), wanted.get(name)
        if theirs != ours:
            raise Mismatch(f"{name} is {_describe(theirs)} there and {_describe(ours)} here")
    leaves = map(_place, (arrays[name] for name in wanted), jax.tree.leaves(like))
    return structure.unflatten(leaves)


def signature(tree: ArrayTree) -> Signature:
    """Structure, shapes and types; two states with the same signature can share a checkpoint
    stage."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(_without_keys, tree))
    return structure, [(leaf.shape, str(leaf.dtype)) for leaf in leaves]


def _describe(kind: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if kind is None else f"{kind[1]} of {kind[0]}"


def _names(prefix: str, tree: ArrayTree) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}" for path in paths]


def _place(value: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):  # stays in host memory
        return value
    where = like.sharding if getattr(like, "committed", False) else None
    if _is_key(like):
        impl = jax.random.key_impl(jnp.zeros((), like.dtype))
        return jax.device_put(jax.random.wrap_key_data(jnp.asarray(value), impl=impl), where)
    return jax.device_put(value, where)


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _without_keys(tree: ArrayTree) -> ArrayTree:
    """Replaces typed keys by their key data."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)
