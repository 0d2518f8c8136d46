"""Reads images to fit a model: checks their classes, and finds the size and preprocessing that the
model expects."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxbd.base import Batch, Dataset, UserError
from jaxbd.data import labels, load, pictures
from jaxbd.interop import preprocess
from jaxbd.interop.load import Model

LARGEST_OWN = 320
"""Largest side, in pixels, of pictures used at their own size. Larger ones are resized, since
classifiers take photographs at a reduced size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Which images to read.

    Attributes:
      spec: the source, as `data.load.load` takes it.
      split: which split to use, if the source has several.
      limit: maximum number of images, drawn at random.
      seed: seed of that draw.
      class_names: text file with the class names in the model's order; None if folders or labels
        are enough.
      download: whether `tfds:NAME` may access the network.
    """

    spec: str
    split: str = "test"
    limit: int | None = None
    seed: int = 0
    class_names: Path | None = None
    download: bool = False


class Matched(NamedTuple):
    """The model resized to the images, the images, and the table of the preprocessing check (None
    if it was not run)."""

    model: Model
    dataset: Dataset
    table: preprocess.Table | None


def read(source: Source, model: Model, image_shape: pictures.Shape, limit: int | None) -> Dataset:
    """Reads the images of `source` at `image_shape` and checks that the model has their classes.

    Raises: UserError as `data.load.load`; if the numbers of classes differ, it states both.
    """
    spec = model.spec
    if source.class_names is not None:
        names = labels.read_names(source.class_names, spec.classes)
        classes = labels.Classes(spec.classes, names, stated=True)
    else:
        known = spec.class_names if len(spec.class_names) == spec.classes else ()
        classes = labels.Classes(spec.classes, tuple(known))
    found = load.load(
        source.spec,
        split=source.split,
        image_shape=image_shape,
        limit=limit,
        seed=source.seed,
        classes=classes,
        download=source.download,
    )
    load.check(found, image_shape if image_shape[0] else found.images.shape[1:], spec.classes)
    return found


def match(
    model: Model,
    source: Source,
    *,
    given: preprocess.Constants | None = None,
    trusted: bool = False,
    fixed_size: bool = False,
    accept: bool = False,
) -> Matched:
    """Reads images for a model, and determines their size and its preprocessing.

    If the size is not fixed, starts with the size that all pictures share, or with the net's usual
    one if they share none. If the result is not convincing, measures other sizes under the best
    normalisation so far, or under all of them if none beat chance.

    Args:
      given: constants stated by the user or the model's own folder.
      trusted: whether `given` comes from the model itself; other constants are then tried only to
        explain a failure.
      fixed_size: whether the net's input size is known.
      accept: see `preprocess.check`.
    Raises: UserError when the images do not fit the model or no verdict can be given.
    """
    usual = model.spec.image_shape
    options: dict[str, Any] = dict(given=given, only_given=trusted)
    if fixed_size:
        dataset = read(source, model, usual, source.limit)
        table = preprocess.measure(model, _sample(dataset), **options)
        return Matched(model, dataset, preprocess.accept_or_refuse(table, accept))
    dataset, own = _at_own_size(source, model)
    model = _resize(model, dataset)
    table = preprocess.measure(model, _sample(dataset), **options)
    best, hint = table.used, table.used if table.used.accuracy >= table.needed else None
    for shape in () if _is_convincing(best, own) else _other_sizes(dataset, usual, own):
        rows = _measure_at(model, source, shape, hint)
        table = table._replace(rows=(*table.rows, *rows))
        found = max(rows, key=lambda row: row.accuracy, default=best)
        # a smaller gain could be luck
        if found.accuracy > best.accuracy + 2 * table.error:
            best = found
    if best.size is not None and best.size != table.used.size:
        dataset = read(source, model, (best.size[0], best.size[1], usual[2]), source.limit)
        model = _resize(model, dataset)
        # other sizes were measured on a smaller draw of images: measure the chosen one in full
        again = preprocess.measure(model, _sample(dataset), **options)
        table = again._replace(rows=(*again.rows, *table.rows))
    return Matched(model, dataset, preprocess.accept_or_refuse(table, accept))


def _sample(dataset: Dataset) -> Batch:
    return preprocess.sample(Batch(dataset.images, dataset.labels))


def _resize(model: Model, dataset: Dataset) -> Model:
    shape = (*dataset.images.shape[1:3], model.spec.image_shape[2])
    return model._replace(spec=dataclasses.replace(model.spec, image_shape=shape))


def _at_own_size(source: Source, model: Model) -> tuple[Dataset, bool]:
    """(images, True) at the size they all share; (images, False) at the net's usual size if they
    share none or exceed `LARGEST_OWN`."""
    usual = model.spec.image_shape
    try:
        dataset = read(source, model, (0, 0, usual[2]), source.limit)
        if max(dataset.images.shape[1:3]) <= LARGEST_OWN:
            return dataset, True
        return read(source, model, usual, source.limit), False
    except pictures.SizesDiffer:
        return read(source, model, usual, source.limit), False


def _is_convincing(row: preprocess.Row, own: bool) -> bool:
    """Whether no other size needs to be tried. Moments hardly depend on the size, so they count
    only at the pictures' own size."""
    return row.accuracy >= preprocess.GOOD_ACCURACY or (own and preprocess.is_convincing(row))


def _other_sizes(dataset: Dataset, usual: pictures.Shape, own: bool) -> Iterator[pictures.Shape]:
    """Further sizes to try: the net's usual one if `dataset` has its own size, otherwise sizes from
    half to twice the usual one."""
    side, channels = usual[0], usual[2]
    sides = [side] if own else [side // 2, 28, 3 * side // 4, 48, 3 * side // 2, 64, 2 * side]
    tried = {int(dataset.images.shape[1])}
    for each in sides:
        if each not in tried and side // 2 <= each <= 2 * side:
            tried.add(each)
            yield (each, each, channels)


def _measure_at(
    model: Model, source: Source, shape: pictures.Shape, hint: preprocess.Row | None
) -> tuple[preprocess.Row, ...]:
    """Rows at another size: one for the normalisation of `hint`, or one for every normalisation
    without a hint. Empty if the images cannot be read at that size."""
    limit = min(source.limit or preprocess.SAMPLE, preprocess.SAMPLE)
    try:
        dataset = read(source, model, shape, limit)
        model, data = _resize(model, dataset), _sample(dataset)
        if hint is None:
            return preprocess.measure(model, data).rows
        return (preprocess.measure_row(model, data, hint),)
    except UserError:
        return ()
