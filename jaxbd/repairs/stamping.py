"""Fine-tuning on images with true labels, some of them stamped with a known trigger: shared by all
repairs that unlearn a known trigger."""

from collections.abc import Callable
from typing import NamedTuple

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
    Phase,
    Problem,
    Repair,
    RepairData,
    UserError,
    Variables,
)

NEEDS: frozenset[Need] = frozenset({"clean", "trigger"})


class State(NamedTuple):
    """Step [] int32, the net's variables, the optimiser's state, and the trigger's parameters,
    which never change."""

    step: Array
    variables: Variables
    opt: optax.OptState
    trigger_params: ArrayTree


class Info(NamedTuple):
    """Loss [] in nats and accuracy [] on the batch with its stamped images, and the share [] of
    stamped images."""

    loss: Array
    accuracy: Array
    stamped: Array


def stamp_some(
    key: Key,
    stamp: Callable[[Key, ArrayTree, Array], Array],
    trigger_params: ArrayTree,
    images: Array,
    rate: float,
) -> tuple[Array, Array]:
    """Stamps each image with probability `rate`, r in Qiao et al. 2019, eq. (5). Returns the images
    [B, H, W, C], and which of them are stamped [B] bool."""
    rate_key, stamp_key = jax.random.split(key)
    chosen = jax.random.bernoulli(rate_key, rate, images.shape[:1])
    # stamps all images and selects, so that shapes stay static
    stamped = stamp(stamp_key, trigger_params, images)
    return jnp.where(chosen[:, None, None, None], stamped, images), chosen


def optimiser(
    learning_rate: float, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with a constant rate; weight decay is added to the gradient before momentum."""
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    return optax.chain(decay, optax.sgd(learning_rate, momentum=momentum))


def fine_tune(
    name: str,
    problem: Problem,
    rule: optax.GradientTransformation,
    rate: float,
    num_steps: int,
    choose: Callable[[ArrayTree, Array], ArrayTree] = lambda triggers, step: triggers,
) -> Repair:
    """The repair `name`: `num_steps` steps of `rule` on images stamped with probability `rate`.

    BatchNorm uses batch moments and re-estimates its running ones.

    Args:
      choose: (trigger_params, step []) -> the trigger parameters to stamp in this step.
    Raises: UserError when the problem has no stamp.
    """
    stamp = problem.stamp
    if stamp is None:
        raise UserError(f"{name}: the problem has no stamp; make it from evidence of a trigger")

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        del key
        # copies, since drivers donate the state
        variables, trigger_params = jax.tree.map(
            jnp.copy, ({"batch_stats": {}, **variables}, data.trigger_params)
        )
        step = jnp.zeros((), jnp.int32)
        return State(step, variables, rule.init(variables["params"]), trigger_params)

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        triggers = choose(state.trigger_params, state.step)
        images, chosen = stamp_some(key, stamp, triggers, batch.images, rate)
        variables, opt, loss, accuracy = losses.descend(
            problem.net, rule, state.variables, state.opt, Batch(images, batch.labels)
        )
        after = state._replace(step=state.step + 1, variables=variables, opt=opt)
        return after, Info(loss, accuracy, chosen.mean())

    def extract(state: State, dial: None = None) -> Variables:
        del dial
        return state.variables

    return Repair(init, (Phase(name, step, num_steps, Info),), extract, needs=NEEDS)
