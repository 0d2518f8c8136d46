"""From a person's words to a data set: finds the kind of source, checks the result, takes parts of it."""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbd.base import Batch, Dataset, UserError
from jaxbd.data import cifar, digits, folder, npz, pack, parquet, recipes, tfds

KINDS = (
    "digits, a .npz or .parquet file, a folder of class sub-folders or parquet files, CIFAR batches, tfds:NAME, "
    "mini-imagenet:FOLDER, vggface2:FOLDER"
)


def load(
    spec: str,
    *,
    split: str = "test",
    image_shape: tuple[int, int, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Loads what `spec` names: one of `KINDS`.

    Args:
      split: part to load of sources that have parts (CIFAR, tfds, split shards or sub-folders); others come whole.
      image_shape: (H, W, C) the images must have. Image files and tfds images are resized to it, digits made so
        large; arrays of another shape are refused.
      limit: at most so many images, drawn without replacement with `seed`, in the source's order.
    Raises: UserError when `spec` is missing, empty or of no known kind, or its content is bad.
    """
    image_shape = None if image_shape is None else tuple(image_shape)
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} leaves no images; give at least 1")
    settings = dict(image_shape=image_shape, limit=limit, seed=seed)
    if spec.startswith("tfds:"):
        dataset = tfds.load(spec.removeprefix("tfds:"), split=split, **settings)
    elif spec.startswith(tuple(f"{kind}:" for kind in recipes.RECIPES)):
        dataset = _by_recipe(spec, split, settings)
    elif spec == "digits":
        dataset = _digits(image_shape)
    else:
        dataset = _from_path(spec, split, settings)
    if limit is not None and len(dataset.labels) > limit:  # sources that decode have drawn their rows already
        dataset = take(dataset, pack.chosen_rows(len(dataset.labels), limit, seed))
    if image_shape is not None:
        _check_shape(dataset, image_shape)
    return dataset


def _digits(image_shape: tuple[int, int, int] | None) -> Dataset:
    """Digits of the wanted side where they come in it; otherwise of their default side."""
    side = image_shape[0] if image_shape else 0
    return digits.load(side) if side >= 8 and side % 8 == 0 else digits.load()


def _by_recipe(spec: str, split: str, settings: dict[str, Any]) -> Dataset:
    kind, _, path = spec.partition(":")
    try:
        return recipes.load(kind, path, split=split, **settings)
    except OSError as error:
        raise UserError(f"data {spec} cannot be read ({error.strerror or error}); check its permissions") from None


def _from_path(spec: str, split: str, settings: dict[str, Any]) -> Dataset:
    path = Path(os.path.expanduser(spec))
    try:
        if spec and path.is_file():
            return _from_file(path, split, settings)
        if spec and path.is_dir():
            return _from_folder(path, split, settings)
    except OSError as error:
        raise UserError(f"data {spec} cannot be read ({error.strerror or error}); check its permissions") from None
    raise UserError(f"data {spec!r} does not exist; give {KINDS}")


def _from_file(path: Path, split: str, settings: dict[str, Any]) -> Dataset:
    """The source its suffix tells."""
    if path.suffix.lower() == ".npz":
        return npz.load(path)
    if path.suffix.lower() == ".parquet":
        return parquet.load(path, **settings)
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return cifar.load(path, split=split)
    raise UserError(f"data {path} is of no known kind; give {KINDS}")


def _from_folder(path: Path, split: str, settings: dict[str, Any]) -> Dataset:
    """The source its content tells."""
    if not any(path.iterdir()):
        raise UserError(f"data {path} is an empty folder; give {KINDS}")
    if cifar.found(path):
        return cifar.load(path, split=split)
    if next(path.glob("*.parquet"), None) or next(path.glob("*/*.parquet"), None):
        return parquet.load(path, split=split, **settings)
    return folder.load(_split_folder(path, split), **settings)


def _split_folder(path: Path, split: str) -> Path:
    """The sub-folder of `split` where `path` holds one per split, each with class sub-folders; otherwise `path`."""
    parts = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if not parts or not parts <= {"train", "test", "val", "valid", "validation"}:
        return path
    if not any(entry.is_dir() for part in parts for entry in (path / part).iterdir()):
        return path
    if split not in parts:
        raise UserError(f"data {path} has no split {split!r}; it has {', '.join(sorted(parts))}")
    return path / split


def check(dataset: Dataset, image_shape: tuple[int, int, int], classes: int, *, at_least: int = 1) -> None:
    """Raises UserError unless `dataset` fits a model on images of `image_shape` (H, W, C) with K = `classes`.

    Args:
      at_least: how many images are needed, such as the batch size.
    """
    _check_shape(dataset, tuple(image_shape))
    wrong = np.flatnonzero((dataset.labels < 0) | (dataset.labels >= classes))
    if wrong.size:
        label = int(dataset.labels[wrong[0]])
        fix = f"the model has classes 0..{classes - 1}: relabel or remove"
        raise UserError(f"data {dataset.name}: image {wrong[0]} has label {label}, {fix} {wrong.size} image(s)")
    if len(dataset.labels) < at_least:
        count = len(dataset.labels)
        raise UserError(f"data {dataset.name} has {count} images, {at_least} are needed; give more or lower the batch")


def _check_shape(dataset: Dataset, image_shape: tuple[int, int, int]) -> None:
    height, width, channels = dataset.images.shape[1:]
    if channels != image_shape[2]:
        fix = "convert the images"
        raise UserError(f"data {dataset.name} has {channels} channel(s), the model takes {image_shape[2]}; {fix}")
    if (height, width) != image_shape[:2]:
        wanted = f"{image_shape[0]}x{image_shape[1]}"
        raise UserError(f"data {dataset.name} has {height}x{width} images, the model takes {wanted}; resize them")


def take(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """The `rows` [n] (int) of `dataset`, in that order."""
    return dataset._replace(images=dataset.images[rows], labels=dataset.labels[rows])


def split(dataset: Dataset, first: int, seed: int) -> tuple[Dataset, Dataset]:
    """Two random disjoint parts that together are `dataset`, of `first` and of all remaining images.

    Raises: UserError unless both parts get at least one image.
    """
    total = len(dataset.labels)
    if not 0 < first < total:
        raise UserError(f"data {dataset.name} has {total} images, {first} cannot be set apart; give 1..{total - 1}")
    order = np.random.default_rng(seed).permutation(total)
    return take(dataset, order[:first]), take(dataset, order[first:])


def as_batch(dataset: Dataset) -> Batch:
    """The whole data set on the device: images uint8 [N, H, W, C], labels int32 [N]."""
    return Batch(jnp.asarray(dataset.images), jnp.asarray(dataset.labels))
