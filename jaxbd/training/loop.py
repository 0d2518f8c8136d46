"""Over time: runs compiled steps chunk by chunk. The training loop is the `for` over `chunks`.

There are two modes with the same result. "scan" compiles a chunk of steps into one program
(default on accelerators). "host" calls one compiled step in a host loop (default on CPUs): on
XLA:CPU a convolution's weight gradient inside a compiled loop is more than twenty times slower, see
`scripts/bench_time_loops.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbd import devices
from jaxbd.base import ArrayTree, Key
from jaxbd.caching import cached
from jaxbd.training.program import Clock, Program, Seconds, Time, default_time

Step = Callable[..., tuple[ArrayTree, ArrayTree]]


class NotFinite(FloatingPointError):
    """A step produced NaN or infinity.

    Attributes:
      step: index of the first bad step.
      index: positions of the bad entries along the leading (cell) axis; empty for a run without
        cells.
    """

    def __init__(self, step: int, index: tuple[int, ...]):
        super().__init__(f"values stopped being finite at step {step}")
        self.step, self.index = step, index


class Chunk(NamedTuple):
    """Result of a few steps.

    Attributes:
      done: steps made so far.
      get_state: () -> state. Call it only when the state is needed, since it copies a state that is
        on several devices, and before the next chunk, which donates the buffers.
      infos: infos of this chunk's steps [steps, …], NumPy.
    """

    done: int
    get_state: Callable[[], ArrayTree]
    infos: ArrayTree


@cached(64)
def _programs(advance: Step, chunk: int) -> tuple[Program, Program]:
    """Programs for one step and for one chunk of `advance(state, *args) -> (state, info)`; cached,
    so that nothing is traced twice."""

    def scanned(state, *args):
        return jax.lax.scan(lambda carry, _: advance(carry, *args), state, None, length=chunk)

    return Program(advance, donate=(0,)), Program(scanned, donate=(0,))


def compile_step(advance: Step, chunk: int = 20) -> Program:
    """The one-step program of `advance`; the same object that `chunks` uses for this `chunk`."""
    return _programs(advance, chunk)[0]


def chunks(
    advance: Step,
    state: ArrayTree,
    *args: Any,
    num_steps: int,
    over_time: Time = "auto",
    chunk: int = 20,
    rows: int | None = None,
) -> Iterator[Chunk]:
    """Applies `advance(state, *args) -> (state, info)` `num_steps` times; yields after each chunk.

    `state` is donated: the caller must not use it afterwards. `rows` is the size of the batches
    that `advance` marks with `images.spread_rows`. The devices in use share each batch, unless the
    caller has placed `state` on several devices or `rows` is not a multiple of their number.
    Sharing does not show outside: the caller's state and the returned state are on one device.

    Raises: NotFinite as soon as a chunk's infos hold NaN or infinity.
    """
    over = devices.mesh("data") if rows and not devices.lies_on_several(state) else None
    # an uneven batch cannot be shared: run it on one device
    if over is not None and rows and rows % over.size:
        over = None
    if over is not None:
        state, args = devices.on_each((state, args), over)
    over_time = default_time() if over_time == "auto" else over_time
    step, scanned = _programs(advance, chunk)
    for first in range(0, num_steps, chunk):
        size = min(chunk, num_steps - first)
        # a shorter last chunk runs step by step, since scanning it would need another program
        if over_time == "scan" and size == chunk:
            state, infos = scanned(state, *args)
            infos = jax.tree.map(np.asarray, devices.fetch(infos))
        else:
            each = []
            for _ in range(size):
                state, info = step(state, *args)
                # stays on the device until the chunk ends, so that the host can dispatch ahead
                each.append(info)
            infos = jax.tree.map(lambda *leaves: np.stack(leaves), *devices.fetch(each))
        check_finite(infos, first)
        # the default argument binds the state of this chunk
        yield Chunk(first + size, lambda state=state: devices.home(state, over), infos)


def check_finite(infos: ArrayTree, first_step: int) -> None:
    """Raises NotFinite when any leaf [steps] or [steps, cells] of `infos` holds NaN or infinity."""
    bad = [entry for leaf in jax.tree.leaves(infos) for entry in np.argwhere(~np.isfinite(leaf))]
    if bad:
        row = min(entry[0] for entry in bad)
        cells = sorted({int(entry[1]) for entry in bad if entry[0] == row and len(entry) > 1})
        raise NotFinite(first_step + int(row), tuple(cells))


def join_infos(chunks: list[ArrayTree]) -> ArrayTree:
    """Concatenates the infos [steps, …] of several chunks; None for no chunk."""
    if not chunks:
        return None
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)


def run(
    advance: Step, state: ArrayTree, *args: Any, num_steps: int, **settings: Any
) -> tuple[ArrayTree, ArrayTree, Seconds]:
    """Runs `chunks` to the end. Returns the last state, all infos [num_steps, …] and the seconds
    spent."""
    clock, collected = Clock(), []
    for _, get_state, infos in chunks(advance, state, *args, num_steps=num_steps, **settings):
        collected.append(infos)
        state = get_state()
    jax.block_until_ready(state)
    return state, join_infos(collected), clock.read()


@cached(64)
def with_batches(step: Step, draw: Callable[..., Any] | None) -> Step:
    """Wraps `step(key, state, batch, *extra)` as `advance(state, key, data, extra)`, which draws
    batches by `draw(key, data)`; without `draw` the batch is None.

    A step's key depends on the run's key and `state.step` alone, so a resumed run gets the same
    keys.
    """

    def advance(state, key, data, extra):
        key = jax.random.fold_in(key, state.step)
        if draw is None:
            return step(key, state, None, *extra)
        draw_key, step_key = jax.random.split(key)
        return step(step_key, state, draw(draw_key, data), *extra)

    return advance


def batch_rows(draw: Callable[..., Any] | None, key: Key, data: ArrayTree) -> int | None:
    """Rows of a batch from `draw`, if several devices could share it; else None."""
    if draw is None or not devices.mesh("data"):
        return None
    return jax.tree.leaves(jax.eval_shape(draw, key, data))[0].shape[0]
