"""Checks a repaired net: its accuracy, what known triggers still do, and unusually small triggers
that a fresh search finds. For `pipelines.hold`.

Composition only. Prints nothing and opens no file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxbd.base import Evidence, Key, Variables
from jaxbd.detection.verdict import COMPARABLE
from jaxbd.metrics import evaluate
from jaxbd.pipelines import fresh
from jaxbd.training.program import Seconds, total_seconds

COUNTS = 0.5
"""Minimum rate for another class's trigger to count in the comparison of sizes."""
WAYS = (1.0, 0.75, 0.5, 0.25)
"""Interpolation weights between the net before and after a repair, tried in this order."""


class Limits(NamedTuple):
    """Sizes below which a trigger is unusually small: L1 norm of a mask, L2 norm of an additive
    pattern. inf if there is nothing to compare with."""

    mask: float
    additive: float

    def is_unusual(self, trigger: fresh.Trigger) -> bool:
        """Whether a trigger is unusually small. A patch always is: the search fixes its size."""
        limit = {"mask": self.mask, "additive": self.additive}.get(trigger.kind)
        return limit is None or trigger.size < limit


class Round(NamedTuple):
    """State of a repair after a round, measured on the held-out images.

    Attributes:
      accuracy: clean accuracy.
      shares: {target: share of other classes' images that go there without a trigger}.
      rates: (target, rate) of every trigger known so far, in the order of discovery.
      found: triggers that the fresh search in this net ended with; empty if the round was undone.
      left: those of `found` that work and are unusually small.
      kept: how far the weights moved from the net before (0) to the repaired one (1), see
        `keep_within`.
    """

    accuracy: float
    shares: dict[int, float]
    rates: tuple[tuple[int, float], ...]
    found: tuple[fresh.Trigger, ...] = ()
    left: tuple[fresh.Trigger, ...] = ()
    kept: float = 1.0

    def working(self, least: float) -> list[fresh.Trigger]:
        """Triggers of `found` whose rate exceeds the trigger-free share by at least `least`."""
        beyond = lambda each: each.rate - self.shares[each.evidence.target]
        return [each for each in self.found if beyond(each) >= least]

    def has_known_left(self, most: Sequence[float]) -> bool:
        """Whether a trigger known before the search still works: whether one of `rates` exceeds the
        trigger-free share by at least its limit in `most`."""
        return any(
            rate - self.shares[target] >= limit
            for (target, rate), limit in zip(self.rates, most, strict=True)
        )


def compare(
    lab: fresh.Lab, key: Key, targets: Sequence[int], norms: np.ndarray | None, label: str
) -> tuple[Limits, Seconds]:
    """Derives the size limits from triggers of the suspect's other classes.

    Args:
      norms: [K] norms of the smallest masks, nan for classes without one. Masks are searched if
        this is None or nan for all other classes, as after a scan of the targets alone.
    """
    config, variables = lab.config, lab.suspect.freeze().variables
    others = [k for k in range(lab.suspect.classes) if k not in targets]
    chosen = others[: config.compared]
    if norms is not None and not np.isfinite(norms[others]).any():
        norms = None
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
    """Size below which a trigger is unusually small compared with other classes' `sizes` [n], nan
    for a class without a trigger.

    This is the size at which the anomaly index (Wang et al. 2019) reaches `threshold`, but at least
    half the median and at most the smallest of `sizes`. With fewer than `COMPARABLE` sizes it is
    half their median; without any it is inf, so that every working trigger is unusual.
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
    """Interpolates from `before` to `after` as far as the accuracy allows.

    Fine-tuned weights lie in the same basin as the weights before, so nets between the two work
    (Wortsman et al. 2022, who also move back from fine-tuned weights).

    Returns: (the farthest of the nets at `WAYS` with at least the accuracy `least` on the held-out
      images, its weight in `WAYS`); (`before`, 0) if even the shortest step costs too much.
    """
    for share in WAYS:
        between = move(before, after, share)
        if measure(lab, jax.random.key(0), between, ()).accuracy >= least:
            return between, share
    return before, 0.0


def move(before: Variables, after: Variables, share: float) -> Variables:
    """`after`, with weights and moments interpolated: before + share * (after - before).

    Collections that only `after` has, such as bounds, stay unchanged.
    """
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
    """Searches the net with `variables` and adds the result to `now`.

    Args:
      least: a trigger works if its rate exceeds the trigger-free share by at least this.
    """
    frozen = lab.suspect._replace(variables=variables).freeze().variables
    found, seconds = fresh.search(lab, key, frozen, list(now.shares), label)
    now = now._replace(found=tuple(found))
    left = [each for each in now.working(least) if limits.is_unusual(each)]
    return now._replace(left=tuple(left)), seconds


def measure(lab: fresh.Lab, key: Key, variables: Variables, known: Sequence[Evidence]) -> Round:
    """Measures accuracy, trigger-free shares and the known triggers' rates on the held-out
    images."""
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
    """Share of hits [N] bool among the rows `among` [N] bool; 0 if `among` is empty."""
    return float(hits[among].mean()) if among.any() else 0.0
