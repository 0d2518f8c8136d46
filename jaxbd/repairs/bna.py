"""BNA: shifts, scales and clips activations until triggered images activate a net like clean images
(Li et al. 2023)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses
from jaxbd.base import (
    Array,
    ArrayTree,
    Batch,
    Key,
    Need,
    Net,
    Phase,
    Problem,
    Repair,
    RepairData,
    Suspect,
    UserError,
    Variables,
)
from jaxbd.caching import cached
from jaxbd.images import to_float
from jaxbd.repairs import activations, bna_layers, histogram
from jaxbd.repairs.bna_config import Config, paper, quick, released
from jaxbd.repairs.bna_layers import Theta
from jaxbd.repairs.histogram import Grid

__all__ = ["Config", "Info", "State", "adapt", "make", "paper", "quick", "released"]
PAPER = "https://arxiv.org/abs/2308.09850"
NEEDS: frozenset[Need] = frozenset({"clean", "trigger"})
DIVERGENCES = {
    "tv": losses.total_variation,
    "js": losses.jensen_shannon,
    "kl": losses.kullback_leibler,
}
FIXED = {"all": (), "bounds": ("shift", "log_scale"), "upper": ("shift", "log_scale", "lower")}
"""Value of `Config.trained` -> the parameters of `Theta` that are not trained."""
Stamp = Callable[[Key, ArrayTree, Array], Array]
"""(key, trigger_params, images [B, H, W, C]) -> images"""


class Reference(NamedTuple):
    """Reference of one layer: histogram p [C, bins] of clean activations in the suspect, its
    intervals, and the unit [C] of mu."""

    p: Array
    grid: Grid
    unit: Array


class CleanTarget(NamedTuple):
    """Images [N, H, W, C] of the target class, and the histogram p [C, bins] of their clean
    activations in each layer, on the reference's intervals."""

    images: Array
    p: dict[str, Array]


class State(NamedTuple):
    """State of the repair.

    Attributes:
      step: [] int32.
      theta, opt, reference: parameters, optimiser state and clean histogram of each layer.
      mean: average of the parameters since the middle of the run; equal to theta before that, or if
        `Config.average` is off.
      variables: the suspect's, with BatchNorm's initial moments.
      trigger_params: see `base.Evidence`.
      clean_target: clean images of the target class; None if the objective does not use them.
      keep: [] float32, see `Config`. A driver may replace it; all values share one program.
    """

    step: Array
    theta: dict[str, Theta]
    mean: dict[str, Theta]
    opt: dict[str, optax.OptState]
    reference: dict[str, Reference]
    variables: Variables
    trigger_params: ArrayTree
    clean_target: CleanTarget | None
    keep: Array


class Info(NamedTuple):
    """Loss [], summed over the channels in training, and divergence {layer: []}, averaged over the
    layer's channels."""

    loss: Array
    divergence: dict[str, Array]


def adapt(config: Config, suspect: Suspect, data: RepairData, batch_size: int) -> Config:
    """`config` with its epochs, if set, converted to `num_steps` for the suspect's layers and the
    images of the source classes."""
    if config.epochs is None or data.clean_sources is None:
        return config
    images = data.clean_sources.images
    steps = -(-len(images) // batch_size)
    turns = 1
    if config.order == "layerwise":
        one = to_float(images[:1])
        turns = len(_layer_names(suspect.net, suspect.variables, one, config))
    return dataclasses.replace(config, num_steps=config.epochs * steps * turns, epochs=None)


def _layer_names(net: Net, variables: Variables, images: Array, config: Config) -> list[str]:
    only = config.layers == "batchnorm"
    return bna_layers.names(net, variables, images, batchnorm_only=only)


def _outputs(net: Net, variables: Variables, images: Array, config: Config) -> dict[str, Array]:
    only = config.layers == "batchnorm"
    return bna_layers.outputs(net, variables, images, batchnorm_only=only)


def make(problem: Problem, config: Config) -> Repair:
    """Corrects `problem.net` for the trigger that `problem.stamp` puts on images.

    Changes only BatchNorm's moments and the collection `bounds`, never a weight. Batches are drawn
    from images of the source classes. `init` measures all images, a few at a time.

    Raises: UserError when the problem has no stamp, or the net shows no layers (from `init` if only
      tracing the net can tell).
    """
    if problem.net.outputs is None:
        raise UserError(
            "bna: a net made from a bare apply function shows no layers to correct; use another"
            " repair"
        )
    net, stamp = problem.net, problem.stamp
    if stamp is None:
        raise UserError("bna: the problem has no stamp; make it from evidence of a trigger")

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        return _init(key, net, stamp, config, {"batch_stats": {}, **variables}, data)

    # the step reads `keep` from the state, so that all its values share one program
    step = _step(net, stamp, dataclasses.replace(config, keep=0.0))
    phases = (Phase("bna", step, config.num_steps, Info, draws="clean_sources"),)
    return Repair(init, phases, extract, needs=NEEDS)


def extract(state: State, dial: None = None) -> Variables:
    """The corrected variables of the suspect."""
    del dial
    return _correct(state, state.mean)


def _correct(state: State, theta: dict[str, Theta]) -> Variables:
    units = {name: reference.unit for name, reference in state.reference.items()}
    return bna_layers.correct(state.variables, theta, units)


def _init(
    key: Key, net: Net, stamp: Stamp, config: Config, variables: Variables, data: RepairData
) -> State:
    """Measures clean activations and chooses the intervals."""
    variables, sources, triggers = jax.tree.map(
        jnp.asarray, (variables, data.clean_sources, data.trigger_params)
    )
    target = data.clean_target.images if config.keep and data.clean_target else None
    stamped = lambda number, images: stamp(jax.random.fold_in(key, number), triggers, images)
    clean_outputs = lambda _, images: _outputs(net, variables, images, config)
    outputs = lambda number, images: clean_outputs(number, stamped(number, images))
    # Differs from paper: its extremes are those of all clean images, not only of source classes
    clean = activations.ranges(clean_outputs, sources.images)
    if target is not None:
        clean = activations.union(clean, activations.ranges(clean_outputs, target))
    spans = clean
    if config.span == "both":
        spans = activations.union(clean, activations.ranges(outputs, sources.images))
    grids = {n: histogram.grid(r.low, r.high, config.width, config.bins) for n, r in spans.items()}
    count = lambda images: activations.histograms(clean_outputs, images, grids, config.bins)
    p = count(sources.images)
    clean_target = None if target is None else CleanTarget(target, count(target))
    if config.moments == "triggered":
        moments = activations.batch_moments(net, variables, stamped, sources.images)
        variables = {**variables, "batch_stats": moments}
    reference = {n: Reference(p[n], grids[n], clean[n].std + bna_layers.LEAST_UNIT) for n in p}
    theta = {n: bna_layers.start(r, config.start_upper) for n, r in clean.items()}
    opt = {n: _optimiser(config).init(t) for n, t in theta.items()}
    keep, step = jnp.float32(config.keep), jnp.zeros((), jnp.int32)
    state = State(step, theta, theta, opt, reference, variables, triggers, clean_target, keep)
    # drivers donate the state, so no two of its leaves may share memory
    return jax.tree.map(jnp.copy, state)


def _optimiser(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate)


@cached(32)
def _step(net: Net, stamp: Stamp, config: Config) -> Callable[..., tuple[State, Info]]:
    """The step function; cached, so that the same net, stamp and settings share one program."""

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        images = stamp(key, state.trigger_params, batch.images)
        active, target = active_layers(net, state, images, config), state.clean_target
        if target is not None:
            drawn = _draw_some(jax.random.fold_in(key, 1), target.images, images.shape[0] // 2)
            target = target._replace(images=drawn)
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, each), gradient = grad(state.theta, state, images, target, active, net, config)
        moved = {
            n: update(gradient[n], state.opt[n], t, active[n], config)
            for n, t in state.theta.items()
        }
        theta, opt = ({n: pair[i] for n, pair in moved.items()} for i in (0, 1))
        after = state._replace(step=state.step + 1, theta=theta, opt=opt)
        return after._replace(mean=average(after, config)), Info(value, each)

    return step


def divergences(
    theta: dict[str, Theta],
    state: State,
    images: Array,
    p: dict[str, Array],
    net: Net,
    config: Config,
) -> dict[str, Array]:
    """D_k(p || q) [C] of each layer, where q is the histogram of the corrected net's activations on
    `images` (Li et al. 2023, eq. 3)."""
    reach = histogram.reach(config.tau, config.width)
    outputs = _outputs(net, _correct(state, theta), images, config)
    q: dict[str, Any] = {
        n: histogram.soft(values, state.reference[n].grid, config.bins, config.tau, reach)
        for n, values in outputs.items()
    }
    return {name: DIVERGENCES[config.divergence](p[name], q[name]) for name in q}


def loss(
    theta: dict[str, Theta],
    state: State,
    images: Array,
    target: CleanTarget | None,
    active: dict[str, Array],
    net: Net,
    config: Config,
) -> tuple[Array, dict[str, Array]]:
    """Sum over channels j and layers l of D_k(p || q) (Li et al. 2023, eq. 3), and the mean over
    each layer's channels.

    Args:
      images: triggered images; target: clean images of the target class, or None.
      active: {layer: [] 1 or 0}, see `active_layers`.
    """
    p = {name: reference.p for name, reference in state.reference.items()}
    each = divergences(theta, state, images, p, net, config)
    total: Any = sum(active[n] * d.sum() for n, d in each.items())
    if target is not None:
        # Differs from paper: a second term preserves activations of clean target-class images
        unmoved = divergences(theta, state, target.images, target.p, net, config)
        total += state.keep * sum(active[n] * d.sum() for n, d in unmoved.items())
    return total, {n: d.mean() for n, d in each.items()}


def average(state: State, config: Config) -> dict[str, Theta]:
    """Updates the mean of the parameters over all steps since the middle of the run, including this
    one."""
    if not config.average:
        return state.theta
    # a running mean; up to the middle of the run count is 1, which copies theta
    count = jnp.maximum(state.step - config.num_steps // 2, 1)
    return jax.tree.map(
        lambda old, new: old + (new - old) / count.astype(new.dtype), state.mean, state.theta
    )


def active_layers(net: Net, state: State, images: Array, config: Config) -> dict[str, Array]:
    """1.0 for every layer that is trained at this step, 0.0 for the others."""
    order = _layer_names(net, state.variables, images, config)
    if config.order == "joint":
        return {name: jnp.ones((), images.dtype) for name in order}
    # equal shares of the steps, in order of execution
    turn = state.step * len(order) // config.num_steps
    return {name: (turn == number).astype(images.dtype) for number, name in enumerate(order)}


def update(
    gradient: Theta, opt: optax.OptState, theta: Theta, active: Array, config: Config
) -> tuple[Theta, optax.OptState]:
    """Parameters and optimiser state of one layer after a step; unchanged if the layer is not
    active."""
    updates: Any
    updates, new = _optimiser(config).update(gradient, opt, theta)
    fixed = FIXED[config.trained]
    updates = updates._replace(**{name: jnp.zeros_like(getattr(updates, name)) for name in fixed})
    after = optax.apply_updates(theta, updates), new
    return jax.tree.map(lambda now, before: jnp.where(active > 0, now, before), after, (theta, opt))


def _draw_some(key: Key, images: Array, most: int) -> Array:
    """Up to `most` of `images` [N, H, W, C] as floats, drawn without replacement."""
    if images.shape[0] > most:
        images = images[jax.random.permutation(key, images.shape[0])[:most]]
    return to_float(images)
