"""Plain classifier training as init/step; trains backdoored victims and clean models."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses
from jaxbd.base import Array, ArrayTree, Batch, Key, Net, UserError, Variables, check_choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Training settings.

    Attributes:
      learning_rate: of the first step.
      schedule: "constant"; "cosine" to zero over `num_steps`; "steps": x0.1 at 60 % and 80 % of
        them.
      num_steps: length of the schedule.
      optimiser: "sgd" (momentum) or "adam".
      momentum: of SGD.
      weight_decay: added to the gradient before momentum, on every parameter (PyTorch's
        convention).
    """

    learning_rate: float = 0.05
    schedule: Literal["constant", "cosine", "steps"] = "cosine"
    num_steps: int = 1000
    optimiser: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self):
        check_choices("training", self)
        if not self.learning_rate > 0 or self.num_steps < 1:
            raise UserError("training: learning_rate must be > 0 and num_steps at least 1")
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise UserError("training: momentum must be in [0, 1) and weight_decay >= 0")


class State(NamedTuple):
    """Step [] int32, the net's variables, and the optimiser's state."""

    step: Array
    variables: Variables
    opt: optax.OptState


class Info(NamedTuple):
    """Loss [] in nats and accuracy [] on the batch as drawn."""

    loss: Array
    accuracy: Array


class Trainer(NamedTuple):
    """init: (variables) -> State (the variables are copied); step: (key, state, batch) -> (state,
    Info)."""

    init: ArrayTree
    step: ArrayTree


def optimiser(config: Config) -> optax.GradientTransformation:
    """The optimiser of `config`."""
    rate = config.learning_rate
    schedules = {
        "constant": lambda: rate,
        "cosine": lambda: optax.cosine_decay_schedule(rate, config.num_steps),
        "steps": lambda: optax.piecewise_constant_schedule(
            rate, {int(config.num_steps * 0.6): 0.1, int(config.num_steps * 0.8): 0.1}
        ),
    }
    schedule = schedules[config.schedule]()
    decay = (
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
    )
    rule = (
        optax.adam(schedule)
        if config.optimiser == "adam"
        else optax.sgd(schedule, momentum=config.momentum)
    )
    return optax.chain(decay, rule)


def make(net: Net, config: Config) -> Trainer:
    """Trainer of `net`; BatchNorm uses batch moments and updates the running ones."""
    return trainer(net, optimiser(config))


def trainer(net: Net, rule: optax.GradientTransformation, *, train: bool = True) -> Trainer:
    """Trainer of `net` with any optimiser `rule`; with `train=False` the net runs in evaluation
    mode and BatchNorm's moments do not change."""

    def init(variables: Variables) -> State:
        variables = jax.tree.map(jnp.copy, {"batch_stats": {}, **variables})
        return State(jnp.zeros((), jnp.int32), variables, rule.init(variables["params"]))

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        del key
        variables, opt, loss, accuracy = losses.descend(
            net, rule, state.variables, state.opt, batch, train=train
        )
        return State(state.step + 1, variables, opt), Info(loss, accuracy)

    return Trainer(init, step)
