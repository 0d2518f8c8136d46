"""The default scan (method "auto") of a model from elsewhere.

Searches margins without data, then masks for every class, then patches at the place of the smallest
masks, and combines two families of searches into a verdict.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbd.base import Cell, Inversion
from jaxbd.detection import detect, verdict
from jaxbd.inversion import margin as margins
from jaxbd.inversion import pt_red
from jaxbd.pipelines import locate, margin_scan
from jaxbd.pipelines.class_scan import (
    Additive,
    Located,
    Scan,
    ScanConfig,
    Task,
    by_class,
    judge,
    list_classes,
    make_mesa,
    make_pt_red,
    measure,
    run_sweep,
)
from jaxbd.pipelines.spent import NOTHING, Spent, spend, sum_up
from jaxbd.training import sweep

ADDITIVE = pt_red.Config()
ADDITIVE_STEPS = 120
"""Settings of the search for perturbations of the whole image."""
MASKS = "masks"
"""Name of the mask search among the stages of `Clues.spent`."""
LOOK_AGAIN = 25
"""Steps between two comparisons of the classes after the first `look` steps."""


class Patches(NamedTuple):
    """Triggers that MESA modelled at the located places.

    Attributes:
      inversions: the same method stamping at the located place, and at random places.
      cells, states: [N]; infos [steps, N]; NumPy.
      level_rates: success rates on held-out images [K, L]; nan where not modelled.
    """

    inversions: tuple[Inversion, Inversion]
    cells: Cell
    states: Any
    infos: Any
    level_rates: np.ndarray


class Clues(NamedTuple):
    """Everything found so far, and the cost by stage; None for what was not searched."""

    spent: Mapping[str, Spent]
    baseline: np.ndarray
    accuracy: float
    margin: margin_scan.MarginScan | None
    masks: locate.Masks
    located: Located
    patches: Patches | None = None
    mask_rates: np.ndarray | None = None
    additive: Additive | None = None


def scan(task: Task) -> Scan:
    """Searches until two families agree or all classes are searched; see `detection.verdict`.

    A class whose mask stands out after `look` steps is modelled at once. If that decides the
    verdict, the searches of the other classes stop there, which saves most of the work on a
    backdoored model.
    """
    config = task.config
    margin, spent = None, NOTHING
    if config.with_margin and task.suspect.classes >= margins.LEAST_CLASSES:
        margin = margin_scan.scan(
            task.run, jax.random.fold_in(task.key, 4), task.suspect, config.margin
        )
        spent = spend(spent, "margins", margin.image_steps, margin.seconds)
    alarmed = [] if margin is None else margin.outliers.classes
    alarmed = sorted({*alarmed} & {*list_classes(task.suspect.classes, config)})
    first, *later = _halts(config)
    masks = locate.search(task, first, config.first_masks)
    spent = spend(spent, MASKS, masks.image_steps, masks.seconds)
    clues = Clues(spent, *measure(task), margin, masks, locate.compare(task, masks))
    tried: set[int] = set()
    for halt in later:
        early = _clear(clues.located, config, alarmed, tried)
        if early:
            clues, tried = _check_masks(task, _model(task, clues, early)), tried | {*early}
            if weigh(task, clues).verdict == "backdoored":
                return _result(task, clues)
        clues = _search_on(task, clues, halt)
    chosen = sorted({*locate.candidates(clues.located, config), *alarmed})
    clues = _model(task, clues, chosen)
    return _result(task, _settle(task, clues, alarmed))


def _search_on(task: Task, clues: Clues, steps: int) -> Clues:
    """Continues the search for masks up to `steps` steps in total."""
    masks = locate.go_on(task, clues.masks, steps)
    # `masks` counts its cost from step 0, so replace the stage's entry instead of adding to it
    spent = {**clues.spent, **spend(NOTHING, MASKS, masks.image_steps, masks.seconds)}
    located = locate.compare(task, masks)
    return clues._replace(spent=spent, masks=masks, located=located, mask_rates=None)


def _halts(config: ScanConfig) -> list[int]:
    """Steps at which the mask search halts to compare classes; the last one is its end."""
    last = config.locate_steps
    if not 0 < config.look < last:
        return [last]
    return [*range(config.look, last, LOOK_AGAIN), last]


def _clear(
    located: Located, config: ScanConfig, alarmed: Sequence[int], tried: set[int]
) -> list[int]:
    """Classes to model before the mask search ends; each is tried once.

    Of the classes whose masks stand out by far, takes those whose margins stand out too. Early in
    the search other masks are small by chance, so only where no margin stands out does it take the
    one that stands out most.
    """
    found = locate.early_outliers(located, config)
    chosen = [k for k in found if k in alarmed] if alarmed else found[:1]
    return [k for k in chosen if k not in tried]


def _model(task: Task, clues: Clues, chosen: Sequence[int]) -> Clues:
    """Runs MESA on the classes `chosen`, at the places of their masks."""
    config, suspect = task.config, task.suspect
    at_place, anywhere = (
        make_mesa(suspect.net, suspect.image_shape, config.modelled(place=place, row=0, column=0))
        for place in ("fixed", "image")
    )
    cells = sweep.grid(chosen, config.levels)
    places = np.repeat(clues.located.places[list(chosen)], len(config.levels), axis=0)
    name = f"mesa: classes {', '.join(map(str, chosen))} at the located place"
    found = run_sweep(task, 2, name, at_place, cells, config.steps, {"place": places})
    rates = judge(task, at_place, found.states, cells, found.slots).reshape(len(chosen), -1)
    spent = spend(clues.spent, "patches", found.image_steps_pushed, found.seconds)
    patches = Patches(
        (at_place, anywhere),
        cells,
        found.states,
        found.course,
        by_class(rates, chosen, suspect.classes),
    )
    return clues._replace(spent=spent, patches=patches)


def _check_masks(task: Task, clues: Clues) -> Clues:
    """Judges small masks on held-out images, unless patches already work for those classes."""
    signs = signs_of(task, clues)
    if not (signs.small & ~signs.patch).any():
        return clues
    return clues._replace(mask_rates=_judge_masks(task, clues, signs.small))


def _settle(task: Task, clues: Clues, alarmed: Sequence[int]) -> Clues:
    """Resolves a disagreement of the families: if only the margin raises an alarm, also searches
    perturbations of the whole image."""
    clues = _check_masks(task, clues)
    if alarmed and weigh(task, clues).verdict != "backdoored":
        clues = _search_additive(task, clues)
    return clues


def _judge_masks(task: Task, clues: Clues, chosen: np.ndarray) -> np.ndarray:
    """Success rate [K] of the smallest masks of the classes `chosen` [K] bool on the held-out
    images; nan for the other classes."""
    searched = list_classes(task.suspect.classes, task.config)
    rows = [row for row in searched if chosen[row]]
    own = np.isin(searched, rows)
    states = jax.tree.map(lambda leaf: leaf[own], clues.located.states)
    rates = judge(task, clues.masks.inversion, states, sweep.grid(rows))
    return by_class(rates, rows, task.suspect.classes)


def _search_additive(task: Task, clues: Clues) -> Clues:
    """Runs PT-RED for every target: the smallest perturbations of the whole image."""
    suspect, classes = task.suspect, task.suspect.classes
    inversion = make_pt_red(suspect.net, suspect.image_shape, ADDITIVE)
    rows = list_classes(classes, task.config)
    cells = sweep.grid(rows)
    name = f"pt-red: {len(rows)} classes"
    found = run_sweep(task, 6, name, inversion, cells, ADDITIVE_STEPS)
    assert inversion.size is not None and inversion.works is not None
    works = np.asarray(jax.vmap(inversion.works)(found.states))
    norms = np.where(works, np.asarray(jax.vmap(inversion.size)(found.states)), np.nan)
    rates = judge(task, inversion, found.states, cells)
    spread = lambda values: by_class(np.asarray(values, float), rows, classes)
    scores = np.nan_to_num(spread(-detect.mad_scores(norms)))
    additive = Additive(spread(norms), scores, spread(rates), inversion, found.states)
    spent = spend(clues.spent, "perturbations", found.image_steps_pushed, found.seconds)
    return clues._replace(spent=spent, additive=additive)


def weigh(task: Task, clues: Clues) -> verdict.Judgement:
    """The verdict on everything found so far."""
    return verdict.judge(signs_of(task, clues), _power(task, clues))


def signs_of(task: Task, clues: Clues) -> verdict.Signs:
    """The signs that each class shows so far."""
    config, classes = task.config, task.suspect.classes
    least = config.detection.threshold
    none = np.zeros(classes, bool)
    wins = lambda rates: np.nan_to_num(detect.gain(rates, clues.baseline)) >= least
    # repeated comparisons find more by chance, so ending a search early takes a higher threshold
    early = _is_early(task, clues)
    limit = config.early_threshold if early else config.anomaly_threshold
    small = clues.located.scores > limit
    if clues.mask_rates is not None:
        small &= wins(clues.mask_rates)
    if clues.additive is not None:
        unusual = clues.additive.scores > config.anomaly_threshold
        small |= unusual & wins(clues.additive.rates)
    patch = none if clues.patches is None else wins(_best(clues.patches))
    margin = none.copy()
    if clues.margin is not None:
        margin[clues.margin.outliers.classes] = True
    return verdict.Signs(small, patch, margin)


def _best(patches: Patches) -> np.ndarray:
    """[K] success rate of the best level; nan for classes that were not modelled."""
    known = np.isfinite(patches.level_rates).any(1)
    return np.where(known, np.nan_to_num(patches.level_rates, nan=-1.0).max(1), np.nan)


def _power(task: Task, clues: Clues) -> verdict.Power:
    config, classes = task.config, task.suspect.classes
    rows = np.zeros(classes, bool)
    rows[list_classes(classes, config)] = True
    labels = np.asarray(task.held_out.labels)
    return verdict.Power(
        searched=rows,
        worked=np.isfinite(clues.located.norms),
        steps=min(clues.masks.steps, config.steps),
        accuracy=clues.accuracy,
        chance=float(np.bincount(labels).max() / len(labels)),
        has_margin=clues.margin is not None and np.isfinite(clues.margin.outliers.p_value),
    )


def _result(task: Task, clues: Clues) -> Scan:
    patches, located = clues.patches, clues.located
    assert patches is not None
    signs, judgement = signs_of(task, clues), weigh(task, clues)
    at_place, anywhere = patches.inversions
    inversion, elsewhere = at_place, None
    modelled = [t for t in judgement.targets if np.isfinite(patches.level_rates[t]).any()]
    if modelled:
        # a trigger that works anywhere must be unlearned at random places, not only at this one
        elsewhere = _judge_anywhere(task, patches, anywhere)
        if (elsewhere[modelled] >= task.config.detection.threshold).all():
            inversion = anywhere
    image_steps, seconds = sum_up(clues.spent)
    return Scan(
        decision=detect.Decision(judgement.verdict, judgement.targets, located.scores.tolist()),
        decided_by=explain(judgement, signs, early=_is_early(task, clues)),
        rates=_best(patches),
        level_rates=patches.level_rates,
        inversion=inversion,
        cells=patches.cells,
        states=patches.states,
        infos=patches.infos,
        located=located,
        steps=clues.masks.steps + task.config.steps,
        image_steps=image_steps,
        seconds=seconds,
        spent=clues.spent,
        anywhere=elsewhere,
        baseline=clues.baseline,
        judgement=judgement,
        signs=signs,
        margin=clues.margin,
        additive=clues.additive,
        mask_rates=clues.mask_rates,
    )


def _is_early(task: Task, clues: Clues) -> bool:
    """Whether the mask search has stopped before its last step."""
    return clues.masks.steps < task.config.locate_steps


def _judge_anywhere(task: Task, patches: Patches, anywhere: Inversion) -> np.ndarray:
    """[K] success rate of the best level with patches pasted at random places."""
    rates = judge(task, anywhere, patches.states, patches.cells)
    chosen = np.unique(np.asarray(patches.cells.target))
    levels = by_class(rates.reshape(len(chosen), -1), chosen.tolist(), task.suspect.classes)
    return _best(patches._replace(level_rates=levels))


def explain(judgement: verdict.Judgement, signs: verdict.Signs, *, early: bool) -> str:
    """What decided the verdict, in words."""
    names = {
        "small": "a trigger far smaller than the other classes'",
        "patch": "small patches that work on held-out images",
        "margin": "a margin that stands out",
    }
    list_signs = lambda k: [text for name, text in names.items() if getattr(signs, name)[k]]
    if judgement.targets:
        each = "; ".join(f"class {k}: {', '.join(list_signs(k))}" for k in judgement.targets)
        rest = ", so the other classes were not searched to the end" if early else ""
        return f"two signs or more of three: {each}{rest}"
    if judgement.leads:
        each = "; ".join(
            f"class {k} shows {', '.join(list_signs(k))} only" for k in judgement.leads
        )
        return f"one sign of three, which clean models show now and then too: {each}"
    if judgement.lacks:
        return f"no sign, and a search without the power to find one: {'; '.join(judgement.lacks)}"
    return "no class shows an unusually small trigger or an unusual margin, and all were searched"
