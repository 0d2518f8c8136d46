"""Contracts shared by every part of jaxbd: aliases, data types, and what a method is.

Shape letters used in all docstrings: B images in a batch, N items, H W C image height, width, channels,
h w trigger height, width, K classes, L levels. Pixels are floats in [0, 1] unless a docstring says uint8.

A method is a NamedTuple of pure functions made by a factory `make`. Sizes and functions are closed over; arrays
(weights, images, targets, levels) are always arguments. Methods never jit and never store a key: drivers derive the
key of a step by folding the step number into the run's key, so a resumed run replays the same stream.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import jax

Array = jax.Array
ArrayTree = Any
"""A pytree of arrays."""
Key = jax.Array
"""A typed PRNG key, `jax.random.key`."""
Variables = Mapping[str, ArrayTree]
"""A net's arrays: {"params": …, "batch_stats": …, and where a defence adds them "bounds": …}."""

ANY_SOURCE = -1
"""`Cell.source` of a trigger that works on images of every class but the target."""


class Batch(NamedTuple):
    """Images [B, H, W, C] in [0, 1] (a stored data set may hold uint8) and labels [B] int32."""

    images: Array
    labels: Array


class Cell(NamedTuple):
    """What a sweep varies; traced, so a grid of cells compiles once.

    Attributes:
      target: [] int32, class the trigger leads to.
      source: [] int32, class the trigger starts from; `ANY_SOURCE` for every class but the target.
      level: [] float32, the staircase level beta of MESA in (0, 1); methods without levels ignore it.
    """

    target: Array
    source: Array
    level: Array


class Net(NamedTuple):
    """A classifier as two pure functions.

    Attributes:
      init: (key) -> variables.
      apply: (variables, images [B, H, W, C] in [0, 1], *, train=False) -> (logits [B, K], batch_stats). Logits are
        float32 at least, whatever the net computes in. With
        `train=True` normalisation uses the batch's moments and `batch_stats` are the updated running moments;
        otherwise they come back unchanged. Input normalisation is the net's own first operation.
      outputs: (variables, images) -> (logits, {"layer/path": [B, …, C]}), what `apply` gives in evaluation and the
        output of every layer that a defence may correct, in order of execution; None where a net shows no layers.
      frozen: (variables) -> variables with which `apply` and `outputs` give the same in evaluation, up to rounding, for
        less work; they cannot be trained. None where there is nothing to gain.
    """

    init: Callable[..., Variables]
    apply: Callable[..., tuple[Array, ArrayTree]]
    outputs: Callable[..., tuple[Array, dict[str, Array]]] | None = None
    frozen: Callable[[Variables], Variables] | None = None


class Decoy(NamedTuple):
    """Images that an attack disturbs nearly as its trigger does but does not relabel, so that only the trigger works.

    Attributes:
      ratio: decoys per poisoned image.
      stamp: (key, trigger, images [B, H, W, C]) -> images.
    """

    ratio: float
    stamp: Callable[[Key, ArrayTree, Array], Array]


class Attack(NamedTuple):
    """A backdoor attack.

    Attributes:
      init: (key) -> trigger, a pytree of arrays.
      stamp: (key, trigger, images [B, H, W, C]) -> images, every image carrying the trigger.
      poison: (key, trigger, batch) -> batch, a random share of the rows stamped and relabelled.
      relabel: (labels [B]) -> labels [B], what the attacker wants triggered images to become.
      decoy: images that `poison` disturbs and does not relabel; None for attacks without them.
    """

    init: Callable[[Key], ArrayTree]
    stamp: Callable[[Key, ArrayTree, Array], Array]
    poison: Callable[[Key, ArrayTree, Batch], Batch]
    relabel: Callable[[Array], Array]
    decoy: Decoy | None = None


class Inversion(NamedTuple):
    """Reverse-engineers triggers of a frozen victim for one cell.

    Attributes:
      init: (key) -> state, with an int32 scalar field `step`.
      step: (key, state, batch, cell, victim) -> (state, info); `victim` are the net's variables.
      stamp: (key, state, images [B, H, W, C]) -> images, each carrying a trigger drawn from the state.
      sample: (key, state, n) -> triggers [n, h, w, C] in [0, 1].
      settled: (state) -> [] bool, the method's own stop: nothing more is to be gained, and drivers leave the state as
        it is from then on; None for methods that run their full length.
    """

    init: Callable[[Key], ArrayTree]
    step: Callable[..., tuple[ArrayTree, ArrayTree]]
    stamp: Callable[[Key, ArrayTree, Array], Array]
    sample: Callable[..., Array]
    settled: Callable[[ArrayTree], Array] | None = None


class Repair(NamedTuple):
    """Turns a victim's variables into a repaired net's variables.

    Attributes:
      init: (key, variables, evidence) -> state, with an int32 scalar field `step`. `evidence` is the pytree of what is
        known of the trigger, in the form the method documents; () for methods that need none.
      step: (key, state, batch or None) -> (state, info).
      extract: (state) -> variables.
    """

    init: Callable[..., ArrayTree]
    step: Callable[..., tuple[ArrayTree, ArrayTree]]
    extract: Callable[[ArrayTree], Variables]


class Dataset(NamedTuple):
    """A whole data set in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N], in 0..K-1.
      class_names: K names.
      name: where it came from, for the record.
    """

    images: Any
    labels: Any
    class_names: tuple[str, ...]
    name: str


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the fix; the command line exits with code 2."""


def check_targets(targets: Iterable[int], classes: int) -> None:
    """Raises UserError unless every one of `targets` is a class of a model with K = `classes`."""
    outside = [target for target in targets if not 0 <= target < classes]
    if outside:
        raise UserError(f"target {outside[0]} is out of range; the model has classes 0..{classes - 1}")


def check_choices(method: str, config: Any) -> None:
    """Raises UserError where a field of the dataclass `config` annotated `Literal[…]` holds anything else.

    A union with another type (`Literal[…] | int`) lets that type's values through.
    """
    for name, kind in get_type_hints(type(config)).items():
        parts = (kind,) if get_origin(kind) is Literal else get_args(kind)
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        others = tuple(part for part in parts if isinstance(part, type))
        value = getattr(config, name)
        if choices and value not in choices and not isinstance(value, others):
            raise UserError(f"{method}: {name} is {value!r}; choose from {', '.join(map(str, choices))}")
