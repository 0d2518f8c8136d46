"""Repairs a suspect by any method of `methods`: runs the phases of its `Repair` in order.

Prints nothing and opens no file.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbd import methods
from jaxbd.base import (
    ArrayTree,
    Batch,
    Evidence,
    Key,
    Phase,
    Problem,
    Repair,
    RepairData,
    Suspect,
    UserError,
    Variables,
)
from jaxbd.caching import cached
from jaxbd.data import draw
from jaxbd.repairs import mixture
from jaxbd.training import loop
from jaxbd.training.program import Program, Seconds, total_seconds
from jaxbd.training.run import Run

REMEDIES = {
    "clean": "clean images: give --data",
    "trigger": "a trigger: give --trigger, or let a scan find one",
}
"""{what a repair may need: how to provide it}."""


class Repaired(NamedTuple):
    """Result of a repair.

    Attributes:
      variables: variables of the repaired net.
      infos: {phase: its infos [num_steps, …]}, NumPy; concatenated over several targets.
      seconds: compile and run time.
      guarded: targets of a guarded net. If not empty, `variables` belong to
        `detection.guard.make(net, guarded)`: the suspect and a correction for each target. If
        empty, they belong to the suspect's net.
    """

    variables: Variables
    infos: dict[str, ArrayTree]
    seconds: Seconds
    guarded: tuple[int, ...] = ()


def repair(
    run: Run,
    key: Key,
    suspect: Suspect,
    clean: Batch | None,
    evidence: Sequence[Evidence],
    method: str,
    config: Any,
    *,
    batch_size: int = 64,
    label: str = "",
) -> Repaired:
    """Repairs a suspect.

    Methods that need a trigger treat several targets one after another, each starting from the net
    repaired for the one before; several triggers of one target share the images. All other methods
    run once and ignore the evidence.

    Args:
      clean: clean images with labels (uint8 or float); None for methods that need none.
      evidence: known triggers; empty for methods that need none.
      method: name of a repair in `methods`.
      config: settings of the method.
      batch_size: images per step.
      label: name of the repair in progress lines and checkpoints; default: that of the method.
    Raises: UserError when something the method needs is missing, or there are fewer images than a
      batch; loop.NotFinite when a loss diverges; Stopped after a stop request.
    """
    found = methods.find("repair", method)
    check_needs(method, found.needs, clean, evidence)
    clean = clean if "clean" in found.needs else None
    known = mixture.join_by_target(evidence) if "trigger" in found.needs else [None]
    results = []
    for own_key, name, each in zip(
        split_keys(key, len(known)), name_targets(label or method, known), known, strict=True
    ):
        data = select(suspect, clean, each)
        settings = adapt(found, config, suspect, data, batch_size)
        made = make(found, suspect.problem(each), settings)
        state = start(made, jax.random.fold_in(own_key, 0), suspect.variables, data)
        state, infos, seconds = fit(run, own_key, made, data, state, batch_size, name)
        suspect = suspect._replace(variables=made.extract(state))
        results.append(Repaired(suspect.variables, infos, seconds))
    seconds = total_seconds(*(each.seconds for each in results))
    return Repaired(suspect.variables, join_infos(results), seconds)


def split_keys(key: Key, count: int) -> list[Key]:
    """A key for each of `count` targets; the first is `key` itself."""
    return [jax.random.fold_in(key, 10 + number) if number else key for number in range(count)]


def name_targets(label: str, known: Sequence[Evidence | None]) -> list[str]:
    """A name for the repair of each target; `label` itself if there is only one."""
    if len(known) == 1:
        return [label]
    return [f"{label}: class {each.target}" for each in known if each is not None]


def join_infos(results: Sequence[Repaired]) -> dict[str, ArrayTree]:
    """Concatenates the infos of several repairs by one method, phase by phase."""
    return {
        phase: loop.join_infos([result.infos[phase] for result in results])
        for phase in results[0].infos
    }


def check_needs(
    method: str, needs: frozenset[str], clean: Batch | None, evidence: Sequence[Evidence]
) -> None:
    """Raises UserError unless everything that a repair needs is given."""
    there = {"clean": clean is not None, "trigger": bool(evidence)}
    for need in sorted(needs):
        if not there[need]:
            raise UserError(f"{method} needs {REMEDIES[need]}")


def select(suspect: Suspect, clean: Batch | None, evidence: Evidence | None) -> RepairData:
    """Selects the arrays for a repair. Rows of a class are selected here, outside compiled code,
    since their number depends on the data."""
    if clean is not None:
        clean = Batch(jnp.asarray(clean.images), jnp.asarray(clean.labels))
    if evidence is None:
        return RepairData(clean)
    triggers = jax.tree.map(jnp.asarray, evidence.trigger_params)
    if clean is None:
        return RepairData(trigger_params=triggers)
    sources = draw.of_classes(clean, evidence.all_sources(suspect.classes))
    target = draw.of_classes(clean, (evidence.target,))
    return RepairData(clean, sources, target if len(target.labels) else None, triggers)


def adapt(
    method: methods.Method, config: Any, suspect: Suspect, data: RepairData, batch_size: int
) -> Any:
    """`config` with settings that depend on the suspect and the data filled in, if the method has
    any."""
    fill = getattr(method.module, "adapt", None)
    return config if fill is None else fill(config, suspect, data, batch_size)


def make(method: methods.Method, problem: Problem, config: Any) -> Repair:
    """Makes the repair; cached, so that the same problem and settings are traced once."""
    return _make(method.module.make, problem, config)


@cached(32)
def _make(factory: Any, problem: Problem, config: Any) -> Repair:
    return factory(problem, config)


def start(made: Repair, key: Key, variables: Variables, data: RepairData) -> ArrayTree:
    """The state before the first step."""
    return _starter(made.init)(key, variables, data)


@cached(32)
def _starter(init: Any) -> Program:
    return Program(init)


def fit(
    run: Run,
    key: Key,
    made: Repair,
    data: RepairData,
    state: ArrayTree,
    batch_size: int,
    label: str,
) -> tuple[ArrayTree, dict[str, ArrayTree], Seconds]:
    """Runs all phases from `state`: (last state, {phase: infos}, seconds)."""
    infos, spent = {}, []
    for number, phase in enumerate(made.phases, start=1):
        drawn, rows = _source(phase, data, batch_size)
        state = state if phase.begin is None else phase.begin(state)
        state, infos[phase.name], seconds = run.fit(
            label if len(made.phases) == 1 else f"{label}, {phase.name}",
            jax.random.fold_in(key, number),
            phase.step,
            drawn,
            rows,
            state,
            info=phase.info,
            num_steps=phase.num_steps,
            chunk=phase.chunk,
            rows=phase.rows,
        )
        spent.append(seconds)
    return state, infos, total_seconds(*spent)


def _source(phase: Phase, data: RepairData, batch_size: int) -> tuple[Any, Batch | None]:
    """(draw function, data to draw from) of a phase; (None, None) if it takes no images."""
    if phase.draws is None:
        return None, None
    rows = getattr(data, phase.draws)
    if len(rows.labels) < batch_size:
        raise UserError(
            f"{len(rows.labels)} images to repair with, fewer than a batch of {batch_size}; give"
            " more images or lower the batch size"
        )
    return draw.uniform(batch_size), rows
