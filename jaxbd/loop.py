"""Over time: compiled steps, chunk by chunk, with callbacks. One of the three places that call `jax.jit`.

Two ways over time give the same result. "scan" compiles a chunk of steps into one program (accelerators). "host" is a
host loop of one compiled step: on XLA:CPU a convolution's weight gradient inside a compiled loop is more than
twenty times slower (`scripts/bench_time_loops.py` measures it), so the CPU default is "host".
"""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxbd import devices, lanes
from jaxbd.base import ArrayTree, Key
from jaxbd.remembered import relieve, remembered

Time = Literal["auto", "scan", "host"]


class Seconds(NamedTuple):
    """Wall seconds of a run: tracing and compiling, and everything after it."""

    compile: float
    run: float


def total(*each: Seconds) -> Seconds:
    """The seconds of several runs together."""
    return Seconds(*map(sum, zip(*each, strict=True)))


class NotFinite(FloatingPointError):
    """A step produced NaN or infinity.

    Attributes:
      step: index of the first bad step.
      index: positions of the bad entries along the leading (cell) axis; empty for a run without cells.
    """

    def __init__(self, step: int, index: tuple[int, ...]):
        super().__init__(f"values stopped being finite at step {step}")
        self.step, self.index = step, index


class Program:
    """A function compiled ahead of time once per argument signature, so that compile time is known apart.

    Attributes:
      traces: how often Python traced the function.
      compile_seconds: total time spent tracing and compiling.
    """

    def __init__(self, function: Callable[..., Any], donate: tuple[int, ...] = ()):
        self.traces = 0
        self.compile_seconds = 0.0
        self._compiled: dict[Any, Any] = {}
        self._traffic: dict[Any, float] = {}
        self._jitted = jax.jit(self._count(function), donate_argnums=donate)

    def _count(self, function):
        @functools.wraps(function)
        def counted(*args):
            self.traces += 1
            return function(*args)

        return counted

    def compiled(self, *args):
        """The executable for arguments shaped and placed like `args` (`jax.stages.Compiled`)."""
        signature = _signature(args)
        if signature not in self._compiled:
            started = time.perf_counter()
            relieve()
            with _mesh_of(jax.tree.leaves(args)):
                self._compiled[signature] = self._jitted.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - started
        return self._compiled[signature]

    def traffic(self, *args) -> float:
        """Bytes that XLA counts as read and written, before it joins operations; nothing is compiled. 0: not known."""
        signature = _signature(args)
        if signature not in self._traffic:
            with _mesh_of(jax.tree.leaves(args)):
                found = self._jitted.lower(*args).cost_analysis() or {}
            self._traffic[signature] = float(found.get("bytes accessed", 0.0))
        return self._traffic[signature]

    def __call__(self, *args):
        return self.compiled(*args)(*args)


def _signature(args: tuple) -> Any:
    """What a compiled program depends on: structure, shapes, types and places of its arguments."""
    leaves, tree = jax.tree.flatten(args)
    kind = lambda x: (np.shape(x), str(getattr(x, "dtype", type(x))), getattr(x, "sharding", None))
    return tree, tuple(map(kind, leaves))


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a part of larger programs: Python traces it once for arguments of the same shapes.

    Under `vmap` the shapes are those of a single row, so batches of every width share the trace, and so does
    `jax.eval_shape`.
    """
    return jax.jit(function, inline=True)


def _mesh_of(leaves: list[Any]) -> contextlib.AbstractContextManager:
    """Makes the mesh on which arguments lie known to `images.divided` while the function is traced."""
    places = (getattr(leaf, "sharding", None) for leaf in leaves)
    meshes = (place.mesh for place in places if isinstance(place, jax.sharding.NamedSharding))
    return next((jax.set_mesh(mesh) for mesh in meshes if mesh.shape.get("data", 1) > 1), contextlib.nullcontext())


def default_time() -> Time:
    """The default way over time: "host" on CPU, "scan" elsewhere."""
    return "host" if jax.default_backend() == "cpu" else "scan"


@remembered(64)
def _programs(advance: Callable[..., Any], chunk: int) -> tuple[Program, Program]:
    """One step and one chunk of `advance(state, *args) -> (state, info)`; kept, so that nothing is traced twice."""

    def scanned(state, *args):
        return jax.lax.scan(lambda carry, _: advance(carry, *args), state, None, length=chunk)

    return Program(advance, donate=(0,)), Program(scanned, donate=(0,))


def one_step(advance: Callable[..., Any], chunk: int = 20) -> Program:
    """The program of one step of `advance`, as `run` uses it with the same `chunk`."""
    return _programs(advance, chunk)[0]


def run(
    advance: Callable[..., tuple[ArrayTree, ArrayTree]],
    state: ArrayTree,
    *args: Any,
    num_steps: int,
    over_time: Time = "auto",
    chunk: int = 20,
    on_chunk: Callable[[int, ArrayTree, ArrayTree], None] | None = None,
    rows: int | None = None,
    split: tuple[int, ...] = (),
    group: int | None = None,
) -> tuple[ArrayTree, ArrayTree, Seconds]:
    """Applies `advance(state, *args) -> (state, info)` `num_steps` times.

    `state` is donated: the caller's copy is gone afterwards. `on_chunk(steps_done, state, infos of the chunk)` runs
    after each chunk; it may save, print or raise. `rows` is the size of the batches that `advance` marks with
    `images.divided`: the devices in use share them, unless the caller has placed `state` on several or they do not
    divide it, and state and result lie on one device all the same. `split` says which of (state, *args), counted from
    0, have a leading axis of cells: a host loop then takes them over lanes, see `lanes`, in groups of `group` cells or
    of as many as suit.

    Returns: the last state, the infos as NumPy arrays stacked on a leading axis [num_steps], and the seconds.
    Raises: NotFinite as soon as a chunk's infos hold NaN or infinity.
    """
    over = devices.mesh("data") if rows and not devices.lies_on_several(state) else None
    if over is not None and rows % over.size == 0:
        state, args = devices.on_each((state, args), over)
        told = on_chunk and (lambda done, state, infos: on_chunk(done, devices.home(state, over), infos))
        state, *rest = run(advance, state, *args, num_steps=num_steps, over_time=over_time, chunk=chunk, on_chunk=told)
        return devices.home(state, over), *rest
    step, scanned = _programs(advance, chunk)
    over_time = default_time() if over_time == "auto" else over_time
    compiled_before = step.compile_seconds + scanned.compile_seconds
    started, collected, done = time.perf_counter(), [], 0
    if split and over_time == "host" and group is None:
        group = lanes.width(step, (state, *args), split, jax.tree.leaves(state)[0].shape[0])
    while done < num_steps:
        size = min(chunk, num_steps - done)
        if over_time == "scan" and size == chunk:
            state, infos = scanned(state, *args)
            infos = jax.tree.map(np.asarray, devices.fetch(infos))
        elif split and over_time == "host":
            state, infos = lanes.advance(step, (state, *args), split, size, group)
        else:
            each = []
            for _ in range(size):
                state, info = step(state, *args)
                each.append(info)
            infos = jax.tree.map(lambda *leaves: np.stack(leaves), *devices.fetch(each))
        _check_finite(infos, done)
        collected.append(infos)
        done += size
        if on_chunk is not None:
            on_chunk(done, state, infos)
    jax.block_until_ready(state)
    infos = jax.tree.map(lambda *leaves: np.concatenate(leaves), *collected) if collected else None
    compile_seconds = step.compile_seconds + scanned.compile_seconds - compiled_before
    return state, infos, Seconds(compile_seconds, time.perf_counter() - started - compile_seconds)


def _check_finite(infos: ArrayTree, first_step: int) -> None:
    """Raises NotFinite when any leaf [steps] or [steps, cells] of `infos` holds a value that is not finite."""
    bad = [entry for leaf in jax.tree.leaves(infos) for entry in np.argwhere(~np.isfinite(leaf))]
    if bad:
        row = min(entry[0] for entry in bad)
        cells = sorted({int(entry[1]) for entry in bad if entry[0] == row and len(entry) > 1})
        raise NotFinite(first_step + int(row), tuple(cells))


@remembered(64)
def _trained(step: Callable[..., Any], draw: Callable[..., Any]) -> Callable[..., Any]:
    """`step` on a batch from `draw`, both keyed by the state's own step number."""

    def advance(state, key, data, extra):
        draw_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        return step(step_key, state, draw(draw_key, data), *extra)

    return advance


def fit(
    key: Key,
    step: Callable[..., tuple[ArrayTree, ArrayTree]],
    draw: Callable[..., Any],
    data: ArrayTree,
    state: ArrayTree,
    *extra: ArrayTree,
    num_steps: int,
    over_time: Time = "auto",
    chunk: int = 20,
    on_chunk: Callable[[int, ArrayTree, ArrayTree], None] | None = None,
) -> tuple[ArrayTree, ArrayTree, Seconds]:
    """Runs a method's `step(key, state, batch, *extra)` on batches `draw(key, data)`.

    The last state is the result: nothing is selected on the way. The key of a step depends on the run's key and on
    `state.step` alone, so a run resumed from a saved state continues bit for bit. See `run` for the rest.
    """
    advance = _trained(step, draw)
    drawn = jax.eval_shape(draw, key, data) if devices.mesh("data") else None
    rows = jax.tree.leaves(drawn)[0].shape[0] if drawn else None
    return run(
        advance, state, key, data, extra,
        num_steps=num_steps, over_time=over_time, chunk=chunk, on_chunk=on_chunk, rows=rows,
    )  # fmt: skip
