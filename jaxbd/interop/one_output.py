"""Converts a net with one output (the sigmoid logit of class 1 of two) to a two-class net and back.

sigmoid(z) gives the same probabilities as softmax over (0, z), so a constant logit 0 is added for
class 0. On the way back the difference of the two logits is written, which keeps the probabilities
no matter what a repair did to either logit.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from jaxbd.base import Array, UserError, Variables
from jaxbd.models import build, families, own

NOTE = "the net has one output (a sigmoid); a logit 0 for class 0 is added"


def widen_spec(spec: build.Spec) -> build.Spec:
    """The spec of the net with two outputs."""
    options = dict(spec.options)
    if "layers" in options:
        name, layers = _head(spec), dict(options["layers"])
        # an entry begins with the number of outputs
        _, by, inputs = layers[name].partition("x")
        options["layers"] = {**layers, name: f"2{by}{inputs}"}
    return dataclasses.replace(spec, classes=2, options=options)


def widen(spec: build.Spec, variables: Variables) -> tuple[build.Spec, Variables]:
    """Adds a constant output 0 before a net's single output.

    Raises: UserError for an architecture of the user's own, whose last layer is not known.
    """
    add = lambda leaf: jnp.concatenate([jnp.zeros_like(leaf), leaf], -1)
    return widen_spec(spec), _with_head(spec, variables, add)


def narrow(spec: build.Spec, variables: Variables) -> Variables:
    """Replaces a net's two outputs by their difference; `spec` is that of the net with one."""
    return _with_head(spec, variables, lambda leaf: leaf[..., 1:] - leaf[..., :1])


def _head(spec: build.Spec) -> str:
    """Name of the last layer. A family's is its last linear layer or, without one, its last
    convolution: the number of classes is taken from it."""
    if own.is_own(spec.arch):
        raise UserError(f"--arch {spec.arch} returns one logit; let it return two, 0 and the logit")
    if "layers" not in spec.options:
        return "head"
    shapes, _ = families.parse(spec.options["layers"])
    by_rank = {len(shape): name for name, shape in shapes.items()}
    return by_rank[2 if 2 in by_rank else 4]


def _with_head(
    spec: build.Spec, variables: Variables, change: Callable[[Array], Array]
) -> Variables:
    """`variables` with `change` applied to kernel [..., K] and bias [K] of the last layer."""
    params, name = dict(variables["params"]), _head(spec)
    head = {leaf: change(values) for leaf, values in params[name].items()}
    return {**variables, "params": {**params, name: head}}
