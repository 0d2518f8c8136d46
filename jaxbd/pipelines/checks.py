"""How a repaired net stands: accuracy, what known triggers still do, and what a fresh search finds
that is unusually small. For `pipelines.hold`.

Composition only. Nothing is printed and no file is opened.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxbd.base import Evidence, Key, Suspect, Variables
from jaxbd.detection.verdict import COMPARABLE
from jaxbd.metrics import evaluate
from jaxbd.pipelines import fresh
from jaxbd.training.program import Seconds, total_seconds

COUNTS = 0.5
"""Rate from which another class's trigger counts for what size is usual."""
WAYS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the way from a net to the repaired one that are tried in turn."""


class Limits(NamedTuple):
    """Sizes below which a trigger is unusually small: L1 norm of a mask, L2 norm of an additive
    pattern. inf where there is nothing to compare with."""

    mask: float
    additive: float

    def are_met(self, trigger: fresh.Trigger) -> bool:
        """Whether a trigger is unusually small; a patch is, having the size that the search gave
        it."""
        limit = {"mask": self.mask, "additive": self.additive}.get(trigger.kind)
        return limit is None or trigger.size < limit


class Round(NamedTuple):
    """Where a repair stands, all measured on the held-out images.

    Attributes:
      accuracy: clean accuracy.
      shares: by target, share of the images of other classes that go there without a trigger.
      rates: of all triggers known so far, in the order in which they came to be known: (target,
        rate).
      found: what the fresh search in this net ended with; empty for a round that was undone.
      left: those of them that work and are unusually small.
      kept: share of the way from the net before to the repaired one that its weights go, see
        `keep_within`.
    """

    accuracy: float
    shares: dict[int, float]
    rates: tuple[tuple[int, float], ...]
    found: tuple[fresh.Trigger, ...] = ()
    left: tuple[fresh.Trigger, ...] = ()
    kept: float = 1.0

    def working(self, least: float) -> list[fresh.Trigger]:
        """What the search found that sends `least` more images to its target than go there
        anyway."""
        beyond = lambda each: each.rate - self.shares[each.evidence.target]
        return [each for each in self.found if beyond(each) >= least]

    def has_known_left(self, least: float) -> bool:
        """Whether a trigger known before the search works."""
        return any(rate - self.shares[target] >= least for target, rate in self.rates)


def compare(
    lab: fresh.Lab, key: Key, targets: Sequence[int], norms: np.ndarray | None, label: str
) -> tuple[Limits, Seconds]:
    """What size is usual, from triggers of the suspect's other classes.

    Args:
      norms: [K] of the smallest masks, nan where there is none; None to search for some.
    """
    config, variables = lab.config, freeze(lab.suspect)
    others = [k for k in range(lab.suspect.classes) if k not in targets]
    chosen = others[: config.compared]
    sizes = {"mask": [] if norms is None else [float(norms[k]) for k in others], "additive": []}
    searches = {"mask": fresh.search_masks} if norms is None else {}
    if config.additive_steps:
        searches["additive"] = fresh.search_additive
    spent = [Seconds(0.0, 0.0)]
    for kind, search in searches.items() if chosen else []:
        triggers, seconds = search(lab, key, variables, chosen, label)
        spent.append(seconds)
        for target in chosen:
            # the smallest of several starts; a trigger that does not work has no size
            own = [t.size for t in triggers if t.evidence.target == target and t.rate >= COUNTS]
            sizes[kind].append(min(own, default=float("nan")))
    limit = lambda kind: usual_limit(np.array(sizes[kind]), config.anomaly_threshold)
    return Limits(limit("mask"), limit("additive")), total_seconds(*spent)


def usual_limit(sizes: np.ndarray, threshold: float) -> float:
    """Size below which a trigger is unusually small beside those of other classes, `sizes` [n]; nan
    where a class has none.

    It is where the anomaly index (Wang et al. 2019) reaches `threshold`, but at least half the
    median, and no size that another class undercuts is unusual. Few sizes tell by half their median
    alone; without any, every trigger that works is unusual.
    """
    sizes = np.asarray(sizes, float)
    sizes = sizes[np.isfinite(sizes)]
    if not sizes.size:
        return float("inf")
    median = float(np.median(sizes))
    if sizes.size < COMPARABLE:
        return median / 2
    spread = 1.4826 * float(np.median(np.abs(sizes - median)))
    return min(float(sizes.min()), max(median / 2, median - threshold * spread))


def keep_within(
    lab: fresh.Lab, before: Variables, after: Variables, least: float
) -> tuple[Variables, float]:
    """(the net on the way from `before` to `after` that goes farthest and has at least the accuracy
    `least` on the held-out images, the share of the way); the share is 0, and the net `before`,
    where even the shortest step costs too much.

    Weights that were fine-tuned lie in one basin with those before, so the nets between them work
    (Wortsman et al. 2022, who go back from fine-tuned weights likewise).
    """
    for share in WAYS:
        between = move(before, after, share)
        if measure(lab, jax.random.key(0), between, ()).accuracy >= least:
            return between, share
    return before, 0.0


def move(before: Variables, after: Variables, share: float) -> Variables:
    """`after` with the weights and moments that `before` has too moved back to `share` of the
    way."""
    if share == 1:
        return after
    between = lambda old, new: (old + share * (new - old)).astype(new.dtype)
    parts = [part for part in ("params", "batch_stats") if before.get(part)]
    return {**after, **{part: jax.tree.map(between, before[part], after[part]) for part in parts}}


def search_again(
    lab: fresh.Lab,
    key: Key,
    variables: Variables,
    now: Round,
    limits: Limits,
    least: float,
    label: str,
) -> tuple[Round, Seconds]:
    """`now` of the net with `variables`, with what a search there finds; a trigger works from
    `least` beyond the trigger-free share on."""
    frozen = freeze(lab.suspect._replace(variables=variables))
    found, seconds = fresh.search(lab, key, frozen, list(now.shares), label)
    now = now._replace(found=tuple(found))
    left = [each for each in now.working(least) if limits.are_met(each)]
    return now._replace(left=tuple(left)), seconds


def measure(lab: fresh.Lab, key: Key, variables: Variables, known: Sequence[Evidence]) -> Round:
    """Accuracy, and what the known triggers do, on the held-out images."""
    net, labels = lab.suspect.net, np.asarray(lab.held.labels)
    predicted = evaluate.logits(net, variables, lab.held).argmax(-1)
    rates = []
    for number, each in enumerate(known):
        stamped = evaluate.triggered_logits(
            jax.random.fold_in(key, 20 + number),
            net,
            variables,
            each.stamp,
            each.trigger_params,
            lab.held,
        ).argmax(-1)
        counted = np.isin(labels, each.all_sources(lab.suspect.classes))
        rates.append((each.target, _share(stamped == each.target, counted)))
    targets = dict.fromkeys(each.target for each in known)
    shares = {target: _share(predicted == target, labels != target) for target in targets}
    return Round(float((predicted == labels).mean()), shares, tuple(rates))


def _share(hits: np.ndarray, among: np.ndarray) -> float:
    """Share of hits [N] bool among the rows `among` [N] bool; 0 where there is none to count."""
    return float(hits[among].mean()) if among.any() else 0.0


def freeze(suspect: Suspect) -> Variables:
    """Variables that give the same for less work, where the net has such."""
    net, variables = suspect.net, suspect.variables
    return variables if net.frozen is None else net.frozen(variables)
