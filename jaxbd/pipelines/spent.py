"""What the stages of a scan took: images pushed through the suspect, seconds, memory."""

import resource
import sys
from collections.abc import Mapping
from typing import NamedTuple

from jaxbd.training.program import Seconds, total_seconds

UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in which the operating system counts memory."""


class Spent(NamedTuple):
    """What a stage took.

    Attributes:
      image_steps: images pushed through the suspect, forward and back.
      seconds: compile and run.
      peak_bytes: most host memory that the process has had up to the stage's end.
    """

    image_steps: int
    seconds: Seconds
    peak_bytes: int


NOTHING: Mapping[str, Spent] = {}


def spend(
    spent: Mapping[str, Spent], stage: str, image_steps: int, seconds: Seconds
) -> dict[str, Spent]:
    """`spent` with these image-steps and seconds added to those of `stage`."""
    peak = UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if stage in spent:
        image_steps += spent[stage].image_steps
        seconds = total_seconds(seconds, spent[stage].seconds)
    return {**spent, stage: Spent(image_steps, seconds, peak)}


def sum_up(spent: Mapping[str, Spent]) -> tuple[int, Seconds]:
    """(image-steps, seconds) of all stages."""
    steps = sum(each.image_steps for each in spent.values())
    return steps, total_seconds(*(each.seconds for each in spent.values()))
