"""How much memory a compiled program takes, and how much there is."""

import math
import os
import re
from typing import Any

import jax

from jaxbd import devices
from jaxbd.base import UserError

CPU_SHARE, DEVICE_SHARE = 0.5, 0.8
"""Of the machine's available memory, and of an accelerator's free memory, that a program may take
where no budget is given."""


UNITS = {"": 1, "b": 1} | {
    letter + ending: base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
"""Unit of a number of bytes, in small letters -> bytes."""


class Bytes(int):
    """A number of bytes."""

    @classmethod
    def parse(cls, text: str) -> "Bytes":
        """A text such as 2GiB, 500MB, 1.5e9 or 4096. Raises: UserError for any other."""
        found = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?) *([a-z]*)", text.strip().lower())
        count = float(found[1]) * UNITS.get(found[2], 0) if found else 0.0
        if not 1 <= count < math.inf:
            raise UserError(
                f"{text!r} is no size; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB"
            )
        return cls(int(count))


def needed(compiled: Any) -> int:
    """Bytes of the arguments of a compiled program (`jax.stages.Compiled`), its results and what is
    between, by the compiler's account; 0 where it gives none."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    sizes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return sizes - memory.alias_size_in_bytes  # results that lie where donated arguments did


def available() -> int:
    """Bytes that a program may take where no budget is given: a share of what is free on the device
    that has least, or on the machine."""
    local = [d for d in devices.in_use() if d.process_index == jax.process_index()]
    free = [_free(device) for device in local]
    known = [count for count in free if count is not None]
    return int(DEVICE_SHARE * min(known)) if known else int(CPU_SHARE * _free_on_host())


def _free(device: Any) -> int | None:
    """Bytes of an accelerator that no array holds; None where the device does not say."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return max(stats["bytes_limit"] - stats.get("bytes_in_use", 0), 0)


def _free_on_host() -> int:
    try:
        # counts what the system would give up, which sysconf leaves out
        with open("/proc/meminfo") as lines:
            found = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
            return 1024 * int(next(found))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ran_out(error: BaseException) -> bool:
    """Whether the device had no memory left."""
    return "RESOURCE_EXHAUSTED" in str(error)
