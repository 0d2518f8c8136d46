"""Converts a net with one output (the sigmoid logit of class 1 of two) to a two-class net and back.

sigmoid(z) gives the same probabilities as softmax over (0, z), so a constant logit 0 is added for
class 0. On the way back the difference of the two logits is written, which keeps the probabilities
no matter what a repair did to either logit.
"""

import dataclasses

import jax.numpy as jnp

from jaxbd.base import Array, Variables
from jaxbd.models import build

NOTE = "the net has one output (a sigmoid); a logit 0 for class 0 is added"


def widen(spec: build.Spec, variables: Variables) -> tuple[build.Spec, Variables]:
    """Adds a constant output 0 before a net's single output."""
    add = lambda leaf: jnp.concatenate([jnp.zeros_like(leaf), leaf], -1)
    return dataclasses.replace(spec, classes=2), _with_head(variables, add)


def narrow(variables: Variables) -> Variables:
    """Replaces a net's two outputs by their difference."""
    return _with_head(variables, lambda leaf: leaf[..., 1:] - leaf[..., :1])


def _with_head(variables: Variables, change) -> Variables:
    """`variables` with `change` applied to kernel [F, K] and bias [K] of the last layer."""
    params = dict(variables["params"])
    head: dict[str, Array] = {name: change(leaf) for name, leaf in params["head"].items()}
    return {**variables, "params": {**params, "head": head}}
