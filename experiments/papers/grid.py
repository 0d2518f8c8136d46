"""Measures the units that are missing, in order of priority, until the time is over.

    python -m experiments.papers.grid --size small --attacks bna-badnets dhbe-badnets-3 \
        --defences finetune anp dhbe --seeds 0 1 2 --minutes 480
    python -m experiments.papers.grid --size small --minutes 0    # prints what is there
    python -m experiments.papers.grid --smoke

Seed 0 of everything comes first, the victim before its defences; units that only older code has
measured come last. Every unit is written at once, and a victim's training or a repair that is cut
off goes on next time. Several machines may work on the same grid and commit what they have.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from experiments import units
from experiments.papers import defences, images, ledger, runs, special, victims
from experiments.papers.sizes import SIZES, SizeName
from experiments.papers.victim import Victim
from experiments.papers.victim import unit as victim_unit
from jaxbd.training.run import Stopped

ATTACKS = ("bna-badnets", "bna-l2-inv", "bna-wanet", "dhbe-badnets-3", "dhbe-trojan-3")
"""Of the small size's first table."""
COMPARED = (
    "finetune",
    "ft-sam",
    "fine-pruning",
    "nad",
    "argd",
    "anp",
    "mcr",
    "ibau",
    "clip",
    "nc-unlearn",
    "unlearn",
    "bna",
    "dhbe",
    special.DEFAULT,
)
"""Rows of that table, with the defender's own evidence alone."""
WEAK = 0.3
"""ASR below which a victim is called weak; the weakest of the papers has 46 %."""


class Job(NamedTuple):
    """One unit to measure: a victim alone, or a defence on it; `run` returns its result."""

    victim: Victim
    defence: str | None
    unit: ledger.Unit
    run: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        """For progress."""
        return f"{self.unit.folder}/{self.unit.name}"


class Outcome(NamedTuple):
    """Jobs that were done, that were found, that wait, and that failed."""

    done: list[Job]
    found: list[Job]
    waiting: list[Job]
    failed: list[Job]


@functools.cache
def plan(victim: Victim, defence: str | None = None) -> Job:
    """The job of a defence by name, or of the victim alone."""
    if defence is None:
        return Job(victim, None, victim_unit(victim), lambda: victims.measure(victim))
    if defence in special.NAMES:
        unit = special.unit(victim, defence)
        return Job(victim, defence, unit, lambda: special.measure(victim, defence))
    own = defences.named(defence)
    unit = defences.unit(victim, own)
    return Job(victim, defence, unit, lambda: defences.measure(victim, own))


def list_jobs(found: Iterable[Victim], names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every job, seed by seed: of each victim its figures, then its defences. Defences that have no
    meaning for a victim are left out."""
    chosen, jobs = list(found), []
    for seed in seeds:
        for one in (dataclasses.replace(each, seed=seed) for each in chosen):
            jobs += [plan(one), *(plan(one, name) for name in names if fits(one, name))]
    return jobs


def fits(victim: Victim, name: str) -> bool:
    """Whether a defence can be measured on a victim: a "-told" repair needs a single target, which
    all-to-all attacks lack, and a clean net has no trigger to be known."""
    if victim.attack == "clean":
        return name not in special.NAMES and "-known" not in name and "-told" not in name
    one_target = "-told" in name or name == "mesa-levels"
    return not (victim.is_all_to_all and one_target)


def order(jobs: Iterable[Job]) -> list[Job]:
    """Jobs that nobody has measured, then those that only older code has; as given otherwise."""
    jobs = distinct(jobs)
    missing = [job for job in jobs if ledger.find(job.unit) is None]
    older = [job for job in jobs if _is_older(job)]
    return [*missing, *older]


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each unit once, where it comes first."""
    found: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        own = (job.unit.folder, job.unit.name, ledger.work(job.unit))
        found.setdefault(own, job)
    return list(found.values())


def _is_older(job: Job) -> bool:
    stored = ledger.find(job.unit)
    return stored is not None and stored.is_older


def is_weak(job: Job, result: dict[str, Any]) -> bool:
    """Whether a victim's own attack hardly works, so that its repairs have nothing to remove."""
    asr = result.get("asr") if job.defence is None and job.victim.attack != "clean" else None
    return asr is not None and asr < WEAK


def run(
    jobs: Sequence[Job],
    *,
    deadline: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    write: Callable[[ledger.Unit, dict[str, Any], float], Any] = ledger.write,
) -> Outcome:
    """Measures jobs in order until `deadline` by `clock`, and stores each at once.

    A job that is cut off by the deadline is not stored; its run has saved where it is. A job that
    fails is named and not stored, and the next one begins, so that a night is not lost to one net.
    """
    waiting = order(jobs)
    known = {id(job) for job in waiting}
    found = [job for job in distinct(jobs) if id(job) not in known]
    done, failed = [], []
    while waiting and (deadline is None or clock() < deadline):
        job, started = waiting[0], clock()
        units.say(f"{job.name}: running ({len(waiting)} to go)")
        try:
            result = job.run()
        except Stopped as stopped:
            units.say(f"{job.name}: {stopped}")
            break
        except Exception as error:
            units.say(f"{job.name}: failed: {type(error).__name__}: {error}")
            failed.append(waiting.pop(0))
            continue
        write(job.unit, result, clock() - started)
        units.say(f"{job.name}: {clock() - started:.0f} s")
        if is_weak(job, result):
            units.say(f"{job.name}: ASR {result['asr']:.3f}; repairs of this victim say little")
        done.append(waiting.pop(0))
    return Outcome(done, found, waiting, failed)


def compare(
    size: SizeName, measure: Literal["accuracy", "asr"], attacks: Sequence[str] = ATTACKS
) -> list[dict[str, Any]]:
    """Defences side by side: of each the mean of `measure` for every attack, over the seeds that
    were measured, how many units that are, and how many of them only older code has; blank where
    there is none."""
    seeds, rows = range(SIZES[size].seeds), []
    for name in (None, *COMPARED):
        means: dict[str, Any] = {}
        there: list[ledger.Stored] = []
        for attack in attacks:
            jobs = [plan(Victim(attack=attack, size=size, seed=seed), name) for seed in seeds]
            found = [stored for job in jobs if (stored := ledger.find(job.unit))]
            found = [each for each in found if each.result.get(measure) is not None]
            values = [each.result[measure] for each in found]
            means[attack] = sum(values) / len(values) if values else ""
            there += found
        counts = {"measured": len(there), "units": len(seeds) * len(attacks)}
        older = sum(each.is_older for each in there)
        note = {"note": f"{older} by older code"} if older else {}
        rows.append({"defence": name or "none", **means, **counts, **note})
    return rows


def row(job: Job) -> dict[str, Any]:
    """A line of the grid's table: what is stored of a job, or that it is missing."""
    first = {"victim": job.victim.name, "defence": job.defence or "none"}
    stored = ledger.find(job.unit)
    if stored is None:
        return {**first, "ACC": "missing"}
    shown = {**first, **describe(stored)}
    if is_weak(job, stored.result):
        shown["note"] = "; ".join(filter(None, [shown.get("note"), "weak attack"]))
    return shown


def describe(stored: ledger.Stored) -> dict[str, Any]:
    """The columns of a stored row; "older code" where it needs measuring again."""
    result = stored.result
    if "failed" in result:
        return {"ACC": "failed", "note": result["failed"]}
    if "levels" in result:
        best = result["levels"].get("MESA level 0.9") or list(result["levels"].values())[1]
        result = {**best, "note": "level 0.9"}
    columns = {
        "ACC": "accuracy",
        "ASR": "asr",
        "ASR eq. 9": "asr_eq9",
        "SIA": "sia",
        "x4": "x4",
        "x9": "x9",
        "TPR": "tpr",
        "FPR": "fpr",
    }
    shown = {title: result[name] for title, name in columns.items() if result.get(name) is not None}
    oracle = result.get("oracle")
    if oracle is not None:
        shown["oracle ASR"], shown["oracle ACC"] = oracle["asr"], oracle["accuracy"]
    shown["seconds"] = round(stored.record["seconds"], 1)
    notes = [result["note"]] if result.get("note") else []
    notes += ["older code"] if stored.is_older else []
    return {**shown, **({"note": "; ".join(notes)} if notes else {})}


def main(
    size: SizeName = "small",
    attacks: tuple[str, ...] = ATTACKS,
    defences: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    minutes: float | None = None,
    data: tuple[str, ...] = (),
    smoke: bool = False,
) -> int:
    """Measures what is missing and prints the table of what is there; 1 where a unit failed.

    Args:
      size: full, small or digits.
      attacks: of experiments/papers/attacks.py.
      defences: repairs by name, all with the size's own settings by default; "strip",
        "mesa-levels" and "default" besides.
      seeds: the size's own number by default.
      minutes: after which nothing more is begun, and what runs is saved and stopped; 0 measures
        nothing.
      data: NAME=SOURCE of data sets that do not lie beside the repository.
      smoke: one attack and three defences, in seconds; stores nothing.
    """
    units.use_cache()
    images.name_sources(data)
    if smoke:
        size, attacks, seeds = "smoke", ("dhbe-badnets-3",), (0,)
        defences = defences or ("finetune", "anp", "unlearn-known")
    seeds = seeds or tuple(range(SIZES[size].seeds))
    chosen = [Victim(attack=attack, size=size) for attack in attacks]
    jobs = list_jobs(chosen, defences or usual(), seeds)
    if smoke:
        print(units.table([{"defence": job.defence or "none", **job.run()} for job in jobs]))
        return 0
    done, found, waiting, failed = run(jobs, deadline=runs.stop_after(minutes))
    counts = f"{len(done)} measured now, {len(found)} found, {len(waiting)} missing"
    units.say(f"{counts}, {len(failed)} failed")
    print(units.table([row(job) for job in distinct(jobs)]))
    return 1 if failed else 0


def usual() -> tuple[str, ...]:
    """All repairs with the size's own settings, those that take long last."""
    last = ("bna", "unlearn", "nc-unlearn", "dhbe")
    names = [each for each in defences.usual() if each not in last]
    return (*names, *last)


if __name__ == "__main__":
    units.cli(main)
