"""Interprets a graph as a `Net`: pure, jittable and differentiable, for any number of images, with
named parameters.

The graph is computed for batches of the size it was exported for (one image if that is open) and
vmapped over the images. A batch size that the exporter wrote into the shapes therefore does no
harm, and vmap still gives ordinary batched convolutions and matrix products. Values that depend on
neither image nor weights stay NumPy arrays, so shapes are static.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, ArrayTree, Key, Net, UserError, Variables
from jaxbd.interop.onnx import freeze, ops, pixels
from jaxbd.interop.onnx.graph import MISFITS, Graph, Node
from jaxbd.interop.onnx.outputs import check_answer
from jaxbd.interop.onnx.parameters import Layout, lay_out, look_up, variables_of
from jaxbd.interop.onnx.stated import check_all
from jaxbd.interop.onnx.tidying import BATCH_NORM, tidy
from jaxbd.interop.onnx.values import Budget, Value, check_size
from jaxbd.limits import Refusal, quote
from jaxbd.models.norm import normalise

IMAGES = "jaxbd_images"
"""Name of the vmapped axis, over which a batch's moments are averaged."""


class Program(NamedTuple):
    """Everything needed to compute a graph.

    Attributes:
      graph, layout: the tidied graph and its layout.
      batch: number of images that the graph takes at a time.
      channels_first: whether it takes them as [B, C, H, W].
      check: called before each operator.
    """

    graph: Graph
    layout: Layout
    batch: int
    channels_first: bool
    check: Callable[[], None]


def to_net(
    graph: Graph,
    *,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    channels_first: bool = True,
    batch: int = 1,
    check: Callable[[], None] = lambda: None,
) -> tuple[Net, Variables]:
    """The net of `graph`, preceded by (images - mean) / std, and its variables.

    Args:
      channels_first: whether the graph takes images as [B, C, H, W].
      batch: number of images that it takes at a time.
      check: called before each operator is traced; raises Refusal when the time is up.
    Raises: Refusal if the graph computes with integer pixels, or rounds all that the logits are
      computed from.
    """
    graph = tidy(graph)
    layout = lay_out(graph)
    layout = layout._replace(nodes=pixels.as_floats(graph, layout.nodes))
    pixels.check_gradient(graph, layout.nodes)
    program = Program(graph, layout, batch, channels_first, check)
    own = variables_of(graph, layout)

    def forward(
        variables: Variables, images: Array, train: bool, has_layers: bool
    ) -> tuple[Array, Any, dict[str, Array]]:
        try:
            return _forward(program, variables, normalise(images, mean, std), train, has_layers)
        except Refusal as refusal:
            raise UserError(f"the graph cannot be computed: {refusal}") from None

    def apply(
        variables: Variables, images: Array, *, train: bool = False
    ) -> tuple[Array, ArrayTree]:
        logits, moments, _ = forward(variables, images, train, False)
        return logits, {**variables.get("batch_stats", {}), **moments}

    def outputs(variables: Variables, images: Array) -> tuple[Array, dict[str, Array]]:
        logits, _, layers = forward(variables, images, False, True)
        return logits, layers

    return Net(lambda key: _fresh(key, own), apply, outputs, freeze.freezing(layout)), own


def _fresh(key: Key, own: Variables) -> Variables:
    """New initial variables: kernels drawn at random (He et al. 2015, eq. 10), biases and moments
    reset. Parameters with another role keep the values that were read."""
    flat = jax.tree_util.tree_flatten_with_path(own)
    rest = {"bias": 0.0, "mean": 0.0, "scale": 1.0, "var": 1.0}
    leaves = []
    for number, (path, leaf) in enumerate(flat[0]):
        # (collection, layer, leaf); a parameter without a role has only two steps
        role = path[-1].key if len(path) == 3 else ""
        if role == "kernel":
            fan_in = max(int(np.prod(leaf.shape[:-1])), 1)
            drawn = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
            leaves.append(drawn * (2 / fan_in) ** 0.5)
        else:
            leaves.append(jnp.full_like(leaf, rest[role]) if role in rest else leaf)
    return jax.tree_util.tree_unflatten(flat[1], leaves)


def _forward(
    program: Program, variables: Variables, images: Array, train: bool, has_layers: bool
) -> tuple[Array, dict[str, Any], dict[str, Array]]:
    """(logits [B, K], new moments by layer, outputs by layer [B, …, C]).

    Moments are empty unless `train`, outputs unless `has_layers`.
    """
    batch = program.batch
    count = images.shape[0]
    if batch > 1 and count % batch:  # pad with the last image to whole groups
        images = jnp.concatenate([images, jnp.repeat(images[-1:], -count % batch, 0)])
    groups = images.reshape(-1, batch, *images.shape[1:])
    one = lambda group: _compute(program, variables, group, train, has_layers)
    logits, moments, layers = jax.vmap(one, out_axes=(0, None, 0), axis_name=IMAGES)(groups)
    flat = lambda x: x.reshape(-1, *x.shape[2:])[:count]
    logits = flat(logits)
    # vmap returns dictionaries sorted by name: restore the order of the layers
    ordered = [layer.name for layer in program.layout.layers if layer.name in layers]
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return wide, moments, {name: flat(layers[name]) for name in ordered}


def _compute(
    program: Program, variables: Variables, images: Array, train: bool, has_layers: bool
) -> tuple[Array, dict[str, Any], dict[str, Array]]:
    """`_forward` for one group [b, H, W, C]; moments are taken over all groups."""
    graph, layout = program.graph, program.layout
    at_value = {layer.value: layer for layer in layout.layers}
    x = images.transpose(0, 3, 1, 2) if program.channels_first else images
    known: dict[str, Value] = {
        # a graph for integer images expects pixels of 0..255
        graph.image: x * 255 if graph.image_type.kind in "iu" else x,
        **_tensors(program, variables),
    }
    moments, outputs, budget = {}, {}, Budget(program.batch)
    for node in layout.nodes:
        program.check()
        missing = [name for name in node.inputs if name and name not in known]
        if missing:  # its node has it as a further output, which the operator here does not return
            raise Refusal(f"value {quote(missing[0])} is an output that is not supported")
        inputs = [known[name] if name else None for name in node.inputs]
        if node.op == BATCH_NORM and node.outputs[0] in layout.norms:
            name = layout.norms[node.outputs[0]]
            results = [_batch_norm(node, inputs, name, variables, moments if train else None)]
        else:
            results = compute(node, inputs)
        check_all(node.outputs, results, graph.stated)
        for value, result in zip(node.outputs, results, strict=False):
            budget.spend(result)
            layer = at_value.get(value)
            if layer is not None:
                result = _apply_bounds(
                    result, variables.get("bounds", {}).get(layer.name), layer.axis
                )
                outputs[layer.name] = jnp.moveaxis(result, layer.axis, -1)
            known[value] = result
    check_answer(graph, np.shape(known[graph.logits]))
    return _as_logits(known[graph.logits], program.batch), moments, outputs if has_layers else {}


def _tensors(program: Program, variables: Variables) -> dict[str, Value]:
    """The value of every stored tensor: weights come from the variables, constants from the
    file."""
    found = {}
    for name, array in program.graph.tensors.items():
        slot = program.layout.slots.get(name)
        if slot is None:
            half = array.dtype.itemsize == 2 and jnp.issubdtype(array.dtype, jnp.floating)
            found[name] = array.astype(np.float32) if half else array
        elif (value := look_up(variables, slot.path)) is not None:
            found[name] = slot.to_tensor(jnp.asarray(value))
        else:
            found[name] = None  # folded into a convolution by `freeze`
    return found


def compute(node: Node, inputs: list[Value]) -> tuple[Value, ...]:
    """Computes the outputs of `node`. Raises Refusal naming it if it does not fit its inputs."""
    place = f"operator {node.op} of node {quote(node.name or ''.join(node.outputs[:1]))}"
    try:
        with np.errstate(all="ignore"):
            result = ops.TABLE[node.op](node, *inputs)
    except Refusal as refusal:
        raise Refusal(f"{place}: {refusal}") from None
    except MISFITS as error:
        reason = quote(str(error).partition("\n")[0])
        raise Refusal(f"{place} (opset {node.opset}) does not fit its inputs: {reason}") from None
    results = result if isinstance(result, tuple) else (result,)
    for value in results:
        check_size(np.shape(value))
    return results


def _batch_norm(
    node: Node, inputs: list[Value], name: str, variables: Variables, moments: dict[str, Any] | None
) -> Array:
    """Computes a BatchNormalization.

    In training, `moments` is a dictionary: the batch's moments are used, and the updated running
    moments are stored in it. As in PyTorch, the batch is normalised with the biased variance, and
    the unbiased one is stored.
    """
    x = jnp.asarray(inputs[0])
    shift = look_up(variables, ("folded", name, "shift"))
    if shift is not None:
        if moments is not None:
            raise UserError(
                "BatchNorm folded into a convolution cannot be trained; use the variables as they "
                "were"
            )
        return x + shift.astype(x.dtype).reshape((1, -1) + (1,) * (x.ndim - 2))
    if moments is None:
        return compute(node, [x, *inputs[1:]])[0]
    axes = (0, *range(2, x.ndim))
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jax.lax.pmean(x32.mean(axes), IMAGES)
    centred = x32 - mean.reshape((1, -1) + (1,) * (x.ndim - 2))
    variance = jax.lax.pmean(jnp.square(centred).mean(axes), IMAGES)
    count = x.size // x.shape[1] * jax.lax.psum(1, IMAGES)
    keep, unbiased = node.get("momentum", 0.9), variance * (count / max(count - 1, 1))
    moments[name] = {
        "mean": keep * inputs[3] + (1 - keep) * mean,
        "var": keep * inputs[4] + (1 - keep) * unbiased,
    }
    return compute(node, [x, inputs[1], inputs[2], mean, variance])[0]


def _apply_bounds(x: Array, bounds: Mapping[str, Array] | None, axis: int) -> Array:
    """Corrects an activation: max(min((x - mean) / std, upper), lower), with those steps that
    `bounds` has arrays for (Li et al. 2023, section 4.2)."""
    if not bounds:
        return x
    fit = lambda v: jnp.asarray(v, x.dtype).reshape(
        [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    )
    if "mean" in bounds:
        x = (x - fit(bounds["mean"])) / fit(bounds["std"])
    return jnp.clip(x, fit(bounds["lower"]), fit(bounds["upper"])) if "upper" in bounds else x


def _as_logits(x: Value, batch: int) -> Array:
    """Reshapes an output to logits [b, K]; it may be one number per image, or have further axes of
    size 1."""
    x = jnp.asarray(x)
    if x.ndim == 1 and x.shape[0] == batch:
        return x[:, None]
    if x.ndim < 2 or x.shape[0] != batch or x.size != x.shape[0] * max(x.shape[1:]):
        raise Refusal(
            f"its output has the shape {quote(x.shape)} for {batch} images; logits have two axes"
        )
    return x.reshape(batch, -1)
