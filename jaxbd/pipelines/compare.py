"""Compares repairs of a known victim: with each of MESA's sub-models and their mixture, with single
reversed triggers, and with the true trigger. Used by the demo and the experiments."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import ANY_SOURCE, Attack, Batch, Cell, Evidence, Inversion, Key, Suspect, Variables
from jaxbd.data import draw
from jaxbd.inversion import pixel
from jaxbd.metrics import evaluate
from jaxbd.pipelines import evidence as evidences
from jaxbd.pipelines import repair, scan
from jaxbd.repairs import mixture, unlearn
from jaxbd.training import slots, sweep
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a repair table.

    Attributes:
      method: name of the repair.
      runs: number of independent repairs.
      clean_accuracy: mean over runs.
      attack_success_rate: mean over runs, with the attacker's own trigger.
      worst: highest attack success rate of a run.
      seconds_compile, seconds_run: summed over runs.
    """

    method: str
    runs: int
    clean_accuracy: float
    attack_success_rate: float
    worst: float
    seconds_compile: float
    seconds_run: float


def summarise(method: str, found: list[evaluate.Rates], seconds: list[Seconds]) -> Row:
    """Summarises independent runs of one method in a row."""
    rates = [rates.attack_success_rate or 0.0 for rates in found]
    return Row(
        method,
        len(found),
        float(np.mean([rates.clean_accuracy for rates in found])),
        float(np.mean(rates)),
        float(np.max(rates)),
        sum(s.compile for s in seconds),
        sum(s.run for s in seconds),
    )


class Case(NamedTuple):
    """A victim to repair: the net, the true attack for judging, and the data.

    The true trigger is used only for judging and for the "ideal" repair.
    """

    victim: Suspect
    attack: Attack
    trigger: Any
    target: int
    defence: Batch
    test: Batch


def judge(case: Case, variables: Variables) -> evaluate.Rates:
    """Clean accuracy and ASR of `variables` on the case's test images, with the attacker's own
    trigger."""
    return evaluate.rates(
        jax.random.key(0), case.victim.net, variables, case.test, case.attack, case.trigger
    )


def true_evidence(case: Case) -> Evidence:
    """The attacker's own trigger as evidence, for the "ideal" repair."""
    true = mixture.single(jax.tree.map(jnp.asarray, case.trigger))
    return Evidence(case.target, (), mixture.mix(case.attack.stamp), true)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings of `repair_all`.

    Attributes:
      unlearning: settings of every repair.
      levels: beta of the scan's sub-models.
      runs: number of single reversed triggers to search and unlearn.
      reversing: settings of the search for them.
      pixel_steps: steps of the search for them.
      batch_size: images per step of that search and of the repairs.
    """

    unlearning: unlearn.Config
    levels: tuple[float, ...]
    runs: int = 5
    reversing: pixel.Config = pixel.Config(place="image")
    pixel_steps: int = 55
    batch_size: int = 64


def reverse_pixels(
    run: Run, key: Key, case: Case, config: Comparison
) -> tuple[Inversion, slots.Found]:
    """Searches a single reversed trigger from `runs` independent starts, as one sweep."""
    inversion = scan.make_pixel(case.victim.net, case.victim.image_shape, config.reversing)
    cells = Cell(
        jnp.full((config.runs,), case.target, jnp.int32),
        jnp.full((config.runs,), ANY_SOURCE, jnp.int32),
        jnp.full((config.runs,), 0.9),
    )
    found = sweep.search(
        run,
        "reversed triggers",
        key,
        inversion,
        draw.uniform(config.batch_size),
        case.defence,
        cells,
        case.victim.variables,
        num_steps=config.pixel_steps,
        slots=config.runs,
    )
    return inversion, found


def repair_all(
    run: Run, key: Key, case: Case, found: scan.Scan, config: Comparison
) -> tuple[list[Row], dict[str, repair.Repaired]]:
    """Unlearns with each level's sub-model, their mixture, single reversed triggers, and the true
    trigger.

    Returns: (rows of the table, starting with the victim before repair; {method: repaired net}).
    """

    def unlearned(label: str, number: int, known: Evidence) -> repair.Repaired:
        return repair.repair(
            run,
            jax.random.fold_in(key, number),
            case.victim,
            case.defence,
            [known],
            "unlearn",
            config.unlearning,
            batch_size=config.batch_size,
            label=f"unlearn: {label}",
        )

    repaired = {
        f"MESA {name}": unlearned(f"MESA {name}", number, known)
        for number, (name, known) in enumerate(
            evidences.list_mixtures(found, case.target, config.levels).items()
        )
    }
    inversion, searched = reverse_pixels(run, jax.random.fold_in(key, 100), case, config)
    singles = []
    for index in range(config.runs):
        # bind `index` now; a closure would read the loop's last value
        state = jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf[index]), searched.states)
        known = Evidence(case.target, (), mixture.mix(inversion.stamp), mixture.single(state))
        singles.append(unlearned(f"reversed trigger {index + 1}", 100 + index, known))
    repaired["ideal (true trigger)"] = unlearned("ideal", 200, true_evidence(case))
    return _tabulate(case, repaired, singles, searched.seconds), repaired


def _tabulate(
    case: Case,
    repaired: dict[str, repair.Repaired],
    singles: Sequence[repair.Repaired],
    searching: Seconds,
) -> list[Row]:
    """Rows of the victim and every repair; the single triggers come just before the ideal one."""
    rows = [summarise("before", [judge(case, case.victim.variables)], [Seconds(0.0, 0.0)])]
    rows += [
        summarise(name, [judge(case, result.variables)], [result.seconds])
        for name, result in repaired.items()
    ]
    single = summarise(
        "single reversed trigger",
        [judge(case, result.variables) for result in singles],
        [searching, *(result.seconds for result in singles)],
    )
    return [*rows[:-1], single, rows[-1]]
