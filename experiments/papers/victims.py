"""Victims of the papers' tables: trained once, weights under `runs/`, figures a unit of the ledger.

    python -m experiments.papers.victims --size small --attack bna-badnets --seed 0
    python -m experiments.papers.victims --size smoke --attack dhbe-badnets-3

Training resumes where it was stopped.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import units
from experiments.papers import attacks, images, ledger, runs
from experiments.papers.judge import judge
from experiments.papers.recipe import Recipe
from experiments.papers.sizes import SizeName
from experiments.papers.victim import Victim, identify, unit
from experiments.scale.bench import suspect_of
from jaxbd import files
from jaxbd.attacks import poison
from jaxbd.base import Attack, Batch, Key, Suspect, Variables
from jaxbd.data import draw
from jaxbd.interop import folder
from jaxbd.models import build
from jaxbd.pipelines import compare, implant
from jaxbd.training import supervised
from jaxbd.training.run import Run


def make(victim: Victim) -> compare.Case:
    """The victim with the images of defender and judge; trained when it is not under `runs/`.

    Raises: UserError when its images are not here; Stopped when time is over.
    """
    parts = parts_of(victim)
    path = units.RUNS / "papers" / "victims" / f"{victim.size}-{victim.name}"
    wanted, made = identify(victim), _attack(victim)
    notes = files.read_json(path / folder.CONFIG)["notes"] if folder.is_model(path) else {}
    if notes.get("work") == wanted:
        variables, trigger = folder.load(path)[1], _read(made, notes["trigger"])
    else:
        started = time.perf_counter()
        variables, trigger = train(victim, parts.train)
        stored = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), trigger._asdict())
        seconds = time.perf_counter() - started
        notes = {"work": wanted, "trigger": stored, "seconds": seconds}
        folder.save(path, victim.spec, variables, notes)
    suspect = suspect_of(victim.spec, variables)
    return compare.Case(suspect, made, trigger, victim.aim, parts.defence, parts.test)


def open_case(victim: Victim, drawn: tuple[int, int] | None) -> compare.Case:
    """The victim, its defender with all images or with some that were drawn."""
    case = make(victim)
    if drawn is None:
        return case
    return case._replace(defence=images.draw_balanced(case.defence, *drawn))


def parts_of(victim: Victim) -> draw.Parts:
    """Images of attacker, defender and judge."""
    return images.divide(victim.size, victim.data, victim.seed, victim.spec.image_shape[0])


def measure(victim: Victim) -> dict[str, Any]:
    """The victim's figures; trains it first where it is not under `runs/`."""
    found = judge(make(victim), None, patch=victim.plan.is_patch)
    path = units.RUNS / "papers" / "victims" / f"{victim.size}-{victim.name}"
    return {**found, "train_seconds": files.read_json(path / folder.CONFIG)["notes"]["seconds"]}


def train(victim: Victim, rows: Batch) -> tuple[Variables, Any]:
    """(variables, trigger) of the victim trained on the images `rows`."""
    name, plan = f"{victim.size}-{victim.name}-victim", victim.plan
    run = runs.start_run(name, identify(victim))
    key = jax.random.fold_in(jax.random.key(6000 + victim.seed), 0)
    if plan.way == "trojan":
        batching = draw.Batching(victim.made_of.recipes[plan.recipe].batch_size)
        found = implant.plant_trojan(
            run,
            "trojan",
            jax.random.fold_in(key, 2),
            _clean(victim),
            rows,
            plan.config,
            count=_count(plan, rows),
            batching=batching,
        )
        variables, trigger = found.variables, found.trigger
    else:
        made = _attack(victim)
        trigger = made.init(jax.random.fold_in(key, 1))
        variables = _fit(run, victim, key, rows, (made, trigger))
    runs.forget_run(name)
    return variables, trigger


def _fit(run: Run, victim: Victim, key: Key, rows: Batch, planted: tuple[Attack, Any]) -> Variables:
    """Trains from scratch on poisoned images, or tunes the clean net on batches poisoned anew."""
    plan, net = victim.plan, build.net(victim.spec)
    recipe: Recipe = victim.made_of.recipes[plan.recipe]
    drawn = draw.Batching(recipe.batch_size, recipe.crop_padding, recipe.flip).draw()
    if plan.way == "tuned":
        variables, source = _clean(victim).variables, (rows, planted[1])
        drawn = poison.dynamic(planted[0], drawn)
    else:
        variables = net.init(jax.random.fold_in(key, 4))
        source = _poison(run, victim, jax.random.fold_in(key, 2), rows, planted)
    steps = recipe.count_steps(len(rows.labels))
    trainer = supervised.trainer(net, recipe.rule(steps))
    fitted = run.fit(
        "train",
        jax.random.fold_in(key, 3),
        trainer.step,
        drawn,
        source,
        trainer.init(variables),
        info=supervised.Info,
        num_steps=steps,
    )
    return fitted.state.variables


def _poison(run: Run, victim: Victim, key: Key, rows: Batch, planted: tuple[Attack, Any]) -> Batch:
    """The images as the attacker passes them on."""
    plan, clean = victim.plan, jax.tree.map(np.asarray, rows)
    if plan.way == "none":
        return rows
    count = _count(plan, clean)
    if plan.way == "clean-label":
        hidden = implant.hide(
            run, "perturb", key, _clean(victim), planted, clean, plan.config, count=count
        )
        return Batch(*map(jnp.asarray, hidden.data))
    poisoned = poison.static(key, *planted, clean, count, per_class=plan.way == "added")
    if plan.way == "added":
        new = np.flatnonzero(poisoned.labels != clean.labels)
        poisoned = Batch(
            np.concatenate([clean.images, poisoned.images[new]]),
            np.concatenate([clean.labels, poisoned.labels[new]]),
        )
    return Batch(*map(jnp.asarray, poisoned))


def _count(plan: attacks.Plan, rows: Batch) -> int | float:
    assert plan.count is not None
    # a number below 1 is a share; the digits have fewer images of a class than some papers poison
    return plan.count if plan.count < 1 else min(int(plan.count), len(rows.labels) // 4)


def _clean(victim: Victim) -> Suspect:
    """The clean net of the same data and seed."""
    return make(dataclasses.replace(victim, attack="clean", target=None, changes=())).victim


def _attack(victim: Victim) -> Attack:
    return _made(victim.plan, victim.spec.image_shape, victim.spec.classes)


@functools.lru_cache(16)
def _made(plan: attacks.Plan, shape: tuple[int, int, int], classes: int) -> Attack:
    """The same functions for the same attack, so that nothing is traced twice."""
    return attacks.make(plan, shape, classes)


def _read(made: Attack, stored: dict[str, Any]) -> Any:
    """The trigger that was saved with a victim."""
    like = jax.eval_shape(made.init, jax.random.key(0))
    leaves = {name: jnp.asarray(stored[name], leaf.dtype) for name, leaf in like._asdict().items()}
    return type(like)(**leaves)


def main(attack: str, size: SizeName = "small", seed: int = 0) -> None:
    """Trains one victim where there is none, stores and prints its figures."""
    units.use_cache()
    victim = Victim(attack=attack, size=size, seed=seed)
    started = time.perf_counter()
    found = measure(victim)
    if size != "smoke" and not ledger.has_current(unit(victim)):
        ledger.write(unit(victim), found, time.perf_counter() - started)
    print(units.table([{"victim": victim.name, **found}]))


if __name__ == "__main__":
    units.cli(main)
