"""Early stopping of a MESA search (not in the paper; off unless `mesa.Config.stop_after` is set).

A search tracks a fast and a slow exponential mean of two quantities of its batches: the margin,
which is the confidence on images of other classes minus the level, and the entropy bound. From step
`stop_after` on it has converged when either

(a) it has reached its level and stays there: the fast mean of the margin is at least -`REACHED` and
    at most `CALM` above the slow one, and the two means of the entropy bound differ by less than
    `STILL` nats; or
(b) it is hopeless: both means of the margin are below -`FAR`, and the fast one is at most `RISING`
    above the slow one.
"""

import math

import jax.numpy as jnp

from jaxbd.base import Array

RATES = (0.1, 0.03)
"""Rates of the fast and the slow mean; each is a plain mean for the first 1/rate steps."""
REACHED, CALM, FAR, RISING, STILL = 0.05, 0.03, 0.3, 0.01, 0.2
"""Thresholds of the rule: the first four in units of confidence, `STILL` in nats."""
TRAVEL = 0.04
"""Default start of the rule, as steps times learning rate."""


def stop_after(learning_rate: float) -> int:
    """Steps after which the rule is reliable.

    Adam moves a weight by about its learning rate per step, so this many steps move it by about
    `TRAVEL`. Before 1/rate steps, the slow mean is barely slower than the fast one.
    """
    return max(round(TRAVEL / learning_rate), math.ceil(1 / RATES[1]))


def update_means(means: Array, value: Array, step: Array) -> Array:
    """Updates the fast and the slow mean [2] by `value` [] of step number `step` []."""
    rates = jnp.maximum(jnp.asarray(RATES, means.dtype), 1 / (step + 1).astype(means.dtype))
    return means + rates * (value - means)


def has_reached(margin: Array, spread: Array) -> Array:
    """Rule (a), [] bool, from the means [2] of the margin and of the entropy bound in nats."""
    (fast, slow), still = margin, jnp.abs(spread[0] - spread[1]) < STILL
    return (fast >= -REACHED) & (fast - slow <= CALM) & still


def is_hopeless(margin: Array) -> Array:
    """Rule (b), [] bool, from the means [2] of the margin."""
    fast, slow = margin
    return (jnp.maximum(fast, slow) < -FAR) & (fast - slow <= RISING)
