"""Every repair of `jaxbd methods` on a victim of the papers' tables, by the one contract.

The row of a repair is its automatic choice, which sees the defender's images alone. Where a repair
has a dial, the value with the lowest ASR on test images within the accuracy budget is judged
besides, under "oracle": a choice that needs triggered images.

Repairs that need a trigger come three times: "unlearn" takes what a scan names and finds,
"unlearn-told" searches for the attacked class, which is told, and "unlearn-known" has the
attacker's own trigger. A repair whose scan names no class changes nothing, and its row says so.
"""

import dataclasses
import functools
from typing import Any

import jax

from experiments import units
from experiments.papers import finding, ledger, runs, victims
from experiments.papers.defence import Defence, Source, method_of
from experiments.papers.dials import ask_oracle, repair_along
from experiments.papers.judge import judge
from experiments.papers.sizes import SIZES, SizeName
from experiments.papers.victim import Victim
from experiments.papers.victim import modules as victim_modules
from experiments.papers.victim import settings as victim_settings
from jaxbd import files, methods
from jaxbd.base import Batch, Evidence, Key, UserError
from jaxbd.pipelines import compare
from jaxbd.pipelines import repair as repairs
from jaxbd.training.loop import NotFinite
from jaxbd.training.run import Run


@functools.cache
def table() -> dict[str, Defence]:
    """Every defence by name: those with the size's own preset first."""
    plain, others = [], []
    for method in (method_of(name) for name in methods.names("repair")):
        sources: tuple[Source, ...] = ("none",)
        if "trigger" in method.needs:
            sources = ("found", "known") if method.guards else ("found", "told", "known")
        for source in sources:
            plain.append(Defence(method=method.name, source=source))
            others += [dataclasses.replace(plain[-1], preset=each) for each in method.presets]
    pure = Defence(method="dhbe", changes=(("pure", True),))
    return {each.name: each for each in (*plain, pure, *others)}


def named(name: str) -> Defence:
    """The defence of a name. Raises: UserError when there is none."""
    if name not in table():
        usual = ", ".join(n for n, each in table().items() if each.preset is None)
        raise UserError(
            f"unknown defence {name!r}; choose from {usual}, or add a preset: dhbe-quick"
        )
    return table()[name]


def usual() -> list[str]:
    """The defences with the size's own settings."""
    return [name for name, each in table().items() if each.preset is None and not each.changes]


def config_of(defence: Defence, size_name: SizeName) -> Any:
    """The settings of a defence at a size: the preset named, or the size's own with its changes."""
    size, method = SIZES[size_name], method_of(defence.method)
    own = next((each for each in size.preset if each in method.presets), None)
    config = method.preset(defence.preset or own)
    changes = dict(defence.changes)
    if defence.preset is None:
        changes = {**size.repairs.get(defence.method, {}), **changes}
    if method.guards:
        inner = dataclasses.replace(config.correction, **changes)
        return dataclasses.replace(config, correction=inner, rounds=size.rounds)
    return dataclasses.replace(config, **changes)


def settings(victim: Victim, defence: Defence) -> dict[str, Any]:
    """Everything a row depends on, as JSON types."""
    size = victim.made_of
    stated: dict[str, Any] = {
        "victim": victim_settings(victim),
        "defence": dataclasses.asdict(defence),
        "config": units.settings_of(config_of(defence, victim.size)),
        "batch_size": size.batch_size,
        "oracle": [size.dial_points, size.dial_images],
    }
    if defence.source in ("found", "told"):
        stated["search"] = units.settings_of(finding.search_of(victim, defence))
    return files.plain(stated)


def unit(victim: Victim, defence: Defence) -> ledger.Unit:
    """The unit of a row."""
    method = method_of(defence.method)
    modules = [*victim_modules(victim), __name__, "jaxbd.attacks.amplified", method.path]
    modules += [method.pipeline] if method.guards else []
    name = f"{victim.name}-{defence.name}"
    stated = settings(victim, defence)
    without = finding.unused(victim, defence)
    return ledger.Unit(f"{victim.size}/defence", name, stated, tuple(modules), without)


def measure(victim: Victim, defence: Defence) -> dict[str, Any]:
    """The row of a defence on a victim. A repair that finds no trigger leaves the victim as it is;
    one that diverges, or refuses the net, says so and has no figures."""
    case = victims.open_case(victim, defence.held)
    known, row = finding.find_triggers(victim, case, defence)
    if defence.source != "none" and not known:
        found = judge(case, None, patch=victim.plan.is_patch)
        return {**found, **row, "note": "no trigger found"}
    name = f"{victim.size}-{victim.name}-{defence.name}"
    run = runs.start_run(name, ledger.work(unit(victim, defence)))
    key = jax.random.key(8000 + victim.seed)
    try:
        row |= _repair(run, key, victim, defence, case, known)
    except (NotFinite, UserError) as error:
        # of refusals only the method's own are a result: a full disk is none
        if isinstance(error, UserError) and not str(error).startswith(f"{defence.method}:"):
            raise
        row |= {"failed": f"{type(error).__name__}: {error}"}
    runs.forget_run(name)
    return row


def _repair(
    run: Run, key: Key, victim: Victim, defence: Defence, case: compare.Case, known: list[Evidence]
) -> dict[str, Any]:
    """Repairs, and judges the automatic choice and the oracle's."""
    method, config = method_of(defence.method), config_of(defence, victim.size)
    size = victim.made_of
    batch_size = min(size.batch_size, len(case.defence.labels))
    along = None
    if method.guards:
        made = finding.correct_all(run, key, victim, defence, case, known, config)
    elif "trigger" in method.needs:
        made = repairs.repair(
            run,
            key,
            case.victim,
            case.defence,
            known,
            defence.method,
            config,
            batch_size=batch_size,
        )
    else:
        made, along = repair_along(run, key, case, defence.method, config, batch_size)
    row = {**judge(case, made, patch=victim.plan.is_patch), "seconds": sum(made.seconds)}
    if along is None:
        return row
    test = Batch(case.test.images[: size.dial_images], case.test.labels[: size.dial_images])
    budget = getattr(config, "max_drop", 0.1)
    return {**row, "oracle": ask_oracle(case, along, test, size.dial_points, budget)}
