"""How far a change of accuracy is known, from the same images before and after."""

from typing import NamedTuple

import numpy as np

Z = 1.959964
"""Quantile of the normal distribution for a 95 % interval."""


class Change(NamedTuple):
    """A change of accuracy as a share, below 0 where images were lost, with the ends of its 95 %
    interval."""

    change: float
    low: float
    high: float


def compare(before: np.ndarray, after: np.ndarray) -> Change:
    """The change from `before` to `after`, [N] bool: whether each image was classified correctly.

    Only images on which the two differ carry information. Half an image is added to each of the
    four counts of the pairs, so that the interval has its level for few images too, and a width if
    no image differs (Agresti and Min 2005).

    Raises: ValueError without images, or with different numbers of them.
    """
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    if before.shape != after.shape or not before.size:
        raise ValueError(f"pairs of images are needed, got {before.shape} and {after.shape}")
    gained, lost = (float(np.sum(a & ~b)) for a, b in ((after, before), (before, after)))
    count = before.size + 2
    middle = (gained - lost) / count
    spread = float(np.sqrt(((gained + lost + 1) / count - middle**2) / count))
    low, high = max(-1.0, middle - Z * spread), min(1.0, middle + Z * spread)
    return Change((gained - lost) / before.size, low, high)
