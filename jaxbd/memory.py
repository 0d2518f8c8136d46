"""How much memory a compiled program takes, and how much there is."""

import os

import jax

CPU_SHARE, DEVICE_SHARE = 0.5, 0.8
"""Of the machine's available memory, and of an accelerator's, that a program may take where no budget is given."""


def needed(compiled: jax.stages.Compiled) -> int:
    """Bytes of the program's arguments, its results and what is between, as the compiler says; 0 where it cannot."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    sizes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return sizes - memory.alias_size_in_bytes  # results that lie where donated arguments did


def available() -> int:
    """Bytes that a program may take where no budget is given: a share of the device's memory, or of the machine's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(DEVICE_SHARE * stats["bytes_limit"])
    try:
        with open("/proc/meminfo") as lines:  # counts what the system would give up, which sysconf leaves out
            free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(CPU_SHARE * free)


def ran_out(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether the device had no memory left."""
    return "RESOURCE_EXHAUSTED" in str(error)
