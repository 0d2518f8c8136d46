"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images that come with the package."""

from typing import Any

import numpy as np

from jaxbd.base import Dataset


def load(side: int = 16) -> Dataset:
    """Loads the digits as uint8 [1797, side, side, 1], enlarged by repeating pixels.

    Raises: ValueError when `side` is not a multiple of 8.
    """
    if side < 8 or side % 8:
        raise ValueError(f"digits: side {side} is not a multiple of 8")
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # their grey runs from 0 to 16
    images = np.kron(images, np.ones((1, side // 8, side // 8), np.uint8))[..., None]
    return Dataset(
        images, bunch.target.astype(np.int32), tuple(str(k) for k in range(10)), "digits"
    )
