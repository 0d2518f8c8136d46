"""Shared by all scans over classes: settings, the result, running a sweep and judging it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxbd.base import Batch, Cell, Inversion, Key, Suspect, UserError
from jaxbd.caching import cached
from jaxbd.data import draw
from jaxbd.detection import detect
from jaxbd.detection.verdict import Judgement, Signs
from jaxbd.inversion import mesa, neural_cleanse, pixel, pt_red, stopping
from jaxbd.inversion.mesa import Config as MesaConfig
from jaxbd.inversion.neural_cleanse import Config as NeuralCleanseConfig
from jaxbd.inversion.pixel import Config as PixelConfig
from jaxbd.metrics import evaluate, sweep_rates
from jaxbd.pipelines import margin_scan
from jaxbd.pipelines.margin_scan import Config as MarginConfig
from jaxbd.pipelines.margin_scan import MarginScan
from jaxbd.pipelines.spent import NOTHING, Spent
from jaxbd.training import slots, sweep
from jaxbd.training.memory import Bytes
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run

make_mesa, make_pixel, make_neural_cleanse, make_pt_red = (
    cached(32)(factory) for factory in (mesa.make, pixel.make, neural_cleanse.make, pt_red.make)
)
"""Cached factories: the same net and settings give the same functions, so that another victim of
the same shape does not trace them again."""

METHODS = ("auto", "mesa", "neural-cleanse", "pixel")
CHUNK = 10
"""Steps between two removals of converged cells. Small, since they occupy their slots until
then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Settings of a scan.

    Attributes:
      method: "mesa": every class x level, triggers at random places unless `mesa.place` says
        otherwise. "neural-cleanse": mask and pattern per class, decided by the anomaly of the mask
        size. "pixel": one reversed patch per class. "auto": margins without data, then masks for
        every class, then MESA's patches at the place of the smallest masks; two signs decide, see
        `detection.verdict`.
      levels: beta of every MESA sub-model.
      targets: classes to search; empty for all.
      steps: optimisation steps of the MESA or pixel sweep.
      batch_size: images per cell and step.
      locate_steps: optimisation steps of Neural Cleanse.
      candidates: minimum number of classes that "auto" passes from Neural Cleanse to MESA; outliers
        are added to them.
      first_masks: "auto" only: Neural Cleanse starts once per class from each of these
        (`neural_cleanse.first_mask`), and the smallest working mask counts. On some nets a
        half-transparent start always ends in a large mask. Empty for a single start.
      look: "auto" only: after this many steps of Neural Cleanse, a class that stands out by
        `early_threshold` is modelled at once; 0 for never.
      anomaly_threshold: a class stands out if the MAD anomaly index of its mask size exceeds this.
      early_threshold: the same before the mask search has ended.
      with_margin: whether "auto" starts with the search without data. Without it no model is called
        clean.
      margin: settings of the search without data.
      mesa, neural_cleanse, pixel: settings of the methods.
      detection: thresholds on attack success rates.
      retire: whether a MESA search may end before `steps` once its outcome is decided, by the rule
        in `inversion.stopping`; from `mesa.stop_after` on, or if that is 0 from a step derived from
        the learning rate.
      memory_budget: bytes the compiled search may use, which limits how many cells run at a time.
        Default: a share of the device's memory, see `memory.available`.
    """

    method: Literal["auto", "mesa", "neural-cleanse", "pixel"] = "auto"
    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    targets: tuple[int, ...] = ()
    steps: int = 200
    batch_size: int = 32
    locate_steps: int = 200
    candidates: int = 2
    first_masks: tuple[float, ...] = ()
    look: int = 0
    anomaly_threshold: float = 2.0
    early_threshold: float = 3.0
    with_margin: bool = True
    margin: MarginConfig = dataclasses.field(default_factory=margin_scan.Config)
    mesa: MesaConfig = dataclasses.field(
        default_factory=lambda: mesa.Config(place="image", hidden=128, learning_rate=1e-3)
    )
    neural_cleanse: NeuralCleanseConfig = dataclasses.field(default_factory=neural_cleanse.Config)
    pixel: PixelConfig = dataclasses.field(default_factory=lambda: pixel.Config(place="image"))
    detection: detect.Config = dataclasses.field(default_factory=detect.Config)
    retire: bool = False
    memory_budget: Bytes | int | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"unknown scan method {self.method!r}; known: {', '.join(METHODS)}")
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise UserError(f"levels {self.levels} must lie between 0 and 1")
        if min(self.steps, self.batch_size, self.locate_steps, self.candidates) < 1:
            raise UserError("steps, locate_steps, batch_size and candidates must be at least 1")
        if not all(0 < mask <= 1 for mask in self.first_masks) or self.look < 0:
            raise UserError(
                f"first_masks {self.first_masks} must lie in (0, 1], and look {self.look} must be"
                " at least 0"
            )
        if self.method == "auto" and self.mesa.place in ("fixed", "searched"):
            raise UserError(
                f"method auto locates the place itself; a {self.mesa.place} one needs method mesa"
            )
        if self.memory_budget is not None and self.memory_budget < 1:
            raise UserError(f"memory_budget must be at least 1 byte, got {self.memory_budget}")

    def modelled(self, **changes: Any) -> MesaConfig:
        """MESA's settings with `changes`, and with its stopping rule if cells may `retire`."""
        if self.retire and not self.mesa.stop_after:
            changes["stop_after"] = stopping.stop_after(self.mesa.learning_rate)
        return dataclasses.replace(self.mesa, **changes)


PRESETS = {
    "quick": ScanConfig(
        steps=150,
        locate_steps=150,
        batch_size=8,
        # Differs from released code: it starts once, from a mask of at most 1
        first_masks=(0.1, 1.0),
        look=50,
        neural_cleanse=neural_cleanse.Config(memory=0.8),
        retire=True,
    ),
    "released": ScanConfig(method="mesa", steps=620, batch_size=128, mesa=mesa.Config()),
    "paper": ScanConfig(method="mesa", steps=620, batch_size=128, mesa=mesa.paper()),
}
"""Settings by name: "quick", those of this project; "released", those of the released MESA code;
"paper", those of the paper, completed as released where it is silent (Qiao et al. 2019). The last
two model triggers of every class and level at random places."""


class Located(NamedTuple):
    """Result of Neural Cleanse per class.

    Attributes:
      norms: L1 norm [K] of the smallest working mask over all starts; nan if none works or the
        class was not searched.
      scores: anomaly index [K], positive for masks smaller than the median.
      places: [K, 2] row and column of the window that holds most of each mask; share [K] of the
        norm inside it.
      states: the method's states [K, …].
    """

    norms: np.ndarray
    scores: np.ndarray
    places: np.ndarray
    share: np.ndarray
    states: Any


class Additive(NamedTuple):
    """Result of PT-RED per class: one perturbation that sends all other classes to it.

    Attributes:
      norms: L2 norm [K]; nan if the perturbation did not reach its success rate.
      scores: anomaly index [K], positive for norms below the median.
      rates: attack success rate [K] on held-out images.
      inversion, states: the method and its states [K, …].
    """

    norms: np.ndarray
    scores: np.ndarray
    rates: np.ndarray
    inversion: Inversion
    states: Any


class Scan(NamedTuple):
    """Result of a scan.

    Attributes:
      decision: verdict, targets, scores.
      decided_by: the step that decided the verdict, in words.
      rates: attack success rate [K] of each class's recovered triggers on held-out images; nan
        where not measured.
      level_rates: the same per level [K, L].
      baseline: share [K] of the same images that reach each class without a trigger.
      inversion, cells, states: the sweep, for sampling triggers; states [N, …] are NumPy.
      infos: [steps, N] of every step, NumPy; nan after a cell has retired.
      located: result of Neural Cleanse; None if it did not run.
      steps: optimisation steps per cell over all stages; cells that retired made fewer.
      image_steps: images pushed through the victim by the searches.
      seconds: compile and run time.
      spent: "auto" only: {stage: its cost}.
      anywhere: "auto" only: rate [K] of the same triggers pasted at random places. If it is high
        for every target, `inversion` stamps at random places, else at the located place.
      judgement, signs: "auto" only: the verdict and the signs it is based on.
      margin: "auto" only: result of the search without data; None if it was skipped.
      additive: "auto" only: perturbations of the whole image; searched only if the margin alone
        raises an alarm.
      mask_rates: "auto" only: success rate [K] of Neural Cleanse's masks on held-out images, of the
        classes with small masks that patches hardly reach; nan for the others, None if there are
        none.
    """

    decision: detect.Decision
    decided_by: str
    rates: np.ndarray
    level_rates: np.ndarray
    baseline: np.ndarray
    inversion: Inversion
    cells: Cell
    states: Any
    infos: Any
    located: Located | None
    steps: int
    image_steps: int
    seconds: Seconds
    spent: Mapping[str, Spent] = NOTHING
    anywhere: np.ndarray | None = None
    judgement: Judgement | None = None
    signs: Signs | None = None
    margin: MarginScan | None = None
    additive: Additive | None = None
    mask_rates: np.ndarray | None = None


class Task(NamedTuple):
    """The arguments of `scan.scan`, with the search images on the device."""

    run: Run
    key: Key
    suspect: Suspect
    search: Batch
    held_out: Batch
    config: ScanConfig


def list_classes(classes: int, config: ScanConfig) -> list[int]:
    """The classes a scan searches, ascending."""
    return sorted(set(config.targets)) or list(range(classes))


def by_class(
    values: np.ndarray, rows: Sequence[int], classes: int, missing: float = np.nan
) -> np.ndarray:
    """Spreads `values` [n, …] of the classes `rows` to [K, …], with `missing` elsewhere."""
    every = np.full((classes, *np.shape(values)[1:]), missing, np.asarray(values).dtype)
    every[list(rows)] = values
    return every


def run_sweep(
    task: Task,
    number: int,
    name: str,
    inversion: Inversion,
    cells: Cell,
    num_steps: int,
    given: dict[str, Any] | None = None,
) -> slots.Found:
    """Runs one sweep of a scan.

    Args:
      number: distinguishes the sweeps of a scan; folded into the key.
      name: of the sweep as a stage of `task.run`.
      given: fields of the initial states [N, …].
    """
    return sweep.search(
        task.run,
        name,
        jax.random.fold_in(task.key, number),
        inversion,
        draw.uniform(task.config.batch_size),
        task.search,
        cells,
        task.suspect.variables,
        num_steps=num_steps,
        memory_budget=task.config.memory_budget,
        chunk=CHUNK,
        given=given,
        course=True,
    )


def judge(
    task: Task, inversion: Inversion, states: Any, cells: Cell, width: int | None = None
) -> np.ndarray:
    """Success rate [N] of each cell's triggers on the held-out images; runs `width` cells at a
    time."""
    return sweep_rates.attack_success(
        jax.random.fold_in(task.key, 3),
        task.suspect.net,
        inversion,
        states,
        cells,
        task.suspect.variables,
        task.held_out,
        slots=width,
    )


def measure(task: Task) -> tuple[np.ndarray, float]:
    """Measures (baseline [K], clean accuracy) of the suspect on the held-out images.

    The baseline is the share of other classes' images that reach each class without a trigger.
    """
    suspect, held_out = task.suspect, task.held_out
    predicted = evaluate.logits(suspect.net, suspect.variables, held_out).argmax(-1)
    labels = np.asarray(held_out.labels)
    accuracy = float((predicted == labels).mean())
    return evaluate.baseline(predicted, labels, suspect.classes), accuracy
