"""A whole case on data one owns: plant a backdoor, scan, repair in every way MESA is compared with, tabulate.

The demo and the experiments are made of these pieces. Nothing is printed and no file is opened.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import evaluate, loop, stages, supervised, sweep, workflow
from jaxbd.attacks import latent, poison
from jaxbd.base import ANY_SOURCE, Attack, Batch, Cell, Dataset, Key, Net, Variables
from jaxbd.data import draw
from jaxbd.inversion import pixel
from jaxbd.repair import unlearn


class Parts(NamedTuple):
    """Disjoint rows of a data set: the attacker trains on `train`, the defender holds `defence`, `test` judges."""

    train: Batch
    defence: Batch
    test: Batch


def divide(dataset: Dataset, train: int, defence: int, seed: int = 0) -> Parts:
    """`train` and `defence` random rows; the rest is for testing. The permutation depends on `seed` alone."""
    order = np.random.default_rng(seed).permutation(len(dataset.labels))
    rows = np.split(order, [train, train + defence])
    return Parts(*(Batch(jnp.asarray(dataset.images[r]), jnp.asarray(dataset.labels[r])) for r in rows))


def train(
    key: Key,
    net: Net,
    data: Batch,
    config: supervised.Config,
    *,
    attack: Attack | None = None,
    trigger: Any = None,
    variables: Variables | None = None,
    batch_size: int = 64,
    crop_padding: int = 0,
    flip: bool = False,
    progress: workflow.Progress | None = None,
    label: str = "train",
    keep: stages.Keep = stages.through,
) -> tuple[Variables, Any, loop.Seconds]:
    """Trains a net, with dynamic poisoning when an attack is given; from `variables` or from scratch.

    Returns: variables, infos, seconds.
    """
    trainer = supervised.make(net, config)
    variables = net.init(jax.random.fold_in(key, 0)) if variables is None else variables
    drawn = draw.uniform(batch_size, crop_padding=crop_padding, flip=flip)
    source: Any = data
    if attack is not None:
        drawn, source = poison.dynamic(attack, drawn), (data, trigger)
    report = progress or (lambda *_: None)
    report(label, 0, config.num_steps)
    fit = lambda state, left, on_chunk: loop.fit(
        jax.random.fold_in(key, 1), trainer.step, drawn, source, state, num_steps=left, on_chunk=on_chunk
    )
    state, infos, seconds = stages.run(
        keep, report, label, trainer.init(variables), fit, info=supervised.Info, num_steps=config.num_steps
    )
    return state.variables, infos, seconds


def train_adaptive(
    key: Key,
    net: Net,
    data: Batch,
    classes: int,
    config: latent.Config,
    *,
    features: Callable[[Variables, jax.Array], latent.Seen] | None = None,
    variables: Variables | None = None,
    batch_size: int = 64,
    crop_padding: int = 0,
    flip: bool = False,
    progress: workflow.Progress | None = None,
    label: str = "adaptive attack",
) -> tuple[Variables, latent.Trigger, latent.Info, loop.Seconds]:
    """Trains a victim together with its trigger generator, both stages; from `variables` or from scratch.

    `features` may be left out for nets that show theirs, see `latent.penultimate`.

    Returns: variables, trigger, infos [num_steps], seconds.
    """
    features = latent.penultimate(net) if features is None else features
    trainer = latent.make(net, features, data.images.shape[1:], classes, config)
    variables = net.init(jax.random.fold_in(key, 0)) if variables is None else variables
    state = trainer.init(jax.random.fold_in(key, 2), variables)
    drawn = draw.uniform(batch_size, crop_padding=crop_padding, flip=flip)
    report = progress or (lambda *_: None)
    report(label, 0, config.num_steps)
    infos, seconds = [], loop.Seconds(0.0, 0.0)
    for step, first, length in (
        (trainer.step, 0, config.first_steps),
        (trainer.second, config.first_steps, config.second_steps),
    ):
        state, seen, spent = loop.fit(
            jax.random.fold_in(key, 1),
            step,
            drawn,
            data,
            state,
            num_steps=length,
            on_chunk=lambda done, _, __, first=first: report(label, first + done, config.num_steps),
        )
        infos += [seen] if seen is not None else []
        seconds = loop.total(seconds, spent)
    infos = jax.tree.map(lambda *leaves: np.concatenate(leaves), *infos)
    return *trainer.extract(state), infos, seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a repair table.

    Attributes:
      method: what was done.
      runs: how many independent repairs stand behind the figures.
      clean_accuracy: mean over runs.
      attack_success_rate: mean over runs, with the attacker's own trigger; worst: the highest.
      seconds_compile, seconds_run: summed over runs.
    """

    method: str
    runs: int
    clean_accuracy: float
    attack_success_rate: float
    worst: float
    seconds_compile: float
    seconds_run: float


def row(method: str, found: list[evaluate.Rates], seconds: list[loop.Seconds]) -> Row:
    """Summarises independent runs of one method."""
    rates = [rates.attack_success_rate for rates in found]
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
    """A victim to repair: its net and weights, the true attack for judging, and the data.

    The true trigger serves the judge and the "ideal" repair only.
    """

    net: Net
    variables: Variables
    image_shape: tuple[int, int, int]
    attack: Attack
    trigger: Any
    target: int
    defence: Batch
    test: Batch


def judge(case: Case, variables: Variables) -> evaluate.Rates:
    """Clean accuracy and ASR of `variables` on the case's test images under the attacker's own trigger."""
    return evaluate.rates(jax.random.key(0), case.net, variables, case.test, case.attack, case.trigger)


def reverse_pixels(key: Key, case: Case, config: pixel.Config, runs: int, num_steps: int, batch_size: int):
    """The single reversed trigger, `runs` times from fresh starts as one sweep: inversion, states [runs, …], times."""
    inversion = workflow.make_pixel(case.net, case.image_shape, config)
    cells = Cell(
        jnp.full((runs,), case.target, jnp.int32), jnp.full((runs,), ANY_SOURCE, jnp.int32), jnp.full((runs,), 0.9)
    )
    drawn = draw.uniform(batch_size)
    states, _, seconds = sweep.fit(key, inversion, drawn, case.defence, cells, case.variables, num_steps=num_steps)
    return inversion, states, seconds


def repair_all(
    key: Key,
    case: Case,
    scan: workflow.Scan,
    levels: tuple[float, ...],
    config: unlearn.Config,
    *,
    baseline_runs: int = 5,
    baseline: pixel.Config | None = None,
    baseline_steps: int = 55,
    batch_size: int = 64,
    progress: workflow.Progress | None = None,
) -> tuple[list[Row], dict[str, workflow.Repaired]]:
    """Unlearns with each level's sub-model, their mixture, single reversed triggers, and the true trigger.

    Returns: the table's rows, the victim before repair first; and the repaired nets by method.
    """
    rows = [row("before", [judge(case, case.variables)], [loop.Seconds(0.0, 0.0)])]
    repaired: dict[str, workflow.Repaired] = {}

    def unlearned(label: str, number: int, stamp, evidence) -> workflow.Repaired:
        return workflow.unlearn_trigger(
            jax.random.fold_in(key, number),
            case.net,
            case.variables,
            stamp,
            evidence,
            case.defence,
            config,
            batch_size=batch_size,
            progress=progress,
            label=f"unlearn: {label}",
        )

    for number, (name, evidence) in enumerate(workflow.mixtures(scan, case.target, levels).items()):
        repaired[f"MESA {name}"] = unlearned(f"MESA {name}", number, scan.inversion.stamp, evidence)
    settings = baseline or pixel.Config(place="image")
    inversion, states, sought = reverse_pixels(
        jax.random.fold_in(key, 100), case, settings, baseline_runs, baseline_steps, batch_size
    )
    singles = []
    for run in range(baseline_runs):
        evidence = unlearn.single(jax.tree.map(lambda leaf, run=run: leaf[run], states))
        singles.append(unlearned(f"reversed trigger {run + 1}", 100 + run, inversion.stamp, evidence))
    repaired["ideal (true trigger)"] = unlearned(
        "ideal", 200, case.attack.stamp, unlearn.single(jax.tree.map(jnp.asarray, case.trigger))
    )
    for name, result in repaired.items():
        rows.append(row(name, [judge(case, result.variables)], [result.seconds]))
    rows.insert(
        len(rows) - 1,
        row(
            "single reversed trigger",
            [judge(case, result.variables) for result in singles],
            [sought] + [result.seconds for result in singles],
        ),
    )
    return rows, repaired
