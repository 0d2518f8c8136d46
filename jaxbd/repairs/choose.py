"""Chooses a value of a dial by the accuracy on held-out clean images, never by the success rate of
an attack."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbd.base import Array, Batch, Key, Net, Phase, UserError, Variables
from jaxbd.images import to_float

ROUNDING = 1e-6
"""Tolerance when comparing accuracies: in float32, 0.3 - 0.1 is more than 0.2."""


class Sweep(NamedTuple):
    """Accuracies measured along a dial.

    Attributes:
      measured: [] int32, number of values measured so far, from the first.
      accuracies: [n], on held-out images; -1 where not measured yet.
      before: [], the suspect's accuracy.
    """

    measured: Array
    accuracies: Array
    before: Array


class Measured(NamedTuple):
    """Info of a sweep: value [] of the dial and the held-out accuracy [] there."""

    value: Array
    accuracy: Array


def start_sweep(net: Net, variables: Variables, held: Batch, points: int) -> Sweep:
    """An empty sweep that contains only the suspect's accuracy."""
    before = measure_accuracy(net, variables, held)
    return Sweep(jnp.zeros((), jnp.int32), jnp.full(points, -1, before.dtype), before)


def sweep(name: str, dial: Array, net: Net, extract: Callable[[Any, Array], Variables]) -> Phase:
    """The phase `name` that measures each value of `dial` on held-out images, one per step.

    States must have the fields `step`, `sweep` and `held`. `extract` is the repair's.
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

    # one chunk per value, so that the metrics file shows the whole curve
    return Phase(name, step, len(dial), Measured, draws=None, begin=begin, chunk=1)


def best_within(accuracies: Array, before: Array, max_drop: float) -> Array:
    """Index [] of the strongest value with an accuracy of at least `before` - `max_drop`; 0 if
    there is none.

    Args:
      accuracies: [n] in [0, 1], from the weakest value to the strongest.
      before: [] in [0, 1], the suspect's accuracy.
      max_drop: maximum loss of accuracy, as a share.
    """
    is_good = accuracies >= before - max_drop - ROUNDING
    return jnp.where(is_good, jnp.arange(len(accuracies)), 0).max()


def nearest_middle(accuracies: Array, before: Array, max_drop: float) -> Array:
    """Index [] of the t nearest to the middle of the dial with an accuracy [points] within the
    budget; 0 if there is none. Of two equally near, takes the one towards the second end."""
    count = len(accuracies)
    # farthest from the middle first, so that `best_within` returns the nearest
    order = sorted(range(count), key=lambda i: (-abs(2 * i - count + 1), i))
    ordered = jnp.array(order)
    return ordered[best_within(accuracies[ordered], before, max_drop)]


def split(key: Key, clean: Batch, share: float, most: int, method: str) -> tuple[Batch, Batch]:
    """Splits `clean` at random into (train, held): holds out `share` of the images, at most `most`.

    Raises: UserError when either part would be empty; `method` begins the message.
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
    """Share [] of `data` that the net classifies correctly."""
    logits, _ = net.apply(variables, to_float(data.images), train=False)
    return (logits.argmax(-1) == data.labels).mean()


def check_held(method: str, max_drop: float, held_share: float, most_held: int) -> None:
    """Raises UserError if a setting is out of range."""
    if not 0 <= max_drop < 1:
        raise UserError(f"{method}: max_drop must be in [0, 1), got {max_drop}")
    if not 0 < held_share < 1 or most_held < 1:
        raise UserError(
            f"{method}: held_share must be in (0, 1) and most_held at least 1, got {held_share} and"
            f" {most_held}"
        )
