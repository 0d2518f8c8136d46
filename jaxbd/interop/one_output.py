"""Nets of one output, a sigmoid's logit for class 1 of two, as nets of two classes and back.

sigmoid(z) and softmax over (0, z) are the same probabilities, so a logit that is always 0 is added
for class 0. On the way back the difference of both logits is written, which changes no probability
whatever a repair did to either.
"""

import dataclasses

import jax.numpy as jnp

from jaxbd.base import Array, Variables
from jaxbd.models import build

NOTE = "the net has one output (a sigmoid); a logit 0 for class 0 is added"


def widen(spec: build.Spec, variables: Variables) -> tuple[build.Spec, Variables]:
    """A net of one output with a second one, which is always 0, before it."""
    add = lambda leaf: jnp.concatenate([jnp.zeros_like(leaf), leaf], -1)
    return dataclasses.replace(spec, classes=2), _with_head(variables, add)


def narrow(variables: Variables) -> Variables:
    """A net of two outputs as one of their difference."""
    return _with_head(variables, lambda leaf: leaf[..., 1:] - leaf[..., :1])


def _with_head(variables: Variables, change) -> Variables:
    """`variables` with `change` applied to kernel [F, K] and bias [K] of the last layer."""
    params = dict(variables["params"])
    head: dict[str, Array] = {name: change(leaf) for name, leaf in params["head"].items()}
    return {**variables, "params": {**params, "head": head}}
