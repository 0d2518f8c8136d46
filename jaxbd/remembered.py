"""What factories made, kept so that nothing is traced twice; and how it is forgotten before a process is full of it."""

import functools
import gc
import pathlib
import weakref
from collections.abc import Callable
from typing import Any

import jax

CROWDED = 0.6
"""Share of the memory mappings a process may have, above which `relieve` forgets."""
_LIMIT, _MAPPINGS = pathlib.Path("/proc/sys/vm/max_map_count"), pathlib.Path("/proc/self/maps")
_known: weakref.WeakSet[Any] = weakref.WeakSet()


def remembered(most: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the `most` last results of a function of hashable arguments are kept until `forget`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        kept = functools.lru_cache(most)(function)
        _known.add(kept)
        return kept

    return decorate


def forget() -> None:
    """Drops everything remembered, and JAX's own caches, with the compiled programs that nothing else holds.

    Whatever is in use goes on as it is; what is asked for again is traced and compiled again.
    """
    for kept in _known:
        kept.cache_clear()
    jax.clear_caches()
    gc.collect()


def mappings() -> tuple[int, int]:
    """(memory mappings of this process, most that it may have); (0, 0) where the system does not tell."""
    try:
        with _MAPPINGS.open("rb") as lines:
            return sum(1 for _ in lines), int(_LIMIT.read_text())
    except (OSError, ValueError):
        return 0, 0


def relieve() -> bool:
    """`forget` when the process is crowded; whether it was.

    Every program that XLA compiles for the CPU takes hundreds of mappings, of which Linux allows a process 65,530 by
    default. At the limit compiling fails, or the process dies: a session that examines many models would.
    """
    count, most = mappings()
    if count <= CROWDED * most:
        return False
    forget()
    return True
