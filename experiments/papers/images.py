"""Where the data sets of the papers lie on this machine, and their division among attacker,
defender and judge."""

import functools

import jax.numpy as jnp
import numpy as np

from experiments import units
from experiments.papers.sizes import SIZES, SizeName
from jaxbd.base import Batch, Dataset, UserError
from jaxbd.data import digits, draw, load

SOURCES: dict[str, str] = {}
"""Data set -> what `jaxbd scan --data` takes; those that were named on the command line."""


def name_sources(given: tuple[str, ...]) -> None:
    """Takes the words NAME=SOURCE of a command line. Raises: UserError on a word without "="."""
    for word in given:
        name, equals, source = word.partition("=")
        if not equals or not source:
            raise UserError(f"--data {word} names no data set; write NAME=SOURCE, cifar100=FOLDER")
        SOURCES[name] = source


def find_source(dataset: str) -> str | None:
    """The source of a data set; None where it is not here."""
    if dataset == "digits" or dataset in SOURCES:
        return SOURCES.get(dataset, "digits")
    beside = units.SHARED / "data" / dataset
    # of GTSRB some classes' images may lie there; tables are made of whole sets alone
    return str(beside) if dataset == "cifar10" and beside.is_dir() else None


def say_missing(dataset: str) -> str:
    """The line for a table whose data set is not here."""
    return f"not measured: data {dataset} is not here (give --data {dataset}=SOURCE)"


@functools.cache
def divide(size_name: SizeName, dataset: str, seed: int, side: int) -> draw.Parts:
    """Images of attacker, defender and judge as NumPy; division by `seed`.

    Raises: UserError when the data set is not here.
    """
    size, source = SIZES[size_name], find_source(dataset)
    if source is None:
        raise UserError(say_missing(dataset))
    if dataset == "digits":
        parts = draw.divide(digits.load(side), size.train, size.held, seed=6000 + seed)
        return parts._replace(test=_first(parts.test, size.tested))
    shape = (side, side, 3)
    whole = load.load(source, split="train", image_shape=shape)
    count = min(size.train + size.held, len(whole.labels))
    order = np.random.default_rng(6000 + seed).permutation(len(whole.labels))[:count]
    test = _all(load.load(source, split="test", image_shape=shape))
    held = size.held if count > size.held else count // 20
    return draw.Parts(
        _rows(whole, order[held:]), _rows(whole, order[:held]), _first(test, size.tested)
    )


def draw_balanced(data: Batch, count: int, seed: int) -> Batch:
    """`count` images, balanced over the classes as far as possible.

    Raises: UserError when there are fewer.
    """
    labels = np.asarray(data.labels)
    if count > len(labels):
        raise UserError(f"{count} images were asked for, the defender has {len(labels)}; ask fewer")
    order = np.random.default_rng(seed).permutation(len(labels))
    # position of every image within its class, so that the first of all classes come first
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        rank[own] = np.arange(len(own))
    rows = order[np.argsort(rank[order], kind="stable")][:count]
    return Batch(jnp.asarray(np.asarray(data.images)[rows]), jnp.asarray(labels[rows]))


def _all(dataset: Dataset) -> Batch:
    return Batch(jnp.asarray(dataset.images), jnp.asarray(dataset.labels))


def _rows(dataset: Dataset, rows: np.ndarray) -> Batch:
    return Batch(jnp.asarray(dataset.images[rows]), jnp.asarray(dataset.labels[rows]))


def _first(data: Batch, count: int) -> Batch:
    return Batch(data.images[:count], data.labels[:count])
