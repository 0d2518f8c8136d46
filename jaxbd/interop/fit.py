"""Checks that arrays from a file fit a net by name, shape and type, before any of them is used."""

from collections.abc import Collection, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import UserError
from jaxbd.limits import Refusal, quote
from jaxbd.models import build


def check(tensors: dict[str, np.ndarray], spec: build.Spec) -> None:
    """Raises Refusal, listing the arrays that are missing, extra, or of another shape or type than
    in the net of `spec`."""
    layers = least_layers(spec.options)
    if len(tensors) < layers:  # before the net is traced, which takes seconds for a deep one
        raise Refusal(f"it holds {len(tensors)} arrays, too few for the {layers} layers of its net")
    expected = expected_shapes(spec)
    if any(name.startswith("bounds/") for name in tensors):
        expected |= bound_shapes(spec, expected, tensors)
    compare(tensors, expected, spec)


def least_layers(options: Mapping[str, Any]) -> int:
    """Lower bound on the number of layers with arrays in a net with these `options`."""
    blocks = options.get("blocks")
    total = sum(blocks) if isinstance(blocks, list | tuple) else 0
    counts = (options.get("stages"), options.get("depth"), total)
    return max(count for count in counts if type(count) is int)


def bound_shapes(
    spec: build.Spec, expected: dict[str, tuple[int, ...]], given: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the bounds of every layer that has any in `given`. A layer needs all of its
    bounds or none.

    A normalisation layer is clipped with one pair of bounds per channel. A layer without moments of
    its own is normalised first, so its bounds include a mean and std.
    """
    net, images = build.net(spec), jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    outputs = net.outputs
    if outputs is None:
        return {}  # no layers, so no bounds
    layers = jax.eval_shape(
        lambda key, images: outputs(net.init(key), images)[1], jax.random.key(0), images
    )
    shapes = {}
    for layer, output in layers.items():
        own = (
            ("lower", "upper")
            if f"batch_stats/{layer}/mean" in expected
            else ("mean", "std", "lower", "upper")
        )
        names = [f"bounds/{layer}/{part}" for part in own]
        if any(name in given for name in names):
            shapes |= dict.fromkeys(names, output.shape[-1:])
    return shapes


def nonfinite(name: str, tensor: np.ndarray) -> int:
    """Number of unusable values in the array `name`: NaN, or infinite outside a bound.

    An infinite `bounds/…/lower` or `upper` is valid: it does not clip. 0 for integers.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return 0
    is_bound = name.startswith("bounds/") and name.endswith(("/lower", "/upper"))
    return int(np.isnan(tensor).sum() if is_bound else tensor.size - np.isfinite(tensor).sum())


LARGEST = 1e15
"""No trained net holds larger numbers; products of such numbers overflow float32."""


def complaint(name: str, tensor: np.ndarray) -> str:
    """Why the array `name` cannot be used, or "" if it can. `name` may be a file's or one of ours.

    Values must be finite (except in open bounds) and at most `LARGEST` in magnitude; variances and
    standard deviations must not be negative.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating) or not tensor.size:
        return ""
    if bad := nonfinite(name, tensor):
        return f"holds {bad:,} values that are NaN or infinite"
    numbers = np.asarray(tensor, np.float64)
    most = np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0)
    if most > LARGEST:
        return f"holds values of {most:.3g}, above the limit of {LARGEST:g}"
    if name.endswith(("running_var", "/var", "/std")) and numbers.min() < 0:
        return f"holds a negative variance or standard deviation, {numbers.min():.3g}"
    return ""


def compare(
    tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]], spec: build.Spec
) -> None:
    """Raises Refusal unless `tensors` are exactly the `expected` arrays, as floats of those
    shapes."""
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{quote(name)} is not in the net" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name]:
            wrong.append(
                f"{name} has shape {tensors[name].shape} where the net has {expected[name]}"
            )
        elif not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            wrong.append(f"{name} holds {tensors[name].dtype}, not floats")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise Refusal(f"it does not fit {spec.arch}: {'; '.join(sorted(wrong)[:5])}{more}")


def expected_shapes(spec: build.Spec) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array of the net, by abstract tracing: nothing is computed."""
    try:
        abstract = jax.eval_shape(build.net(spec).init, jax.random.key(0))
    except UserError as error:
        raise Refusal(f"config.json: {error}") from None
    except Exception as error:  # untrusted options can make Flax raise anything
        raise Refusal(
            f"config.json does not describe a net: {quote(str(error).partition(chr(10))[0])}"
        ) from None
    flat: dict[str, Any] = dict(flax.traverse_util.flatten_dict(dict(abstract), sep="/"))
    return {path: leaf.shape for path, leaf in flat.items()}
