"""Cost of the stages of a scan: images pushed through the suspect, seconds, memory."""

import resource
import sys
from collections.abc import Mapping
from typing import NamedTuple

from jaxbd.training.program import Seconds, total_seconds

UNIT = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss` in bytes: macOS counts bytes, Linux KiB."""


class Spent(NamedTuple):
    """Cost of a stage.

    Attributes:
      image_steps: images pushed through the suspect, forward and backward.
      seconds: compile and run time.
      peak_bytes: peak host memory of the process up to the end of the stage.
    """

    image_steps: int
    seconds: Seconds
    peak_bytes: int


NOTHING: Mapping[str, Spent] = {}


def spend(
    spent: Mapping[str, Spent], stage: str, image_steps: int, seconds: Seconds
) -> dict[str, Spent]:
    """Adds image steps and seconds to those of `stage` in `spent`."""
    peak = UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if stage in spent:
        image_steps += spent[stage].image_steps
        seconds = total_seconds(seconds, spent[stage].seconds)
    return {**spent, stage: Spent(image_steps, seconds, peak)}


def sum_up(spent: Mapping[str, Spent]) -> tuple[int, Seconds]:
    """(image steps, seconds) of all stages together."""
    steps = sum(each.image_steps for each in spent.values())
    return steps, total_seconds(*(each.seconds for each in spent.values()))
