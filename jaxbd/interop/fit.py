"""Whether arrays from a file are those of a net: their names, shapes and kinds, compared before any is used."""

from collections.abc import Collection

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import UserError
from jaxbd.interop.files import Refusal, quote
from jaxbd.models import build


def check(tensors: dict[str, np.ndarray], spec: build.Spec) -> None:
    """Raises Refusal listing by name what is missing, extra, or of another shape or kind than the net of `spec` has."""
    expected = expected_shapes(spec)
    if any(name.startswith("bounds/") for name in tensors):
        expected |= bound_shapes(spec, expected, tensors)
    compare(tensors, expected, spec)


def bound_shapes(
    spec: build.Spec, expected: dict[str, tuple[int, ...]], given: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the bounds of every layer that has some in `given`; a layer's bounds come whole or not at all.

    A normalisation layer is clipped, one pair of bounds per channel; a layer with no moments of its own is normalised
    first.
    """
    net, images = build.net(spec), jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    layers = jax.eval_shape(lambda key, images: net.outputs(net.init(key), images)[1], jax.random.key(0), images)
    shapes = {}
    for layer, output in layers.items():
        own = ("lower", "upper") if f"batch_stats/{layer}/mean" in expected else ("mean", "std", "lower", "upper")
        names = [f"bounds/{layer}/{part}" for part in own]
        if any(name in given for name in names):
            shapes |= dict.fromkeys(names, output.shape[-1:])
    return shapes


def nonfinite(name: str, tensor: np.ndarray) -> int:
    """How many values of the array `name` are none to compute with: NaN, or infinite except in a bound that is open.

    A `bounds/…/lower` or `upper` of infinity does not clip. 0 for integers.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return 0
    is_bound = name.startswith("bounds/") and name.endswith(("/lower", "/upper"))
    return int(np.isnan(tensor).sum() if is_bound else tensor.size - np.isfinite(tensor).sum())


def compare(tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]], spec: build.Spec) -> None:
    """Raises Refusal unless `tensors` are floats of the `expected` shapes, no more and no fewer."""
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{quote(name)} is not in the net" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name]:
            wrong.append(f"{name} has shape {tensors[name].shape} where the net has {expected[name]}")
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
        raise Refusal(f"config.json does not describe a net: {quote(str(error).partition(chr(10))[0])}") from None
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(dict(abstract), sep="/").items()}
