"""Finds the preprocessing that a foreign model was trained with, from its accuracy on the user's
images and the moments stored in its first normalisation layer.

A state_dict does not state the normalisation that its net expects, and a scan under the wrong one
is worthless. Before anything else, therefore, every plausible normalisation is measured with both
channel orders. Accuracy alone cannot tell wrong preprocessing from a poor model: an MNIST net
without its constants still gets a third of the digits right. The stored moments can, see `moments`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from jaxbd.base import Batch, Net, UserError
from jaxbd.caching import cached
from jaxbd.interop import load
from jaxbd.interop.load import Model
from jaxbd.interop.probe import Constants, Probe, Row, candidates

SAMPLE = 256
"""Number of images that the check uses."""
STANDARD_ERRORS = 5
"""Binomial standard errors by which the accuracy must exceed chance."""
GOOD_ACCURACY = 0.95
"""At or above this accuracy, accuracy alone shows that the preprocessing is right."""
DIFFERENT = 0.5
"""At or above this distance of moments, the preprocessing is probably wrong. Measured: 0.01 to 0.18
for nets with their own preprocessing (even honest nets with 70 to 82 % accuracy), 0.5 to 12 with
another common one."""
ALIKE = 0.05
"""Smallest difference in distance of moments that tells two candidates apart."""


class Table(NamedTuple):
    """Result of the check.

    Attributes:
      rows: every candidate that was measured.
      used: the chosen candidate.
      images: number of images.
      chance: accuracy of a net that knows nothing.
      needed: minimum accuracy to be accepted.
      stated: whether `used` was given rather than chosen.
      doubt: why `used` is probably not the model's own preprocessing; "" if there is no reason.
      caution: a warning that only a mediocre accuracy supports `used`; "" otherwise.
    """

    rows: tuple[Row, ...]
    used: Row
    images: int
    chance: float
    needed: float
    stated: bool
    doubt: str = ""
    caution: str = ""

    @property
    def error(self) -> float:
        """Binomial standard error of the accuracy of `used`."""
        return math.sqrt(self.used.accuracy * (1 - self.used.accuracy) / self.images)


def sample(data: Batch, count: int = SAMPLE) -> Batch:
    """At most `count` rows of `data`, drawn at random with a fixed seed."""
    rows = np.random.default_rng(0).permutation(len(data.labels))[:count]
    return Batch(np.asarray(data.images)[rows], np.asarray(data.labels)[rows])


def check(
    model: Model,
    data: Batch,
    given: Constants | None = None,
    *,
    only_given: bool = False,
    accept: bool = False,
) -> Table:
    """`measure`, followed by `accept_or_refuse`."""
    return accept_or_refuse(measure(model, data, given, only_given=only_given), accept)


def measure(
    model: Model, data: Batch, given: Constants | None = None, *, only_given: bool = False
) -> Table:
    """Measures the candidates on `data` (uint8 images in RGB order, labels) and chooses one.

    A `given` candidate is always used. Otherwise the most accurate one is; among those within two
    standard errors of it, the stored moments decide, and ties go to the first in the order of
    `NORMALISATIONS`, RGB before BGR.

    Args:
      only_given: measure other candidates only if the given one fails, to explain why (for a model
        that states its own preprocessing).
    Raises: UserError when there are too few images to decide, or the net outputs NaN or infinite
      logits.
    """
    chance = float(np.bincount(data.labels).max()) / len(data.labels)
    least = needed(chance, len(data.labels))
    if least >= 1:
        raise UserError(
            f"{len(data.labels)} images, {100 * chance:.0f} % of them with the same label, cannot"
            " tell whether this is the model's preprocessing; give more images, of several classes"
        )
    probe = Probe(model, data)
    rows = [] if given is None else [probe.measure("given", given, "rgb")]
    if not (only_given and rows and rows[0].accuracy >= least):
        # candidates with the best moments first, the others only if none of these convinces
        near, far = probe.sort(list(candidates(model)))
        rows += [probe.measure(*candidate) for candidate in near]
        if not is_convincing(choose(rows, len(data.labels)), least):
            rows += [probe.measure(*candidate) for candidate in far]
    used = choose(rows, len(data.labels)) if given is None else rows[0]
    count, stated = len(data.labels), given is not None
    table = Table(tuple(rows), used, count, chance, least, stated)
    return table._replace(doubt=_doubt(table, probe), caution=_caution(table))


def measure_row(model: Model, data: Batch, row: Row) -> Row:
    """Measures the candidate of `row` on other images."""
    order = "bgr" if row.channels == "bgr" else "rgb"
    return Probe(model, data).measure(row.normalisation, (row.mean, row.std), order)


def accept_or_refuse(table: Table, accept: bool = False) -> Table:
    """Returns `table` if its candidate `used` is acceptable.

    Args:
      accept: also accept preprocessing that is probably not the model's.
    Raises: UserError if the accuracy is near chance, see `needed`; or if the candidate was not
      stated by the user or model and is doubtful (see `Table.doubt`).
    """
    if table.used.accuracy < table.needed:
        best = choose(list(table.rows), table.images)
        raise UserError(_complaint(table, best))
    if table.doubt and not (accept or table.stated):
        raise UserError(f"{table.doubt}, or go on with --accept-accuracy")
    return table


def needed(chance: float, count: int) -> float:
    """Minimum accuracy on `count` images that does not count as near chance.

    `chance` is the share of the most common label, which a constant answer reaches. The minimum
    exceeds it by the largest of two margins: `STANDARD_ERRORS` binomial standard errors, and the
    smaller of `chance` itself and a quarter of the way to 1.
    """
    error = math.sqrt(chance * (1 - chance) / count)
    return chance + max(STANDARD_ERRORS * error, min(chance, (1 - chance) / 4))


def choose(rows: list[Row], count: int) -> Row:
    """The row to use, see `measure`; accuracies were measured on `count` images."""
    best = max(rows, key=lambda row: row.accuracy)
    error = math.sqrt(best.accuracy * (1 - best.accuracy) / count)
    near = [row for row in rows if row.accuracy >= best.accuracy - 2 * error]
    distances = [row.distance for row in near if row.distance is not None]
    # without moments for all candidates only accuracy can decide
    if len(distances) < len(near):
        return best
    limit = min(distances) + ALIKE
    # `max` below keeps the first of equals, as `measure` promises
    alike = [row for row, far in zip(near, distances, strict=True) if far <= limit]
    return max(alike, key=lambda row: row.accuracy)


def is_convincing(row: Row, least: float = 0.0) -> bool:
    """Whether accuracy or moments show that `row` is the model's own preprocessing.

    Args:
      least: accuracy that is required in any case.
    """
    alike = row.distance is not None and row.distance < DIFFERENT
    return row.accuracy >= least and (row.accuracy >= GOOD_ACCURACY or alike)


def adopt(model: Model, table: Table) -> Model:
    """`model` with the preprocessing of `table.used` as its net's first operation; the images it
    takes are still RGB in [0, 1]."""
    used = table.used
    spec = dataclasses.replace(model.spec, mean=used.mean, std=used.std)
    net = load.net_of(model, spec)
    return model._replace(spec=spec, net=_reverse_channels(net) if used.channels == "bgr" else net)


def as_record(table: Table) -> dict[str, Any]:
    """The table as plain values, for a result file's key "preprocessing"."""
    return {
        **table._asdict(),
        "rows": [row._asdict() for row in table.rows],
        "used": table.used._asdict(),
    }


def _doubt(table: Table, probe: Probe) -> str:
    """Why the chosen row is probably not the model's preprocessing; "" if there is no reason."""
    used = table.used
    if used.distance is None or is_convincing(used):
        return ""
    found = probe.moments((used.mean, used.std), "bgr" if used.channels == "bgr" else "rgb")
    if found is None:
        return ""
    doubt = (
        f"normalisation {used.normalisation} is probably not this model's preprocessing: it gets"
        f" {used.accuracy:.3f} of {table.images} images right, the best of {len(table.rows)} tried,"
        f" but the inputs of layer {found.layer} have {found.spread:.2g} times the standard"
        f" deviation of training and are shifted by {found.shift:.2g} standard deviations"
    )
    fix = "give the model's own constants with --mean and --std"
    if len(used.std) != 1 or not 1e-3 < used.std[0] * found.spread < 1e3:
        return f"{doubt}; {fix}"
    # the layer's input scales with the net's input, which is divided by std: correct std by the
    # ratio
    return f"{doubt}; {fix}, std is near {used.std[0] * found.spread:.2g}"


@cached(64)
def _reverse_channels(net: Net) -> Net:
    """`net` with the channel order of its input reversed."""
    forward = net.outputs
    outputs = None
    if forward is not None:
        outputs = lambda variables, images: forward(variables, images[..., ::-1])
    return Net(
        net.init,
        lambda variables, images, *, train=False: net.apply(
            variables, images[..., ::-1], train=train
        ),
        outputs,
        net.frozen,
    )


def _caution(table: Table) -> str:
    """A warning for a mediocre accuracy that no stored moments can confirm; "" otherwise."""
    used = table.used
    if table.stated or used.distance is not None or is_convincing(used):
        return ""
    return (
        "the net has no normalisation layer to compare with, so an accuracy of"
        f" {used.accuracy:.3f} is the only evidence for this preprocessing; give --mean and --std"
        " if you know them"
    )


def _complaint(table: Table, best: Row) -> str:
    """Why no verdict can be given, and what would help."""
    what = (
        "this is not the preprocessing (or not the data) of this model: clean accuracy"
        f" {table.used.accuracy:.3f} on {table.images} images is near chance ({table.chance:.3f},"
        f" needed {table.needed:.3f})"
    )
    if table.stated and best.accuracy >= table.needed:
        order = "; the images look BGR to this model" if best.channels == "bgr" else ""
        return f"{what}; with normalisation {best.normalisation} it is {best.accuracy:.3f}{order}"
    return (
        f"{what} under every normalisation tried; check the labels' order, the images and"
        " --mean/--std"
    )
