"""Whether arrays from a file are those of a net: their names, shapes and kinds, compared before any
is used."""

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
    """Raises Refusal listing by name what is missing, extra, or of another shape or kind than the
    net of `spec` has."""
    layers = least_layers(spec.options)
    if len(tensors) < layers:  # before the net is traced, which takes seconds for a deep one
        raise Refusal(f"it holds {len(tensors)} arrays, too few for the {layers} layers of its net")
    expected = expected_shapes(spec)
    if any(name.startswith("bounds/") for name in tensors):
        expected |= bound_shapes(spec, expected, tensors)
    compare(tensors, expected, spec)


def least_layers(options: Mapping[str, Any]) -> int:
    """How many layers with arrays of their own a net of these `options` has at least."""
    blocks = options.get("blocks")
    total = sum(blocks) if isinstance(blocks, list | tuple) else 0
    counts = (options.get("stages"), options.get("depth"), total)
    return max(count for count in counts if type(count) is int)


def bound_shapes(
    spec: build.Spec, expected: dict[str, tuple[int, ...]], given: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the bounds of every layer that has some in `given`; a layer's bounds come
    whole or not at all.

    A normalisation layer is clipped, one pair of bounds per channel; a layer with no moments of its
    own is normalised first.
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
    """How many values of the array `name` are none to compute with: NaN, or infinite except in a
    bound that is open.

    A `bounds/…/lower` or `upper` of infinity does not clip. 0 for integers.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return 0
    is_bound = name.startswith("bounds/") and name.endswith(("/lower", "/upper"))
    return int(np.isnan(tensor).sum() if is_bound else tensor.size - np.isfinite(tensor).sum())


LARGEST = 1e15
"""No trained net holds larger numbers; products of such ones are infinite in float32."""


def complaint(name: str, tensor: np.ndarray) -> str:
    """Why the array `name` is none to compute with, in a file's names or in ours; "" where it is
    one.

    Values must be finite (but for bounds that are open), at most `LARGEST`, and no variance or
    spread negative.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating) or not tensor.size:
        return ""
    if bad := nonfinite(name, tensor):
        return f"holds {bad:,} values that are NaN or infinite"
    numbers = np.asarray(tensor, np.float64)
    most = np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0)
    if most > LARGEST:
        return f"holds values of {most:.3g}, more than the {LARGEST:g} that nets hold"
    if name.endswith(("running_var", "/var", "/std")) and numbers.min() < 0:
        return f"holds a negative variance or spread, {numbers.min():.3g}"
    return ""


def compare(
    tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]], spec: build.Spec
) -> None:
    """Raises Refusal unless `tensors` are floats of the `expected` shapes, no more and no fewer."""
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
    """Path -> shape of every array of the net, traced without computing anything."""
    try:
        abstract = jax.eval_shape(build.net(spec).init, jax.random.key(0))
    except UserError as error:
        raise Refusal(f"config.json: {error}") from None
    except Exception as error:  # whatever Flax makes of options that a stranger wrote
        raise Refusal(
            f"config.json does not describe a net: {quote(str(error).partition(chr(10))[0])}"
        ) from None
    flat: dict[str, Any] = dict(flax.traverse_util.flatten_dict(dict(abstract), sep="/"))
    return {path: leaf.shape for path, leaf in flat.items()}
