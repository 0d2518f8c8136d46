"""Caches for factory functions, so that nothing is traced or compiled twice. Also clears them
before a process runs out of memory mappings."""

import functools
import gc
import pathlib
import weakref
from collections.abc import Callable
from typing import Any

import jax

CROWDED = 0.6
"""Share of the allowed memory mappings above which `relieve` clears the caches."""
_LIMIT, _MAPPINGS = pathlib.Path("/proc/sys/vm/max_map_count"), pathlib.Path("/proc/self/maps")
_known: weakref.WeakSet[Any] = weakref.WeakSet()


def cached(most: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: caches the last `most` results of a function of hashable arguments, until `forget`
    is called."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        cache = functools.lru_cache(most)(function)
        _known.add(cache)
        return cache

    return decorate


def forget() -> None:
    """Clears all caches and JAX's own, which frees compiled programs that nothing else references.

    Programs in use stay; any other is traced and compiled again when needed.
    """
    for cache in _known:
        cache.cache_clear()
    jax.clear_caches()
    gc.collect()


def mappings() -> tuple[int, int]:
    """(memory mappings of this process, the system's limit); (0, 0) if /proc does not have them."""
    try:
        with _MAPPINGS.open("rb") as lines:
            return sum(1 for _ in lines), int(_LIMIT.read_text())
    except (OSError, ValueError):
        return 0, 0


def relieve() -> bool:
    """Calls `forget` if the process has used more than `CROWDED` of its memory mappings. Returns:
    whether it did.

    Every program that XLA compiles for the CPU takes hundreds of mappings, and Linux allows 65,530
    per process by default. At the limit compilation fails or the process dies; a session that
    examines many models would reach it.
    """
    count, most = mappings()
    if count <= CROWDED * most:
        return False
    forget()
    return True
