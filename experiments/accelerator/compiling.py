"""Where the seconds before the first step go: tracing, lowering, compiling, reading the persistent
cache.

JAX announces each part to whoever listens. Autotuning is inside the compiler's part: its share is
the difference between two cold processes, one of them with `--xla_gpu_autotune_level=0`.
"""

import collections
from typing import NamedTuple

import jax

_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "backend",
    "/jax/compilation_cache/cache_retrieval_time_sec": "cache_read",
}
_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


class Parts(NamedTuple):
    """Seconds of each part, of all programs together, and how many programs the cache had.

    Attributes:
      trace, lower: from Python to the compiler's input; a part of a trace may be counted again
        inside another.
      backend: in the compiler, autotuning included; reading the cache counts here too.
      cache_read: of `backend`, reading programs from the persistent cache.
      hits, misses: programs that the persistent cache had, and had not.
    """

    trace: float
    lower: float
    backend: float
    cache_read: float
    hits: int
    misses: int


class Listener:
    """Adds up what JAX announces from when it was made on."""

    def __init__(self):
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._counts: collections.Counter[str] = collections.Counter()
        jax.monitoring.register_event_duration_secs_listener(self._add)
        jax.monitoring.register_event_listener(self._count)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _EVENTS:
            self._seconds[_EVENTS[event]] += duration_secs

    def _count(self, event: str, **_: str | int) -> None:
        self._counts[event] += 1

    def read(self) -> Parts:
        """What was announced so far."""
        seconds = {name: float(self._seconds[name]) for name in _EVENTS.values()}
        return Parts(**seconds, hits=self._counts[_HIT], misses=self._counts[_MISS])
