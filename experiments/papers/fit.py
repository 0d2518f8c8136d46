"""The trade-off of accuracy and attack success as a curve: a logistic fit (Yan et al. 2023, Figs. 3
and 4)."""

import warnings
from typing import NamedTuple

import numpy as np
from scipy import optimize


class Logistic(NamedTuple):
    """ASR at accuracy a: 1 / (1 + exp(-slope (a - middle))).

    Attributes:
      middle: accuracy at which half of the triggered images reach the target.
      slope: per unit of accuracy; above 0 where more accuracy costs more attacks.
      error: root mean square of the residuals.
    """

    middle: float
    slope: float
    error: float

    def at(self, accuracy: np.ndarray | float) -> np.ndarray:
        """ASR [N] at accuracies [N]."""
        return _logistic(np.asarray(accuracy, float), self.middle, self.slope)


def fit_logistic(accuracy: np.ndarray, asr: np.ndarray) -> Logistic | None:
    """The curve nearest to points (accuracy [N], ASR [N]), both shares; None where there are fewer
    than four, all have nearly the same accuracy, or all lie on one side of one half: they do not
    determine a curve."""
    accuracy, asr = np.asarray(accuracy, float), np.asarray(asr, float)
    if len(accuracy) < 4 or np.ptp(accuracy) < 1e-3 or not asr.min() < 0.5 < asr.max():
        return None
    first = (float(np.median(accuracy)), 20.0)
    bounds = ((-1.0, -1000.0), (2.0, 1000.0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optimize.OptimizeWarning)
            found, _ = optimize.curve_fit(_logistic, accuracy, asr, first, bounds=bounds)
    except RuntimeError:  # no convergence
        return None
    error = float(np.sqrt(np.mean((_logistic(accuracy, *found) - asr) ** 2)))
    return Logistic(float(found[0]), float(found[1]), error)


def _logistic(accuracy: np.ndarray, middle: float, slope: float) -> np.ndarray:
    return 1 / (1 + np.exp(np.clip(-slope * (accuracy - middle), -60, 60)))
