"""FT-SAM: fine-tunes towards flat minima, which shrinks the large weights that carry a backdoor
(Zhu et al. 2023)."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
from jaxbd.repairs import tuning

PAPER = "https://arxiv.org/abs/2304.11823"
NEEDS: frozenset[Need] = frozenset({"clean"})
LEAST_NORM = 1e-12
"""Added to the gradient's norm before dividing by it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of FT-SAM; defaults follow the released code except for schedule and augmentation.

    Attributes:
      rho: length of the perturbation of the weights.
      adaptive: whether to scale each weight's perturbation with the weight's size.
      label_smoothing: probability mass that the loss moves from the true class to the others.
      learning_rate: of SGD's first step.
      schedule: "cosine": falls to zero over `num_steps`; "waves": falls to zero in `wave_steps`,
        rises again in as many, and so on (released).
      wave_steps: see `schedule`.
      momentum: SGD's.
      weight_decay: SGD's, added to the gradient.
      num_steps: length of the run.
      epochs: length in passes over the images; `adapt` converts it to `num_steps`.
      crop_padding: pixels added around an image before a random crop; 0 for no crop.
      flip: whether to mirror images at random.
    """

    rho: float = 2.0
    adaptive: bool = True
    label_smoothing: float = 0.1
    learning_rate: float = 0.01
    # Differs from released code: it has "waves", because it advances a per-epoch schedule at every
    # step
    schedule: Literal["cosine", "waves"] = "cosine"
    wave_steps: int = 100
    momentum: float = 0.9
    weight_decay: float = 5e-4
    num_steps: int = 1000
    epochs: int | None = None
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self):
        tuning.check("ft-sam", self)
        if not 0 <= self.rho < float("inf"):
            raise UserError(f"ft-sam: rho must be at least 0, got {self.rho}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"ft-sam: label_smoothing must be in [0, 1), got {self.label_smoothing}"
            )
        if self.wave_steps < 1:
            raise UserError(f"ft-sam: wave_steps must be at least 1, got {self.wave_steps}")


def quick(**changes: Any) -> Config:
    """A third of the steps, for small data sets and a CPU."""
    return Config(**{**dict(num_steps=300), **changes})


def released(**changes: Any) -> Config:
    """The settings of BackdoorBench, which the paper names as its code: 100 passes over 5 % of the
    data (BackdoorBench uses batches of 256)."""
    settings = dict(schedule="waves", epochs=100, crop_padding=4, flip=True)
    return Config(**{**settings, **changes})


class State(NamedTuple):
    """Step [] int32, the net's variables, and the optimiser's state."""

    step: Array
    variables: Variables
    opt: optax.OptState


class Info(NamedTuple):
    """Loss in nats, sharpness (increase of the loss by the perturbation) and accuracy, all [] on
    the batch as drawn."""

    loss: Array
    sharpness: Array
    accuracy: Array


def adapt(config: Config, suspect: Suspect, data: RepairData, batch_size: int) -> Config:
    """`config` with its epochs, if set, converted to `num_steps`."""
    del suspect
    return tuning.count_steps(config, data, batch_size)


def make(problem: Problem, config: Config) -> Repair:
    """FT-SAM for `problem.net`, which may be any net with parameters.

    BatchNorm uses batch moments in both passes, and updates its running ones in the first.
    """
    rule = tuning.sgd(make_schedule(config), config.momentum, config.weight_decay)

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        del key, data
        # a copy, since drivers donate the state
        variables = jax.tree.map(jnp.copy, {"batch_stats": {}, **variables})
        return State(jnp.zeros((), jnp.int32), variables, rule.init(variables["params"]))

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        batch = tuning.vary(key, batch, config)
        return sam_step(problem.net, rule, config, state, batch)

    def extract(state: State, dial: None = None) -> Variables:
        del dial
        return state.variables

    return Repair(init, (Phase("ft-sam", step, config.num_steps, Info),), extract, needs=NEEDS)


def make_schedule(config: Config) -> optax.Schedule:
    """The learning rate as a function of the step."""
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    # a cosine that continues past its half-wave, as in PyTorch's CosineAnnealingLR
    return lambda count: (
        config.learning_rate * (1 + jnp.cos(jnp.pi * count / config.wave_steps)) / 2
    )


def smoothed_cross_entropy(logits: Array, labels: Array, smoothing: float) -> Array:
    """Mean cross-entropy [] in nats of `logits` [B, K] against 1 - s for the class of `labels` [B]
    and s / (K - 1) for every other; s is `smoothing`."""
    classes = logits.shape[-1]
    own = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
    wanted = own * (1 - smoothing) + (1 - own) * smoothing / max(classes - 1, 1)
    return optax.softmax_cross_entropy(logits, wanted).mean()


def perturb(params: ArrayTree, gradient: ArrayTree, rho: float, adaptive: bool) -> ArrayTree:
    """w + rho T^2 g / |T g|_2 with T = |w| per weight if `adaptive`, else 1; the norm is over all
    weights together. Zhu et al. 2023, the inner maximisation."""
    scale = jax.tree.map(jnp.abs if adaptive else jnp.ones_like, params)
    scaled = jax.tree.map(jnp.multiply, scale, gradient)
    length = rho / (optax.tree.norm(scaled) + LEAST_NORM)
    move = lambda w, t, tg: w + (length * t * tg).astype(w.dtype)
    return jax.tree.map(move, params, scale, scaled)


def sam_step(
    net: Net, rule: optax.GradientTransformation, config: Config, state: State, batch: Batch
) -> tuple[State, Info]:
    """One update: takes the gradient at the perturbed weights and applies it to the original
    weights."""

    def loss(params: ArrayTree) -> tuple[Array, tuple[Array, ArrayTree]]:
        logits, stats = net.apply({**state.variables, "params": params}, batch.images, train=True)
        return smoothed_cross_entropy(logits, batch.labels, config.label_smoothing), (logits, stats)

    params = state.variables["params"]
    (here, (logits, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    higher = perturb(params, gradient, config.rho, config.adaptive)
    # drop the second pass's running moments: those of the first are kept
    (there, _), gradient = jax.value_and_grad(loss, has_aux=True)(higher)
    updates, opt = rule.update(gradient, state.opt, params)
    params = optax.apply_updates(params, updates)
    variables = {**state.variables, "params": params, "batch_stats": stats}
    accuracy = (logits.argmax(-1) == batch.labels).mean()
    return State(state.step + 1, variables, opt), Info(here, there - here, accuracy)
