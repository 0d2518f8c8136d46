"""Looks for a backdoor pair by pair: a trigger for every ordered pair of classes (Li et al. 2023, section 4.2).

An attack may send every class to one target, or every class to a target of its own; only pairs tell the two apart. What
is measured is how large a trigger has to be that sends the images of one class to another. A backdoor's is small. How
the searches for patches and for perturbations become one answer is written down in `pair_rules`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import detect, loop, pair_triggers, stages
from jaxbd.base import Array, Batch, Inversion, Key, Net, UserError, Variables, check_targets
from jaxbd.pair_rules import Config, Rules
from jaxbd.pair_triggers import METHODS, Lab, Pair
from jaxbd.remembered import remembered

__all__ = [
    "METHODS",
    "Config",
    "Estimate",
    "Pair",
    "PairScan",
    "Progress",
    "again",
    "estimates",
    "scan",
    "searched",
    "together",
]

Stamp = Callable[[Key, Any, Array], Array]
"""(key, model, images) -> images"""

Progress = Callable[[str, int, int], None]
"""(what is running, steps done, steps in all)"""


class Estimate(NamedTuple):
    """A trigger estimated for one target.

    Attributes:
      method: the search behind it; "plain" for a patch of one colour, see rule 7 of `pair_rules`.
      stamp: (key, model, images) -> images; model: its state.
      sources: classes whose images it was made on.
      norm: L1 norm of the mask (of a plain patch its area), or L2 norm of the perturbation.
      attack_success_rate: on held-out images of the sources; nan without any.
    """

    method: str
    stamp: Stamp
    model: Any
    sources: tuple[int, ...]
    norm: float
    attack_success_rate: float


class PairScan(NamedTuple):
    """What a scan over pairs found.

    Attributes:
      verdict: "backdoored" where there are pairs; "inconclusive" where a score exceeds the threshold but no trigger
        works on held-out images, or triggers were found for too few pairs to compare; otherwise "clean".
      targets: detected target classes, ascending; pairs: detected (source, target).
      setting: see `detect.setting`.
      decided_by: the step whose numbers decided, in words.
      statistics: by search, [K, K] (source, target): 1 / norm of the pair's trigger; 0 where none was found; nan on the
        diagonal and where nothing was searched.
      scores: by search, [K, K], see `detect.pair_scores`.
      triggers: target -> estimate.
      others: target -> the other search's estimate for the same sources, where that works as well.
      missing: classes without images, that could not be searched as sources.
      steps: by search, steps of all pairs together; image_steps: images pushed through the victim with a gradient.
      seconds: compile and run of the searches and joint estimates.
    """

    verdict: detect.Verdict
    targets: list[int]
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
    seconds: loop.Seconds


def scan(
    key: Key,
    net: Net,
    variables: Variables,
    image_shape: tuple[int, int, int],
    classes: int,
    search: Batch,
    held_out: Batch,
    config: Config,
    progress: Progress | None = None,
    keep: stages.Keep = stages.through,
) -> PairScan:
    """Looks for a backdoor in a net of which nothing is known but its weights, pair by pair.

    Args:
      image_shape: (H, W, C); classes: K.
      search: clean images the triggers are made on (uint8 or float); held_out: others, on which they are judged.
      keep: what may save the searches and estimates and go on from there.
    Raises: UserError when a class brings some images but fewer than `config.least_images`, when no class brings any, or
      on a target out of range; FloatingPointError when a pair diverges.
    """
    pairs, missing = searched(np.asarray(search.labels), classes, config)
    inversions, joint = (_inversions(net, image_shape, config, config.methods, last=last) for last in (False, True))
    lab = Lab(
        key,
        net,
        variables,
        classes,
        Batch(jnp.asarray(search.images), jnp.asarray(search.labels)),
        Batch(np.asarray(held_out.images), np.asarray(held_out.labels)),
        inversions,
        joint,
        progress or (lambda *_: None),
        keep,
    )
    rules = Rules(lab, config, pairs)
    seeds = {method: rules.seeds(method) for method in config.methods}
    return _result(rules, image_shape, seeds, missing)


def _inversions(net, image_shape, config: Config, methods: Sequence[str], *, last: bool) -> dict[str, Inversion]:
    """The searches by method; the `last` ones have to reach `joint_rate`."""
    settings = {"neural-cleanse": config.neural_cleanse, "pt-red": config.pt_red}
    if last:
        settings = {
            "neural-cleanse": dataclasses.replace(config.neural_cleanse, attack_threshold=config.joint_rate),
            "pt-red": dataclasses.replace(config.pt_red, success_rate=config.joint_rate),
        }
    return {method: pair_triggers.MAKE[method](net, image_shape, settings[method]) for method in methods}


def searched(labels: np.ndarray, classes: int, config: Config) -> tuple[list[Pair], tuple[int, ...]]:
    """The pairs that a scan searches with images of `labels` [N], and the classes without any."""
    check_targets(config.targets, classes)
    counts = np.bincount(labels, minlength=classes)
    few = [source for source in range(classes) if 0 < counts[source] < config.least_images]
    if few:
        raise UserError(
            f"class {few[0]} has {counts[few[0]]} image(s) to search with, {config.least_images} are needed of each "
            "class; bring more, or none of that class"
        )
    targets = sorted({*config.targets}) or range(classes)
    pairs = [(s, t) for t in targets for s in range(classes) if s != t and counts[s]]
    if not pairs:
        raise UserError(f"no images to search with; bring at least {config.least_images} of each class")
    return pairs, tuple(source for source in range(classes) if not counts[source])


def _estimate(rules: Rules, method: str, target: int, sources: list[int]) -> Estimate:
    """One trigger for `target` on all its sources, or on the easiest where they do not share one: rule 5."""
    wish = dict.fromkeys(sources, target)
    found = rules.joint(method, wish, last=True)
    if len(sources) > 1 and not rules.shared(method, found.norm, wish):
        sources = [min(sources, key=lambda source: rules.searches[method].norms[source, target])]
        found = rules.joint(method, {sources[0]: target}, last=True)
    return _judged(rules, method, target, sources, found)


def _judged(rules: Rules, method: str, target: int, sources: list[int], found: pair_triggers.Joint) -> Estimate:
    """A trigger of several pairs with its rate on held-out images."""
    rate = _rate(pair_triggers.outcomes(rules.lab, method, found.state, sources), dict.fromkeys(sources, target))
    stamp = rules.lab.inversions[method].stamp
    return Estimate(method, stamp, found.state, tuple(sources), found.norm, rate)


def _rate(shares: np.ndarray, wish: Mapping[int, int]) -> float:
    """Mean share [K, K] of the pairs in `wish` that could be judged; nan without any."""
    rates = np.array([shares[pair] for pair in wish.items()])
    return float(rates[np.isfinite(rates)].mean()) if np.isfinite(rates).any() else float("nan")


def _plain(rules: Rules, image_shape: tuple[int, int, int], target: int, estimate: Estimate) -> Estimate | None:
    """A patch of one colour in place of a small speckled one; None where that does not work as well: rule 7."""
    box = pair_triggers.box(estimate.method, estimate.model)
    if box is None or math.prod(box[2:] - box[:2]) > rules.config.plain_share * math.prod(image_shape[:2]):
        return None
    wish, config = dict.fromkeys(estimate.sources, target), rules.config
    inversion, state, seconds = pair_triggers.plain_patch(
        rules.lab, image_shape, box, wish, config.joint_steps, config.joint_batch_size, f"plain patch: class {target}"
    )
    rules.spend(config.joint_steps * config.joint_batch_size, seconds)
    rate = _rate(pair_triggers.sent(rules.lab, inversion.stamp, state, list(wish)), wish)
    area = float(math.prod(box[2:] - box[:2]))
    found = Estimate("plain", inversion.stamp, state, estimate.sources, area, rate)
    return found if rate >= estimate.attack_success_rate else None


def _other(rules: Rules, target: int, estimate: Estimate) -> Estimate | None:
    """What the other search makes of the same pairs; None where that does not work as well: rule 6."""
    wish = dict.fromkeys(estimate.sources, target)
    for method in rules.searches.keys() - {estimate.method}:
        found = rules.joint(method, wish, last=True)
        other = _judged(rules, method, target, list(wish), found)
        if other.attack_success_rate >= rules.config.working_rate and rules.shared(method, found.norm, wish):
            return other
    return None


def estimates(found: PairScan, target: int) -> list[Estimate]:
    """All that was estimated for a detected target."""
    return [found.triggers[target], *([found.others[target]] if target in found.others else [])]


def again(
    key: Key,
    net: Net,
    variables: Variables,
    classes: int,
    image_shape: tuple[int, int, int],
    search: Batch,
    first: Estimate,
    target: int,
    config: Config,
    progress: Progress | None = None,
    keep: stages.Keep = stages.through,
    label: str = "what is left",
) -> tuple[Estimate, loop.Seconds]:
    """What leads to `target` in a net after its correction: one trigger for the sources of `first`, the first estimate.

    Args:
      variables: of the corrected net.
      keep, label: what may save the search and go on from there, and the search's name to it.
    Returns: the estimate (its rate is that on `search`), and the seconds it took.
    """
    method = first.method if first.method in METHODS else "neural-cleanse"
    inversions = _inversions(net, image_shape, config, (method,), last=True)
    batch = Batch(jnp.asarray(search.images), jnp.asarray(search.labels))
    held = Batch(np.asarray(search.images), np.asarray(search.labels))
    lab = Lab(key, net, variables, classes, batch, held, inversions, inversions, progress or (lambda *_: None), keep)
    wish = dict.fromkeys(first.sources, target)
    sizes = config.joint_steps, config.joint_batch_size
    found = pair_triggers.joint(lab, method, inversions[method], wish, *sizes, label)
    rate = _rate(pair_triggers.outcomes(lab, method, found.state, list(wish)), wish)
    return Estimate(method, inversions[method].stamp, found.state, first.sources, found.norm, rate), found.seconds


def together(estimates: Sequence[Estimate]) -> tuple[Stamp, Any]:
    """(stamp, model) of several estimates: one of them is drawn for each image."""
    if len(estimates) == 1:
        return estimates[0].stamp, estimates[0].model
    return _either(tuple(each.stamp for each in estimates)), tuple(each.model for each in estimates)


@remembered(32)
def _either(stamps: tuple[Stamp, ...]) -> Stamp:
    """Stamps each image with one of several triggers; their models are given as a tuple."""

    def stamp(key: Key, models: tuple[Any, ...], images: Array) -> Array:
        choose_key, *keys = jax.random.split(key, 1 + len(stamps))
        stamped = jnp.stack([one(*given, images) for one, *given in zip(stamps, keys, models, strict=True)])
        chosen = jax.random.randint(choose_key, images.shape[:1], 0, len(stamps))
        return stamped[chosen, jnp.arange(images.shape[0])]

    return stamp


def _result(
    rules: Rules, image_shape, tried: dict[str, tuple[dict[Pair, float], list[Pair]]], missing: tuple[int, ...]
) -> PairScan:
    """What `tried`, each search's seeds and pairs that did not work, come to."""
    seeds = {method: working for method, (working, _) in tried.items()}
    found, rule = rules.detected(seeds)
    triggers = {}
    for method, pairs in found:
        for target in sorted({t for _, t in pairs}):
            triggers[target] = _estimate(rules, method, target, [s for s, t in pairs if t == target])
    patches = {target: _plain(rules, image_shape, target, estimate) for target, estimate in triggers.items()}
    triggers |= {target: patch for target, patch in patches.items() if patch is not None}
    others = {t: None if patches[t] else _other(rules, t, estimate) for t, estimate in triggers.items()}
    pairs = sorted((source, target) for target, estimate in triggers.items() for source in estimate.sources)
    doubts = rules.doubts(seeds, any(failed for _, failed in tried.values()))
    verdict = "backdoored" if found else "inconclusive" if doubts else "clean"
    words = f"{' and '.join(sorted({m for m, _ in found}) or list(rules.searches))}: "
    words += rule if found else "; ".join(doubts) or f"no pair scores above {rules.config.threshold:g}"
    if missing:
        words += f"; no images of class {', '.join(map(str, missing))}, not searched as a source"
    return PairScan(
        verdict,
        sorted(triggers),
        pairs,
        detect.setting(pairs, rules.lab.classes),
        words,
        {method: 1 / search.norms for method, search in rules.searches.items()},
        {method: search.scores for method, search in rules.searches.items()},
        dict(sorted(triggers.items())),
        {target: other for target, other in sorted(others.items()) if other is not None},
        missing,
        rules.steps,
        rules.image_steps,
        rules.seconds,
    )
