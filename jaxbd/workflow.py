"""What the command line, the demo and the experiments do with a model: scan it, repair it, tell what it does now.

Everything here is composition: methods from `inversion` and `repair`, drivers from `loop` and `sweep`, the rule from
`detect`. Nothing is printed and no file is opened.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import detect, loop, slots, stages, sweep
from jaxbd.base import Array, Batch, Cell, Inversion, Key, Net, UserError, Variables, check_targets
from jaxbd.data import draw
from jaxbd.inversion import mesa, neural_cleanse, pixel
from jaxbd.remembered import remembered
from jaxbd.repair import unlearn

Progress = stages.Progress

make_mesa, make_pixel, make_neural_cleanse, make_unlearn = (
    remembered(32)(factory) for factory in (mesa.make, pixel.make, neural_cleanse.make, unlearn.make)
)
"""The factories, remembering what they made: the same net and settings give the same functions, so nothing is traced
twice for another victim of the same shape."""

MesaConfig, NeuralCleanseConfig, PixelConfig = mesa.Config, neural_cleanse.Config, pixel.Config
"""Named apart, since fields of `ScanConfig` bear the modules' names."""
METHODS = ("auto", "mesa", "neural-cleanse", "pixel")
CHUNK = 10
"""Steps after which cells that have settled leave. Few, since until then they take up their slots."""
LEAST_MASKS = 3
"""Masks without which none can be called unusually small: of two, either is as far from their median."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Settings of a scan.

    Attributes:
      method: "mesa": every class x level, triggers at random places (`mesa.place` says otherwise); "neural-cleanse":
        mask and pattern per class, decided by the anomaly of the mask's size; "pixel": one reversed patch per class;
        "auto": Neural Cleanse locates a trigger for every class, then MESA models the patches at that place for the
        classes with the smallest masks, and the rate MESA reaches decides.
      levels: beta of every MESA sub-model.
      targets: classes to search; none stands for all.
      steps: optimisation steps of the MESA or pixel sweep.
      batch_size: images per cell and step.
      locate_steps: optimisation steps of Neural Cleanse.
      candidates: how many classes "auto" hands from Neural Cleanse to MESA, at least; outliers are added to them.
      anomaly_threshold: MAD anomaly index of a mask's size from which "neural-cleanse" calls a class attacked.
      mesa, neural_cleanse, pixel: settings of the methods.
      detection: when a rate counts as an attack.
      retire: whether MESA's searches end before `steps` once their outcome is decided, by the rule in
        `inversion.mesa`; from `mesa.stop_after` on, or where that is 0 from the step that suits the learning rate.
      memory_budget: bytes that the compiled search may take; so many cells run at a time as fit. By default a share of
        what the device has, see `memory.available`.
    """

    method: Literal["auto", "mesa", "neural-cleanse", "pixel"] = "auto"
    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    targets: tuple[int, ...] = ()
    steps: int = 200
    batch_size: int = 32
    locate_steps: int = 200
    candidates: int = 2
    anomaly_threshold: float = 2.0
    mesa: MesaConfig = dataclasses.field(
        default_factory=lambda: mesa.Config(place="image", hidden=128, learning_rate=1e-3)
    )
    neural_cleanse: NeuralCleanseConfig = dataclasses.field(default_factory=neural_cleanse.Config)
    pixel: PixelConfig = dataclasses.field(default_factory=lambda: pixel.Config(place="image"))
    detection: detect.Config = dataclasses.field(default_factory=detect.Config)
    retire: bool = False
    memory_budget: int | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"unknown scan method {self.method!r}; known: {', '.join(METHODS)}")
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise UserError(f"levels {self.levels} must lie between 0 and 1")
        if min(self.steps, self.batch_size, self.locate_steps, self.candidates) < 1:
            raise UserError("steps, locate_steps, batch_size and candidates must be at least 1")
        if self.method == "auto" and self.mesa.place in ("fixed", "searched"):
            raise UserError(f"method auto locates the place itself; a {self.mesa.place} one needs method mesa")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise UserError(f"a memory budget of {self.memory_budget} bytes is none; give at least 1")

    def modelled(self, **changes: Any) -> MesaConfig:
        """MESA's settings with `changes`, and with its stopping rule where cells retire."""
        if self.retire and not self.mesa.stop_after:
            changes["stop_after"] = mesa.stop_after(self.mesa.learning_rate)
        return dataclasses.replace(self.mesa, **changes)


PRESETS = {
    "quick": ScanConfig(steps=150, locate_steps=150, retire=True),
    "released": ScanConfig(method="mesa", steps=620, batch_size=128, mesa=mesa.Config()),
    "paper": ScanConfig(method="mesa", steps=620, batch_size=128, mesa=mesa.paper()),
}
"""Settings by name: this project's; those of the released MESA code; the paper's wording with what it leaves open as
released (Qiao et al. 2019). The last two model triggers of every class and level at random places."""


class Located(NamedTuple):
    """What Neural Cleanse found per class.

    Attributes:
      norms: L1 norm [K] of the smallest mask that works; nan where none did, or the class was not searched.
      scores: anomaly index [K], positive for masks smaller than the median.
      places: [K, 2] row and column of the window that holds most of each mask; share [K] of the norm inside it.
      states: the method's states [K, …].
    """

    norms: np.ndarray
    scores: np.ndarray
    places: np.ndarray
    share: np.ndarray
    states: Any


class Scan(NamedTuple):
    """What a scan found.

    Attributes:
      decision: verdict, targets, scores.
      decided_by: the step whose numbers decided, in words.
      rates: attack success rate [K] of each class's recovered triggers on held-out images; nan where not measured.
      level_rates: the same per level [K, L].
      inversion, cells, states: the sweep behind it, for sampling triggers; states [N, …] are NumPy.
      infos: [steps, N] of every step, NumPy; nan from the step on at which a cell had retired.
      located: what Neural Cleanse found, where it ran.
      steps: optimisation steps of every cell, all stages together, fewer for cells that retired; image_steps: images
        pushed through the victim by the searches.
      seconds: compile and run.
      anywhere: "auto" only: rate [K] of the same triggers pasted at random places; where it is high for every target,
        `inversion` stamps at random places, otherwise at the located one.
    """

    decision: detect.Decision
    decided_by: str
    rates: np.ndarray
    level_rates: np.ndarray
    inversion: Inversion
    cells: Cell
    states: Any
    infos: Any
    located: Located | None
    steps: int
    image_steps: int
    seconds: loop.Seconds
    anywhere: np.ndarray | None = None


def scan(
    key: Key,
    net: Net,
    variables: Variables,
    image_shape: tuple[int, int, int],
    classes: int,
    search: Batch,
    held_out: Batch,
    config: ScanConfig,
    progress: Progress | None = None,
    keep: stages.Keep = stages.through,
) -> Scan:
    """Looks for a backdoor in a net of which nothing is known but its weights.

    Args:
      image_shape: (H, W, C); classes: K.
      search: clean images the triggers are optimised on (uint8 or float); held_out: others, on which they are judged.
      keep: what may save the sweeps and go on from there.
    Raises: UserError when there are fewer images than a batch; FloatingPointError when a cell diverges.
    """
    if len(search.labels) < config.batch_size:
        raise UserError(
            f"{len(search.labels)} images to search with, fewer than a batch of {config.batch_size}; "
            "bring more images or lower the batch size"
        )
    check_targets(config.targets, classes)
    search = Batch(jnp.asarray(search.images), jnp.asarray(search.labels))
    ways = {"mesa": _scan_patches, "pixel": _scan_patches, "neural-cleanse": _scan_masks, "auto": _scan_auto}
    return ways[config.method](
        key, net, variables, image_shape, classes, search, held_out, config, progress or _no_progress, keep
    )


def _no_progress(what: str, done: int, total: int) -> None:
    pass


def searched(classes: int, config: ScanConfig) -> list[int]:
    """The classes a scan searches, ascending."""
    return sorted(set(config.targets)) or list(range(classes))


def _by_class(values: np.ndarray, rows: Sequence[int], classes: int, missing: float = np.nan) -> np.ndarray:
    """`values` [n, …] of the classes `rows` as [K, …]; `missing` elsewhere."""
    every = np.full((classes, *np.shape(values)[1:]), missing, np.asarray(values).dtype)
    every[list(rows)] = values
    return every


def _scan_patches(key, net, variables, image_shape, classes, search, held_out, config, progress, keep) -> Scan:
    """Every class x level as one sweep, decided by the rate on held-out images."""
    if config.method == "pixel":
        inversion, levels = make_pixel(net, image_shape, config.pixel), config.levels[-1:]
    else:
        inversion, levels = make_mesa(net, image_shape, config.modelled()), config.levels
    rows = searched(classes, config)
    cells = sweep.grid(rows, levels)
    label = f"{config.method}: {sweep.size(cells)} cells"
    found = _sweep(
        jax.random.fold_in(key, 2), label, inversion, variables, search, cells, config.steps, config, progress, keep
    )
    rates = sweep.attack_success(
        jax.random.fold_in(key, 3), net, inversion, found.states, cells, variables, held_out, slots=found.slots
    )
    level_rates = _by_class(rates.reshape(len(rows), len(levels)), rows, classes)
    best = level_rates.max(1)
    rule = f"{config.method}: attack success rate of the recovered triggers on held-out images"
    decision = detect.decide(np.nan_to_num(best), config.detection)
    scores = [float("nan") if np.isnan(rate) else score for rate, score in zip(best, decision.scores, strict=True)]
    return Scan(
        decision._replace(scores=scores), rule, best, level_rates, inversion, cells, found.states, found.course, None,
        config.steps, found.image_steps_pushed, found.seconds,
    )  # fmt: skip


def _sweep(
    key, label, inversion, variables, search, cells, num_steps, config: ScanConfig, progress, keep, given=None
) -> slots.Found:
    """`sweep.search` as one stage, with progress that is on screen before the first compile."""
    progress(label, 0, num_steps * sweep.size(cells))
    told = label

    def shrunk(count: int) -> None:
        nonlocal told
        told = f"{label}, out of memory, {count} at a time from here on"

    return sweep.search(
        key, inversion, draw.uniform(config.batch_size), search, cells, variables, num_steps=num_steps,
        memory_budget=config.memory_budget, chunk=CHUNK, given=given, course=True,
        on_chunk=lambda at: progress(told, at.steps, at.steps_total), on_shrink=shrunk, keep=keep, name=label,
    )  # fmt: skip


def locate(
    key, net, variables, image_shape, classes, search, config: ScanConfig, progress: Progress, side: int,
    keep: stages.Keep = stages.through,
):  # fmt: skip
    """Neural Cleanse on every class searched: (inversion, cells, Located, its sweep); windows are side x side."""
    inversion = make_neural_cleanse(net, image_shape, config.neural_cleanse)
    rows = searched(classes, config)
    cells = sweep.grid(rows)
    label = f"neural-cleanse: {len(rows)} classes"
    made = _sweep(
        jax.random.fold_in(key, 1), label, inversion, variables, search, cells, config.locate_steps, config, progress,
        keep,
    )  # fmt: skip
    norms = np.array(made.states.best_norm, float)
    norms[~np.isfinite(norms)] = np.nan
    places, share = neural_cleanse.locate(jnp.asarray(made.states.best_mask), side)
    scores = -detect.mad_scores(norms)
    spread = [_by_class(v, rows, classes) for v in (norms, scores, np.asarray(share))]
    places = _by_class(np.asarray(places), rows, classes, missing=-1)
    found = Located(spread[0], np.nan_to_num(spread[1]), places, spread[2], made.states)
    return inversion, cells, found, made


def _scan_masks(key, net, variables, image_shape, classes, search, held_out, config, progress, keep) -> Scan:
    """Neural Cleanse alone, decided by the anomaly index of the mask sizes (Wang et al. 2019)."""
    side = config.mesa.patch
    inversion, cells, found, made = locate(
        key, net, variables, image_shape, classes, search, config, progress, side, keep
    )
    rates = sweep.attack_success(
        jax.random.fold_in(key, 3), net, inversion, found.states, cells, variables, held_out, slots=made.slots
    )
    rates = _by_class(rates, searched(classes, config), classes)
    small = outliers(found, config)
    working = [k for k in small if rates[k] >= config.detection.threshold]
    few = np.isfinite(found.norms).sum() < LEAST_MASKS
    verdict = "backdoored" if working else "inconclusive" if small or few else "clean"
    decision = detect.Decision(verdict, working, found.scores.tolist())
    rule = "neural-cleanse: anomaly index of the mask size"
    if verdict == "inconclusive":
        why = f"working masks for fewer than {LEAST_MASKS} classes, too few to compare"
        rule += f"; {why if few else 'a small mask that does not work on held-out images'}"
    return Scan(
        decision, rule, rates, rates[:, None], inversion, cells, found.states, made.course, found, config.locate_steps,
        made.image_steps_pushed, made.seconds,
    )  # fmt: skip


def _scan_auto(key, net, variables, image_shape, classes, search, held_out, config, progress, keep) -> Scan:
    """Neural Cleanse says where to look and at which classes first; MESA's rate there decides."""
    side = config.mesa.patch
    *_, found, first = locate(key, net, variables, image_shape, classes, search, config, progress, side, keep)
    chosen = candidates(found, config)
    inversion, everywhere = (
        make_mesa(net, image_shape, config.modelled(place=place, row=0, column=0)) for place in ("fixed", "image")
    )
    cells = sweep.grid(chosen, config.levels)
    places = np.repeat(found.places[chosen], len(config.levels), axis=0)
    label = f"mesa: classes {', '.join(map(str, chosen))} at the located place"
    made = _sweep(
        jax.random.fold_in(key, 2), label, inversion, variables, search, cells, config.steps, config, progress, keep,
        {"place": places},
    )  # fmt: skip

    def judged(at: Inversion) -> np.ndarray:
        rates = sweep.attack_success(
            jax.random.fold_in(key, 3), net, at, made.states, cells, variables, held_out, slots=made.slots
        )
        return _by_class(rates.reshape(len(chosen), -1), chosen, classes)

    level_rates, anywhere = judged(inversion), judged(everywhere)
    rates, anywhere = np.nan_to_num(level_rates).max(1), anywhere.max(1)
    decision = detect.decide(rates, config.detection)
    # a trigger that works wherever it is pasted has to be unlearned wherever it may be pasted
    if decision.targets and (anywhere[decision.targets] >= config.detection.threshold).all():
        inversion = everywhere
    images = first.image_steps_pushed + made.image_steps_pushed
    seconds = loop.total(made.seconds, first.seconds)
    rule = "mesa at the place that neural-cleanse located: attack success rate on held-out images"
    unconfirmed = sorted({*outliers(found, config)} - {*decision.targets})
    if decision.verdict == "clean" and unconfirmed:
        decision = decision._replace(verdict="inconclusive")
        classes_named = ", ".join(map(str, unconfirmed))
        rule += f"; no patch there works for class {classes_named}, whose smallest mask is unusually small all the same"
    return Scan(
        decision._replace(scores=found.scores.tolist()), rule, np.where(np.isnan(level_rates[:, 0]), np.nan, rates),
        level_rates, inversion, cells, made.states, made.course, found, config.locate_steps + config.steps, images,
        seconds, anywhere,
    )  # fmt: skip


def candidates(found: Located, config: ScanConfig) -> list[int]:
    """Classes worth modelling: the `config.candidates` smallest masks and every outlier, in class order."""
    order = np.argsort(np.where(np.isnan(found.norms), np.inf, found.norms), kind="stable")
    order = [k for k in order if k in searched(len(order), config)]
    return sorted({int(k) for k in order[: config.candidates]} | {*outliers(found, config)})


def outliers(found: Located, config: ScanConfig) -> list[int]:
    """Classes whose mask is smaller than the others' by the anomaly threshold."""
    return [int(k) for k in np.flatnonzero(found.scores > config.anomaly_threshold)]


def cells_of(result: Scan, target: int) -> Any:
    """States [L, …] of the scan's cells that aim at `target`, levels ascending as configured."""
    index = np.flatnonzero(np.asarray(result.cells.target) == target)
    if not index.size:
        raise UserError(f"the scan did not model triggers for class {target}")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), result.states)


def reached(result: Scan, target: int) -> np.ndarray:
    """[L] bool: which sub-models of `target` reached their level; Algorithm 1 leaves the others out (gamma_i = 0).

    When none did, the one with the highest rate counts as reached.
    """
    index = np.flatnonzero(np.asarray(result.cells.target) == target)
    rates = result.level_rates[target]
    good = rates >= np.asarray(result.cells.level)[index]
    return good if good.any() else rates == rates.max()


class Repaired(NamedTuple):
    """variables of the repaired net, infos of the run, seconds."""

    variables: Variables
    infos: Any
    seconds: loop.Seconds


def unlearn_trigger(
    key: Key,
    net: Net,
    variables: Variables,
    stamp: Callable[[Key, Any, Array], Array],
    evidence: unlearn.Evidence,
    data: Batch,
    config: unlearn.Config,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
    label: str = "unlearn",
    keep: stages.Keep = stages.through,
) -> Repaired:
    """Unlearning on clean `data` (uint8 or float), see `repair.unlearn`."""
    if len(data.labels) < batch_size:
        raise UserError(f"{len(data.labels)} images to repair with, fewer than a batch of {batch_size}; bring more")
    method = make_unlearn(net, stamp, config)
    state = method.init(jax.random.fold_in(key, 0), variables, evidence)
    report = progress or _no_progress
    report(label, 0, config.num_steps)
    data, drawn = Batch(jnp.asarray(data.images), jnp.asarray(data.labels)), draw.uniform(batch_size)
    fit = lambda state, left, on_chunk: loop.fit(
        jax.random.fold_in(key, 1), method.step, drawn, data, state, num_steps=left, on_chunk=on_chunk
    )
    state, infos, seconds = stages.run(keep, report, label, state, fit, info=unlearn.Info, num_steps=config.num_steps)
    return Repaired(method.extract(state), infos, seconds)


def equal_mixture(result: Scan, target: int) -> unlearn.Evidence:
    """gamma_i = 1/N over the sub-models of `target` that reached their level (Qiao et al. 2019, section 3.3)."""
    chosen = np.flatnonzero(reached(result, target))
    return unlearn.uniform(jax.tree.map(lambda leaf: leaf[chosen], cells_of(result, target)))


def entropy_mixture(result: Scan, target: int) -> unlearn.Evidence:
    """gamma_i proportional to exp(h_i) / g'(g^-1(beta_i)) over the same sub-models (Algorithm 1), for a linear g.

    h_i is the bound on the entropy of sub-model i, averaged over the last 20 steps that its search made.

    Raises: UserError for a scan method that models no distributions.
    """
    if not hasattr(result.infos, "entropy"):
        raise UserError(
            "this scan method models no distributions, so there is no entropy to weight by; use mesa or auto"
        )
    chosen = np.flatnonzero(reached(result, target))
    index = np.flatnonzero(np.asarray(result.cells.target) == target)[chosen]
    courses = [course[np.isfinite(course)][-20:] for course in np.asarray(result.infos.entropy)[:, index].T]
    entropy = jnp.asarray([course.mean() for course in courses])
    models = jax.tree.map(lambda leaf: leaf[chosen], cells_of(result, target))
    return unlearn.entropy_weighted(models, entropy, jnp.ones_like(entropy))


def mixtures(result: Scan, target: int, levels: Sequence[float]) -> dict[str, unlearn.Evidence]:
    """The evidence MESA offers for unlearning: each level alone, and the 1/N mixture of all, nothing being selected."""
    states = cells_of(result, target)
    named = {
        f"level {level:g}": unlearn.single(jax.tree.map(lambda leaf, i=i: leaf[i], states))
        for i, level in enumerate(levels)
    }
    return {**named, "mixture": unlearn.uniform(states)}
