"""Loads the data set that a `--data` argument names, checks it, and takes parts of it."""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbd.base import Batch, Dataset, UserError
from jaxbd.data import (
    bounded,
    cifar,
    digits,
    folder,
    idx,
    labels,
    lists,
    npz,
    pack,
    parquet,
    pictures,
    recipes,
    splits,
    tfds,
)

KINDS = (
    "digits, a .npz or .parquet file, a folder of class sub-folders, of images and a .csv, of"
    " parquet, Arrow or IDX (MNIST) files, or of CIFAR batches, tfds:NAME, mini-imagenet:FOLDER,"
    " vggface2:FOLDER"
)
LARGEST_DIGITS = 512
"""Largest side, in pixels, to which digits are enlarged; all of them take half a gigabyte then."""


def load(
    spec: str,
    *,
    split: str = "test",
    image_shape: pictures.Shape | None = None,
    limit: int | None = None,
    seed: int = 0,
    classes: labels.Classes = labels.Classes(),
    download: bool = False,
) -> Dataset:
    """Loads the source that `spec` names: one of `KINDS`.

    Args:
      split: the part to load, for sources that have parts (CIFAR, IDX, tfds, split shards,
        sub-folders or arrays); others are loaded whole. "val" replaces a missing "test".
      image_shape: required (H, W, C). Image files and tfds images are resized to it, digits are
        enlarged to it; arrays of another shape are refused. With H = W = 0 the images keep their
        size, which all must share.
      limit: maximum number of images, drawn without replacement with `seed`, in the source's order.
      classes: what is known of the model's classes; the source must match.
      download: whether `tfds:NAME` may fetch and prepare a data set. Nothing else uses the network.
    Raises: UserError when `spec` is missing, empty or of an unknown kind, or its content is bad or
      does not fit the model; `pictures.SizesDiffer` when images that must share a size do not.
    """
    if image_shape is not None:
        height, width, channels = image_shape
        image_shape = (height, width, channels)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    settings: dict[str, Any] = dict(limit=limit, seed=seed, classes=classes)
    sized: dict[str, Any] = dict(image_shape=image_shape, **settings)
    if spec.startswith("tfds:"):
        name = spec.removeprefix("tfds:")
        dataset = tfds.load(name, split=split, download=download, **sized)
    elif spec.startswith(tuple(f"{kind}:" for kind in recipes.RECIPES)):
        dataset = _by_recipe(spec, split, sized)
    elif spec == "digits":
        dataset = _digits(image_shape, classes)
    else:
        dataset = _from_path(spec, split, settings, sized)
    if limit is not None and len(dataset.labels) > limit:  # CIFAR and digits come whole
        dataset = take(dataset, pack.chosen_rows(len(dataset.labels), limit, seed))
    if image_shape is not None:
        _check_shape(dataset, image_shape)
    return dataset


def _digits(image_shape: pictures.Shape | None, classes: labels.Classes) -> Dataset:
    """Digits of the wanted side if `digits` can make it, else of the default side."""
    side = image_shape[0] if image_shape else 0
    can_make = 8 <= side <= LARGEST_DIGITS and side % 8 == 0
    found = digits.load(side) if can_make else digits.load()
    return pack.dataset(found.images, found.labels, found.class_names, found.name, classes)


def _by_recipe(spec: str, split: str, sized: dict[str, Any]) -> Dataset:
    kind, _, path = spec.partition(":")
    try:
        return recipes.load(kind, path, split=split, **sized)
    except OSError as error:
        raise UserError(
            f"data {spec} cannot be read ({error.strerror or error}); check its permissions"
        ) from None


def _from_path(spec: str, split: str, settings: dict[str, Any], sized: dict[str, Any]) -> Dataset:
    path = Path(os.path.expanduser(spec))
    try:
        if spec and path.is_dir():
            return _from_folder(path, split, settings, sized)
        if spec and bounded.is_regular(path):
            return _from_file(path, split, settings, sized)
        if spec and path.exists():
            raise UserError(f"data {path} is a pipe or device, which is never read; give {KINDS}")
    except OSError as error:
        raise UserError(
            f"data {spec} cannot be read ({error.strerror or error}); check its permissions"
        ) from None
    raise UserError(f"data {spec!r} does not exist; give {KINDS}")


def _from_file(path: Path, split: str, settings: dict[str, Any], sized: dict[str, Any]) -> Dataset:
    """Picks the reader by the file's suffix or name."""
    name = path.name.lower()
    if path.suffix.lower() == ".npz":
        return npz.load(path, split=split, **settings)
    if path.suffix.lower() in (".parquet", ".arrow"):
        return parquet.load(path, **sized)
    if idx.IMAGES.fullmatch(path.name):
        return idx.load(path, split=split, **settings)
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return cifar.load(path, split=split, classes=settings["classes"])
    raise UserError(f"data {path} is of an unknown kind; give {KINDS}")


def _from_folder(
    path: Path, split: str, settings: dict[str, Any], sized: dict[str, Any]
) -> Dataset:
    """Picks the reader by the folder's content."""
    if not any(path.iterdir()):
        raise UserError(f"data {path} is an empty folder; give {KINDS}")
    if cifar.is_cifar(path):
        return cifar.load(path, split=split, classes=settings["classes"])
    if idx.find(path):
        return idx.load(path, split=split, **settings)
    if parquet.tables(path):
        return parquet.load(path, split=split, **sized)
    notes: tuple[str, ...] = ()
    for place in (path, folder.below_wrappers(path)):
        if parts := splits.folders(place):
            path, notes = _find_labelled_part(place, parts, split)
            break
    table = None if _holds_classes(path) else lists.find(path, split)
    dataset = folder.load(path, **sized) if table is None else lists.load(path, table, **sized)
    return dataset._replace(notes=notes + dataset.notes)


def _find_labelled_part(
    path: Path, parts: dict[str, Path], split: str
) -> tuple[Path, tuple[str, ...]]:
    """The folder of `split`, and notes. Tiny-ImageNet's test images have no labels, so its val part
    replaces them."""
    annotated = bounded.is_regular(parts.get("val", path) / lists.ANNOTATIONS)
    if annotated and splits.name(split) == "test" and "test" in parts:
        return parts["val"], ("the test images have no labels, the val part is used",)
    return splits.choose(parts, split, f"data {path}")


def _holds_classes(path: Path) -> bool:
    """Whether the folder has class folders rather than images with a list."""
    if bounded.is_regular(path / lists.ANNOTATIONS):
        return False
    inside = folder.sub_folders(path)
    return len(inside) > 1 or (len(inside) == 1 and len(folder.sub_folders(inside[0])) > 1)


def check(
    dataset: Dataset, image_shape: pictures.Shape, classes: int, *, at_least: int = 1
) -> None:
    """Raises UserError unless `dataset` fits a model of K = `classes` on images of `image_shape`
    (H, W, C).

    Args:
      at_least: minimum number of images, for example the batch size.
    """
    wrong = np.flatnonzero((dataset.labels < 0) | (dataset.labels >= classes))
    if wrong.size:
        label = int(dataset.labels[wrong[0]])
        fix = f"the model has classes 0..{classes - 1}: relabel or remove"
        raise UserError(
            f"data {dataset.name}: image {wrong[0]} has label {label}, {fix} {wrong.size} image(s)"
        )
    _check_shape(dataset, image_shape)
    if len(dataset.labels) < at_least:
        count = len(dataset.labels)
        raise UserError(
            f"data {dataset.name} has {count} images, {at_least} are needed; give more or lower the"
            " batch"
        )


def _check_shape(dataset: Dataset, image_shape: pictures.Shape) -> None:
    height, width, channels = dataset.images.shape[1:]
    if channels != image_shape[2]:
        fix = "convert the images"
        raise UserError(
            f"data {dataset.name} has {channels} channel(s), the model takes {image_shape[2]};"
            f" {fix}"
        )
    if image_shape[0] and (height, width) != tuple(image_shape[:2]):
        wanted = f"{image_shape[0]}x{image_shape[1]}"
        raise UserError(
            f"data {dataset.name} has {height}x{width} images, the model takes {wanted}; resize"
            " them"
        )


def take(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """The `rows` [n] (int) of `dataset`, in that order."""
    return dataset._replace(images=dataset.images[rows], labels=dataset.labels[rows])


def split(dataset: Dataset, first: int, seed: int) -> tuple[Dataset, Dataset]:
    """Splits `dataset` at random into `first` images and the rest.

    Raises: UserError unless both parts get at least one image.
    """
    total = len(dataset.labels)
    if total < 2:
        raise UserError(
            f"data {dataset.name} has {total} image(s), too few to divide; give at least 2"
        )
    if not 0 < first < total:
        raise UserError(
            f"data {dataset.name} has {total} images, {first} cannot be set apart; give"
            f" 1..{total - 1}"
        )
    order = np.random.default_rng(seed).permutation(total)
    return take(dataset, order[:first]), take(dataset, order[first:])


def as_batch(dataset: Dataset) -> Batch:
    """Puts the whole data set on the device: images uint8 [N, H, W, C], labels int32 [N]."""
    return Batch(jnp.asarray(dataset.images), jnp.asarray(dataset.labels))
