"""Compiled programs that measure their own compile time. The only module that calls `jax.jit`."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxbd.caching import relieve

Time = Literal["auto", "scan", "host"]


class Seconds(NamedTuple):
    """Wall-clock seconds of a run: `compile` for tracing and compiling, `run` for everything
    else."""

    compile: float
    run: float


def total_seconds(*each: Seconds) -> Seconds:
    """Sums the seconds of several runs."""
    return Seconds(sum(one.compile for one in each), sum(one.run for one in each))


# compile seconds of all programs in this process; a list, so that functions can update it
_all_compiling = [0.0]


class Clock:
    """Stopwatch that separates compile time from all other time."""

    def __init__(self):
        self._started, self._compiled = time.perf_counter(), _all_compiling[0]

    def read(self) -> Seconds:
        """The seconds since the clock was made."""
        compiling = _all_compiling[0] - self._compiled
        return Seconds(compiling, time.perf_counter() - self._started - compiling)


class Program:
    """A function compiled ahead of time, once per argument signature, so that compile time can be
    measured separately.

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
            spent = time.perf_counter() - started
            self.compile_seconds += spent
            _all_compiling[0] += spent
        return self._compiled[signature]

    def lower(self, *args: Any, platform: str) -> str:
        """The program as StableHLO for "cpu", "cuda" or "tpu". Compiles nothing and needs no such
        device."""
        with _mesh_of(jax.tree.leaves(args)):
            return self._jitted.trace(*args).lower(lowering_platforms=(platform,)).as_text()

    def traffic(self, *args: Any) -> float:
        """Bytes read and written ("bytes accessed") by XLA's cost analysis before fusion; 0 if
        unknown. Compiles nothing."""
        signature = _signature(args)
        if signature not in self._traffic:
            with _mesh_of(jax.tree.leaves(args)):
                found = self._jitted.lower(*args).cost_analysis() or {}
            self._traffic[signature] = float(found.get("bytes accessed", 0.0))
        return self._traffic[signature]

    def __call__(self, *args):
        return self.compiled(*args)(*args)


def _signature(args: tuple) -> Any:
    """Everything that a compiled program depends on: structure, shapes, types and placement of its
    arguments."""
    leaves, tree = jax.tree.flatten(args)
    kind = lambda x: (np.shape(x), str(getattr(x, "dtype", type(x))), getattr(x, "sharding", None))
    return tree, tuple(map(kind, leaves))


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function`, a part of larger programs, so that Python traces it once per argument
    shapes.

    Under `vmap` these are the shapes of a single row, so batches of every width share the trace.
    So does `jax.eval_shape`.
    """
    return jax.jit(function, inline=True)


def _mesh_of(leaves: list[Any]) -> contextlib.AbstractContextManager:
    """Sets the mesh of the arguments during tracing, for `images.spread_rows` to read."""
    places = (getattr(leaf, "sharding", None) for leaf in leaves)
    meshes = (
        place.mesh
        for place in places
        if isinstance(place, jax.sharding.NamedSharding)
        and isinstance(place.mesh, jax.sharding.Mesh)
    )
    return next(
        (jax.set_mesh(mesh) for mesh in meshes if mesh.shape.get("data", 1) > 1),
        contextlib.nullcontext(),
    )


def default_time() -> Time:
    """The default mode over time, see `loop`: "host" on CPU, "scan" elsewhere."""
    return "host" if jax.default_backend() == "cpu" else "scan"
