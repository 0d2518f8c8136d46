"""Fine-tuning: continues training on clean images, so that the net forgets what they do not contain
(Liu et al. 2017)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses
from jaxbd.base import (
    Array,
    Batch,
    Key,
    Need,
    Phase,
    Problem,
    Repair,
    RepairData,
    UserError,
    Variables,
)

PAPER = "https://arxiv.org/abs/1710.00942"
NEEDS: frozenset[Need] = frozenset({"clean"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of fine-tuning. The paper only says to retrain; these settings are common ones.

    Attributes:
      learning_rate: of SGD's first step; it falls along a cosine to zero over `num_steps`.
      momentum: SGD's.
      weight_decay: SGD's, added to the gradient.
      num_steps: length of the run.
    """

    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    num_steps: int = 1000

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise UserError(f"finetune: learning_rate must be > 0, got {self.learning_rate}")
        if self.num_steps < 1:
            raise UserError(f"finetune: num_steps must be at least 1, got {self.num_steps}")
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise UserError("finetune: momentum must be in [0, 1) and weight_decay >= 0")


def quick(**changes: Any) -> Config:
    """A third of the steps, for small data sets and a CPU."""
    return Config(**{**dict(num_steps=300), **changes})


class State(NamedTuple):
    """Step [] int32, the net's variables, and the optimiser's state."""

    step: Array
    variables: Variables
    opt: optax.OptState


class Info(NamedTuple):
    """Loss [] in nats and accuracy [] on the batch as drawn."""

    loss: Array
    accuracy: Array


def make(problem: Problem, config: Config) -> Repair:
    """Fine-tuning of `problem.net`; BatchNorm uses batch moments and updates its running ones."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    decay = optax.add_decayed_weights(config.weight_decay)
    rule = optax.chain(decay, optax.sgd(rate, momentum=config.momentum))

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        del key, data
        # a copy, since drivers donate the state
        variables = jax.tree.map(jnp.copy, {"batch_stats": {}, **variables})
        return State(jnp.zeros((), jnp.int32), variables, rule.init(variables["params"]))

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        del key
        variables, opt, loss, accuracy = losses.descend(
            problem.net, rule, state.variables, state.opt, batch
        )
        return State(state.step + 1, variables, opt), Info(loss, accuracy)

    def extract(state: State, dial: None = None) -> Variables:
        del dial
        return state.variables

    return Repair(init, (Phase("finetune", step, config.num_steps, Info),), extract, needs=NEEDS)
