"""The rules by which triggers of class pairs become an answer: which pairs an attacker made.

How two searches become one answer (the paper chooses the search by the attack, which a defender does not know):

1. Each search scores its own statistics (`detect.pair_scores`). A pair is a *seed* where its score exceeds `threshold`
   and its trigger sends at least `working_rate` of the held-out images of its source to the target.
2. A target with `group` seeds or more is that of an all-to-one attack, unless as many seeds lie elsewhere as in the
   largest group. Each such target goes to the search with the highest score, which decides; seeds elsewhere are
   intrinsic backdoors. Every other class that one trigger for the seeds sends to the target at half the working rate is
   a source as well. Of several targets only those stay whose trigger is not much larger than the smallest
   (`rival_factor`): classes that many others resemble have triggers of their own, beside which a backdoor's is small.
3. Where there is none, the pairs that stand out most of both their row and their column (`detect.centred_scores`), one
   for every second class, are put to the test of an all-to-all attack: one trigger is estimated on all of them. It must
   not be much larger than the single ones (`intrinsic_factor`). Other classes that it sends to a target of their own
   are added and the trigger estimated anew, until there are no more. Where it works for more classes than it was first
   made for, these are the pairs: only the attacker's trigger does this.
4. Otherwise a target with fewer seeds is that of an all-to-one attack if one trigger for them works, in the sense of
   2, for half of all classes. Where there is no such target either, a pair stands alone. Clean models too have such
   pairs, of similar classes: it counts from `lone_factor` times the threshold on, and leaves the verdict open below.
5. For every target one trigger is estimated on all of its sources. Where it is much larger than the single ones
   (`intrinsic_factor`) they do not share one, and only the source with the smallest trigger is kept (appendix C).
"""

import dataclasses
from typing import Any

import numpy as np

from jaxbd import detect, loop, pair_triggers
from jaxbd.base import UserError
from jaxbd.inversion import neural_cleanse, pt_red
from jaxbd.pair_triggers import METHODS, Lab, Pair, Search

NeuralCleanseConfig, PtRedConfig = neural_cleanse.Config, pt_red.Config
LEAST_PAIRS = 6
"""Pairs with a trigger without which none of them can be called unusually small."""
ROUNDS = 5
"""How often a trigger of several pairs is estimated anew because it works for more of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a scan over pairs.

    Attributes:
      methods: searches to run, of `METHODS`: patches and perturbations.
      targets: classes to search as targets; none stands for all. Scores compare pairs: leave some that are no targets.
      steps: at most so many steps of Neural Cleanse per pair; perturbation_steps: of PT-RED.
      batch_size: images per pair and step.
      joint_steps, joint_batch_size: of the estimates on several sources together, and of the last one for a target.
      joint_rate: success rate that the last one is made for, in place of the searches' own.
      slots, memory_budget: see `sweep.search`.
      threshold: anomaly score of a pair above which it is a seed (7; 3 for WaNet in appendix C).
      working_rate: least share of a source's held-out images that a trigger has to send to the target. A trigger stops
        at 90 % of the images it is made on, so on others it does less.
      group: seeds of one target that make it the target of an all-to-one attack.
      lone_factor: times the threshold, the score from which a pair counts that stands alone.
      intrinsic_factor: a joint trigger larger than this times the largest single one shows that the sources do not
        share a trigger (appendix C: 27.18 against 7.95).
      rival_factor: of several targets found by one search, those whose trigger is larger than this times the smallest
        are intrinsic backdoors, and are left out.
      least_images: images that a source class has to bring.
      neural_cleanse, pt_red: settings of the searches.
    """

    methods: tuple[str, ...] = METHODS
    targets: tuple[int, ...] = ()
    steps: int = 150
    perturbation_steps: int = 80
    batch_size: int = 16
    joint_steps: int = 200
    joint_batch_size: int = 32
    joint_rate: float = 0.95
    slots: int | None = None
    memory_budget: int | None = None
    threshold: float = 7.0
    working_rate: float = 0.5
    group: int = 3
    lone_factor: float = 2.0
    intrinsic_factor: float = 3.0
    rival_factor: float = 2.0
    least_images: int = 5
    neural_cleanse: NeuralCleanseConfig = dataclasses.field(default_factory=neural_cleanse.for_pairs)
    pt_red: PtRedConfig = dataclasses.field(default_factory=pt_red.Config)

    def __post_init__(self):
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) != len(self.methods):
            raise UserError(f"pairs: methods are {self.methods}; choose from {', '.join(METHODS)}, each once")
        counts = ("steps", "perturbation_steps", "batch_size", "joint_steps", "joint_batch_size", "least_images")
        low = [name for name in counts if getattr(self, name) < 1]
        if low:
            raise UserError(f"pairs: {low[0]} is {getattr(self, low[0])}; it must be at least 1")
        if not (0 < self.working_rate <= 1 and 0 < self.joint_rate <= 1):
            raise UserError("pairs: working_rate and joint_rate must be in (0, 1]")
        if not (self.threshold > 0 and self.group >= 2):
            raise UserError("pairs: need threshold > 0 and group >= 2")
        if not min(self.intrinsic_factor, self.rival_factor, self.lone_factor) >= 1:
            raise UserError("pairs: intrinsic_factor, rival_factor and lone_factor must be at least 1")


def groups(seeds: dict[str, dict[Pair, float]], group: int) -> dict[int, str]:
    """Targets of all-to-one attacks and the search that each goes to: rule 2 above."""
    found: dict[int, tuple[float, str]] = {}
    for method, scores in seeds.items():
        sizes = {t: sum(pair[1] == t for pair in scores) for _, t in scores}
        elsewhere = sum(size for size in sizes.values() if size < group)
        for target, size in sizes.items():
            if size >= group and elsewhere < max(sizes.values()):
                best = max(score for pair, score in scores.items() if pair[1] == target)
                found[target] = max(found.get(target, (0.0, method)), (best, method))
    return {target: method for target, (_, method) in sorted(found.items())}


class Rules:
    """The rules of this module on the pairs of one model; counts what their triggers cost."""

    def __init__(self, lab: Lab, config: Config, pairs: list[Pair]):
        self.lab, self.config, self.pairs = lab, config, pairs
        self.searches: dict[str, Search] = {}
        self.steps, self.image_steps, self.seconds = {}, 0, loop.Seconds(0.0, 0.0)
        for method in config.methods:
            self.sweep(method)

    def spend(self, images: int, seconds: loop.Seconds) -> None:
        self.image_steps += images
        self.seconds = loop.Seconds(*(a + b for a, b in zip(self.seconds, seconds, strict=True)))

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

    def joint(self, method: str, wish: dict[int, int], *, last: bool = False) -> pair_triggers.Joint:
        """One trigger for all of `wish`, source -> target; the `last` one is made for `joint_rate`."""
        config = self.config
        inversion = (self.lab.last_inversions if last else self.lab.inversions)[method]
        found = pair_triggers.joint(self.lab, method, inversion, wish, config.joint_steps, config.joint_batch_size)
        self.spend(config.joint_steps * config.joint_batch_size, found.seconds)
        return found

    def seeds(self, method: str) -> tuple[dict[Pair, float], list[Pair]]:
        """Pairs above the threshold: the scores of those that work on held-out images, and those that do not."""
        search = self.searches[method]
        above = [(int(s), int(t)) for s, t in np.argwhere(search.scores > self.config.threshold)]
        rate = lambda pair: pair_triggers.outcomes(self.lab, method, search.state(pair), pair[:1])[pair]
        working = [pair for pair in above if rate(pair) >= self.config.working_rate]
        return {pair: float(search.scores[pair]) for pair in working}, [p for p in above if p not in working]

    def shared(self, method: str, norm: float, wish: dict[int, int]) -> bool:
        """Whether a joint trigger is not much larger than the single ones of the pairs that it stands for."""
        sizes = [self.searches[method].norms[pair] for pair in wish.items()]
        return norm <= self.config.intrinsic_factor * np.max(sizes)

    def outcomes(self, method: str, state: Any) -> tuple[np.ndarray, dict[int, int]]:
        """Where a trigger sends images: shares [K, K] with 0 for staying, and source -> the other class most go to."""
        shares = np.nan_to_num(pair_triggers.outcomes(self.lab, method, state, range(self.lab.classes)))
        np.fill_diagonal(shares, 0)
        searched = self.searches[method].rows
        most = {source: int(target) for source, target in enumerate(shares.argmax(1)) if (source, target) in searched}
        return shares, most

    def all_to_one(self, method: str, target: int, seeds: dict[Pair, float]) -> tuple[list[Pair], float]:
        """The seeds of `target` and the sources that one trigger for all of them sends there too; its norm."""
        wish = {source: target for source, t in seeds if t == target}
        found = self.joint(method, wish)
        if self.shared(method, found.norm, wish):
            shares, most = self.outcomes(method, found.state)
            wish |= {s: t for s, t in most.items() if t == target and shares[s, t] >= self.config.working_rate / 2}
        return sorted(wish.items()), found.norm

    def small(self, found: dict[int, tuple[str, list[Pair], float]]) -> list[tuple[str, list[Pair]]]:
        """(search, its pairs) of the targets whose trigger is not much larger than the smallest of the same search."""
        least = {m: min(norm for other, _, norm in found.values() if other == m) for m, _, _ in found.values()}
        limit = self.config.rival_factor
        return [(m, pairs) for m, pairs, norm in found.values() if norm <= limit * least[m]]

    def all_to_all(self, method: str) -> list[Pair]:
        """The pairs that one trigger sends each to a target of its own, if more than it was first made for: rule 3."""
        wish = first = self.standing_out(method)
        for _ in range(ROUNDS):
            if len(wish) < max(len(first), 2):
                return []
            found = self.joint(method, wish)
            if not (found.reached and self.shared(method, found.norm, wish)):
                return []
            shares, most = self.outcomes(method, found.state)
            known, wish = wish, {s: t for s, t in wish.items() if most.get(s) == t}
            for source, target in most.items():  # one that works half as well as it must is worth a try
                if shares[source, target] >= self.config.working_rate / 2 and target not in wish.values():
                    wish.setdefault(source, target)
            if wish == known:
                break
        pairs = sorted(pair for pair in wish.items() if shares[pair] >= self.config.working_rate)
        return pairs if len(pairs) > len(first) else []

    def standing_out(self, method: str) -> dict[int, int]:
        """Source -> target of the pairs that stand out most, one for every second class, no two of one target."""
        scores = np.nan_to_num(detect.centred_scores(1 / self.searches[method].norms))
        wish: dict[int, int] = {}
        for flat in np.argsort(-scores, axis=None, kind="stable"):
            source, target = (int(side) for side in np.unravel_index(flat, scores.shape))
            if scores[source, target] <= 0 or 2 * len(wish) >= self.lab.classes:
                break
            if source not in wish and target not in wish.values():
                wish[source] = target
        return wish

    def detected(self, seeds: dict[str, dict[Pair, float]]) -> tuple[list[tuple[str, list[Pair]]], str]:
        """(search, its pairs) that rules 2 to 4 leave, and which rule it was, in words."""
        size = min(self.config.group, max(self.lab.classes - 1, 2))
        chosen = groups(seeds, size)
        if chosen:
            found = {target: (m, *self.all_to_one(m, target, seeds[m])) for target, m in chosen.items()}
            return self.small(found), f"trigger sizes of at least {size} pairs of one target"
        if not self.config.targets:
            found = [(method, self.all_to_all(method)) for method in self.searches]
            method, pairs = max(found, key=lambda each: len(each[1]))
            if pairs:
                return [(method, pairs)], "one trigger that sends classes to targets of their own"
        found = self.spreading(seeds, size)
        if found:
            return found, "a trigger of few pairs that sends other classes to the same target"
        return self.alone(seeds), "trigger sizes of pairs that stand alone"

    def spreading(self, seeds: dict[str, dict[Pair, float]], size: int) -> list[tuple[str, list[Pair]]]:
        """(search, pairs of one target) where a trigger for few seeds works for half of the classes: rule 4."""
        found: dict[int, tuple[str, list[Pair], float]] = {}
        for method in sorted(seeds, key=lambda method: -max(seeds[method].values(), default=0)):
            for target in sorted({t for _, t in seeds[method]} - {*found}):
                pairs, norm = self.all_to_one(method, target, seeds[method])
                if len(pairs) >= max(size, self.lab.classes / 2):
                    found[target] = method, pairs, norm
        return self.small(found)

    def alone(self, seeds: dict[str, dict[Pair, float]]) -> list[tuple[str, list[Pair]]]:
        """(search, pairs) of the search with the highest score, if high enough for pairs that stand alone."""
        least = self.config.lone_factor * self.config.threshold
        best = max(seeds, key=lambda method: max(seeds[method].values(), default=0))
        pairs = sorted(pair for pair, score in seeds[best].items() if score > least)
        return [(best, pairs)] if pairs else []

    def doubts(self, seeds: dict[str, dict[Pair, float]], failed: bool) -> list[str]:
        """What leaves the verdict open where no attack was found, in words."""
        doubts = []
        lone = sorted({pair for scores in seeds.values() for pair in scores})
        if lone:
            named = ", ".join(f"{source} -> {target}" for source, target in lone)
            doubts.append(f"above {self.config.threshold:g} only pairs that stand alone: {named}")
        if failed:
            doubts.append("a pair above the threshold has a trigger that does not work on held-out images")
        few = [method for method, search in self.searches.items() if np.isfinite(search.norms).sum() < LEAST_PAIRS]
        if few:
            doubts.append(f"{few[0]} found triggers for fewer than {LEAST_PAIRS} pairs, too few to compare")
        return doubts
