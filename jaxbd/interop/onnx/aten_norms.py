"""aten operators that normalise, and variances."""

import math

import numpy as np

from jaxbd.interop.onnx.aten import Converter
from jaxbd.interop.onnx.aten_arguments import Arguments
from jaxbd.interop.onnx.aten_math import Handler, axes_of, times
from jaxbd.interop.onnx.graph import MOST_STATIC
from jaxbd.interop.onnx.values import check_size
from jaxbd.limits import Refusal, quote


def batch_norm(c: Converter, a: Arguments) -> list[str]:
    """BatchNorm with stored moments. Without affine parameters, a scale of 1 and a bias of 0 are
    added."""
    if a.get("training") or a.get("running_mean") is None:
        raise Refusal(
            "a batch_norm with the moments of its batch is not supported; export the model in"
            " evaluation mode"
        )
    mean = c.value(a["running_mean"])
    count = c.size(a["running_mean"], 0)
    affine = [a.get(key) for key in ("weight", "bias")]
    scale, bias = (
        c.value(given)
        if given is not None
        else _add_weight(c, np.full(count, fill, np.float32), mean, leaf)
        for given, fill, leaf in zip(affine, (1, 0), ("weight", "bias"), strict=True)
    )
    inputs = [c.value(a["input"]), scale, bias, mean, c.value(a["running_var"])]
    # PyTorch's momentum weights the new moments, ONNX's the old ones
    keep = {"epsilon": float(a.get("eps", 1e-5)), "momentum": 1 - float(a.get("momentum", 0.1))}
    return [c.add("BatchNormalization", inputs, "", 1, **keep), "", ""]


def _add_weight(c: Converter, array: np.ndarray, beside: str, leaf: str) -> str:
    """Adds a weight that the program lacks, named after the moments of the same layer."""
    name = c.name(f"{beside.removesuffix('.running_mean')}.{leaf}")
    c.tensors[name] = array
    return name


def layer_norm(c: Converter, a: Arguments) -> list[str]:
    x, count = a["input"], len(a["normalized_shape"])
    shape = tuple(a["normalized_shape"])
    check_size(shape, MOST_STATIC)
    scale = (
        c.constant(np.ones(shape, np.float32)) if a.get("weight") is None else c.value(a["weight"])
    )
    inputs = [c.value(x), scale, *([] if a.get("bias") is None else [c.value(a["bias"])])]
    return [
        c.add("LayerNormalization", inputs, "", 1, axis=-count, epsilon=float(a.get("eps", 1e-5))),
        "",
        "",
    ]


def group_norm(c: Converter, a: Arguments) -> str:
    """GroupNorm as InstanceNormalization of the value reshaped to [B, groups, …], followed by scale
    and bias per channel."""
    x, groups = a["input"], a["num_groups"]
    check_size((groups,), MOST_STATIC)
    name = c.value(x)
    parts = c.add("Reshape", [name, c.integers([0, groups, -1])])
    one, zero = (c.constant(np.full(groups, fill, np.float32)) for fill in (1, 0))
    parts = c.add("InstanceNormalization", [parts, one, zero], epsilon=float(a.get("eps", 1e-5)))
    return _scale_channels(c, c.add("Reshape", [parts, c.add("Shape", [name])]), a)


def _scale_channels(c: Converter, y: str, a: Arguments) -> str:
    """Applies the arguments `weight` and `bias`, one number per channel, if given."""
    row = (1,) * (c.rank(a["input"]) - 2)
    for op, key in (("Mul", "weight"), ("Add", "bias")):
        if a.get(key) is not None:
            y = c.add(op, [y, c.add("Reshape", [c.value(a[key]), c.integers([1, -1, *row])])])
    return y


def native_group_norm(c: Converter, a: Arguments) -> list[str]:
    """`group_norm`, with the input's sizes as arguments too."""
    x = a["input"]
    images, channels, *rest = c.meta(x).shape
    sizes = images, channels, None if None in rest else math.prod(rest)
    for key, size in zip(("N", "C", "HxW"), sizes, strict=True):
        if isinstance(a[key], int) and size not in (None, a[key]):
            raise Refusal(f"its {key} is {a[key]}, but that of {quote(x.name)} is {size}")
    given = {key: a[key] for key in ("input", "weight", "bias", "eps")}
    return [group_norm(c, {**given, "num_groups": a["group"]}), "", ""]


def instance_norm(c: Converter, a: Arguments) -> str:
    """Normalises every image and channel by its own moments or, if `use_input_stats` is false, by
    the stored ones."""
    if not a["use_input_stats"]:
        return batch_norm(c, a)[0]
    moments = [a.get(key) for key in ("running_mean", "running_var", "momentum")]
    del moments  # only updated here
    count = (c.size(a["input"], 1),)
    check_size(count, MOST_STATIC)
    scale, bias = (
        c.constant(np.full(count, fill, np.float32)) if a.get(key) is None else c.value(a[key])
        for key, fill in (("weight", 1), ("bias", 0))
    )
    inputs = [c.value(a["input"]), scale, bias]
    return c.add("InstanceNormalization", inputs, epsilon=float(a["eps"]))


def native_batch_norm(c: Converter, a: Arguments) -> list[str]:
    """BatchNorm with stored moments or, for a batch of one, with that image's own: that is how
    `instance_norm` is decomposed."""
    if "running_mean" in a:
        return batch_norm(c, a)
    x = a["input"]
    if not a["training"] or c.size(x, 0) != 1:
        return batch_norm(c, {"input": x, "training": True})
    a.get("momentum")
    axes = c.integers([0, *range(2, c.rank(x))])
    centred = c.add("Sub", [c.value(x), c.add("ReduceMean", [c.value(x), axes], keepdims=1)])
    variance = c.add("ReduceMean", [c.add("Mul", [centred, centred]), axes], keepdims=1)
    above = c.add("Add", [variance, c.constant(a["eps"], np.float32)])
    return [_scale_channels(c, c.add("Div", [centred, c.add("Sqrt", [above])]), a), "", ""]


def spread(root: bool = False, with_mean: bool = False) -> Handler:
    """Handler for the variance over some axes or its square root, and the mean as second output.

    The sum of squares is divided by the number of elements less `correction` (1 by default).
    """

    def make(c: Converter, a: Arguments) -> list[str]:
        x, is_keeping = a["self"], int(a.get("keepdim", False))
        less = a["unbiased"] if "unbiased" in a else a.get("correction")
        less = 1 if less is None else less
        axes = axes_of(c, x, a.get("dim"))
        count = math.prod(c.size(x, axis) for axis in axes)
        if not count > less:
            raise Refusal(f"a variance over {count} elements with a correction of {quote(less)}")
        name, over = c.value(x), c.integers(axes)
        centred = c.add("Sub", [name, c.add("ReduceMean", [name, over], keepdims=1)])
        squares = c.add("Mul", [centred, centred])
        y = c.add("ReduceMean", [squares, over], keepdims=is_keeping)
        y = times(c, y, count / (count - less))
        y = c.add("Sqrt", [y]) if root else y
        return [y, c.add("ReduceMean", [name, over], keepdims=is_keeping)] if with_mean else [y]

    return make


NORMS: dict[str, Handler] = {
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), batch_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), layer_norm),
    "group_norm": group_norm,
    "native_group_norm": native_group_norm,
    "instance_norm": instance_norm,
    "_native_batch_norm_legit": native_batch_norm,
    "var": spread(),
    "std": spread(root=True),
    "var_mean": spread(with_mean=True),
    "std_mean": spread(root=True, with_mean=True),
}
"""Name of an aten operator, without overload -> its handler."""
