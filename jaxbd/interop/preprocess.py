"""Which preprocessing a foreign model was trained with, told by its accuracy on the person's own images.

A state_dict says nothing of the normalisation its net expects, and a scan under the wrong one is worthless. So the
clean accuracy is measured under every plausible normalisation, with the channels in either order, before all else.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from jaxbd import evaluate
from jaxbd.base import Batch, Net, UserError
from jaxbd.interop import guarded
from jaxbd.interop.load import Model
from jaxbd.models.norm import NORMALISATIONS
from jaxbd.remembered import remembered

SAMPLE = 256
"""Images the check looks at."""
STATED_ONLY = {"svhn", "mini-imagenet", "vggface2"}
"""Normalisations that are not tried: so close to another that luck on a few images would choose between them."""
STANDARD_ERRORS = 5
"""Binomial standard errors by which the accuracy must exceed chance."""

Constants = tuple[tuple[float, ...], tuple[float, ...]]
"""Per-channel mean and standard deviation."""


class Row(NamedTuple):
    """One candidate: normalisation by name, order of the channels ("rgb", "bgr", or "grey"), constants, accuracy."""

    normalisation: str
    channels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    accuracy: float


class Table(NamedTuple):
    """What the check found.

    Attributes:
      rows: every candidate measured; used: the one taken.
      images: how many images; chance: accuracy of a net that knows nothing; needed: least accuracy accepted.
      stated: whether `used` was given rather than chosen.
    """

    rows: tuple[Row, ...]
    used: Row
    images: int
    chance: float
    needed: float
    stated: bool


def sample(data: Batch, count: int = SAMPLE) -> Batch:
    """At most `count` random rows of `data`, always the same ones."""
    rows = np.random.default_rng(0).permutation(len(data.labels))[:count]
    return Batch(np.asarray(data.images)[rows], np.asarray(data.labels)[rows])


def check(model: Model, data: Batch, given: Constants | None = None, *, only_given: bool = False) -> Table:
    """Measures the candidates on `data` (uint8 images in RGB order, labels) and settles on one.

    The best is taken unless one is `given`; among equals the first in the order of `NORMALISATIONS`, RGB before BGR.

    Args:
      only_given: try the others only to explain why the given one fails (a model that states its own).
    Raises: UserError when the one taken is not above chance, see `needed`, or the images are too few to tell.
    """
    chance = float(np.bincount(data.labels).max()) / len(data.labels)
    least = needed(chance, len(data.labels))
    if least >= 1:
        raise UserError(
            f"{len(data.labels)} images, {100 * chance:.0f} % of them with the same label, cannot tell whether this is "
            "the model's preprocessing; give more images, of several classes"
        )
    rows = [] if given is None else [_measure(model, data, "given", given, "rgb")]
    if not (only_given and rows and rows[0].accuracy >= least):
        colour = ("rgb", "bgr") if model.spec.image_shape[2] == 3 else ("rgb",)
        tried = [(name, constants, order) for order in colour for name, constants in _plausible(model).items()]
        rows += [_measure(model, data, *candidate) for candidate in tried]
    best = max(rows, key=lambda row: row.accuracy)
    table = Table(tuple(rows), best if given is None else rows[0], len(data.labels), chance, least, given is not None)
    if table.used.accuracy < least:
        raise UserError(_complaint(table, best))
    return table


def needed(chance: float, count: int) -> float:
    """The least accuracy on `count` images that is not near chance.

    Chance is the share of the commonest label, which a constant answer reaches. Above it by `STANDARD_ERRORS` binomial
    standard errors, and by chance once more (twice chance) or, where that is nearer, a quarter of the way to 1.
    """
    error = math.sqrt(chance * (1 - chance) / count)
    return chance + max(STANDARD_ERRORS * error, min(chance, (1 - chance) / 4))


def adopt(model: Model, table: Table) -> Model:
    """`model` with the preprocessing of `table.used` as its net's first operation; images stay RGB in [0, 1]."""
    used = table.used
    spec = dataclasses.replace(model.spec, mean=used.mean, std=used.std)
    net = guarded.net(spec, model.guard)
    return model._replace(spec=spec, net=_reversed(net) if used.channels == "bgr" else net)


def as_record(table: Table) -> dict[str, Any]:
    """The table for a result file, under the key "preprocessing"."""
    return {**table._asdict(), "rows": [row._asdict() for row in table.rows], "used": table.used._asdict()}


def _plausible(model: Model) -> dict[str, Constants]:
    """The normalisations to try that fit the model's channels."""
    tried = {name: pair for name, pair in NORMALISATIONS.items() if name not in STATED_ONLY}
    return {name: pair for name, pair in tried.items() if len(pair[0]) in (1, model.spec.image_shape[2])}


def _measure(model: Model, data: Batch, name: str, constants: Constants, order: str) -> Row:
    """Clean accuracy under one candidate.

    The net's own first operation x -> (x - m) / s stays in place and is undone in what it is fed, so that one compiled
    program serves all candidates.
    """
    images = np.asarray(data.images, np.float32) / 255
    images = images[..., ::-1] if order == "bgr" else images
    mean, std, own_mean, own_std = (np.asarray(v, np.float32) for v in (*constants, model.spec.mean, model.spec.std))
    inputs = (images - mean) / std * own_std + own_mean
    logits = evaluate.logits(model.net, model.variables, Batch(inputs, data.labels), batch_size=128)
    if not np.isfinite(logits).all():
        raise UserError(f"model {model.path} answers with NaN or infinite logits; get an intact file")
    accuracy = float((logits.argmax(-1) == data.labels).mean())
    return Row(name, "grey" if images.shape[-1] == 1 else order, *map(_numbers, constants), accuracy)


def _numbers(values) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


@remembered(64)
def _reversed(net: Net) -> Net:
    """`net` fed with the channels the other way round."""
    outputs = None if net.outputs is None else lambda variables, images: net.outputs(variables, images[..., ::-1])
    return Net(
        net.init,
        lambda variables, images, *, train=False: net.apply(variables, images[..., ::-1], train=train),
        outputs,
        net.frozen,
    )


def _complaint(table: Table, best: Row) -> str:
    """Why no verdict can be given, and what would help."""
    what = (
        f"this is not the preprocessing (or not the data) of this model: clean accuracy {table.used.accuracy:.3f} on "
        f"{table.images} images is near chance ({table.chance:.3f}, needed {table.needed:.3f})"
    )
    if table.stated and best.accuracy >= table.needed:
        order = "; the images look BGR to this model" if best.channels == "bgr" else ""
        return f"{what}; with normalisation {best.normalisation} it is {best.accuracy:.3f}{order}"
    return f"{what} under every normalisation tried; check the labels' order, the images and --mean/--std"
