"""Scans for a backdoor pair by pair: a trigger for every ordered pair of classes (Li et al. 2023,
section 4.2).

An attack may send every class to one target, or every class to a target of its own; only pairs
distinguish the two. The statistic is the size of the trigger that sends images of one class to
another, which is small for a backdoor. `pair_rules` describes how the searches for patches and for
perturbations are combined.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Batch, Evidence, Inversion, Key, Suspect, UserError, check_targets
from jaxbd.detection import detect
from jaxbd.inversion import margin as margins
from jaxbd.pipelines import margin_scan, pair_triggers, pair_verdict
from jaxbd.pipelines.margin_scan import MarginScan
from jaxbd.pipelines.pair_rules import Config, Rules
from jaxbd.pipelines.pair_triggers import METHODS, Lab, Pair
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run

Stamp = Callable[[Key, Any, Array], Array]
"""(key, trigger_params, images) -> images"""


class Estimate(NamedTuple):
    """A trigger estimated for one target.

    Attributes:
      method: the search that made it; "plain" for a patch of one colour, see rule 7 of
        `pair_rules`.
      evidence: target, source classes, stamp, and the search's state.
      norm: L1 norm of the mask (of a plain patch its area), or L2 norm of the perturbation.
      attack_success_rate: on held-out images of the sources; nan without any.
    """

    method: str
    evidence: Evidence
    norm: float
    attack_success_rate: float


class PairScan(NamedTuple):
    """Result of a scan over pairs.

    Attributes:
      verdict: "backdoored" if the rules name pairs and their target shows a second sign, see
        `pair_verdict`; "inconclusive" if there is only one sign, if a score exceeds the threshold
        but the trigger fails on held-out images, or if the searches lacked the power to find a
        backdoor; else "clean".
      targets: detected target classes, ascending.
      leads: classes with one sign: small triggers, or a margin that stands out.
      pairs: detected (source, target).
      setting: see `detect.setting`.
      decided_by: the step that decided the verdict, in words.
      statistics: {search: [K, K] (source, target)}: 1 / norm of the pair's trigger; 0 if none was
        found; nan on the diagonal and for pairs that were not searched.
      scores: {search: [K, K]}, see `detect.pair_scores`.
      triggers: {target or lead: estimate}, if small triggers were found.
      others: the same, estimated by the other search, if that trigger works as well.
      missing: classes without images, which could not be searched as sources.
      steps: {search: total steps of all pairs}.
      image_steps: images pushed through the victim with a gradient.
      seconds: compile and run time of the searches and joint estimates.
      margin: result of the search without data; None if there are too few classes for it.
    """

    verdict: detect.Verdict
    targets: list[int]
    leads: list[int]
    pairs: list[Pair]
    setting: detect.Setting | None
    decided_by: str
    statistics: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    triggers: dict[int, Estimate]
    others: dict[int, Estimate]
    missing: tuple[int, ...]
    steps: dict[str, int]
    image_steps: int
    seconds: Seconds
    margin: MarginScan | None = None


def scan(
    run: Run, key: Key, suspect: Suspect, search: Batch, held_out: Batch, config: Config
) -> PairScan:
    """Scans a net pair by pair; nothing but its weights need be known.

    Args:
      run: reports and saves the searches and estimates; each is one stage.
      search: clean images to optimise the triggers on (uint8 or float).
      held_out: other clean images, to judge them on.
    Raises: UserError when a class has some images but fewer than `config.least_images`, when no
      class has any, or when a target is out of range; FloatingPointError when a pair diverges.
    """
    pairs, missing = list_pairs(np.asarray(search.labels), suspect.classes, config)
    lab = Lab(
        run,
        key,
        suspect,
        Batch(jnp.asarray(search.images), jnp.asarray(search.labels)),
        Batch(np.asarray(held_out.images), np.asarray(held_out.labels)),
        _inversions(suspect, config, config.methods, last=False),
        _inversions(suspect, config, config.methods, last=True),
    )
    rules = Rules(lab, config, pairs)
    seeds = {method: rules.find_seeds(method) for method in config.methods}
    return _summarise(rules, seeds, missing, _search_margins(rules))


def _search_margins(rules: Rules) -> MarginScan | None:
    """Runs the search without data; None if there are too few classes to compare."""
    lab = rules.lab
    if lab.suspect.classes < margins.LEAST_CLASSES:
        return None
    key = jax.random.fold_in(lab.key, 40)
    found = margin_scan.scan(lab.run, key, lab.suspect, rules.config.margin)
    rules.spend(found.image_steps, found.seconds)
    return found


def _inversions(
    suspect: Suspect, config: Config, methods: Sequence[str], *, last: bool
) -> dict[str, Inversion]:
    """{method: inversion}; with `last`, for estimates that must reach `joint_rate`."""
    settings = {"neural-cleanse": config.neural_cleanse, "pt-red": config.pt_red}
    if last:
        settings = {
            "neural-cleanse": dataclasses.replace(
                config.neural_cleanse, attack_threshold=config.joint_rate
            ),
            "pt-red": dataclasses.replace(config.pt_red, success_rate=config.joint_rate),
        }
    return {
        method: pair_triggers.MAKE[method](suspect.net, suspect.image_shape, settings[method])
        for method in methods
    }


def list_pairs(
    labels: np.ndarray, classes: int, config: Config
) -> tuple[list[Pair], tuple[int, ...]]:
    """Lists (the pairs to search with images of `labels` [N], the classes without images)."""
    check_targets(config.targets, classes)
    counts = np.bincount(labels, minlength=classes)
    few = [source for source in range(classes) if 0 < counts[source] < config.least_images]
    if few:
        raise UserError(
            f"class {few[0]} has {counts[few[0]]} image(s) to search with, {config.least_images}"
            " are needed of each class; give more, or none of that class"
        )
    targets = sorted({*config.targets}) or range(classes)
    pairs = [(s, t) for t in targets for s in range(classes) if s != t and counts[s]]
    if not pairs:
        raise UserError(
            f"no images to search with; give at least {config.least_images} of each class"
        )
    return pairs, tuple(source for source in range(classes) if not counts[source])


def _estimate(rules: Rules, method: str, target: int, sources: list[int]) -> Estimate:
    """Rule 5: estimates one trigger for `target` on all its sources, or on the easiest source if
    they do not share a trigger."""
    wish = dict.fromkeys(sources, target)
    found = rules.fit_joint(method, wish, last=True)
    if len(sources) > 1 and not rules.is_shared(method, found.norm, wish):
        sources = [min(sources, key=lambda source: rules.searches[method].norms[source, target])]
        found = rules.fit_joint(method, {sources[0]: target}, last=True)
    return _judge(rules, method, target, sources, found)


def _judge(
    rules: Rules, method: str, target: int, sources: list[int], found: pair_triggers.Joint
) -> Estimate:
    """Wraps a joint trigger with its rate on held-out images."""
    rate = _mean_share(
        pair_triggers.measure_outcomes(rules.lab, method, found.state, sources),
        dict.fromkeys(sources, target),
    )
    stamp = rules.lab.inversions[method].stamp
    evidence = Evidence(target, tuple(sources), stamp, found.state)
    return Estimate(method, evidence, found.norm, rate)


def _mean_share(shares: np.ndarray, wish: Mapping[int, int]) -> float:
    """Mean of `shares` [K, K] over the pairs in `wish` that have one; nan if none has."""
    rates = np.array([shares[pair] for pair in wish.items()])
    return float(rates[np.isfinite(rates)].mean()) if np.isfinite(rates).any() else float("nan")


def _plain(rules: Rules, estimate: Estimate) -> Estimate | None:
    """Rule 7: a patch of one colour to replace a small speckled one; None if it does not work as
    well."""
    evidence, config = estimate.evidence, rules.config
    height, width, _ = rules.lab.suspect.image_shape
    box = pair_triggers.find_box(evidence.trigger_params)
    if box is None or math.prod(box[2:] - box[:2]) > config.plain_share * height * width:
        return None
    wish = dict.fromkeys(evidence.sources, evidence.target)
    name = f"plain patch: class {evidence.target}"
    inversion, fitted = pair_triggers.fit_plain_patch(rules.lab, box, wish, config.effort(), name)
    rules.spend(config.joint_steps * config.joint_batch_size, fitted.seconds)
    shares = pair_triggers.measure_shares(rules.lab, inversion.stamp, fitted.state, list(wish))
    rate = _mean_share(shares, wish)
    if not rate >= estimate.attack_success_rate:
        return None
    evidence = evidence._replace(stamp=inversion.stamp, trigger_params=fitted.state)
    return Estimate("plain", evidence, float(math.prod(box[2:] - box[:2])), rate)


def _other(rules: Rules, estimate: Estimate) -> Estimate | None:
    """Rule 6: the other search's trigger for the same pairs; None if it does not work or is much
    larger than its single ones."""
    target = estimate.evidence.target
    wish = dict.fromkeys(estimate.evidence.sources, target)
    for method in rules.searches.keys() - {estimate.method}:
        found = rules.fit_joint(method, wish, last=True)
        other = _judge(rules, method, target, list(wish), found)
        if other.attack_success_rate >= rules.config.working_rate and rules.is_shared(
            method, found.norm, wish
        ):
            return other
    return None


def estimates(found: PairScan, target: int) -> list[Estimate]:
    """All estimates for a detected target."""
    return [found.triggers[target], *([found.others[target]] if target in found.others else [])]


def search_again(
    run: Run,
    key: Key,
    suspect: Suspect,
    search: Batch,
    first: Estimate,
    config: Config,
    name: str = "search again",
) -> tuple[Estimate, Seconds]:
    """Searches a repaired net for a trigger from the sources of `first` to its target.

    Args:
      suspect: the repaired net.
      name: name of the search as a stage of `run`.
    Returns: (the estimate, with its rate on `search`; seconds).
    """
    # a plain patch replaced a trigger of Neural Cleanse, see rule 7
    method = first.method if first.method in METHODS else "neural-cleanse"
    inversions = _inversions(suspect, config, (method,), last=True)
    batch = Batch(jnp.asarray(search.images), jnp.asarray(search.labels))
    held = Batch(np.asarray(search.images), np.asarray(search.labels))
    lab = Lab(run, key, suspect, batch, held, inversions, inversions)  # nothing is held out here
    wish = dict.fromkeys(first.evidence.sources, first.evidence.target)
    inversion = inversions[method]
    found = pair_triggers.fit_joint(lab, method, inversion, wish, config.effort(), name)
    shares = pair_triggers.measure_outcomes(lab, method, found.state, list(wish))
    evidence = first.evidence._replace(stamp=inversion.stamp, trigger_params=found.state)
    return Estimate(method, evidence, found.norm, _mean_share(shares, wish)), found.seconds


def _summarise(
    rules: Rules,
    tried: dict[str, tuple[dict[Pair, float], list[Pair]]],
    missing: tuple[int, ...],
    margin: MarginScan | None,
) -> PairScan:
    """Combines `tried`, each search's seeds and failed pairs, with the margins into the result."""
    seeds = {method: working for method, (working, _) in tried.items()}
    found, rule, generalises = rules.find_attack(seeds)
    triggers, others = _estimate_all(rules, found)
    doubts = rules.list_doubts(seeds, any(failed for _, failed in tried.values()))
    words = f"{' and '.join(sorted({m for m, _ in found}) or list(rules.searches))}: "
    words += rule if found else f"no pair scores above {rules.config.threshold:g}"
    classes = rules.lab.suspect.classes
    aims = sorted({target for _, target in rules.pairs})
    sized = pair_verdict.Sized(sorted(triggers), generalises, words, doubts, classes, aims)
    weighed = pair_verdict.weigh(sized, None if margin is None else margin.outliers)
    pairs = sorted((s, t) for t in weighed.targets for s in triggers[t].evidence.sources)
    words = weighed.words
    if missing:
        words += f"; no images of class {', '.join(map(str, missing))}, not searched as a source"
    return PairScan(
        verdict=weighed.verdict,
        targets=weighed.targets,
        leads=weighed.leads,
        pairs=pairs,
        setting=detect.setting(pairs, classes),
        decided_by=words,
        # 1 / inf = 0 for pairs without a trigger
        statistics={method: 1 / search.norms for method, search in rules.searches.items()},
        scores={method: search.scores for method, search in rules.searches.items()},
        triggers=triggers,
        others=others,
        missing=missing,
        steps=rules.steps,
        image_steps=rules.image_steps,
        seconds=rules.seconds,
        margin=margin,
    )


def _estimate_all(
    rules: Rules, found: list[tuple[str, list[Pair]]]
) -> tuple[dict[int, Estimate], dict[int, Estimate]]:
    """Estimates, by target, the trigger and the other search's trigger for the same pairs."""
    triggers: dict[int, Estimate] = {}
    for method, pairs in found:
        for target in sorted({t for _, t in pairs}):
            sources = [s for s, t in pairs if t == target]
            triggers[target] = _estimate(rules, method, target, sources)
    patches = {target: _plain(rules, estimate) for target, estimate in triggers.items()}
    triggers |= {target: patch for target, patch in patches.items() if patch is not None}
    # a plain patch replaces the other search's trigger too (rule 7)
    others = {t: _other(rules, each) for t, each in triggers.items() if patches[t] is None}
    return (
        dict(sorted(triggers.items())),
        {target: other for target, other in sorted(others.items()) if other is not None},
    )
