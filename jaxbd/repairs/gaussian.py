"""The two-class Gaussian model behind BNA, in closed form (Li et al. 2023, section 3).

Clean source images are N(-mu, sigma^2 I), triggered ones N(-mu + eps, sigma_b^2 I). The net is one
hidden layer of J nodes with weights w and a BatchNorm with moments m, v.
"""

from typing import NamedTuple

from jaxbd.base import Array


class Moments(NamedTuple):
    """Mean and standard deviation of the model's BatchNorm, per node [J]."""

    mean: Array
    std: Array


def corrected_moments(
    stored: Moments, on_source: Array, on_shift: Array, sigma: Array, sigma_b: Array
) -> Moments:
    """m* and sqrt(v*), with which triggered images activate the nodes like clean images (eq. 2).

    The ratio scales the square root of v, not v (appendix A.1; the root sign is missing in the
    paper's text).

    Args:
      stored: BatchNorm's own m and sqrt(v) [J].
      on_source: w^T mu [J]; on_shift: w^T eps [J].
    """
    ratio = sigma_b / sigma
    return Moments(ratio * stored.mean + (ratio - 1) * on_source + on_shift, ratio * stored.std)


def moments_between(stored: Moments, corrected: Moments, alpha: Array) -> Moments:
    """Moments of Theorem 3.1's classifier between corrected (alpha = 0) and original (alpha =
    1)."""
    return Moments(
        *(alpha * own + (1 - alpha) * other for own, other in zip(stored, corrected, strict=True))
    )
