"""Stages: what a driver runs for long is run through a `Keep`, which may save it on the way and go on from there later.

A run is the same stages in the same order each time. Drivers know nothing of files and signals; the command line does.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from jaxbd.base import ArrayTree
from jaxbd.checkpoint import OnChunk
from jaxbd.loop import Seconds

Fit = Callable[[ArrayTree, int, OnChunk], tuple[ArrayTree, ArrayTree, Seconds]]
"""(state, steps left, on_chunk) -> (last state, infos of those steps, seconds). With none left, the state as it is."""
Progress = Callable[[str, int, int], None]
"""(what is running, steps done, steps in all)"""


class Keep(Protocol):
    """Runs `fit` from `state`, or from what is kept of that stage, and may keep what `on_chunk` is given.

    Args of the call:
      name: of the stage, for people; several may have the same.
      info: the method's `Info`, a NamedTuple class.
      num_steps: of the whole stage.
    Returns: the last state, infos of all steps, seconds of those steps that were run now.
    """

    def __call__(
        self, name: str, state: ArrayTree, fit: Fit, *, info: type, num_steps: int
    ) -> tuple[ArrayTree, ArrayTree, Seconds]: ...


class NoInfo(NamedTuple):
    """The infos of a stage that has none for each step."""


def through(
    name: str, state: ArrayTree, fit: Fit, *, info: type, num_steps: int
) -> tuple[ArrayTree, ArrayTree, Seconds]:
    """The `Keep` that keeps nothing."""
    del name, info
    return fit(state, num_steps, lambda *_: None)


def run(
    keep: Keep, progress: Progress, name: str, state: ArrayTree, fit: Fit, *, info: type, num_steps: int
) -> tuple[ArrayTree, ArrayTree, Seconds]:
    """`keep(name, state, fit, …)` with progress: where it begins, if not at the start, and after every chunk."""

    def told(state: ArrayTree, left: int, on_chunk: OnChunk):
        before = num_steps - left
        if before:
            progress(name, before, num_steps)

        def tell(done: int, state: ArrayTree, infos: ArrayTree) -> None:
            progress(name, before + done, num_steps)
            on_chunk(done, state, infos)

        return fit(state, left, tell)

    return keep(name, state, told, info=info, num_steps=num_steps)
