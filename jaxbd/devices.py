"""Placement of arrays on several devices, on one machine or more.

Work is divided only by placing inputs: cells, or the rows of a batch, are sharded over the devices
of a mesh with the axes "cell" and "data", and everything else is replicated. The compiler does the
rest. Several machines, with one process each, share one mesh and run the same program in lockstep;
`fetch` is where they exchange results.

The environment variable `JAXBD_DEVICES` is the number of devices to use on each machine; the
default is all of them.
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
    """The devices in use on all machines.

    Raises: UserError when `JAXBD_DEVICES` is not a number from 1 to this machine's device count.
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
    """A mesh of all devices in use along `axis`, "cell" or "data"; None for a single device."""
    chosen = in_use()
    if len(chosen) == 1:
        return None
    shape = (len(chosen), 1) if axis == "cell" else (1, len(chosen))
    return Mesh(np.array(chosen).reshape(shape), AXES)


def lies_on_several(tree: ArrayTree) -> bool:
    """Whether any array of `tree` is on more than one device."""
    return any(
        len(leaf.sharding.device_set) > 1
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
    )


def even(count: int, over: Mesh | None) -> int:
    """Rounds `count` cells up to a multiple of the mesh's "cell" axis."""
    ways = 1 if over is None else over.shape["cell"]
    return -(-count // ways) * ways


def by_cell(tree: ArrayTree, over: Mesh | None) -> ArrayTree:
    """Shards leaves [N, …] along their leading axis, padded to `even(N)` with copies of the first
    cell."""
    if over is None:
        return tree
    count = jax.tree.leaves(tree)[0].shape[0]
    if even(count, over) > count:
        index = np.arange(even(count, over)) * (np.arange(even(count, over)) < count)
        tree = jax.tree.map(lambda leaf: leaf[index], tree)
    return _put(tree, NamedSharding(over, PartitionSpec("cell")))


def on_each(tree: ArrayTree, over: Mesh | None) -> ArrayTree:
    """Replicates every leaf on each device."""
    return tree if over is None else _put(tree, NamedSharding(over, PartitionSpec()))


def whole(over: Mesh | None) -> NamedSharding | None:
    """The sharding of arrays that are replicated on a mesh; None without one."""
    return None if over is None else NamedSharding(over, PartitionSpec())


def _put(tree: ArrayTree, sharding: NamedSharding) -> ArrayTree:
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _put_own_part(leaf, sharding), tree)


def _put_own_part(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts this machine's part of an array that every machine has on its devices, without
    communication between machines."""
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
    """`jax.device_get` that also works for arrays spread over several machines: all of them must
    call it, in the same order."""

    def on_every_machine(leaf):
        if (
            isinstance(leaf, jax.Array)
            and not leaf.is_fully_addressable
            and not leaf.is_fully_replicated
        ):
            # block after each exchange: with several in flight, two processes can deadlock, each
            # waiting for an exchange that the other starts later
            sharding = leaf.sharding
            assert isinstance(sharding, NamedSharding)
            everywhere = NamedSharding(sharding.mesh, PartitionSpec())
            return jax.device_put(leaf, everywhere).block_until_ready()
        return leaf

    return jax.device_get(jax.tree.map(on_every_machine, tree))


def home(tree: ArrayTree, over: Mesh | None, count: int | None = None) -> ArrayTree:
    """Moves leaves back to one device; of leaves sharded by `by_cell`, only the first `count`
    rows."""

    def one(leaf):
        return (
            leaf.addressable_data(0)
            if leaf.is_fully_replicated
            else jnp.asarray(fetch(leaf)[:count])
        )

    return tree if over is None else jax.tree.map(one, tree)


def is_first() -> bool:
    """Whether this process is the one that writes files and prints; True for a single process."""
    # does not initialise the devices of a single process
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_all(value: float) -> np.ndarray:
    """Gathers `value` from each of P processes as [P] float32; all must call it."""
    if jax.process_count() == 1:
        return np.asarray([value], np.float32)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.float32(value))).reshape(-1)


def check_same(what: str, value: bytes, fix: str) -> None:
    """Checks that all processes have the same `value`; all must call it.

    Raises: UserError in every process, naming `what`, the first process that differs from process
      0, and the `fix`.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(value).digest(), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(digest))
    other = np.flatnonzero((every != every[0]).any(1))
    if len(other):
        raise UserError(f"process {other[0]} has another {what} than process 0; {fix}")
