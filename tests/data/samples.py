"""What the tests of data sources share: random pictures, encoded ones, and what a refusal is."""

import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from jaxbd.base import UserError

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared"


def pixels(count, height=6, width=5, channels=3, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, (count, height, width, channels), dtype=np.uint8
    )


def encoded(image, kind="PNG", **how):
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind, **how)
    return file.getvalue()


def refused(message, function, *args, **kwargs):
    """Asserts a UserError of one line that contains `message`."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert message in text, text
    assert "\n" not in text


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def assert_same(dataset, images, labels, names):
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int32
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == list(labels)
    assert dataset.class_names == tuple(names)
