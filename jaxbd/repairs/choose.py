"""Choosing one value of a dial by the accuracy on held clean images, which train nothing; never by
how often an attack succeeds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbd.base import Array, Batch, Key, Net, Phase, UserError, Variables
from jaxbd.images import to_float

ROUNDING = 1e-6
"""Accuracies that differ by less are equal: in float32, 0.3 - 0.1 is more than 0.2."""


class Sweep(NamedTuple):
    """What is known along a dial.

    Attributes:
      measured: [] int32, how many values, from the first.
      accuracies: [n], on held images; -1 where not known yet.
      before: [], that of the suspect.
    """

    measured: Array
    accuracies: Array
    before: Array


class Measured(NamedTuple):
    """Info of a sweep: value [] of the dial and the held-out accuracy [] there."""

    value: Array
    accuracy: Array


def start_sweep(net: Net, variables: Variables, held: Batch, points: int) -> Sweep:
    """Nothing known but the accuracy of the suspect."""
    before = measure_accuracy(net, variables, held)
    return Sweep(jnp.zeros((), jnp.int32), jnp.full(points, -1, before.dtype), before)


def sweep(name: str, dial: Array, net: Net, extract: Callable[[Any, Array], Variables]) -> Phase:
    """The phase `name` that measures each value of `dial` on held images, one a step.

    States have the fields `step`, `sweep` and `held`. `extract` is that of the repair.
    """

    def begin(state: Any) -> Any:
        return state._replace(sweep=state.sweep._replace(measured=jnp.zeros((), jnp.int32)))

    def step(key: Key, state: Any, batch: None) -> tuple[Any, Measured]:
        del key, batch
        number, known, before = state.sweep
        value = dial[number]
        accuracy = measure_accuracy(net, extract(state, value), state.held)
        after = Sweep(number + 1, known.at[number].set(accuracy), before)
        return state._replace(step=state.step + 1, sweep=after), Measured(value, accuracy)

    # a chunk a value, so that a file of metrics shows the whole curve
    return Phase(name, step, len(dial), Measured, draws=None, begin=begin, chunk=1)


def best_within(accuracies: Array, before: Array, max_drop: float) -> Array:
    """Index [] of the strongest value whose accuracy is at least `before` - `max_drop`; 0 where
    there is none.

    Args:
      accuracies: [n] in [0, 1], those of weaker values first.
      before: [] in [0, 1], that of the suspect.
      max_drop: what the repair may cost, a share.
    """
    is_good = accuracies >= before - max_drop - ROUNDING
    return jnp.where(is_good, jnp.arange(len(accuracies)), 0).max()


def nearest_middle(accuracies: Array, before: Array, max_drop: float) -> Array:
    """Index [] of the t nearest to the middle of the dial whose accuracy [points] is within the
    budget; 0 where there is none. Of two as near, the one on the second end's side."""
    count = len(accuracies)
    order = sorted(range(count), key=lambda i: (-abs(2 * i - count + 1), i))
    ordered = jnp.array(order)
    return ordered[best_within(accuracies[ordered], before, max_drop)]


def split(key: Key, clean: Batch, share: float, most: int, method: str) -> tuple[Batch, Batch]:
    """(train, held) at random: `share` of the images is held, at most `most` of them.

    Raises: UserError, in the name of `method`, when either would be empty.
    """
    count = len(clean.labels)
    held = min(round(share * count), most)
    if not 0 < held < count:
        raise UserError(
            f"{method}: {count} clean images cannot be divided with held_share {share};"
            " give more images"
        )
    order = jax.random.permutation(key, count)
    rows = order[held:], order[:held]
    train, rest = (Batch(clean.images[row], clean.labels[row]) for row in rows)
    return train, rest


def measure_accuracy(net: Net, variables: Variables, data: Batch) -> Array:
    """Share [] of `data` that the net gets right."""
    logits, _ = net.apply(variables, to_float(data.images), train=False)
    return (logits.argmax(-1) == data.labels).mean()


def check_held(method: str, max_drop: float, held_share: float, most_held: int) -> None:
    """Raises UserError unless the settings of a choice make sense."""
    if not 0 <= max_drop < 1:
        raise UserError(f"{method}: max_drop must be in [0, 1), got {max_drop}")
    if not 0 < held_share < 1 or most_held < 1:
        raise UserError(
            f"{method}: held_share must be in (0, 1) and most_held at least 1, got {held_share} and"
            f" {most_held}"
        )
