"""Searches and judges triggers of class pairs, singly and for several pairs at once; used by
`pair_scan`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import ANY_SOURCE, Batch, Cell, Inversion, Key, Suspect
from jaxbd.caching import cached
from jaxbd.data import draw
from jaxbd.detection import detect
from jaxbd.inversion import neural_cleanse, plain, pt_red
from jaxbd.metrics import evaluate
from jaxbd.training import sweep
from jaxbd.training.program import Seconds
from jaxbd.training.run import Fitted, Run
from jaxbd.training.slots import Found

Pair = tuple[int, int]
"""(source, target)"""
METHODS = ("neural-cleanse", "pt-red")
MAKE = {
    name: cached(32)(module.make)
    for name, module in zip(METHODS, (neural_cleanse, pt_red), strict=True)
}
"""Cached factories, so that nothing is traced twice."""
INFOS = {"neural-cleanse": neural_cleanse.Info, "pt-red": pt_red.Info}
make_plain = cached(32)(plain.make)
EVALUATED = 64
"""Batch size for judging a trigger: about the number of images of one class."""


class Search(NamedTuple):
    """One sweep over pairs.

    Attributes:
      rows: {pair: its index in `states`}.
      states: the pairs' states [N, …], NumPy.
      norms: [K, K], size of each pair's trigger; inf if none was found, nan if not searched.
      scores: [K, K], see `detect.pair_scores`.
    """

    rows: dict[Pair, int]
    states: Any
    norms: np.ndarray
    scores: np.ndarray

    def state(self, pair: Pair) -> Any:
        """The state of one pair."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[self.rows[pair]]), self.states)


class Lab(NamedTuple):
    """Inputs shared by all steps of one scan.

    Attributes:
      search: images to optimise triggers on.
      held_out: other images, to judge them on.
      inversions: {method: inversion}.
      last_inversions: the same for the last estimate of a target.
    """

    run: Run
    key: Key
    suspect: Suspect
    search: Batch
    held_out: Batch
    inversions: Mapping[str, Inversion]
    last_inversions: Mapping[str, Inversion]


class Joint(NamedTuple):
    """A trigger for several pairs: state, size, whether it reached the success rate, seconds."""

    state: Any
    norm: float
    reached: bool
    seconds: Seconds


def sweep_pairs(
    lab: Lab, method: str, pairs: Sequence[Pair], num_steps: int, batch_size: int, **settings: Any
) -> tuple[Search, Found]:
    """Searches one trigger for every pair; also returns the sweep. `settings` are passed to
    `sweep.search`."""
    sources, targets = (jnp.array(side, jnp.int32) for side in zip(*pairs, strict=True))
    inversion, classes = lab.inversions[method], lab.suspect.classes
    found = sweep.search(
        lab.run,
        f"{method}: {len(pairs)} pairs",
        jax.random.fold_in(lab.key, METHODS.index(method)),
        inversion,
        draw.uniform(batch_size),
        lab.search,
        Cell(targets, sources, jnp.zeros(len(pairs))),
        lab.suspect.variables,
        num_steps=num_steps,
        **settings,
    )
    norms = np.full((classes, classes), np.nan)
    sizes, works = _measure_sizes(inversion, found.states)
    norms[tuple(np.transpose(pairs))] = np.where(works, sizes, np.inf)
    rows = {pair: row for row, pair in enumerate(pairs)}
    return Search(rows, found.states, norms, detect.pair_scores(1 / norms)), found


def _measure_sizes(inversion: Inversion, states: Any) -> tuple[np.ndarray, np.ndarray]:
    """Size [N] and success [N] of the triggers `states` [N, …].

    The paper says l0 norm of the patch but gives values such as 3.02, so it must mean the sum of a
    mask with values between 0 and 1, as here.
    """
    if inversion.size is None or inversion.works is None:
        raise TypeError("a scan over pairs compares sizes; this inversion has none")
    return np.asarray(jax.vmap(inversion.size)(states), float), np.asarray(
        jax.vmap(inversion.works)(states)
    )


def measure_outcomes(lab: Lab, method: str, state: Any, sources: Sequence[int]) -> np.ndarray:
    """[K, K]: share of the held-out images of each of `sources` that a trigger sends to each class;
    nan for other rows."""
    return measure_shares(lab, lab.inversions[method].stamp, state, sources)


def measure_shares(lab: Lab, stamp: Any, state: Any, sources: Sequence[int]) -> np.ndarray:
    """As `measure_outcomes`, for any trigger (stamp, state)."""
    shares = np.full((lab.suspect.classes, lab.suspect.classes), np.nan)
    chosen = np.isin(lab.held_out.labels, sources)
    if not chosen.any():
        return shares
    data = Batch(lab.held_out.images[chosen], lab.held_out.labels[chosen])
    key = jax.random.fold_in(lab.key, 10)
    logits = evaluate.triggered_logits(
        key, lab.suspect.net, lab.suspect.variables, stamp, state, data, batch_size=EVALUATED
    )
    counts = np.zeros_like(shares)
    np.add.at(counts, (data.labels, logits.argmax(-1)), 1)
    present = np.unique(data.labels)
    shares[present] = counts[present] / counts[present].sum(1, keepdims=True)
    return shares


class Effort(NamedTuple):
    """Steps and images per step of an estimate on several pairs."""

    num_steps: int
    batch_size: int


def fit_joint(
    lab: Lab, method: str, inversion: Inversion, wish: Mapping[int, int], effort: Effort, name: str
) -> Joint:
    """Estimates one trigger that sends images of every source in `wish` {source: target} to its
    target; `name` is the name of the stage."""
    if inversion.size is None or inversion.works is None:
        raise TypeError("a scan over pairs compares sizes; this inversion has none")
    # the key depends only on the pairs, so an estimate does not depend on those before it
    key = jax.random.fold_in(lab.key, 20)
    for source, target in sorted(wish.items()):
        key = jax.random.fold_in(key, source * lab.suspect.classes + target)
    fitted = _fit_on_sources(
        lab, key, inversion, inversion.init(key), wish, effort, (name, INFOS[method])
    )
    state = fitted.state
    size, works = float(inversion.size(state)), bool(inversion.works(state))
    return Joint(state, size, works, fitted.seconds)


def find_box(state: Any) -> np.ndarray | None:
    """The box [4] around the mask of a patch, see `plain.box_of`; None for a perturbation."""
    mask = getattr(state, "best_mask", None)
    return None if mask is None else plain.box_of(mask)


def fit_plain_patch(
    lab: Lab, box: np.ndarray, wish: Mapping[int, int], effort: Effort, name: str
) -> tuple[Inversion, Fitted]:
    """Fits a patch of one colour that fills `box` [4] to all pairs of `wish` {source: target}."""
    inversion = make_plain(lab.suspect.net, lab.suspect.image_shape, plain.Config())
    state = inversion.init(lab.key)._replace(box=jnp.asarray(box))
    key = jax.random.fold_in(lab.key, 30)
    return inversion, _fit_on_sources(lab, key, inversion, state, wish, effort, (name, plain.Info))


def _fit_on_sources(
    lab: Lab,
    key: Key,
    inversion: Inversion,
    state: Any,
    wish: Mapping[int, int],
    effort: Effort,
    stage: tuple[str, type],
) -> Fitted:
    """Runs an inversion on all images of the sources in `wish`, each with its own target."""
    labels = np.asarray(lab.search.labels)
    # repeat rows up to the size of the whole set, so that one program serves all sets of sources
    rows = jnp.asarray(np.resize(np.flatnonzero(np.isin(labels, list(wish))), len(labels)))
    data = jax.tree.map(lambda leaf: leaf[rows], lab.search)
    targets = jnp.array([wish.get(k, 0) for k in range(lab.suspect.classes)], jnp.int32)
    name, info = stage
    return lab.run.fit(
        name,
        key,
        inversion.step,
        draw.uniform(effort.batch_size),
        data,
        jax.tree.map(jnp.copy, state),  # leaves may share memory, which donating forbids
        Cell(targets, jnp.int32(ANY_SOURCE), jnp.float32(0)),
        lab.suspect.variables,
        info=info,
        num_steps=effort.num_steps,
    )
