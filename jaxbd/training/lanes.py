"""Over lanes: on a CPU, narrow groups of cells that as many threads as there are cores advance side
by side.

XLA gives all cores to one operation after another. In a step of small convolutions much of that is
waiting, and the arrays of a wide batch outgrow the caches besides. So a batch of cells is cut into
groups, all served by one compiled program, and every core takes groups of its own;
`scripts/bench_time_loops.py` measures the difference.
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
"""Cells of a group where nothing speaks for more; bytes that a group's step may read and write, as
XLA counts them before it joins operations, until wider groups are slower: most of that never leaves
a core, and what does then still fits its share of the caches."""


def workers() -> int:
    """Threads that advance groups side by side: the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def are_default() -> bool:
    """Whether cells go over lanes where nothing else is asked for: on a CPU."""
    return jax.default_backend() == "cpu"


def width(program: Any, arguments: tuple, split: tuple[int, ...], count: int) -> int:
    """Cells of a group: `START`, or as many more, by powers of two, as `TRAFFIC` allows; 1 where
    each worker gets fewer than two such groups: one more group than workers would leave all but
    one idle, and a search of three cells and one of six share a program.

    Args:
      program, arguments, split: as of `advance`; nothing is compiled.
      count: of all cells; each worker gets some of them.
    """
    most = -(-count // workers())
    if most < 2 * START:
        return 1
    found = program.traffic(*own(arguments, split, 0, START))
    times = max(1, int(TRAFFIC / found)) if found > 0 else 1
    return min(START << (times.bit_length() - 1), most)


def own(arguments: tuple, split: tuple[int, ...], start: int, size: int) -> tuple:
    """The arguments of the group of `size` cells from `start` on; those at the positions `split`
    hold all cells."""
    return tuple(
        group(each, start, size) if position in split else each
        for position, each in enumerate(arguments)
    )


def group(tree: ArrayTree, start: int, size: int) -> ArrayTree:
    """Rows `start` to `start + size` of every leaf [N, …], as arrays of their own; row N - 1 again
    past the end."""

    def rows(leaf):
        index = np.minimum(np.arange(start, start + size), leaf.shape[0] - 1)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf[index]
        return jnp.array(np.asarray(leaf)[index])

    return jax.tree.map(rows, tree)


def join(groups: Sequence[ArrayTree], total: int) -> ArrayTree:
    """The first `total` rows of all groups together."""

    def rows(*leaves):
        if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
            return jnp.concatenate(leaves)[:total]
        return jnp.array(np.concatenate([np.asarray(leaf) for leaf in leaves])[:total])

    return jax.tree.map(rows, *groups)


def advance(
    program: Any, arguments: tuple, split: tuple[int, ...], count: int, size: int
) -> tuple[ArrayTree, ArrayTree]:
    """`count` steps `carry, info = program(carry, *rest)` of all cells, in groups of `size`.

    Args:
      program: a `Program`; it is compiled for one group.
      arguments: (carry, *rest); those at the positions `split`, of which 0 is one, have a leading
        axis [N] of cells.
    Returns: the carry [N, …], and the infos [count, N, …] as NumPy arrays.
    """
    total = jax.tree.leaves(arguments[0])[0].shape[0]
    # made here: in a thread of its own, JAX does not know of settings such as float64
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
