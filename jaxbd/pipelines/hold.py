"""A repair that checks itself: it repairs, searches the repaired net for triggers that work on
held-out images, and repairs again with what it finds.

Composition only: a repair method, a fresh search, measurements. Prints nothing and opens no file.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxbd import methods
from jaxbd.base import Batch, Evidence, Key, Suspect, UserError, Variables
from jaxbd.pipelines import checks, fresh
from jaxbd.pipelines import repair as repairs
from jaxbd.pipelines.checks import Limits, Round
from jaxbd.pipelines.repair import Repaired
from jaxbd.repairs import choose
from jaxbd.repairs.vary import vary
from jaxbd.training.loop import NotFinite
from jaxbd.training.program import Seconds, total_seconds
from jaxbd.training.run import Run

AUTO, WITHOUT = "auto", "clip"
"""Name of this repair where a method is chosen, and the method to use if there is no trigger."""
PRESET = "rounds"
"""Name of a method's settings for repairs in rounds, if it has them."""
LOWER, TRIES = 0.2, 3
"""Factor of the learning rate after a round that diverged, as in nets with their normalisation
folded away, and how often a round is tried."""
End = Literal["nothing left", "budget", "rounds"]
"""Why a repair ended: no unusually small trigger works any more, the accuracy budget is used up, or
all rounds are done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a repair that checks itself.

    Attributes:
      max_drop: clean accuracy on the held-out images that the repair may cost, as a share.
      rounds: maximum number of repairs, each followed by a fresh search.
      working: a trigger that a fresh search finds works if its rate exceeds the trigger-free share
        by at least this.
      remaining: the same for the suspect's own triggers after they were repaired: those given, and
        the unusually small ones of the search before the first round. Less than `working`, since
        any net has weak triggers, but those of the backdoor should be gone.
      held_share: share of the clean images that is held out for checking, if none are given.
      most_held: maximum number of held-out images.
      vary: whether to unlearn variants of the triggers too, see `repairs.vary`.
      search: settings of the fresh searches.
    """

    max_drop: float = 0.02
    rounds: int = 4
    working: float = 0.2
    remaining: float = 0.05
    held_share: float = 0.25
    most_held: int = 500
    vary: bool = True
    search: fresh.Config = dataclasses.field(default_factory=fresh.Config)

    def __post_init__(self):
        if not 0 <= self.max_drop < 1:
            raise UserError(f"max_drop must be a share in [0, 1), got {self.max_drop}")
        if self.rounds < 1 or self.most_held < 1:
            raise UserError(
                f"rounds and most_held must be at least 1, got {self.rounds}, {self.most_held}"
            )
        shares = (self.working, self.remaining, self.held_share)
        if not all(0 < share < 1 for share in shares):
            raise UserError(
                "working, remaining and held_share must be shares between 0 and 1, got"
                f" {', '.join(map(str, shares))}"
            )


def without_trigger(max_drop: float) -> tuple[methods.Method, Any]:
    """(method, its settings) for a suspect of which no trigger is known, with the same budget of
    clean accuracy, a share."""
    method = methods.find("repair", WITHOUT)
    return method, dataclasses.replace(method.preset(), max_drop=max_drop)


class Held(NamedTuple):
    """Result of `repair`.

    Attributes:
      repaired: the net after the last round. If that was undone, the net after the round before, or
        the suspect itself if there was none.
      rounds: the original suspect, then every round, including one that was undone.
      end: why the repair ended.
      undone: whether the last round was undone because even its smallest part cost too much; `end`
        is then "budget".
      limits: sizes below which a trigger counted as unusually small.
      checked_on: number of held-out images behind all rates and accuracies.
    """

    repaired: Repaired
    rounds: tuple[Round, ...]
    end: End
    undone: bool
    limits: Limits
    checked_on: int

    @property
    def last(self) -> Round:
        """The round that describes the net of `repaired`."""
        return self.rounds[-2 if self.undone else -1]


class Task(NamedTuple):
    """Inputs shared by all rounds; see `repair`."""

    lab: fresh.Lab
    clean: Batch
    method: str
    settings: Any
    config: Config
    batch_size: int
    label: str


def repair(
    run: Run,
    key: Key,
    suspect: Suspect,
    clean: Batch,
    evidence: Sequence[Evidence],
    config: Config,
    base: tuple[str, Any] = ("unlearn", None),
    *,
    held: Batch | None = None,
    norms: np.ndarray | None = None,
    batch_size: int = 64,
    label: str = "",
) -> Held:
    """Repairs in rounds until no unusually small trigger works.

    Triggers to the targets of `evidence` are searched before the first round and after every round.
    All that work are added to the evidence, large ones too. Only small ones are a reason for
    another round, since in any net a large enough mask leads to any class. If a round costs more
    accuracy than the budget allows, only part of its change is applied, see `checks.keep_within`.

    Args:
      clean: clean images with labels (uint8 or float).
      evidence: known triggers, at least one for each class to repair.
      base: (name of a repair in `methods` that changes weights, its settings); settings None for
        its preset "rounds", or its defaults if it has no such preset.
      held: other clean images that check the repair, of which at most `config.most_held` are used;
        None to hold out a share of `clean`.
      norms: [K] norms of the smallest masks of all classes, from a scan of the suspect; nan for
        classes without one. If None or without another class, masks of other classes are searched.
      batch_size: images per step.
    Raises: UserError when something is missing or the images are too few; loop.NotFinite when a
      loss diverges; Stopped after a stop request.
    """
    method, settings = base
    found = methods.find("repair", method)
    if found.guards:
        raise UserError(f"{method} changes no weights, so it cannot be repeated in rounds")
    repairs.check_needs(method, found.needs | {"trigger"}, clean, evidence)
    clean = Batch(np.asarray(clean.images), np.asarray(clean.labels))
    if held is None:
        parts_key, share = jax.random.fold_in(key, 0), config.held_share
        clean, held = choose.split(parts_key, clean, share, config.most_held, "repair")
    else:
        held = Batch(*(np.asarray(part)[: config.most_held] for part in held))
    if settings is None:
        settings = found.preset(PRESET if PRESET in found.presets else None)
    lab = fresh.Lab(run, suspect, clean, held, config.search)
    task = Task(lab, clean, method, settings, config, batch_size, label or method)
    targets = list(dict.fromkeys(each.target for each in evidence))
    label = f"{task.label}, other classes"
    limits, spent = checks.compare(lab, jax.random.fold_in(key, 1), targets, norms, label)
    return _go_on(task, key, list(evidence), limits, spent)


def _go_on(task: Task, key: Key, known: list[Evidence], limits: Limits, first: Seconds) -> Held:
    """Runs the rounds; each starts from the net of the round before, with all triggers so far."""
    config, lab, spent = task.config, task.lab, [first]
    variables, results, rounds = lab.suspect.variables, [], []
    most = [config.remaining] * len(known)  # rate beyond the trigger-free share of each of `known`
    end: End = "rounds"
    for number in range(config.rounds + 1):
        own_key = jax.random.fold_in(key, 100 + number)
        name, kept = f"{task.label}, before", 1.0
        if number:
            name = f"{task.label}, round {number} of {config.rounds}"
            for each in rounds[-1].working(config.working):
                is_own = number == 1 and limits.is_unusual(each)
                known.append(each.evidence)
                most.append(config.remaining if is_own else config.working)
            round_key = jax.random.fold_in(key, 1 + number)
            result, settings = _repair_once(task, round_key, variables, known, name)
            task = task._replace(settings=settings)
            results.append(result)
            least = rounds[0].accuracy - config.max_drop  # relative to the original suspect
            variables, kept = checks.keep_within(lab, variables, result.variables, least)
            if not kept:  # record the undone round's figures; `variables` are those of before
                costly = checks.measure(lab, own_key, result.variables, known)
                rounds.append(costly._replace(kept=0.0))
                end = "budget"
                break
        now = checks.measure(lab, own_key, variables, known)._replace(kept=kept)
        now, seconds = checks.search_again(
            lab, own_key, variables, now, limits, config.working, f"{name}, check"
        )
        spent.append(seconds)
        rounds.append(now)
        if number and not (now.left or now.has_known_left(most)):
            end = "nothing left"
            break
    spent += [result.seconds for result in results]
    repaired = Repaired(variables, repairs.join_infos(results), total_seconds(*spent))
    return Held(repaired, tuple(rounds), end, end == "budget", limits, len(lab.held.labels))


def _repair_once(
    task: Task, key: Key, variables: Variables, known: Sequence[Evidence], name: str
) -> tuple[Repaired, Any]:
    """Repairs once by the base method. If that diverges, tries again with a lower learning rate.

    Returns: the repaired net, and the settings that made it.
    """
    suspect = task.lab.suspect._replace(variables=variables)
    varied = [each._replace(stamp=vary(each.stamp)) if task.config.vary else each for each in known]
    run, settings, label, tries = task.lab.run, task.settings, name, TRIES
    while True:
        try:
            repaired = repairs.repair(
                run,
                key,
                suspect,
                task.clean,
                varied,
                task.method,
                settings,
                batch_size=task.batch_size,
                label=label,
            )
            return repaired, settings
        except NotFinite:
            rate, tries = getattr(settings, "learning_rate", None), tries - 1
            if rate is None or not tries:
                raise
            settings = dataclasses.replace(settings, learning_rate=LOWER * rate)
            label = f"{name}, rate {settings.learning_rate:g}"
            run.notice(f"{name} diverged; trying learning rate {settings.learning_rate:g}")
