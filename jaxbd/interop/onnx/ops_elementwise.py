"""Elementwise operators, as functions (node, *inputs) -> output. NumPy inputs give NumPy
outputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.interop.onnx.graph import Node
from jaxbd.interop.onnx.tensors import TYPES
from jaxbd.interop.onnx.values import Value, aligned, computed, is_static, library, static
from jaxbd.limits import Refusal, quote

HALVES = {np.dtype(np.float16), np.dtype(TYPES[16])}
"""Float types that are computed in float32 for accuracy."""


TRAINING = "the model was exported in training mode; call .eval() before the export"


def _unary(name: str) -> Callable[..., Value]:
    return lambda node, x: getattr(library(x), name)(x)


def _binary(name: str) -> Callable[..., Value]:
    def run(node: Node, x: Value, y: Value) -> Value:
        xp, (x, y) = aligned(x, y)
        return getattr(xp, name)(x, y)

    return run


def _fold_inputs(name: str) -> Callable[..., Value]:
    """An operator with any number of inputs, applied from left to right."""

    def run(node: Node, *values: Value) -> Value:
        xp, (result, *others) = aligned(*values)
        for value in others:
            result = getattr(xp, name)(result, value)
        return result

    return run


def _activation(function: Callable[..., Value]) -> Callable[..., Value]:
    return computed(function)


def div(node: Node, x: Value, y: Value) -> Value:
    """Quotient; for integers it is rounded towards zero."""
    xp, (x, y) = aligned(x, y)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x / y
    if is_static(y) and (np.asarray(y) == 0).any():
        raise Refusal("an integer is divided by zero")
    # // alone would round down
    quotient = xp.abs(x) // xp.abs(y) * xp.sign(x) * xp.sign(y)
    return quotient.astype(x.dtype)


def mod(node: Node, x: Value, y: Value) -> Value:
    """Remainder with the sign of `y`, or with that of `x` if `fmod` is set."""
    xp, (x, y) = aligned(x, y)
    if is_static(y) and jnp.issubdtype(x.dtype, jnp.integer) and (np.asarray(y) == 0).any():
        raise Refusal("an integer is divided by zero")
    return (xp.fmod if node.get("fmod", 0) else xp.mod)(x, y)


def power(node: Node, x: Value, y: Value) -> Value:
    """x to the power y. Integer powers are computed as products, so that the derivative exists for
    negative x too."""
    if is_static(y) and not is_static(x) and np.size(y) == 1:
        exponent = float(np.asarray(y).reshape(()))
        if exponent == 0.5:
            return jnp.sqrt(x)
        if exponent.is_integer() and abs(exponent) <= 64:
            return jax.lax.integer_pow(x, int(exponent))
    xp, (x, y) = aligned(x, y)
    return xp.power(x, y).astype(x.dtype)


def mean(node: Node, *values: Value) -> Value:
    return _fold_inputs("add")(node, *values) / len(values)


def clip(node: Node, x: Value, low: Value = None, high: Value = None) -> Value:
    """Clip; the bounds are attributes up to opset 10 and inputs from 11 on."""
    if node.opset < 11:
        low, high = (
            None if node.get(key) is None else np.float32(node.get(key)) for key in ("min", "max")
        )
    xp = library(x, low, high)
    for bound, choose in ((low, xp.maximum), (high, xp.minimum)):
        if bound is not None and np.size(bound):
            _, (x, bound) = aligned(x, bound.reshape(()))
            x = choose(x, bound)
    return x


def where(node: Node, condition: Value, x: Value, y: Value) -> Value:
    xp, (condition, x, y) = aligned(condition, x, y)
    return xp.where(condition.astype(bool), x, y)


def cast(node: Node, x: Value) -> Value:
    """Changes the element type. Floats that depend on the image keep the image's precision."""
    number = node.get("to")
    if number not in TYPES:
        raise Refusal(f"a cast to elements of type {quote(number)} is not supported")
    return _as_type(x, TYPES[number])


def cast_like(node: Node, x: Value, like: Value) -> Value:
    return _as_type(x, like.dtype)


def _as_type(x: Value, dtype: Any) -> Value:
    """`x` converted to `dtype`, except that floats which depend on the image keep their size."""
    dtype = np.dtype(dtype)
    if not is_static(x) and jnp.issubdtype(dtype, jnp.floating):
        return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        if is_static(x):
            return x.astype(np.float32 if dtype in HALVES else dtype)
        return x.astype(jax.dtypes.canonicalize_dtype(dtype))


def prelu(node: Node, x: Value, slope: Value) -> Value:
    xp, (x, slope) = aligned(x, slope)
    return xp.where(x < 0, slope * x, x)


def gelu(node: Node, x: Value) -> Value:
    return jax.nn.gelu(x, approximate=node.get("approximate", "none") == "tanh")


def selu(node: Node, x: Value) -> Value:
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return gamma * jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0)))


def hard_sigmoid(node: Node, x: Value) -> Value:
    return jnp.clip(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0, 1)


def swish(node: Node, x: Value) -> Value:
    return x * jax.nn.sigmoid(node.get("alpha", 1.0) * x)


def dropout(node: Node, x: Value, ratio: Value = None, training: Value = None) -> Value:
    """The input and, if asked for, a mask that keeps all of it, as outside training."""
    active = training is not None and static(training, "the mode of a Dropout").any()
    if active and (ratio is None or static(ratio, "the ratio of a Dropout").any()):
        raise Refusal(f"it drops values at random: {TRAINING}")
    return (x, np.ones(x.shape, bool)) if len(node.outputs) > 1 else x


def constant(node: Node) -> Value:
    """The constant stored in the node's attributes."""
    kinds = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    if "value" in node.attributes:
        return _as_type(node.attributes["value"], node.attributes["value"].dtype)
    for name, dtype in kinds.items():
        if name in node.attributes:
            return np.asarray(node.attributes[name], dtype)
    raise Refusal("a constant has no numeric value")


def erf(node: Node, x: Value) -> Value:
    return jax.scipy.special.erf(x)


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": _binary("add"),
    "Sub": _binary("subtract"),
    "Mul": _binary("multiply"),
    "Div": div,
    "Mod": mod,
    "Pow": power,
    "Equal": _binary("equal"),
    "Less": _binary("less"),
    "LessOrEqual": _binary("less_equal"),
    "Greater": _binary("greater"),
    "GreaterOrEqual": _binary("greater_equal"),
    "And": _binary("logical_and"),
    "Or": _binary("logical_or"),
    "Xor": _binary("logical_xor"),
    "Min": _fold_inputs("minimum"),
    "Max": _fold_inputs("maximum"),
    "Sum": _fold_inputs("add"),
    "Mean": mean,
    "Not": _unary("logical_not"),
    "Neg": _unary("negative"),
    "Abs": _unary("abs"),
    "Sqrt": _unary("sqrt"),
    "Exp": _unary("exp"),
    "Log": _unary("log"),
    "Sin": _unary("sin"),
    "Cos": _unary("cos"),
    "Floor": _unary("floor"),
    "Ceil": _unary("ceil"),
    "Round": _unary("round"),
    "Sign": _unary("sign"),
    "Tanh": _unary("tanh"),
    "Reciprocal": lambda node, x: 1 / x,
    "Where": where,
    "Clip": clip,
    "Cast": cast,
    "CastLike": cast_like,
    "Identity": lambda node, x: x,
    "Dropout": dropout,
    "Constant": constant,
    "PRelu": prelu,
    "Erf": _activation(erf),
    "Relu": _activation(lambda node, x: jax.nn.relu(x)),
    "LeakyRelu": _activation(lambda node, x: jnp.where(x < 0, node.get("alpha", 0.01) * x, x)),
    "ThresholdedRelu": _activation(
        lambda node, x: jnp.where(x > node.get("alpha", 1.0), x, jnp.zeros_like(x))
    ),
    "Elu": _activation(
        lambda node, x: jnp.where(x > 0, x, node.get("alpha", 1.0) * jnp.expm1(jnp.minimum(x, 0)))
    ),
    "Celu": _activation(lambda node, x: jax.nn.celu(x, node.get("alpha", 1.0))),
    "Selu": _activation(selu),
    "Gelu": _activation(gelu),
    "Sigmoid": _activation(lambda node, x: jax.nn.sigmoid(x)),
    "HardSigmoid": _activation(hard_sigmoid),
    "HardSwish": _activation(lambda node, x: x * jnp.clip(x / 6 + 0.5, 0, 1)),
    "Softplus": _activation(lambda node, x: jax.nn.softplus(x)),
    "Softsign": _activation(lambda node, x: jax.nn.soft_sign(x)),
    "Mish": _activation(lambda node, x: x * jnp.tanh(jax.nn.softplus(x))),
    "Swish": _activation(swish),
}
"""Name of an operator -> function that computes it."""
