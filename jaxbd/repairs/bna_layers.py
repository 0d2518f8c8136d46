"""The layers of a net that BNA corrects, and the four parameters of each (Li et al. 2023, section
4.2)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp

from jaxbd.base import Array, ArrayTree, Net, UserError, Variables
from jaxbd.repairs.activations import Range

UNBOUNDED = -3e38
"""A lower bound that clips nothing."""
LEAST_UNIT = 1e-5
"""Added to a variance or standard deviation used as a unit, so that dead channels have a nonzero
unit."""


class Theta(NamedTuple):
    """Parameters [C] of one layer: mu = start + unit * shift, sigma = start * exp(log_scale),
    upsilon, omega.

    # Differs from paper: mu and sigma move in the layer's own units, so that one learning rate
    suits all nets.
    """

    shift: Array
    log_scale: Array
    lower: Array
    upper: Array


def outputs(
    net: Net, variables: Variables, images: Array, *, batchnorm_only: bool
) -> dict[str, Array]:
    """Outputs {layer: [B, …, C]} of the layers that can be corrected, in order of execution.

    Raises: UserError when there are none.
    """
    found = {} if net.outputs is None else net.outputs(variables, images)[1]
    if batchnorm_only:
        normalised = flatten(variables.get("batch_stats", {}))
        found = {layer: values for layer, values in found.items() if layer in normalised}
    if not found:
        raise UserError(
            "bna: this net shows no layer whose activations could be corrected; build it with"
            " jaxbd's BatchNorm or Correction, or use another repair"
        )
    return found


def names(net: Net, variables: Variables, images: Array, *, batchnorm_only: bool) -> list[str]:
    """The keys of `outputs`; computes nothing. Raises: UserError when there are none."""
    # recorded as a side effect, because the result of `eval_shape` would be sorted by name
    found: list[str] = []

    def trace(variables, images):
        found.extend(outputs(net, variables, images, batchnorm_only=batchnorm_only))

    jax.eval_shape(trace, variables, images)
    return found


def start(clean: Range, upper: float | None) -> Theta:
    """Initial parameters that change nothing on clean images, with bounds at the extremes of their
    activations. With `upper`, omega starts there without a lower bound, as released."""
    # Differs from paper: it does not state the initial values
    zero = jnp.zeros_like(clean.low)
    if upper is None:
        return Theta(zero, zero, clean.low, clean.high)
    return Theta(zero, zero, jnp.full_like(zero, UNBOUNDED), jnp.full_like(zero, upper))


def correct(
    variables: Variables, theta: Mapping[str, Theta], units: Mapping[str, Array]
) -> Variables:
    """`variables` with the parameters `theta` applied.

    In BatchNorm layers, shift and scale go into the moments; in other layers into the collection
    `bounds`, in `units` [C].
    """
    stats, bounds = flatten(variables["batch_stats"]), {}
    for name, (shift, log_scale, lower, upper) in theta.items():
        bounds[name] = {"lower": lower, "upper": upper}
        if name in stats:
            mean, var = stats[name]["mean"], stats[name]["var"]
            stats[name] = {
                "mean": mean + jnp.sqrt(var + LEAST_UNIT) * shift,
                "var": var * jnp.exp(2 * log_scale),
            }
        else:
            bounds[name] |= {"mean": units[name] * shift, "std": jnp.exp(log_scale)}
    return {**variables, "batch_stats": _nest(stats), "bounds": _nest(bounds)}


def flatten(tree: ArrayTree) -> dict[str, dict[str, Array]]:
    """{"layer1_0": {"bn1": {"mean": …}}} -> {"layer1_0/bn1": {"mean": …}}."""
    leaves: dict[str, dict[str, Any]] = {}
    for path, leaf in flax.traverse_util.flatten_dict(dict(tree)).items():
        leaves.setdefault("/".join(path[:-1]), {})[path[-1]] = leaf
    return leaves


def _nest(layers: dict[str, Any]) -> ArrayTree:
    """The inverse of `flatten`."""
    return flax.traverse_util.unflatten_dict(layers, sep="/")
