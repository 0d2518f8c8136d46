"""The guarded net: if the suspect predicts a detected target, a corrected net decides instead.

Li et al. 2023, section 4.2 and Fig. 2: f is the suspect, g(x | Theta_t) its correction for target
t. If f(x) is not a detected target, the answer is f(x). Otherwise it is g(x | Theta_f(x)), and the
input is flagged as triggered if the two differ. There is no threshold to set.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbd.base import Array, ArrayTree, Key, Net, UserError, Variables

PAPER = "https://arxiv.org/abs/2308.09850"
CORRECTED = ("batch_stats", "bounds")
"""Collections in which a corrected net may differ from the suspect; the rest is shared."""


class Verdicts(NamedTuple):
    """Answers for B images; all [B].

    Attributes:
      label: int32, class given by the net that decides.
      suspect_label: int32, class given by the suspect.
      flagged: bool, whether a corrected net was asked and disagreed.
      asked: bool, whether the suspect predicted a detected target.
    """

    label: Array
    suspect_label: Array
    flagged: Array
    asked: Array


class _Asked(NamedTuple):
    """Images sorted by the corrected net they need.

    Attributes:
      order: [B] int32, image indices sorted by target; images that need no correction last.
      counts: [T] int32, images per target.
    """

    order: Array
    counts: Array


def pack(suspect: Variables, corrected: Sequence[Variables]) -> Variables:
    """Builds the guarded net's variables: {"suspect": …, "corrected": the `CORRECTED` collections,
    stacked on a leading axis [T, …]}.

    Args:
      corrected: for each target, in the order given to `make`, the suspect's variables with changed
        moments and bounds.
    Raises: UserError when a correction changes weights, or the corrections differ in structure.
    """
    parts = [{name: each[name] for name in CORRECTED if each.get(name)} for each in corrected]
    if not parts:
        raise UserError("guard: no corrected net; give one for each detected target")
    if len({jax.tree.structure(part) for part in parts}) > 1:
        raise UserError(
            "guard: the corrected nets have different bounds; correct all with the same settings"
        )
    for each in corrected:
        same = [
            one is other or bool((one == other).all()) for one, other in _weights(suspect, each)
        ]
        if not all(same):
            raise UserError(
                "guard: a corrected net's weights differ from the suspect's; only moments and"
                " bounds may differ"
            )
    return {
        "suspect": dict(suspect),
        "corrected": jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts),
    }


def _weights(suspect: Variables, corrected: Variables) -> list[tuple[Array, Array]]:
    return list(
        zip(*(jax.tree.leaves(each["params"]) for each in (suspect, corrected)), strict=True)
    )


def corrected(variables: Variables, index: int | Array) -> Variables:
    """All variables of corrected net number `index` (in the order of the targets)."""
    differing = jax.tree.map(lambda leaf: leaf[index], dict(variables["corrected"]))
    return {**variables["suspect"], **differing}


def make(net: Net, targets: Sequence[int], *, slots: int = 32) -> Net:
    """Makes the guarded net over `net`, a pure `Net` like any other; `pack` makes its variables.

    Its logits are those of the net that decides: the corrected net's for every image that the
    suspect assigns to one of `targets`, the suspect's for all others. Images to correct are grouped
    by target and go through one compiled correction in blocks of `slots`, ceil(n / slots) blocks
    per target. A batch without such images costs only the suspect's forward pass. The while loop
    has no reverse-mode derivative: search for triggers on the suspect.

    Raises: UserError without targets or with a duplicate; while tracing, when a target is not a
      class of the net, or with `train=True`.
    """
    answer = _answering(net, targets, slots)

    def init(key: Key) -> Variables:
        """A fresh suspect with corrections that change nothing."""
        suspect = net.init(key)
        return pack(suspect, [suspect] * len(targets))

    def apply(
        variables: Variables, images: Array, *, train: bool = False
    ) -> tuple[Array, ArrayTree]:
        if train:
            raise UserError(
                "a guarded net is not trained; train or repair the suspect, then correct it again"
            )
        return answer(variables, images)[0], variables["suspect"].get("batch_stats", {})

    return Net(init, apply)


def verdicts(
    net: Net, targets: Sequence[int], *, slots: int = 32
) -> Callable[[Variables, Array], Verdicts]:
    """Makes a pure function (variables, images [B, H, W, C] in [0, 1]) -> `Verdicts`; arguments as
    for `make`."""
    answer = _answering(net, targets, slots)

    def judge(variables: Variables, images: Array) -> Verdicts:
        logits, suspect_label, asked = answer(variables, images)
        label = logits.argmax(-1).astype(jnp.int32)
        return Verdicts(label, suspect_label, label != suspect_label, asked)

    return judge


def flag(net: Net, targets: Sequence[int], *, slots: int = 32) -> Callable[..., Array]:
    """Makes a pure function (key, variables, images) -> flagged [B] bool, the form that
    `evaluate.detection` takes."""
    judge = verdicts(net, targets, slots=slots)

    def flagged(key: Key, variables: Variables, images: Array) -> Array:
        del key
        return judge(variables, images).flagged

    return flagged


def _answering(
    net: Net, targets: Sequence[int], slots: int
) -> Callable[..., tuple[Array, Array, Array]]:
    """Makes (variables, images) -> (logits [B, K] of the net that decides, the suspect's label [B],
    asked [B] bool)."""
    targets = tuple(int(target) for target in targets)
    if not targets or len(set(targets)) != len(targets):
        raise UserError(f"guard: targets {targets}; give at least one, each once")
    if slots < 1:
        raise UserError(f"guard: slots is {slots}; give at least 1")

    def answer(variables: Variables, images: Array) -> tuple[Array, Array, Array]:
        images = jnp.asarray(images)
        logits, _ = net.apply(variables["suspect"], images, train=False)
        label = logits.argmax(-1).astype(jnp.int32)
        number = _numbers(targets, logits.shape[-1])[label]
        ask = lambda index, rows: net.apply(corrected(variables, index), images[rows], train=False)[
            0
        ]
        # a batch whose size is known only at run time (an exported net) takes full blocks
        size = min(slots, images.shape[0]) if isinstance(images.shape[0], int) else slots
        return (
            _replace(logits, ask, _sort(number, len(targets)), size),
            label,
            number < len(targets),
        )

    return answer


def _numbers(targets: tuple[int, ...], classes: int) -> Array:
    """[K] int32: each class's position in `targets`; T for classes that are not targets."""
    outside = [target for target in targets if not 0 <= target < classes]
    if outside:
        raise UserError(
            f"guard: target {outside[0]} is out of range; the net has classes 0..{classes - 1}"
        )
    where = {target: index for index, target in enumerate(targets)}
    return jnp.array([where.get(label, len(targets)) for label in range(classes)], jnp.int32)


def _sort(number: Array, count: int) -> _Asked:
    """Sorts images by the `number` [B] of their target; `count` marks those that need no
    correction."""
    counts = (number[:, None] == jnp.arange(count, dtype=jnp.int32)[None]).sum(0, dtype=jnp.int32)
    return _Asked(jnp.argsort(number, stable=True).astype(jnp.int32), counts)


def _replace(
    logits: Array, ask: Callable[[Array, Array], Array], asked: _Asked, size: int
) -> Array:
    """`logits` [B, K] with the rows of `asked` replaced by `ask(target's number, rows [size]) ->
    [size, K]`."""
    # A while loop over blocks of a fixed size: shapes are static, and the number of iterations
    # depends on the data, so that few triggered images cost little.
    blocks = -(-asked.counts // size)
    last_block, last_row = jnp.cumsum(blocks), jnp.cumsum(asked.counts)
    total = logits.shape[0]

    def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        block, logits = carry
        index = jnp.searchsorted(last_block, block, side="right")
        within = block - (last_block[index] - blocks[index])
        rows = (
            last_row[index]
            - asked.counts[index]
            + within * size
            + jnp.arange(size, dtype=jnp.int32)
        )
        places = asked.order[jnp.minimum(rows, total - 1)]
        # rows past the target's last one are padding; index `total` makes the scatter drop them
        valid = jnp.where(rows < last_row[index], places, total)
        return block + 1, logits.at[valid].set(ask(index, places).astype(logits.dtype), mode="drop")

    return jax.lax.while_loop(
        lambda carry: carry[0] < last_block[-1], body, (jnp.zeros((), jnp.int32), logits)
    )[1]
