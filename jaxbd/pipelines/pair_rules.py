"""Rules that decide from the triggers of class pairs which pairs belong to an attack.

They combine two searches (the paper chooses the search by the attack, which a defender does not
know):

1. Each search scores its own statistics (`detect.pair_scores`). A pair is a *seed* if its score
   exceeds `threshold` and its trigger sends at least `working_rate` of the held-out images of its
   source to the target.
2. A target with at least `group` seeds is tested for an all-to-one attack: one trigger is estimated
   on all of its seeds. It must not be much larger than theirs (`intrinsic_factor`) and must work
   for `coverage` of the other classes, seeds or not; intrinsic backdoors lead only from a few
   similar classes. The sources are the seeds and all classes of which the trigger sends at least
   half the working rate to the target. If both searches pass, the trigger that works best over all
   classes wins, as the one closer to the attacker's.
3. If no target passes, the pairs that stand out most from both their row and their column
   (`detect.centred_scores`), one for every second class, are tested for an all-to-all attack: one
   trigger is estimated on all of them. It must not be much larger than the single ones
   (`intrinsic_factor`). Other classes that it sends to a target of their own are added and the
   trigger is estimated again, until no more are added. If it works for more classes than it was
   first made for, these are the pairs: only the attacker's trigger does this.
4. Otherwise targets with fewer seeds are tested as in 2. If none passes, the seeds are lone pairs.
   Clean models have such pairs of similar classes too, so a lone pair counts only above
   `lone_factor` times the threshold; below, it leaves the verdict open.
5. For every target one trigger is estimated on all of its sources. If it is much larger than the
   single ones (`intrinsic_factor`), the sources do not share a trigger, and only the source with
   the smallest trigger remains (appendix C).
6. If the other search also has a trigger that works for those sources and is not much larger than
   its single ones, it is added to the first. Which of the two activates the net as the attacker's
   trigger does is unknown, so a correction uses both (`repairs.mixture.join`).
7. If the trigger is a small patch, and a patch of one colour that fills its box works as well, the
   plain patch replaces all others. The smallest mask is speckled and only just works, while an
   attacker's patch is solid and works by a wide margin; a correction for one does not fit the
   other.

The result is an alarm. `pair_verdict` decides whether it becomes a verdict.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxbd.base import UserError, check_choices
from jaxbd.detection import detect
from jaxbd.inversion import neural_cleanse, pt_red
from jaxbd.inversion.neural_cleanse import Config as NeuralCleanseConfig
from jaxbd.inversion.pt_red import Config as PtRedConfig
from jaxbd.pipelines import margin_scan, pair_triggers
from jaxbd.pipelines.margin_scan import Config as MarginConfig
from jaxbd.pipelines.pair_triggers import METHODS, Lab, Pair, Search
from jaxbd.training.memory import Bytes
from jaxbd.training.program import Seconds, total_seconds

Method = Literal["pairs", "neural-cleanse-pairs", "pt-red"]
SEARCHES = {
    "pairs": METHODS,
    "neural-cleanse-pairs": ("neural-cleanse",),
    "pt-red": ("pt-red",),
}
"""{`Config.method`: the inversions to run}."""
LEAST_PAIRS = 6
"""Minimum number of pairs with a trigger for one of them to count as unusually small."""
ROUNDS = 5
"""Maximum number of estimates of the all-to-all trigger of rule 3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a scan over pairs.

    Attributes:
      method: searches to run: "pairs" for patches and perturbations, "neural-cleanse-pairs" for
        patches only, "pt-red" for perturbations only.
      targets: classes to search as targets; empty for all. Scores compare pairs, so include some
        classes that are not attacked.
      steps: maximum steps of Neural Cleanse per pair.
      perturbation_steps: maximum steps of PT-RED per pair.
      batch_size: images per pair and step.
      joint_steps: steps of an estimate on several sources, including the last one for a target.
      joint_batch_size: images per step of these estimates.
      joint_rate: success rate that the last estimate aims for, instead of the searches' own.
      slots: number of pairs that advance together; default: what suits device and memory.
      memory_budget: bytes that a step may need; default: a share of the device's memory, see
        `memory.available`.
      threshold: anomaly score above which a pair is a seed (7; 3 for WaNet in appendix C).
      working_rate: minimum share of a source's held-out images that a trigger must send to the
        target. A search stops at 90 % of the images it optimises on; others are harder.
      group: number of seeds from which a class is tested as the target of an all-to-one attack.
      coverage: share of the other classes for which that attack's trigger must work.
      lone_factor: a lone pair counts if its score exceeds this times the threshold.
      intrinsic_factor: a joint trigger larger than this times the largest single one shows that the
        sources do not share a trigger (appendix C: 27.18 against 7.95).
      plain_share: largest share of the image that a patch's box may cover for rule 7; 0 disables
        the rule.
      least_images: minimum number of images of a source class.
      neural_cleanse: settings of the search for patches.
      pt_red: settings of the search for perturbations.
      margin: settings of the search without data, the second sign; see `pair_verdict`.
    """

    method: Method = "pairs"
    targets: tuple[int, ...] = ()
    steps: int = 150
    perturbation_steps: int = 80
    batch_size: int = 16
    joint_steps: int = 200
    joint_batch_size: int = 32
    joint_rate: float = 0.95
    slots: int | None = None
    memory_budget: Bytes | int | None = None
    threshold: float = 7.0
    working_rate: float = 0.5
    group: int = 3
    coverage: float = 0.75
    lone_factor: float = 2.0
    intrinsic_factor: float = 3.0
    plain_share: float = 0.1
    least_images: int = 5
    neural_cleanse: NeuralCleanseConfig = dataclasses.field(
        default_factory=neural_cleanse.for_pairs
    )
    pt_red: PtRedConfig = dataclasses.field(default_factory=pt_red.Config)
    margin: MarginConfig = dataclasses.field(default_factory=margin_scan.Config)

    def __post_init__(self):
        check_choices("pairs", self)
        counts = (
            "steps",
            "perturbation_steps",
            "batch_size",
            "joint_steps",
            "joint_batch_size",
            "least_images",
        )
        low = [name for name in counts if getattr(self, name) < 1]
        if low:
            raise UserError(f"pairs: {low[0]} is {getattr(self, low[0])}; it must be at least 1")
        if not all(0 < rate <= 1 for rate in (self.working_rate, self.joint_rate, self.coverage)):
            raise UserError("pairs: working_rate, joint_rate and coverage must be in (0, 1]")
        if not (self.threshold > 0 and self.group >= 2):
            raise UserError("pairs: need threshold > 0 and group >= 2")
        if not 0 <= self.plain_share <= 1:
            raise UserError(f"pairs: plain_share {self.plain_share} is not in [0, 1]")
        if not min(self.intrinsic_factor, self.lone_factor) >= 1:
            raise UserError("pairs: intrinsic_factor and lone_factor must be at least 1")

    @property
    def methods(self) -> tuple[str, ...]:
        """The searches to run, of `METHODS`."""
        return SEARCHES[self.method]

    def effort(self) -> pair_triggers.Effort:
        """Length and batch size of an estimate on several pairs."""
        return pair_triggers.Effort(self.joint_steps, self.joint_batch_size)


class Detected(NamedTuple):
    """Result of rules 2 to 4.

    Attributes:
      found: (search, its pairs).
      rule: the rule that applied, in words.
      generalises: whether it was rule 3: a trigger works for pairs it was not made for.
    """

    found: list[tuple[str, list[Pair]]]
    rule: str
    generalises: bool = False


class Rules:
    """Applies the rules of this module to the pairs of one model, and counts the cost."""

    def __init__(self, lab: Lab, config: Config, pairs: list[Pair]):
        self.lab, self.config, self.pairs = lab, config, pairs
        self.searches: dict[str, Search] = {}
        self.steps, self.image_steps, self.seconds = {}, 0, Seconds(0.0, 0.0)
        self.joints = 0
        for method in config.methods:
            self.sweep(method)

    def spend(self, images: int, seconds: Seconds) -> None:
        self.image_steps += images
        self.seconds = total_seconds(self.seconds, seconds)

    def sweep(self, method: str) -> None:
        config = self.config
        self.searches[method], found = pair_triggers.sweep_pairs(
            self.lab,
            method,
            self.pairs,
            config.steps if method == "neural-cleanse" else config.perturbation_steps,
            config.batch_size,
            slots=config.slots,
            memory_budget=config.memory_budget,
        )
        self.steps[method] = int(found.steps.sum())
        self.spend(found.image_steps_pushed, found.seconds)

    def fit_joint(
        self, method: str, wish: dict[int, int], *, last: bool = False
    ) -> pair_triggers.Joint:
        """Estimates one trigger for all pairs of `wish` {source: target}; with `last` it aims for
        `joint_rate`."""
        config, self.joints = self.config, self.joints + 1
        inversion = (self.lab.last_inversions if last else self.lab.inversions)[method]
        name = f"{method}: joint trigger {self.joints}, for {len(wish)} source(s)"
        found = pair_triggers.fit_joint(self.lab, method, inversion, wish, config.effort(), name)
        self.spend(config.joint_steps * config.joint_batch_size, found.seconds)
        return found

    def find_seeds(self, method: str) -> tuple[dict[Pair, float], list[Pair]]:
        """Rule 1: ({seed: score}, pairs above the threshold that fail on held-out images)."""
        search = self.searches[method]
        above = [(int(s), int(t)) for s, t in np.argwhere(search.scores > self.config.threshold)]
        rate = lambda pair: pair_triggers.measure_outcomes(
            self.lab, method, search.state(pair), pair[:1]
        )[pair]
        working = [pair for pair in above if rate(pair) >= self.config.working_rate]
        return {pair: float(search.scores[pair]) for pair in working}, [
            p for p in above if p not in working
        ]

    def is_shared(self, method: str, norm: float, wish: dict[int, int]) -> bool:
        """Whether a joint trigger of size `norm` is not much larger than the single triggers that
        were found for its pairs. Without any there is nothing to compare: no."""
        sizes = np.array([self.searches[method].norms[pair] for pair in wish.items()])
        largest = sizes.max(where=np.isfinite(sizes), initial=0.0)
        return bool(norm <= self.config.intrinsic_factor * largest)

    def measure_outcomes(self, method: str, state: Any) -> tuple[np.ndarray, dict[int, int]]:
        """Where a trigger sends images: (shares [K, K] with 0 on the diagonal, {source: the other
        class that most images go to})."""
        shares = np.nan_to_num(
            pair_triggers.measure_outcomes(self.lab, method, state, range(self.lab.suspect.classes))
        )
        np.fill_diagonal(shares, 0)
        searched = self.searches[method].rows
        most = {
            source: int(target)
            for source, target in enumerate(shares.argmax(1))
            if (source, target) in searched
        }
        return shares, most

    def test_all_to_one(
        self, method: str, target: int, seeds: dict[Pair, float]
    ) -> tuple[float, list[Pair]]:
        """Rule 2 for one target: (mean rate of its joint trigger over all classes, its pairs); (0,
        []) if the test fails."""
        wish = {source: target for source, t in seeds if t == target}
        found = self.fit_joint(method, wish)
        shares, _ = self.measure_outcomes(method, found.state)
        sources = [s for s, t in self.searches[method].rows if t == target]
        rates = shares[sources, target]
        enough = (rates >= self.config.working_rate).mean() >= self.config.coverage
        if not (enough and self.is_shared(method, found.norm, wish)):
            return 0.0, []
        half = self.config.working_rate / 2
        return float(rates.mean()), [
            (s, target) for s in sorted(sources) if s in wish or shares[s, target] >= half
        ]

    def find_all_to_one(
        self, seeds: dict[str, dict[Pair, float]], least: int
    ) -> list[tuple[str, list[Pair]]]:
        """(search, pairs) of every target that has at least `least` seeds in one search and passes
        rule 2."""
        sizes = {method: [t for _, t in pairs] for method, pairs in seeds.items()}
        chosen = {t for targets in sizes.values() for t in targets if targets.count(t) >= least}
        found = []
        for target in sorted(chosen):
            passed = {
                m: self.test_all_to_one(m, target, seeds[m]) for m in seeds if target in sizes[m]
            }
            best = max(passed, key=lambda method: passed[method][0])
            if passed[best][1]:
                found.append((best, passed[best][1]))
        return found

    def find_all_to_all(self, method: str) -> list[Pair]:
        """Rule 3: the pairs of one trigger that sends each source to a target of its own; empty
        unless they are more than it was first made for."""
        wish = first = self.pick_outstanding(method)
        for _ in range(ROUNDS):
            if len(wish) < max(len(first), 2):  # pairs that it was made for have dropped out
                return []
            found = self.fit_joint(method, wish)
            if not (found.reached and self.is_shared(method, found.norm, wish)):
                return []
            shares, most = self.measure_outcomes(method, found.state)
            known, wish = wish, {s: t for s, t in wish.items() if most.get(s) == t}
            for source, target in most.items():
                # half the working rate is enough to try the pair in the next estimate
                if (
                    shares[source, target] >= self.config.working_rate / 2
                    and target not in wish.values()
                ):
                    wish.setdefault(source, target)
            if wish == known:
                break
        pairs = sorted(pair for pair in wish.items() if shares[pair] >= self.config.working_rate)
        return pairs if len(pairs) > len(first) else []

    def pick_outstanding(self, method: str) -> dict[int, int]:
        """{source: target} of the pairs that stand out most: at most one for every second class,
        each with its own target."""
        scores = np.nan_to_num(detect.centred_scores(1 / self.searches[method].norms))
        wish: dict[int, int] = {}
        for flat in np.argsort(-scores, axis=None, kind="stable"):
            source, target = (int(side) for side in np.unravel_index(flat, scores.shape))
            if scores[source, target] <= 0 or 2 * len(wish) >= self.lab.suspect.classes:
                break
            if source not in wish and target not in wish.values():
                wish[source] = target
        return wish

    def find_attack(self, seeds: dict[str, dict[Pair, float]]) -> Detected:
        """Applies rules 2 to 4 in order; the first that finds pairs decides."""
        # a target of K classes has at most K - 1 seeds
        size = min(self.config.group, max(self.lab.suspect.classes - 1, 2))
        found = self.find_all_to_one(seeds, size)
        if found:
            words = (
                f"trigger sizes of {size} pairs of one target or more, with a trigger that works"
                " for the others"
            )
            return Detected(found, words)
        if not self.config.targets:  # an all-to-all attack shows only if all targets were searched
            found = [(method, self.find_all_to_all(method)) for method in self.searches]
            method, pairs = max(found, key=lambda each: len(each[1]))
            if pairs:
                words = "one trigger that sends classes to targets of their own"
                return Detected([(method, pairs)], words, generalises=True)
        found = self.find_all_to_one(seeds, 1)
        if found:
            words = "a trigger of few pairs that sends other classes to the same target"
            return Detected(found, words)
        return Detected(self.find_lone_pairs(seeds), "trigger sizes of pairs that stand alone")

    def find_lone_pairs(self, seeds: dict[str, dict[Pair, float]]) -> list[tuple[str, list[Pair]]]:
        """(search, its seeds that score high enough to count alone), for the search with the
        highest score."""
        least = self.config.lone_factor * self.config.threshold
        best = max(seeds, key=lambda method: max(seeds[method].values(), default=0))
        pairs = sorted(pair for pair, score in seeds[best].items() if score > least)
        return [(best, pairs)] if pairs else []

    def list_doubts(self, seeds: dict[str, dict[Pair, float]], failed: bool) -> list[str]:
        """Reasons to leave the verdict open although no attack was found, in words."""
        doubts = []
        lone = sorted({pair for scores in seeds.values() for pair in scores})
        if lone:
            named = ", ".join(f"{source} -> {target}" for source, target in lone)
            doubts.append(f"above {self.config.threshold:g} only pairs that stand alone: {named}")
        if failed:
            doubts.append(
                "a pair above the threshold has a trigger that does not work on held-out images"
            )
        few = [
            method
            for method, search in self.searches.items()
            if np.isfinite(search.norms).sum() < LEAST_PAIRS
        ]
        if few:
            doubts.append(
                f"{few[0]} found triggers for fewer than {LEAST_PAIRS} pairs, too few to compare"
            )
        return doubts
