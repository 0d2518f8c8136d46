"""Memory that a compiled program needs, and memory that is available."""

import math
import os
import re
from typing import Any

import jax

from jaxbd import devices
from jaxbd.base import UserError

CPU_SHARE, DEVICE_SHARE = 0.5, 0.8
"""Default budget of a program: shares of the machine's available memory and of an accelerator's
free memory."""


UNITS = {"": 1, "b": 1} | {
    letter + ending: base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
"""Unit suffix in lower case -> bytes."""


class Bytes(int):
    """A number of bytes."""

    @classmethod
    def parse(cls, text: str) -> "Bytes":
        """Parses a size such as 2GiB, 500MB, 1.5e9 or 4096. Raises: UserError for anything else."""
        found = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?) *([a-z]*)", text.strip().lower())
        count = float(found[1]) * UNITS.get(found[2], 0) if found else 0.0
        if not 1 <= count < math.inf:
            raise UserError(
                f"{text!r} is not a size; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB"
            )
        return cls(int(count))


def needed(compiled: Any) -> int:
    """Bytes that the compiler reports for a compiled program (`jax.stages.Compiled`): arguments,
    results and temporaries; 0 if it reports nothing."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    sizes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return sizes - memory.alias_size_in_bytes  # results that reuse the buffers of donated arguments


def available() -> int:
    """Default budget in bytes: `DEVICE_SHARE` of the free memory of the local device with the
    least, or `CPU_SHARE` of the machine's."""
    local = [d for d in devices.in_use() if d.process_index == jax.process_index()]
    free = [_free(device) for device in local]
    known = [count for count in free if count is not None]
    return int(DEVICE_SHARE * min(known)) if known else int(CPU_SHARE * _free_on_host())


def _free(device: Any) -> int | None:
    """Free bytes of an accelerator; None if the device does not report them."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return max(stats["bytes_limit"] - stats.get("bytes_in_use", 0), 0)


def _free_on_host() -> int:
    try:
        # MemAvailable includes caches that the system would release; sysconf has no such figure
        with open("/proc/meminfo") as lines:
            found = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
            return 1024 * int(next(found))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that the device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)
