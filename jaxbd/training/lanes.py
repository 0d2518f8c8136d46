"""Over lanes: on a CPU, splits a batch of cells into narrow groups and runs one thread per core.

XLA runs one operation at a time on all cores. In a step of small convolutions the cores then mostly
wait, and the arrays of a wide batch do not fit the caches. Here every thread takes whole groups,
and all groups share one compiled program. `scripts/bench_time_loops.py` measures the difference.
"""

import concurrent.futures
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import ArrayTree

START, TRAFFIC = 2, 600e6
"""START: default group width in cells. TRAFFIC: widen a group while one step's XLA "bytes accessed"
(counted before fusion) stays below this; wider groups are slower. Most of these bytes stay inside a
core, and below this limit the others still fit the core's share of the caches."""


def workers() -> int:
    """Number of threads: the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def are_default() -> bool:
    """Whether lanes are the default: on a CPU."""
    return jax.default_backend() == "cpu"


def width(program: Any, arguments: tuple, split: tuple[int, ...], count: int) -> int:
    """Cells per group: `START` times the largest power of two that `TRAFFIC` allows, at most each
    worker's share of the cells.

    The width is 1 if that share is less than two groups of `START`: one more group than workers
    would leave all but one idle, and searches of three and of six cells share a program. Compiles
    nothing.

    Args:
      program, arguments, split: as in `advance`.
      count: number of all cells, shared by the workers.
    """
    most = -(-count // workers())
    if most < 2 * START:
        return 1
    found = program.traffic(*own(arguments, split, 0, START))
    times = max(1, int(TRAFFIC / found)) if found > 0 else 1
    return min(START << (times.bit_length() - 1), most)


def own(arguments: tuple, split: tuple[int, ...], start: int, size: int) -> tuple:
    """The arguments of one group: `size` cells from `start` on, taken from the arguments at the
    positions `split`, which hold all cells."""
    return tuple(
        group(each, start, size) if position in split else each
        for position, each in enumerate(arguments)
    )


def group(tree: ArrayTree, start: int, size: int) -> ArrayTree:
    """Copies rows `start` to `start + size` of every leaf [N, …]; past the end, repeats row
    N - 1."""

    def rows(leaf):
        index = np.minimum(np.arange(start, start + size), leaf.shape[0] - 1)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf[index]
        return jnp.array(np.asarray(leaf)[index])

    return jax.tree.map(rows, tree)


def join(groups: Sequence[ArrayTree], total: int) -> ArrayTree:
    """Concatenates the groups and returns the first `total` rows."""

    def rows(*leaves):
        if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
            return jnp.concatenate(leaves)[:total]
        return jnp.array(np.concatenate([np.asarray(leaf) for leaf in leaves])[:total])

    return jax.tree.map(rows, *groups)


def advance(
    program: Any, arguments: tuple, split: tuple[int, ...], count: int, size: int
) -> tuple[ArrayTree, ArrayTree]:
    """Makes `count` steps `carry, info = program(carry, *rest)` of all cells, in groups of `size`.

    Args:
      program: a `Program`; it is compiled for one group.
      arguments: (carry, *rest); those at the positions `split`, which include 0, have a leading
        axis [N] of cells.
    Returns: the carry [N, …], and the infos [count, N, …] as NumPy arrays.
    """
    total = jax.tree.leaves(arguments[0])[0].shape[0]
    # in the main thread: JAX settings such as float64 are not visible in worker threads
    groups = [own(arguments, split, start, size) for start in range(0, total, size)]
    compiled = program.compiled(*groups[0])

    def run(each: tuple) -> tuple[ArrayTree, ArrayTree]:
        (carry, *rest), infos = each, []
        for _ in range(count):
            carry, info = compiled(carry, *rest)
            infos.append(info)
        return jax.block_until_ready(carry), jax.tree.map(
            lambda *leaves: np.stack(leaves), *jax.device_get(infos)
        )

    with concurrent.futures.ThreadPoolExecutor(workers()) as pool:
        carries, infos = zip(*pool.map(run, groups), strict=True)
    return join(carries, total), jax.tree.map(
        lambda *leaves: np.concatenate(leaves, axis=1)[:, :total], *infos
    )
