"""Operators for matrix products, attention, normalisation, softmax and reductions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.interop.onnx.graph import Node
from jaxbd.interop.onnx.ops_elementwise import TRAINING
from jaxbd.interop.onnx.ops_shape import listed
from jaxbd.interop.onnx.values import Value, axis_of, computed, is_static, library, whole
from jaxbd.limits import Refusal


def gemm(node: Node, a: Value, b: Value, c: Value = None) -> Value:
    """alpha * a b + beta * c; `transA` and `transB` transpose the matrices first."""
    a = a.T if node.get("transA", 0) else a
    b = b.T if node.get("transB", 0) else b
    y = a @ b.astype(a.dtype)
    y = y if node.get("alpha", 1.0) == 1 else y * node.get("alpha", 1.0)
    if c is None:
        return y
    c = c.astype(y.dtype).reshape((1,) * (2 - c.ndim) + c.shape)
    return y + (c if node.get("beta", 1.0) == 1 else c * node.get("beta", 1.0))


def matmul(node: Node, a: Value, b: Value) -> Value:
    if is_static(a, b):
        return a @ b
    # static operands do not count, so that a float64 constant does not change the precision
    kind = jnp.result_type(*(value.dtype for value in (a, b) if not is_static(value)))
    return jnp.matmul(jnp.asarray(a, kind), jnp.asarray(b, kind))


def attention(node: Node, q: Value, k: Value, v: Value, mask: Value = None, *past: Value) -> Value:
    """softmax(q k^T scale + mask) v for inputs [B, heads, T, D], or [B, T, heads * D] with the
    numbers of heads as attributes."""
    if (
        any(value is not None for value in past)
        or len([o for o in node.outputs if o]) > 1
        or node.get("softcap", 0.0)
        or {node.get("left_window_size", -1), node.get("right_window_size", -1)} != {-1}
    ):
        raise Refusal(
            "an Attention with a past, a softcap, a window or more than one output is not supported"
        )
    packed = q.ndim == 3
    if packed:
        heads = node.get("q_num_heads"), node.get("kv_num_heads"), node.get("kv_num_heads")
        q, k, v = (
            z.reshape(*z.shape[:2], n, -1).swapaxes(1, 2)
            for z, n in zip((q, k, v), heads, strict=True)
        )
    # grouped-query attention: several query heads share a key and value head
    k, v = (jnp.repeat(z, q.shape[1] // z.shape[1], 1) for z in (k, v))
    scale = node.get("scale", q.shape[-1] ** -0.5)
    scores = (q @ k.swapaxes(-1, -2)) * scale
    if node.get("is_causal", 0):
        scores = jnp.where(np.tril(np.ones((1, 1, *scores.shape[-2:]), bool)), scores, -jnp.inf)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        scores = (
            jnp.where(mask, scores, -jnp.inf)
            if mask.dtype == bool
            else scores + mask.astype(scores.dtype)
        )
    y = jax.nn.softmax(scores, -1) @ v
    return y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1) if packed else y


def along_channels(values: Value, x: Value) -> Value:
    """Reshapes `values` [C] to broadcast over `x` [B, C, …], in the type of `x`."""
    return values.astype(x.dtype).reshape((1, -1) + (1,) * (x.ndim - 2))


def batch_norm(
    node: Node, x: Value, scale: Value, bias: Value, mean: Value, variance: Value
) -> Value:
    """(x - mean) scale / sqrt(variance + epsilon) + bias, with stored moments."""
    # before opset 14, further outputs (new moments) are what asks for training
    if node.get("training_mode", 0) or len([name for name in node.outputs if name]) > 1:
        raise Refusal(f"it uses the moments of its batch: {TRAINING}")
    if node.get("spatial", 1) != 1:
        raise Refusal("a BatchNormalization that is not spatial is not supported")
    factor = jax.lax.rsqrt(variance + node.get("epsilon", 1e-5))
    # one multiplication and one addition per element
    factor, shift = factor * scale, bias - mean * factor * scale
    return x * along_channels(factor, x) + along_channels(shift, x)


def _standardise(x: Value, axes: tuple[int, ...], epsilon: float) -> Value:
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x - mean).mean(axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)


def layer_norm(node: Node, x: Value, scale: Value, bias: Value = None) -> Value:
    axis = axis_of(node.get("axis", -1), x.ndim)
    y = _standardise(x, tuple(range(axis, x.ndim)), node.get("epsilon", 1e-5))
    fit = lambda v: v.astype(x.dtype).reshape((1,) * (x.ndim - v.ndim) + v.shape)
    return y * fit(scale) if bias is None else y * fit(scale) + fit(bias)


def rms_norm(node: Node, x: Value, scale: Value) -> Value:
    axis = axis_of(node.get("axis", -1), x.ndim)
    size = jnp.square(x).mean(tuple(range(axis, x.ndim)), keepdims=True)
    y = x * jax.lax.rsqrt(size + node.get("epsilon", 1e-5))
    return y * scale.astype(x.dtype).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)


def instance_norm(node: Node, x: Value, scale: Value, bias: Value) -> Value:
    y = _standardise(x, tuple(range(2, x.ndim)), node.get("epsilon", 1e-5))
    return y * along_channels(scale, x) + along_channels(bias, x)


def group_norm(node: Node, x: Value, scale: Value, bias: Value) -> Value:
    """GroupNormalization; scale and bias are per group up to opset 20, per channel from 21 on."""
    groups = node.get("num_groups")
    parts = x.reshape(x.shape[0], groups, -1)
    y = _standardise(parts, (2,), node.get("epsilon", 1e-5)).reshape(x.shape)
    each = x.shape[1] // groups if node.opset < 21 else 1
    return y * along_channels(jnp.repeat(scale, each), x) + along_channels(
        jnp.repeat(bias, each), x
    )


def lp_norm(node: Node, x: Value) -> Value:
    axis, p = node.get("axis", -1), node.get("p", 2)
    if p == 1:
        size = jnp.abs(x).sum(axis, keepdims=True)
    else:
        size = root(jnp.square(x).sum(axis, keepdims=True))
    return x / jnp.where(size == 0, 1, size)  # zeros stay zeros


def _softmax(function: Callable[..., Value]) -> Callable[..., Value]:
    def run(node: Node, x: Value) -> Value:
        """From opset 13 on over one axis; before that over all axes from `axis` on, flattened."""
        if node.opset >= 13:
            return function(x, axis=axis_of(node.get("axis", -1), x.ndim))
        axis = axis_of(node.get("axis", 1), x.ndim)
        return function(x.reshape(int(np.prod(x.shape[:axis])), -1), axis=-1).reshape(x.shape)

    return computed(run)


def _log_sum_exp(xp: Any) -> Callable[..., Value]:
    def reduce(x: Value, axis: tuple[int, ...] | None, keepdims: bool) -> Value:
        largest = xp.max(x, axis=axis, keepdims=True)  # exp of a large number overflows
        total = xp.log(xp.sum(xp.exp(x - largest), axis=axis, keepdims=keepdims))
        return total + (largest if keepdims else xp.squeeze(largest, axis))

    return reduce


def _reduction(
    name: str | Callable[[Any], Callable[..., Value]],
    since: int,
    before: str = "",
    after: Callable[[Value], Value] = lambda y: y,
) -> Callable[..., Value]:
    """A reduction with `xp.name`, or with `name(xp)`; the axes are an attribute before opset
    `since` and an input from then on."""

    def run(node: Node, x: Value, *more: Value) -> Value:
        xp, axes = library(x), listed(node, (x, *more), 1, "axes", since)
        x = getattr(xp, before)(x) if before else x
        if not axes and node.get("noop_with_empty_axes", 0):
            return after(x)
        axes = tuple(axis_of(axis, x.ndim) for axis in axes) if axes else None
        reduce = getattr(xp, name) if isinstance(name, str) else name(xp)
        y = reduce(x, axis=axes, keepdims=bool(node.get("keepdims", 1)))
        return after(y.astype(x.dtype))  # the mean of integers is rounded towards zero

    return run


def root(x: Value) -> Value:
    """Square root with the derivative 0 at 0, where the true one is infinite."""
    if is_static(x):
        return np.sqrt(x)
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), jnp.where(x < 0, jnp.nan, 0))


def _extreme(name: str) -> Callable[..., Value]:
    def run(node: Node, x: Value) -> Value:
        if node.get("select_last_index", 0):
            raise Refusal("an ArgMax or ArgMin with select_last_index is not supported")
        axis = axis_of(node.get("axis", 0), x.ndim)
        return getattr(library(x), name)(x, axis=axis, keepdims=bool(node.get("keepdims", 1)))

    return run


def cumsum(node: Node, x: Value, axis: Value) -> Value:
    if node.get("exclusive", 0) or node.get("reverse", 0):
        raise Refusal("a CumSum that is exclusive or reverse is not supported")
    return library(x).cumsum(x, axis_of(whole(axis, "the axis of a CumSum")[0], x.ndim))


LINEAR: dict[str, Callable[..., Any]] = {
    "Gemm": computed(gemm),
    "MatMul": matmul,
    "Attention": computed(attention),
    "BatchNormalization": computed(batch_norm),
    "LayerNormalization": computed(layer_norm),
    "RMSNormalization": computed(rms_norm),
    "InstanceNormalization": computed(instance_norm),
    "GroupNormalization": computed(group_norm),
    "LpNormalization": computed(lp_norm),
    "Softmax": _softmax(jax.nn.softmax),
    "LogSoftmax": _softmax(jax.nn.log_softmax),
    "ReduceMean": _reduction("mean", 18),
    "ReduceSum": _reduction("sum", 13),
    "ReduceMax": _reduction("max", 18),
    "ReduceMin": _reduction("min", 18),
    "ReduceProd": _reduction("prod", 18),
    "ReduceL1": _reduction("sum", 18, before="abs"),
    "ReduceL2": _reduction("sum", 18, before="square", after=root),
    "ReduceSumSquare": _reduction("sum", 18, before="square"),
    "ReduceLogSumExp": _reduction(_log_sum_exp, 18),
    "ArgMax": _extreme("argmax"),
    "ArgMin": _extreme("argmin"),
    "CumSum": cumsum,
}
"""Name of an operator -> function that computes it."""
