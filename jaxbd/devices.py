"""Where arrays lie when there is more than one device, on one machine or on several.

Work is divided by placing inputs alone: cells, or the rows of a batch, are spread over the devices
of a mesh with the axes "cell" and "data", and everything else lies on each of them. The compiler
does the rest. Several machines, each with a process of its own, share one mesh and run the same
program in step; `fetch` is where they exchange results.

`JAXBD_DEVICES` in the environment is the number of devices in use on each machine; all of them
where it is not set.
"""

import hashlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbd.base import ArrayTree, UserError

AXES = ("cell", "data")
LIMIT = "JAXBD_DEVICES"


def in_use() -> "list[jax.Device]":  # pyright: ignore[reportInvalidTypeForm]
    """The devices in use, those of all machines.

    Raises: UserError when `JAXBD_DEVICES` is no number of devices that this machine has.
    """
    asked, there = os.environ.get(LIMIT), jax.local_device_count()
    if asked is None:
        return jax.devices()
    if not asked.isdecimal() or not 1 <= int(asked) <= there:
        raise UserError(
            f"{asked or 'no'} devices were asked for; this machine has {there}, give 1..{there}"
        )
    every = [
        [d for d in jax.devices() if d.process_index == process]
        for process in range(jax.process_count())
    ]
    return [device for own in every for device in own[: int(asked)]]


def mesh(axis: str = "cell") -> Mesh | None:
    """All devices in use along `axis`, "cell" or "data"; None where there is one device."""
    chosen = in_use()
    if len(chosen) == 1:
        return None
    shape = (len(chosen), 1) if axis == "cell" else (1, len(chosen))
    return Mesh(np.array(chosen).reshape(shape), AXES)


def lies_on_several(tree: ArrayTree) -> bool:
    """Whether the caller has placed arrays of `tree` on more than one device."""
    return any(
        len(leaf.sharding.device_set) > 1
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
    )


def even(count: int, over: Mesh | None) -> int:
    """The least multiple of the mesh's "cell" axis that holds `count` cells."""
    ways = 1 if over is None else over.shape["cell"]
    return -(-count // ways) * ways


def by_cell(tree: ArrayTree, over: Mesh | None) -> ArrayTree:
    """Leaves [N, …] divided by their leading axis, which is filled up to `even` with copies of the
    first cell."""
    if over is None:
        return tree
    count = jax.tree.leaves(tree)[0].shape[0]
    if even(count, over) > count:
        index = np.arange(even(count, over)) * (np.arange(even(count, over)) < count)
        tree = jax.tree.map(lambda leaf: leaf[index], tree)
    return _put(tree, NamedSharding(over, PartitionSpec("cell")))


def on_each(tree: ArrayTree, over: Mesh | None) -> ArrayTree:
    """The whole of every leaf on each device."""
    return tree if over is None else _put(tree, NamedSharding(over, PartitionSpec()))


def whole(over: Mesh | None) -> NamedSharding | None:
    """The sharding of what lies on each device of a mesh."""
    return None if over is None else NamedSharding(over, PartitionSpec())


def _put(tree: ArrayTree, sharding: NamedSharding) -> ArrayTree:
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _put_own_part(leaf, sharding), tree)


def _put_own_part(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """What lies on this machine's devices of an array that every machine has, without a word
    between machines."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        kind = jax.random.key_impl(leaf)
        return jax.random.wrap_key_data(
            _put_own_part(jax.random.key_data(leaf), sharding), impl=kind
        )
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    whole = fetch(jnp.asarray(leaf))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def fetch(tree: ArrayTree) -> ArrayTree:
    """NumPy arrays of all of `tree`, as `jax.device_get`; machines that share arrays must all call
    it, in one order."""

    def on_every_machine(leaf):
        if (
            isinstance(leaf, jax.Array)
            and not leaf.is_fully_addressable
            and not leaf.is_fully_replicated
        ):
            # one exchange at a time: of several under way, two processes may each wait for what the
            # other does later
            sharding = leaf.sharding
            assert isinstance(sharding, NamedSharding)
            everywhere = NamedSharding(sharding.mesh, PartitionSpec())
            return jax.device_put(leaf, everywhere).block_until_ready()
        return leaf

    return jax.device_get(jax.tree.map(on_every_machine, tree))


def home(tree: ArrayTree, over: Mesh | None, count: int | None = None) -> ArrayTree:
    """Leaves on one device again, as if there were no other: the first `count` rows of what
    `by_cell` divided."""

    def one(leaf):
        return (
            leaf.addressable_data(0)
            if leaf.is_fully_replicated
            else jnp.asarray(fetch(leaf)[:count])
        )

    return tree if over is None else jax.tree.map(one, tree)


def is_first() -> bool:
    """Whether this process is the one that writes files and prints; without others it always is."""
    return (
        not jax.distributed.is_initialized() or jax.process_index() == 0
    )  # asks no device while there is but one


def from_all(value: float) -> np.ndarray:
    """[P] float32, the `value` that each of P processes gives; all must call it."""
    if jax.process_count() == 1:
        return np.asarray([value], np.float32)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.float32(value))).reshape(-1)


def check_same(what: str, value: bytes, fix: str) -> None:
    """Compares `value` among all processes; all must call it.

    Raises: UserError on every machine naming `what`, the first process that has another than
      process 0, and the `fix`.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(value).digest(), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(digest))
    other = np.flatnonzero((every != every[0]).any(1))
    if len(other):
        raise UserError(f"process {other[0]} has another {what} than process 0; {fix}")
