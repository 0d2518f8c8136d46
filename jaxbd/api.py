"""The public Python interface: open a model, scan it, repair it, evaluate it, save it.

Composes the pipelines, with the same checks as the command line.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import methods
from jaxbd.base import Attack, Batch, Dataset, Evidence, Suspect, UserError
from jaxbd.caching import cached
from jaxbd.detection.detect import Verdict
from jaxbd.detection.guard import Verdicts
from jaxbd.interop import forms, guarded, matching, preprocess
from jaxbd.interop import load as models
from jaxbd.metrics import evaluate as measuring
from jaxbd.metrics.evaluate import Rates
from jaxbd.pipelines import evidence as evidences
from jaxbd.pipelines import hold, pair_rules, pair_scan
from jaxbd.pipelines import repair as repairs
from jaxbd.pipelines import scan as scanning
from jaxbd.training.run import Run

SEARCH_SHARE = 0.75
"""Share of the given images used for searching and repairing; the rest is held out for judging."""


class Found(NamedTuple):
    """Result of `scan`.

    Attributes:
      verdict: "backdoored", "clean" or "inconclusive".
      targets: classes that a backdoor leads to.
      evidence: all recovered triggers that work, for every target; the input of `repair`. A target
        may have several.
      decided_by: the step that decided the verdict, in words.
      accuracy: clean accuracy of the suspect on the given images.
      baseline: [K], share of the held-out images of other classes that the suspect assigns to each
        class without any trigger.
      details: the full result, `pipelines.scan.Scan` or `pipelines.pair_scan.PairScan`.
    """

    verdict: Verdict
    targets: list[int]
    evidence: list[Evidence]
    decided_by: str
    accuracy: float
    baseline: np.ndarray
    details: Any


class Repaired(NamedTuple):
    """Result of `repair`.

    Attributes:
      suspect: the repaired net, ready for `scan`, `evaluate` and `save_model`.
      before, after: rates on held-out images, with the trigger of the first piece of evidence if
        there is any.
      details: the full result, `pipelines.hold.Held` of method "auto" with a trigger, else
        `pipelines.repair.Repaired`.
    """

    suspect: Suspect
    before: Rates
    after: Rates
    details: repairs.Repaired | hold.Held


def open_model(
    path: str | os.PathLike, images: Any = None, labels: Any = None, **settings: Any
) -> Suspect:
    """Reads a model file of any known kind without executing anything in it.

    Args:
      images: [N, H, W, C] uint8, or float in [0, 1]. If given with labels [N], they determine the
        input normalisation: the one under which the model classifies them.
      labels: [N].
      settings: `arch`, `mean`, `std`, `image_shape`, see `interop.load.open_model`.
    Raises: UserError naming the file and what is wrong, or when the model does not classify the
      images.
    """
    model = models.open_model(path, **settings)
    if images is None:
        return models.suspect_of(model)
    stated = model.states_normalisation() or "mean" in settings
    given = (model.spec.mean, model.spec.std) if stated else None

    suspect = models.suspect_of(model)

    def read(shape: tuple[int, ...]) -> Batch:
        wanted = shape if shape[0] else np.shape(images)[1:]
        return _check_images(suspect._replace(image_shape=wanted), images, labels)

    def match(candidate: models.Model, constants: preprocess.Constants | None) -> matching.Matched:
        batch = read(candidate.spec.image_shape)
        given_only = stated or constants is not None
        table = preprocess.check(
            candidate, preprocess.sample(batch), constants or given, only_given=given_only
        )
        return matching.Matched(candidate, Dataset(*batch, (), "images"), table)

    model, _, table = forms.choose(model, match, read)
    assert table is not None  # `match` measures every form
    return models.suspect_of(preprocess.adopt(model, table))


def save_model(path: str | os.PathLike, suspect: Suspect) -> str | None:
    """Writes a suspect in the format given by the suffix: .pth, .safetensors, or a jaxbd folder.

    Preserves the names, order, types and nesting of the file it was read from.

    Returns: a note if the format cannot hold something, else None.
    Raises: UserError when it cannot be written, or the net was not read from a file.
    """
    if suspect.source is None:
        raise UserError("this net was not read from a file; write its variables with Orbax")
    return models.save_model(path, suspect.source, suspect.variables)


def scan(
    suspect: Suspect,
    images: Any,
    labels: Any,
    *,
    method: str = "auto",
    seed: int = 0,
    run: Run | None = None,
    **settings: Any,
) -> Found:
    """Scans a model for a backdoor and the class that it leads to.

    Args:
      images: at least a few hundred clean images [N, H, W, C], uint8 or float in [0, 1].
      labels: [N].
      method: "auto", "mesa", "neural-cleanse" or "pixel"; over pairs of classes "pairs",
        "neural-cleanse-pairs" or "pt-red".
      run: how to report progress and save checkpoints; default: not at all.
      settings: fields of `pipelines.scan.ScanConfig`, or of `pipelines.pair_rules.Config`.
    Raises: UserError when there are too few images, or the suspect classifies them no better than
      chance, which makes any search meaningless.
    """
    batch = _check_images(suspect, images, labels)
    accuracy = _check_accuracy(suspect, batch)
    search, held_out = _divide(batch, seed)
    key, run = jax.random.key(seed), run or Run()
    frozen = suspect.freeze()
    if method in pair_rules.SEARCHES:
        predicted = measuring.logits(suspect.net, suspect.variables, held_out).argmax(-1)
        baseline = measuring.baseline(predicted, np.asarray(held_out.labels), suspect.classes)
        config = pair_rules.Config(method=cast(pair_rules.Method, method), **settings)
        pairs = pair_scan.scan(run, key, frozen, search, held_out, config)
        known = [e.evidence for t in pairs.targets for e in pair_scan.estimates(pairs, t)]
        verdict, targets, rule = pairs.verdict, pairs.targets, pairs.decided_by
        return Found(verdict, targets, known, rule, accuracy, baseline, pairs)
    config = dataclasses.replace(scanning.PRESETS["quick"], method=method, **settings)
    found = scanning.scan(run, key, frozen, search, held_out, config)
    decision, rule = found.decision, found.decided_by
    known = [e for target in decision.targets for e in evidences.every_trigger(found, target)]
    return Found(decision.verdict, decision.targets, known, rule, accuracy, found.baseline, found)


def repair(
    suspect: Suspect,
    images: Any = None,
    labels: Any = None,
    evidence: Found | Sequence[Evidence] = (),
    *,
    method: str = hold.AUTO,
    config: Any = None,
    batch_size: int = 64,
    seed: int = 0,
    run: Run | None = None,
) -> Repaired:
    """Removes a backdoor.

    Args:
      images, labels: clean images, a quarter of which is held out for judging; None for methods
        that need none.
      evidence: the result of `scan`, or triggers.
      method: a repair listed by `jaxbd methods`, or "auto". "auto" unlearns the triggers in rounds
        and searches for remaining ones after each, as `jaxbd repair` does. After an inconclusive
        scan it does so for the classes with one sign, or uses `clip` if it recovered no trigger.
      config: settings of the method, for "auto" `pipelines.hold.Config`; None for its defaults.
    Raises: UserError when something that the method needs is missing.
    """
    known = list(evidence.evidence if isinstance(evidence, Found) else evidence)
    if method == hold.AUTO:
        config = hold.Config() if config is None else config
        known = known or _take_leads(evidence)
        if not known:
            _check_doubtful(evidence)
            chosen, config = hold.without_trigger(config.max_drop)
            method = chosen.name
    clean = judge = None
    if images is not None:
        clean, judge = _divide(_check_images(suspect, images, labels), seed)
    key, run = jax.random.fold_in(jax.random.key(seed), 10), run or Run()
    if method == hold.AUTO:
        if clean is None:
            raise UserError("auto needs clean images; give images and labels")
        norms = _norms_of(evidence)
        more: dict[str, Any] = {"held": judge, "norms": norms, "batch_size": batch_size}
        details = hold.repair(run, key, suspect, clean, known, config, **more)
        repaired = suspect._replace(variables=details.repaired.variables)
    else:
        chosen = methods.find("repair", method)
        config = chosen.preset() if config is None else config
        given = clean if "clean" in chosen.needs else None
        details = chosen.driver.repair(
            run, key, suspect, given, known, method, config, batch_size=batch_size
        )
        repaired = _with_guard(suspect, details)
    one = known[0] if known else None
    before, after = (
        _rates(each, judge, one) if judge is not None else _no_rates()
        for each in (suspect, repaired)
    )
    return Repaired(repaired, before, after, details)


def evaluate(suspect: Suspect, images: Any, labels: Any, evidence: Evidence | None = None) -> Rates:
    """Measures clean accuracy on images [N, H, W, C] with labels [N], and the rates of a trigger if
    given."""
    return _rates(suspect, _check_images(suspect, images, labels), evidence)


def guard(suspect: Suspect, images: Any) -> Verdicts:
    """Classifies images [N, H, W, C] with a guarded model, made by `repair(method="bna")`.

    Returns: labels, the suspect's own labels, which images are flagged, and which were checked by a
      corrected net; [N] each, NumPy.
    Raises: UserError for a model without a guard, or images that do not fit it.
    """
    found = getattr(suspect.source, "guard", None)
    if found is None:
        raise UserError("this model has no guard; make one with repair(..., method='bna')")
    judge = guarded.judge(_plain_net(suspect), found.targets)
    images = _check_pixels(suspect, images)
    data = Batch(images, np.zeros(len(images), np.int32))  # labels are not used
    asked = measuring.per_image(
        jax.random.key(0), _ignore_key(judge), suspect.variables, data, batch_size=64
    )
    return Verdicts(*asked)


@cached(64)
def _ignore_key(judge: Any) -> Any:
    """`judge` as `per_image` calls it; the same function each time, so that it compiles once."""
    return lambda _, variables, images: judge(variables, images)


def _plain_net(suspect: Suspect) -> Any:
    return guarded.net(suspect.source.spec, None)


def _take_leads(evidence: Found | Sequence[Evidence]) -> list[Evidence]:
    """The triggers of classes with one sign, if the evidence is an inconclusive scan over
    classes."""
    if not isinstance(evidence, Found) or evidence.verdict != "inconclusive":
        return []
    scan = evidence.details
    return evidences.of_leads(scan) if isinstance(scan, scanning.Scan) else []


def _check_doubtful(evidence: Found | Sequence[Evidence]) -> None:
    """Raises: UserError without a scan, or after one that found nothing to repair."""
    if not isinstance(evidence, Found):
        raise UserError("auto needs a trigger; give the result of scan, or triggers")
    if evidence.verdict == "clean":
        raise UserError("the scan found no backdoor, so there is nothing to repair")


def _norms_of(evidence: Found | Sequence[Evidence]) -> np.ndarray | None:
    """Sizes [K] of the smallest mask of each class, if the evidence is a scan that has them."""
    located = getattr(evidence.details, "located", None) if isinstance(evidence, Found) else None
    return None if located is None else located.norms


def _with_guard(suspect: Suspect, details: repairs.Repaired) -> Suspect:
    """The repaired net; if guarded, wraps the suspect's net with its corrections."""
    if not details.guarded:
        return suspect._replace(variables=details.variables)
    net = guarded.make(suspect.net, details.guarded)
    source = suspect.source
    if source is not None:
        source = source._replace(guard=guarded.Guard(details.guarded, ""), net=net)
    return suspect._replace(net=net, variables=details.variables, source=source)


def _check_images(suspect: Suspect, images: Any, labels: Any) -> Batch:
    """The images as a batch. Raises: UserError when they do not fit the suspect."""
    if labels is None:
        raise UserError("images need labels [N]; give both")
    images, labels = _check_pixels(suspect, images), np.asarray(labels)
    if labels.shape != images.shape[:1]:
        raise UserError(f"{len(images)} images need as many labels, got {list(labels.shape)}")
    if labels.dtype.kind not in "buif":
        raise UserError(f"labels must be class numbers, got {labels.dtype}")
    fractions = labels[labels != np.round(labels)]
    if fractions.size:
        raise UserError(f"labels must be whole class numbers, got {fractions[0]:g}")
    if not 0 <= labels.min() <= labels.max() < suspect.classes:
        raise UserError(f"labels must be 0..{suspect.classes - 1}, got up to {labels.max()}")
    return Batch(images, labels.astype(np.int32))


def _check_pixels(suspect: Suspect, images: Any) -> np.ndarray:
    """Images [N, H, W, C] as uint8, or float in [0, 1]; whole numbers of any type may be in 0..255.

    Raises: UserError when they do not fit the suspect.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != suspect.image_shape:
        shape = ", ".join(map(str, suspect.image_shape))
        raise UserError(f"images must be [N, {shape}], got {list(images.shape)}")
    if not len(images):
        raise UserError("there are no images; give at least one")
    if images.dtype == np.uint8:
        return images
    if images.dtype == bool:
        return images.astype(np.float32)
    low, high = images.min(), images.max()
    if images.dtype.kind in "iu":
        if not 0 <= low <= high <= 255:
            raise UserError(f"whole-number images must lie in 0..255, got {low} to {high}")
        if high <= 1:  # may mean black and white, or almost black
            raise UserError(f"images are {images.dtype} with only 0 and 1; give uint8 or floats")
        return images.astype(np.uint8)
    # written with `not`, so that NaN is refused too
    if not 0 <= low <= high <= 1:
        raise UserError(f"float images must lie in [0, 1], got {low:g} to {high:g}")
    return images


def _check_accuracy(suspect: Suspect, batch: Batch) -> float:
    """Measures clean accuracy. Raises: UserError when it is no better than chance."""
    sample = preprocess.sample(batch)
    chance = float(np.bincount(sample.labels).max()) / len(sample.labels)
    found = measuring.rates(jax.random.key(0), suspect.net, suspect.variables, sample)
    least = preprocess.needed(chance, len(sample.labels))
    if found.clean_accuracy < least:
        raise UserError(
            f"clean accuracy is {found.clean_accuracy:.1%} on {len(sample.labels)} images, which is"
            f" no better than chance ({least:.1%} would be); check labels, normalisation and"
            " weights"
        )
    return found.clean_accuracy


def _divide(batch: Batch, seed: int) -> tuple[Batch, Batch]:
    """Splits at random into a part for searching and repairing and a part for judging."""
    order = np.random.default_rng(seed).permutation(len(batch.labels))
    if len(order) < 2:
        raise UserError(f"{len(order)} images are too few to hold some out; give at least 2")
    first, second = np.split(order, [int(SEARCH_SHARE * len(order))])
    return Batch(batch.images[first], batch.labels[first]), Batch(
        batch.images[second], batch.labels[second]
    )


def _rates(suspect: Suspect, judge: Batch, known: Evidence | None) -> Rates:
    key = jax.random.key(0)
    if known is None:
        return measuring.rates(key, suspect.net, suspect.variables, judge)
    attack = _as_attack(known, suspect.classes)
    return measuring.rates(key, suspect.net, suspect.variables, judge, attack, known.trigger_params)


def _no_rates() -> Rates:
    return Rates(float("nan"), None, None, None, 0, 0)


def _as_attack(known: Evidence, classes: int) -> Attack:
    sources = jnp.asarray(known.all_sources(classes))
    relabel = lambda labels: jnp.where(jnp.isin(labels, sources), known.target, labels)
    return Attack(
        lambda key: known.trigger_params, known.stamp, lambda key, trigger, batch: batch, relabel
    )
