"""Triggers of class pairs, one by one and for several at once, and what they do: the work behind `pairs.scan`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import detect, evaluate, loop, stages, sweep
from jaxbd.base import ANY_SOURCE, Batch, Cell, Inversion, Key, Net, Variables
from jaxbd.data import draw
from jaxbd.inversion import neural_cleanse, plain, pt_red
from jaxbd.remembered import remembered

Pair = tuple[int, int]
"""(source, target)"""
METHODS = ("neural-cleanse", "pt-red")
MAKE = {name: remembered(32)(module.make) for name, module in zip(METHODS, (neural_cleanse, pt_red), strict=True)}
"""The factories, remembering what they made, so that nothing is traced twice."""
INFOS = {"neural-cleanse": neural_cleanse.Info, "pt-red": pt_red.Info}
make_plain = remembered(32)(plain.make)
EVALUATED = 64
"""Images at a time when a trigger is judged: about as many as one class brings."""


class Search(NamedTuple):
    """One sweep over pairs.

    Attributes:
      rows: pair -> where its state is in `states` (NumPy, [N, …]).
      norms: [K, K], size of each pair's trigger; inf where none was found, nan where none was sought.
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
    """What all steps of one scan work with.

    Attributes:
      search: images the triggers are made on; held_out: others, on which they are judged.
      inversions: by method; last_inversions: for the last estimate.
      progress: (what is running, steps done, steps in all).
      keep: what may save the searches and go on from there.
    """

    key: Key
    net: Net
    variables: Variables
    classes: int
    search: Batch
    held_out: Batch
    inversions: Mapping[str, Inversion]
    last_inversions: Mapping[str, Inversion]
    progress: Callable[[str, int, int], None]
    keep: stages.Keep = stages.through


class Joint(NamedTuple):
    """One trigger for several pairs: state, its size, whether it ever reached the success rate, seconds."""

    state: Any
    norm: float
    reached: bool
    seconds: loop.Seconds


def sizes(method: str, states: Any) -> np.ndarray:
    """[...]: L1 norms of the masks or L2 norms of the perturbations of states [...].

    The paper says l0 norm of the patch but gives values such as 3.02: it must be the sum of a mask with values between
    0 and 1, as here.
    """
    if method == "neural-cleanse":
        return np.asarray(states.best_mask, float).sum((-3, -2, -1))
    return np.sqrt((np.asarray(states.perturbation, float) ** 2).sum((-3, -2, -1)))


def reached(method: str, states: Any) -> np.ndarray:
    """[...] bool: whether a trigger was found that reaches the success rate."""
    return np.isfinite(states.best_norm) if method == "neural-cleanse" else np.asarray(states.reached) > 0


def sweep_pairs(lab: Lab, method: str, pairs: Sequence[Pair], num_steps: int, batch_size: int, **settings: Any):
    """One trigger for every pair of `pairs`: (Search, what `sweep.search` found); `settings` are its own."""
    sources, targets = (jnp.array(side, jnp.int32) for side in zip(*pairs, strict=True))
    label = told = f"{method}: {len(pairs)} pairs"
    lab.progress(label, 0, num_steps * len(pairs))

    def shrunk(slots: int) -> None:
        nonlocal told
        told = f"{label}, out of memory, {slots} at a time from here on"

    found = sweep.search(
        jax.random.fold_in(lab.key, METHODS.index(method)),
        lab.inversions[method],
        draw.uniform(batch_size),
        lab.search,
        Cell(targets, sources, jnp.zeros(len(pairs))),
        lab.variables,
        num_steps=num_steps,
        on_chunk=lambda at: lab.progress(told, at.steps, at.steps_total),
        on_shrink=shrunk,
        keep=lab.keep,
        name=label,
        **settings,
    )
    norms = np.full((lab.classes, lab.classes), np.nan)
    norms[tuple(np.transpose(pairs))] = np.where(reached(method, found.states), sizes(method, found.states), np.inf)
    rows = {pair: row for row, pair in enumerate(pairs)}
    return Search(rows, found.states, norms, detect.pair_scores(1 / norms)), found


def outcomes(lab: Lab, method: str, state: Any, sources: Sequence[int]) -> np.ndarray:
    """[K, K]: share of the held-out images of each of `sources` that a trigger sends to each class; nan elsewhere."""
    return sent(lab, lab.inversions[method].stamp, state, sources)


def sent(lab: Lab, stamp: Any, state: Any, sources: Sequence[int]) -> np.ndarray:
    """As `outcomes`, of any trigger (stamp, state)."""
    shares = np.full((lab.classes, lab.classes), np.nan)
    chosen = np.isin(lab.held_out.labels, sources)
    if not chosen.any():
        return shares
    data = Batch(lab.held_out.images[chosen], lab.held_out.labels[chosen])
    key = jax.random.fold_in(lab.key, 10)
    logits = evaluate.triggered_logits(key, lab.net, lab.variables, stamp, state, data, batch_size=EVALUATED)
    counts = np.zeros_like(shares)
    np.add.at(counts, (data.labels, logits.argmax(-1)), 1)
    present = np.unique(data.labels)
    shares[present] = counts[present] / counts[present].sum(1, keepdims=True)
    return shares


def joint(
    lab: Lab,
    method: str,
    inversion: Inversion,
    wish: Mapping[int, int],
    num_steps: int,
    batch_size: int,
    label: str,
) -> Joint:
    """One trigger that sends the images of every source in `wish` to its target; `label` is the stage's name."""
    key = jax.random.fold_in(lab.key, 20)
    for number in sorted(wish.items()):
        key = jax.random.fold_in(key, number[0] * lab.classes + number[1])
    info, state = INFOS[method], inversion.init(key)
    state, seconds = _fitted(lab, key, inversion, info, state, wish, num_steps, batch_size, label)
    return Joint(state, float(sizes(method, state)), bool(reached(method, state)), seconds)


def box(method: str, state: Any) -> np.ndarray | None:
    """[4], see `plain.box_of`, around the mask of a patch; None for a perturbation."""
    return plain.box_of(state.best_mask) if method == "neural-cleanse" else None


def plain_patch(
    lab: Lab,
    image_shape: tuple[int, int, int],
    box: np.ndarray,
    wish: Mapping[int, int],
    num_steps: int,
    batch_size: int,
    label: str,
) -> tuple[Inversion, Any, loop.Seconds]:
    """A patch of one colour that fills `box` [4], for all of `wish`: (inversion, its state, seconds).

    `label` is the stage's name.
    """
    inversion = make_plain(lab.net, tuple(image_shape), plain.Config())
    state = inversion.init(lab.key)._replace(box=jnp.asarray(box))
    key = jax.random.fold_in(lab.key, 30)
    state, seconds = _fitted(lab, key, inversion, plain.Info, state, wish, num_steps, batch_size, label)
    return inversion, state, seconds


def _fitted(lab, key, inversion, info, state, wish, num_steps, batch_size, label) -> tuple[Any, loop.Seconds]:
    """(state, seconds) of an inversion on all images of the sources in `wish`, each with its target."""
    labels = np.asarray(lab.search.labels)
    # as many rows as the whole set has, so that one program serves all sets of sources
    rows = jnp.asarray(np.resize(np.flatnonzero(np.isin(labels, list(wish))), len(labels)))
    data = jax.tree.map(lambda leaf: leaf[rows], lab.search)
    target = jnp.array([wish.get(source, 0) for source in range(lab.classes)], jnp.int32)
    cell, drawn = Cell(target, jnp.int32(ANY_SOURCE), jnp.float32(0)), draw.uniform(batch_size)
    lab.progress(label, 0, num_steps)
    fit = lambda state, left, on_chunk: loop.fit(
        key, inversion.step, drawn, data, state, cell, lab.variables, num_steps=left, on_chunk=on_chunk
    )
    state = jax.tree.map(jnp.copy, state)  # leaves may share memory, which donating forbids
    state, _, seconds = stages.run(lab.keep, lab.progress, label, state, fit, info=info, num_steps=num_steps)
    return state, seconds
