"""BNA: shifts, scales and clips activations until triggered images activate a net as clean ones do (Li et al. 2023)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from jaxbd import histogram, losses
from jaxbd.base import Array, ArrayTree, Batch, Key, Net, Repair, UserError, Variables, check_choices
from jaxbd.histogram import Grid
from jaxbd.images import to_float
from jaxbd.repair import activations
from jaxbd.repair.activations import Range

PAPER = "https://arxiv.org/abs/2308.09850"
DIVERGENCES = {"tv": losses.total_variation, "js": losses.jensen_shannon, "kl": losses.kullback_leibler}
UNBOUNDED = -3e38
"""A lower bound that clips nothing."""
LEAST_UNIT = 1e-5
"""Added to a variance or deviation that is a unit, so that a dead channel has one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the correction. The defaults are the paper's parameters and objective, with Jensen-Shannon for total
    variation, a term that keeps the target class, larger steps and fewer of them.

    Attributes:
      divergence: D_k of each channel: total variation, Jensen-Shannon, Kullback-Leibler.
      width: Delta b, the width of the intervals.
      tau: how sharply the intervals are told apart (eq. 6).
      bins: most intervals of a channel.
      span: what the intervals span: the extremes of the "clean" activations, or of "both" clean and triggered ones.
      trained: "all": mu, sigma, upsilon and omega; "bounds": the latter two; "upper": omega alone.
      layers: "all", or only those that are a "batchnorm".
      order: "joint": the sum over all layers at once; "layerwise": one layer after the other, in order of execution,
        each for an equal share of the steps and with a fresh optimiser.
      moments: where mu and sigma of BatchNorm start: its own ("stored"), or those of "triggered" images.
      start_upper: where omega starts, without a lower bound; none: both bounds start at the clean extremes.
      keep: weight of a second term that keeps the activations of clean images of the target class as they are, where
        the evidence brings such images; 0, the paper's objective, leaves it out.
      learning_rate: of Adam.
      average: whether the result is the mean of the parameters over the second half of the steps instead of the last
        ones, which jump about where the two terms of the objective pull apart.
      num_steps: length of the run, all layers together.
      epochs: the length in passes over the images instead, for every layer that is trained on its own; drivers turn it
        into `num_steps` (see `lengthened`).
    """

    # Differs from paper: there total variation (eq. 3); the smoother form spares more of the target class
    divergence: Literal["tv", "js", "kl"] = "js"
    width: float = 0.1
    tau: float = 150.0
    bins: int = 100
    span: Literal["clean", "both"] = "clean"
    trained: Literal["all", "bounds", "upper"] = "all"
    layers: Literal["all", "batchnorm"] = "all"
    order: Literal["joint", "layerwise"] = "joint"
    moments: Literal["stored", "triggered"] = "stored"
    start_upper: float | None = None
    # Differs from paper: without it a small net's correction takes clean images of the target class for triggered ones
    keep: float = 1.0
    learning_rate: float = 0.03
    # Differs from paper: it takes the last parameters
    average: bool = True
    num_steps: int = 200
    epochs: int | None = None

    def __post_init__(self):
        check_choices("bna", self)
        if not self.learning_rate > 0 or self.num_steps < 1 or (self.epochs is not None and self.epochs < 1):
            raise UserError("bna: learning_rate must be > 0, num_steps and epochs at least 1")
        if not 0 <= self.keep < float("inf"):
            raise UserError(f"bna: keep is {self.keep}; give a weight of at least 0")
        if not (self.width > 0 and self.tau > 0 and self.tau * self.width >= 1) or self.bins < 2:
            raise UserError("bna: width and tau must be > 0 and tau x width at least 1, bins at least 2")


def paper(**changes: Any) -> Config:
    """Section 5.1: all four parameters of all layers jointly, 30 epochs; starts and optimiser, left open, as ours."""
    settings = {"divergence": "tv", "epochs": 30, "learning_rate": 0.01, "keep": 0.0, "average": False}
    return Config(**{**settings, **changes})


def released(**changes: Any) -> Config:
    """As in the released code: moments replaced by those of triggered images, then upper bounds layer by layer.

    Parts from it where it parts from itself: both histograms use one grid and are normalised (its clean one has bins
    of another width, its sum of count differences is a multiple that Adam does not see), the end intervals are
    half-infinite, and a layer's turn is not cut short when its loss stands still.
    # Differs from released code: clean images are whatever the evidence holds; there, of all classes.
    """
    settings = dict(
        divergence="tv", epochs=10, moments="triggered", start_upper=3.0, trained="upper", layers="batchnorm",
        order="layerwise", span="both", learning_rate=0.01, keep=0.0, average=False,
    )  # fmt: skip
    return Config(**{**settings, **changes})


class Evidence(NamedTuple):
    """What is known of the trigger.

    Attributes:
      model: the trigger, as `stamp` takes it.
      data: clean images of the source classes (uint8 or float).
      kept: clean images of the target class, where there are any.
    """

    model: ArrayTree
    data: Batch
    kept: Batch | None = None


class Theta(NamedTuple):
    """Parameters [C] of one layer: mu = start + unit * shift, sigma = start * exp(log_scale), upsilon, omega.

    # Differs from paper: mu and sigma move in units of the layer's own, so that one learning rate suits all nets.
    """

    shift: Array
    log_scale: Array
    lower: Array
    upper: Array


class Reference(NamedTuple):
    """Of one layer: p [C, bins] of clean activations in the victim, their intervals, and the unit [C] of mu."""

    p: Array
    grid: Grid
    unit: Array


class State(NamedTuple):
    """step [] int32; theta, optimiser state and reference per layer; the victim (moments as they start), trigger.

    mean: the parameters averaged since the middle of the run; theta itself before that, or where none is asked for.
    kept: images of the target class and p [C, bins] of their clean activations by layer, on the reference's intervals;
    None where they do not matter.
    keep: [] float32, weight of what keeps them; `init` takes it from the Config, and a driver may replace it.
    """

    step: Array
    theta: dict[str, Theta]
    mean: dict[str, Theta]
    opt: dict[str, optax.OptState]
    reference: dict[str, Reference]
    variables: Variables
    model: ArrayTree
    kept: tuple[Array, dict[str, Array]] | None
    keep: Array


class Info(NamedTuple):
    """loss []: sum over the channels in training; divergence {layer: []}: mean over the layer's channels."""

    loss: Array
    divergence: dict[str, Array]


def lengthened(config: Config, layers: int, steps_per_epoch: int) -> Config:
    """`config` with its epochs, where it has any, as `num_steps` for a net of so many trained layers."""
    if config.epochs is None:
        return config
    turns = layers if config.order == "layerwise" else 1
    return dataclasses.replace(config, num_steps=config.epochs * steps_per_epoch * turns, epochs=None)


def trained_layers(net: Net, variables: Variables, images: Array, config: Config) -> list[str]:
    """Layers of `net` that are corrected, in order of execution. Raises: UserError when there are none."""
    found: list[str] = []

    def note(variables, images):
        found.extend(_shown(net, variables, images, config))

    jax.eval_shape(note, variables, images)
    return found


def _shown(net: Net, variables: Variables, images: Array, config: Config) -> dict[str, Array]:
    """Outputs of the layers to be corrected, in order of execution."""
    shown = {} if net.outputs is None else net.outputs(variables, images)[1]
    if config.layers == "batchnorm":
        normalised = _flat(variables.get("batch_stats", {}))
        shown = {layer: values for layer, values in shown.items() if layer in normalised}
    if not shown:
        raise UserError(
            "bna: this net shows no layer whose activations could be corrected; build it with jaxbd's BatchNorm or "
            "Correction, or use another repair"
        )
    return shown


def make(net: Net, stamp: Callable[[Key, Any, Array], Array], config: Config) -> Repair:
    """The correction of `net`; `stamp(key, model, images)` is that of the inversion (or attack) behind the evidence.

    The weights are never touched: what `extract` adds or changes are BatchNorm's moments and the collection `bounds`.

    Raises: UserError when the net shows no layers (at `init` where that takes a trace).
    """
    if net.outputs is None:
        raise UserError("bna: a net made from a bare apply function shows no layers to correct; use another repair")
    rule = optax.adam(config.learning_rate)
    diverge, reach = DIVERGENCES[config.divergence], histogram.reach(config.tau, config.width)

    def init(key: Key, variables: Variables, evidence: Evidence) -> State:
        variables, (model, data, kept) = jax.tree.map(jnp.asarray, ({"batch_stats": {}, **variables}, evidence))
        stamped = lambda number, images: stamp(jax.random.fold_in(key, number), model, images)
        show = lambda _, images: _shown(net, variables, images, config)
        show_stamped = lambda number, images: show(number, stamped(number, images))
        clean = spans = activations.ranges(show, data.images)
        if kept is not None and config.keep:
            clean = spans = activations.union(clean, activations.ranges(show, kept.images))
        if config.span == "both":
            spans = activations.union(clean, activations.ranges(show_stamped, data.images))
        grids = {n: histogram.grid(r.low, r.high, config.width, config.bins) for n, r in spans.items()}
        p = activations.histograms(show, data.images, grids, config.bins)
        if kept is not None:
            kept = kept.images, activations.histograms(show, kept.images, grids, config.bins)
        if config.moments == "triggered":
            moments = activations.batch_moments(net, variables, stamped, data.images)
            variables = {**variables, "batch_stats": moments}
        reference = {n: Reference(p[n], grids[n], clean[n].std + LEAST_UNIT) for n in p}
        theta = {n: _start(r, config) for n, r in clean.items()}
        opt = {n: rule.init(t) for n, t in theta.items()}
        # drivers donate the state, so no two of its leaves may share memory
        kept = kept if config.keep else None
        keep, step = jnp.float32(config.keep), jnp.zeros((), jnp.int32)
        state = State(step, theta, theta, opt, reference, variables, model, kept, keep)
        return jax.tree.map(jnp.copy, state)

    def divergence(theta: dict[str, Theta], state: State, images: Array, p: dict[str, Array]) -> dict[str, Array]:
        """D_k(p || q) [C] of each layer, q being the corrected net's activations on `images` (eq. 3)."""
        shown = _shown(net, _corrected(theta, state), images, config)
        q = {n: histogram.soft(v, state.reference[n].grid, config.bins, config.tau, reach) for n, v in shown.items()}
        return {name: diverge(p[name], q[name]) for name in q}

    def loss(theta: dict[str, Theta], state: State, images: Array, kept: Array | None, active: dict[str, Array]):
        """Sum over channels j and layers l of D_k(p || q) (Li et al. 2023, eq. 3), and its mean in each layer."""
        each = divergence(theta, state, images, {name: r.p for name, r in state.reference.items()})
        total = sum(active[n] * d.sum() for n, d in each.items())
        if kept is not None:
            unmoved = divergence(theta, state, kept, state.kept[1])
            total += state.keep * sum(active[n] * d.sum() for n, d in unmoved.items())
        return total, {n: d.mean() for n, d in each.items()}

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        images = stamp(key, state.model, batch.images)
        active = _active(net, state, images, config)
        kept = None if state.kept is None else _some(jax.random.fold_in(key, 1), state.kept[0], images.shape[0] // 2)
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, each), gradient = grad(state.theta, state, images, kept, active)
        moved = {n: _moved(rule, gradient[n], state.opt[n], t, active[n], config) for n, t in state.theta.items()}
        theta, opt = ({n: pair[i] for n, pair in moved.items()} for i in (0, 1))
        after = state._replace(step=state.step + 1, theta=theta, opt=opt)
        return after._replace(mean=_averaged(after, config)), Info(value, each)

    def extract(state: State) -> Variables:
        return _corrected(state.mean, state)

    return Repair(init, step, extract)


def _averaged(state: State, config: Config) -> dict[str, Theta]:
    """The mean of the parameters over the steps made since the middle of the run, this one included."""
    if not config.average:
        return state.theta
    count = jnp.maximum(state.step - config.num_steps // 2, 1)
    return jax.tree.map(lambda old, new: old + (new - old) / count.astype(new.dtype), state.mean, state.theta)


def _some(key: Key, images: Array, most: int) -> Array:
    """All of `images` [N, H, W, C] as floats, or `most` of them, drawn without replacement."""
    if images.shape[0] > most:
        images = images[jax.random.permutation(key, images.shape[0])[:most]]
    return to_float(images)


def _start(clean: Range, config: Config) -> Theta:
    """mu and sigma as they are; bounds at the clean extremes, which clip no clean image, or as released."""
    # Differs from paper: it leaves the start open
    nothing = jnp.zeros_like(clean.low)
    if config.start_upper is None:
        return Theta(nothing, nothing, clean.low, clean.high)
    return Theta(nothing, nothing, jnp.full_like(nothing, UNBOUNDED), jnp.full_like(nothing, config.start_upper))


def _corrected(theta: dict[str, Theta], state: State) -> Variables:
    """The victim's variables with the parameters `theta` in place."""
    stats, bounds = _flat(state.variables["batch_stats"]), {}
    for name, (shift, log_scale, lower, upper) in theta.items():
        bounds[name] = {"lower": lower, "upper": upper}
        if name in stats:
            mean, var = stats[name]["mean"], stats[name]["var"]
            stats[name] = {"mean": mean + jnp.sqrt(var + LEAST_UNIT) * shift, "var": var * jnp.exp(2 * log_scale)}
        else:
            bounds[name] |= {"mean": state.reference[name].unit * shift, "std": jnp.exp(log_scale)}
    return {**state.variables, "batch_stats": _nested(stats), "bounds": _nested(bounds)}


def _active(net: Net, state: State, images: Array, config: Config) -> dict[str, Array]:
    """1.0 for every layer that is in training at this step, 0.0 for the others."""
    order = trained_layers(net, state.variables, images, config)
    if config.order == "joint":
        return {name: jnp.ones((), images.dtype) for name in order}
    turn = state.step * len(order) // config.num_steps
    return {name: (turn == number).astype(images.dtype) for number, name in enumerate(order)}


def _moved(rule, gradient: Theta, opt: optax.OptState, theta: Theta, active: Array, config: Config):
    """(theta, optimiser state) of one layer after a step; as they were where it is not its turn."""
    updates, new = rule.update(gradient, opt, theta)
    fixed = {"all": (), "bounds": ("shift", "log_scale"), "upper": ("shift", "log_scale", "lower")}[config.trained]
    updates = updates._replace(**{name: jnp.zeros_like(getattr(updates, name)) for name in fixed})
    after = optax.apply_updates(theta, updates), new
    return jax.tree.map(lambda now, before: jnp.where(active > 0, now, before), after, (theta, opt))


def _flat(tree: ArrayTree) -> dict[str, dict[str, Array]]:
    """{"layer1_0": {"bn1": {"mean": …}}} -> {"layer1_0/bn1": {"mean": …}}."""
    leaves: dict[str, dict[str, Array]] = {}
    for path, leaf in flax.traverse_util.flatten_dict(dict(tree)).items():
        leaves.setdefault("/".join(path[:-1]), {})[path[-1]] = leaf
    return leaves


def _nested(layers: dict[str, Any]) -> ArrayTree:
    """The inverse of `_flat`."""
    return flax.traverse_util.unflatten_dict(layers, sep="/")


class Moments(NamedTuple):
    """Mean and standard deviation of the two-class Gaussian model's BatchNorm, per node [J]."""

    mean: Array
    std: Array


def moments_star(stored: Moments, on_source: Array, on_shift: Array, sigma: Array, sigma_b: Array) -> Moments:
    """m* and sqrt(v*) that undo the alteration in the paper's Gaussian model (Li et al. 2023, eq. 2).

    Clean source images are N(-mu, sigma^2 I), triggered ones N(-mu + eps, sigma_b^2 I). The root of v* is what scales
    (appendix A.1; the paper's text has lost the sign).

    Args:
      stored: BatchNorm's own m and sqrt(v) [J].
      on_source: w^T mu [J]; on_shift: w^T eps [J].
    """
    ratio = sigma_b / sigma
    return Moments(ratio * stored.mean + (ratio - 1) * on_source + on_shift, ratio * stored.std)


def moments_between(stored: Moments, star: Moments, alpha: Array) -> Moments:
    """Of Theorem 3.1's classifier between corrected (alpha = 0) and as it was (alpha = 1)."""
    return Moments(*(alpha * own + (1 - alpha) * other for own, other in zip(stored, star, strict=True)))
