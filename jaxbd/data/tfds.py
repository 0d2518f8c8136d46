"""TensorFlow Datasets by name, through `tfds.data_source`: random access, and no TensorFlow needed
for reading."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxbd.base import Dataset, UserError
from jaxbd.data import labels, pack, pictures

_NAME = re.compile(r"\w+(/[\w.-]+)?(:[\d*]+\.[\d*]+\.[\d*]+)?")
"""Excludes namespaces ("huggingface:..."): loading another library's data sets can run code."""
_SPLIT = re.compile(r"(.+)/((?:train|test|validation)(?:[\[+][^/]*)?)")


def load(
    name: str,
    *,
    split: str = "test",
    image_shape: pictures.Shape | None = None,
    limit: int | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
    download: bool = False,
    classes: labels.Classes = labels.Classes(),
) -> Dataset:
    """Reads one split of the data set `name`, "NAME[/CONFIG][:VERSION][/SPLIT]"; a split in the
    name overrides `split`.

    Args:
      split: in the syntax of TFDS: "test", "train[:10%]", ….
      image_shape: (H, W, C); images of other sizes are resized, see `pictures.fit`.
      limit: maximum number of images, drawn with `seed` before anything is decoded.
      data_dir: folder of prepared data sets; default: that of TFDS.
      download: whether a data set that is not prepared yet may be fetched and prepared. Without it
        nothing uses the network. Sets whose preparation encodes arrays as images need TensorFlow
        for this one step.
    Raises: UserError when tensorflow-datasets is not installed, the name or split is unknown, the
      set is not prepared, preparation fails, or the set does not hold labelled images.
    """
    given = _SPLIT.fullmatch(name)
    name, split = given.groups() if given else (name, split)
    if not _NAME.fullmatch(name):
        raise UserError(
            f"tfds:{name} is not NAME[/CONFIG][:VERSION][/SPLIT]; example: tfds:cifar10/test"
        )
    source = _open(name, split, data_dir, download)
    image_key, label_key = _keys(source.dataset_info, name)
    rows = pack.chosen_rows(len(source), limit, seed)
    given, seen = np.zeros(len(rows), np.int64), []

    def images():
        for place, row in enumerate(rows):
            where = f"{row} of tfds:{name}/{split}"
            example = _example(source, int(row), where)
            given[place] = example[label_key]
            pixels = np.asarray(example[image_key])
            fitted = _pixels(pixels, where, image_shape)
            seen.append((pixels.shape[2] == 1, *pixels.shape[:2]))
            yield where, fitted

    names = source.dataset_info.features[label_key].names
    where = f"tfds:{name}/{split}"
    if classes.count not in (None, len(names)):
        # raises the same error as after reading, but before any decoding
        labels.number([0], names, classes, f"data {where}")
    pixels = pictures.stack(images(), len(rows))
    notes = pictures.describe_changes(seen, pixels.shape[1:])
    return pack.dataset(pixels, given, names, where, classes, notes)


def _library(name: str) -> Any:
    """Imports tensorflow-datasets, which the extra `data` installs."""
    try:
        import tensorflow_datasets
    except ImportError:
        raise UserError(
            f"tfds:{name} needs tensorflow-datasets; install it with: pip install 'jaxbd[data]'"
        ) from None
    return tensorflow_datasets


def _open(name: str, split: str, data_dir: str | Path | None, download: bool) -> Any:
    """Opens the random-access source. Raises: UserError with one line on why it cannot."""
    tfds = _library(name)
    settings = dict(
        data_dir=data_dir, download=download, builder_kwargs={"file_format": "array_record"}
    )
    try:
        return tfds.data_source(name, split=split, **settings)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"tfds:{name} is not a data set TFDS knows; `tfds.list_builders()` lists them"
        ) from None
    except ImportError as error:
        package = error.name or "tensorflow"
        fix = f"install {package} once, or prepare it elsewhere with file_format='array_record'"
        raise UserError(f"tfds:{name} needs the package {package} to be prepared; {fix}") from None
    except Exception as error:  # downloading and preparing can raise anything
        reason = (str(error).strip("'\"").splitlines() or [type(error).__name__])[0]
        if not download and re.search("not been generated|could not find data", reason, re.I):
            raise UserError(
                f"tfds:{name} is not prepared in {data_dir or 'the TFDS data folder'}; --download"
                " fetches and prepares it"
            ) from None
        raise UserError(
            f"tfds:{name}/{split} cannot be read: {reason}; check name, split and network"
        ) from None


def _keys(info: Any, name: str) -> tuple[str, str]:
    """Names of the image and label features."""
    tfds = _library(name)
    keys, features = info.supervised_keys or ("image", "label"), info.features
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    for key, kind in zip(keys, kinds, strict=False):
        if not isinstance(key, str) or key not in features or not isinstance(features[key], kind):
            raise UserError(
                f"tfds:{name} is not a set of labelled images (it has {', '.join(features)});"
                " choose another"
            )
    return keys[0], keys[1]


def _example(source: Any, row: int, where: str) -> dict[str, Any]:
    try:
        return source[row]
    except Exception:  # on a damaged file the record reader and decoder can raise anything
        raise UserError(
            f"image {where} cannot be read; delete the prepared data set and prepare it again"
        ) from None


def _pixels(image: np.ndarray, where: str, image_shape: pictures.Shape | None) -> np.ndarray:
    """Checks an image and resizes it to `image_shape` if given; uint8 [H, W, C]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise UserError(
            f"image {where} is {image.dtype} {list(image.shape)}; only 8-bit grey and colour images"
            " work"
        )
    if image_shape is None or image.shape == tuple(image_shape):
        return image
    from PIL import Image

    return pictures.fit(
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), image_shape
    )
