"""Opens a graph file of either kind and determines the images it takes and its classes."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Net, UserError, Variables
from jaxbd.interop.onnx import interpret, outputs, pt2, read
from jaxbd.interop.onnx.graph import Graph, GraphLimits, Node, readers
from jaxbd.interop.onnx.parameters import ARITHMETIC
from jaxbd.limits import Deadline, Limits, Refusal, opened, quote, refusing, sha256

ZIP = b"PK\x03\x04"
COLOURS = (1, 3)
PASSING = ("Identity", "Cast")


class Opened(NamedTuple):
    """An opened graph file.

    Attributes:
      graph: the graph.
      path: path of the file.
      sha256, bytes: hash and size of the file, including its external data.
      image_shape: (H, W, C).
      classes: number of classes K.
      channels_first: whether the graph takes [B, C, H, W].
      batch: number of images it takes at a time.
      mean, std: the normalisation of pixels in [0, 1] that the graph begins with; None if it has
        none.
      files: {name: SHA-256} of the file and its external data files.
    """

    graph: Graph
    path: str
    sha256: str
    bytes: int
    image_shape: tuple[int, int, int]
    classes: int
    channels_first: bool
    batch: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    files: Mapping[str, str] = {}


def open_graph(
    path: pathlib.Path,
    limits: GraphLimits = GraphLimits(),
    image_shape: tuple[int, int, int] | None = None,
    output: str | None = None,
) -> Opened:
    """Reads an ONNX file or a torch.export archive.

    Args:
      image_shape: (H, W, C), if the file leaves it open.
      output: name of an ONNX file's output with the logits, if there are several.
    Raises: UserError naming the file and why it is refused, or saying that the image size must be
      given.
    """
    with refusing(path):
        with opened(path, Limits(file_bytes=limits.file_bytes)) as (file, size):
            data = file.read()
        if data.startswith(ZIP) and output is not None:
            raise Refusal("a .pt2 does not name its outputs; leave --key out")
        if data.startswith(ZIP):
            graph, others = pt2.read_pt2(data, limits), ()
        else:
            graph, others = read.read_with_files(data, limits, path.parent, output)
        files = {path.name: hashlib.sha256(data).hexdigest()}
        del data  # may be gigabytes, and the graph has copies of what it needs
        for other in others:
            with opened(other, Limits(file_bytes=limits.file_bytes)) as (file, more):
                # by relative path: files in different folders may have the same name
                name = other.relative_to(path.parent).as_posix()
                size, files[name] = size + more, sha256(file)
        # with external data, the hash must cover all files
        digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()
        digest = digest if others else files[path.name]
        found = examine(graph, path, digest, size, image_shape, limits)
        return found._replace(files=files)


def examine(
    graph: Graph,
    path: pathlib.Path,
    digest: str,
    size: int,
    image_shape: tuple[int, int, int] | None = None,
    limits: GraphLimits = GraphLimits(),
) -> Opened:
    """Determines the shape of a graph's images and its number of classes, by tracing it."""
    outputs.check_logits(graph)
    first = _takes_channels_first(graph)
    shape = _image_shape(graph, first, image_shape)
    inside = normalisation_inside(graph, first)
    mean, std = inside or (None, None)
    failures = []
    # tracing computes all constants; the file's size does not bound the cost of that
    deadline = Deadline(limits.tracing_seconds, "computing its constants")
    for batch in _batches(graph):
        try:
            classes = _classes(graph, shape, first, batch, deadline)
        except Refusal as refusal:
            failures.append(refusal)
            continue
        return Opened(graph, str(path), digest, size, shape, classes, first, batch, mean, std)
    raise failures[0]


def to_net(
    found: Opened, *, mean: tuple[float, ...] = (0.0,), std: tuple[float, ...] = (1.0,)
) -> tuple[Net, Variables]:
    """The net of an opened graph, on images [B, H, W, C] in [0, 1], and its variables; see
    `interpret.to_net`."""
    return interpret.to_net(
        found.graph, mean=mean, std=std, channels_first=found.channels_first, batch=found.batch
    )


def _classes(
    graph: Graph, shape: tuple[int, int, int], first: bool, batch: int, deadline: Deadline
) -> int:
    """Number of classes of the graph when it takes `batch` images at a time."""
    images = jax.ShapeDtypeStruct((2 * batch, *shape), jnp.float32)
    try:
        net, variables = interpret.to_net(
            graph, channels_first=first, batch=batch, check=deadline.check
        )
        return jax.eval_shape(lambda v, x: net.apply(v, x)[0], variables, images).shape[1]
    except Refusal:
        raise
    except UserError as error:
        raise Refusal(str(error)) from None
    except Exception as error:  # untrusted graphs can make JAX raise anything
        reason = quote(str(error).partition(chr(10))[0])
        raise Refusal(
            f"the graph cannot be traced for images {'x'.join(map(str, shape))}: {reason}"
        ) from None


def _takes_channels_first(graph: Graph) -> bool:
    """Whether the graph takes [B, C, H, W]: from the stated dimensions or, if those are ambiguous,
    from whether it first transposes the image to channels first."""
    _, second, _, last = graph.image_shape
    if (second in COLOURS) != (last in COLOURS):
        return second in COLOURS
    turns = [node for node in graph.nodes if graph.image in node.inputs and node.op == "Transpose"]
    return not any(node.get("perm") == (0, 3, 1, 2) for node in turns)


def _image_shape(
    graph: Graph, first: bool, given: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """(H, W, C) as stated in the file or, where the file leaves it open, as `given`."""
    _, *dims = graph.image_shape
    height, width, channels = (dims[1], dims[2], dims[0]) if first else dims
    channels = _first_channels(graph) if channels is None else channels
    stated = (height, width, channels)
    if given is None:
        if height is None or width is None or channels is None:
            raise Refusal(
                "the file leaves the size of the images open; give --image-shape HEIGHT WIDTH "
                "CHANNELS"
            )
        given = (height, width, channels)
    if any(own not in (None, wanted) for own, wanted in zip(stated, given, strict=True)):
        raise Refusal(f"the file says images of {quote(stated)}, not {given}")
    if any(not 0 < size <= 4096 for size in given):
        raise Refusal(f"it takes images of {quote(given)}")
    return given


def _first_channels(graph: Graph) -> int | None:
    """Number of input channels of the first convolution."""
    for node in graph.nodes:
        kernel = graph.tensors.get(node.inputs[1]) if node.op == "Conv" and node.has(1) else None
        if kernel is not None and kernel.ndim > 1:
            return kernel.shape[1] * node.get("group", 1)
    return None


def _batches(graph: Graph) -> list[int]:
    """Batch sizes to try: the stated one; if open, 1 and then the sizes that an exporter may have
    written into the shapes of Reshape and Expand."""
    stated = graph.image_shape[0]
    if stated is not None:
        if stated > 1024:
            raise Refusal(f"it takes {stated:,} images at a time")
        return [stated]
    literal = []
    for node in graph.nodes:
        shape = (
            graph.tensors.get(node.inputs[1])
            if node.op in ("Reshape", "Expand") and node.has(1)
            else None
        )
        if shape is not None and shape.ndim == 1 and shape.size and 1 < shape[0] <= 64:
            literal.append(int(shape[0]))
    return [1, *sorted(set(literal))[:4]]


def normalisation_inside(
    graph: Graph, first: bool
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) of the arithmetic with constants that the graph begins with, written as
    x -> (x - mean) / std; None if there is none."""
    after, made = readers(graph.nodes), {node.outputs[0]: node for node in graph.nodes}
    value, factor, shift, found = graph.image, np.ones(1), np.zeros(1), False
    axis = 1 if first else 3
    # follow the image while each step is affine, and accumulate x -> factor * x + shift
    while len(nodes := after.get(value, [])) == 1:
        node = nodes[0]
        if node.op == "Transpose" and sorted(node.get("perm", ())) == [0, 1, 2, 3]:
            # where the channels are after the transpose
            axis = node.get("perm").index(axis)
        elif node.op in ARITHMETIC:
            side = [name for name in node.inputs if name != value]
            number = _constant(graph, made, side[0], axis) if side else None
            if number is None or (node.op in ("Sub", "Div") and node.inputs[0] != value):
                break
            scale = {"Mul": number, "Div": 1 / np.where(number, number, np.nan)}.get(node.op, 1.0)
            factor, shift = (
                factor * scale,
                shift * scale + {"Add": number, "Sub": -number}.get(node.op, 0.0),
            )
            found = True
        elif node.op not in PASSING:
            break
        value = node.outputs[0]
    if not found or not np.isfinite(factor).all() or (factor == 0).any():
        return None
    mean, std = np.broadcast_arrays(-shift / factor, 1 / factor)
    if graph.image_type.kind in "iu":
        mean, std = mean / 255, std / 255
    return tuple(float(x) for x in mean), tuple(float(x) for x in std)


def _constant(graph: Graph, made: dict[str, Node], name: str, axis: int) -> np.ndarray | None:
    """The constant `name` as [1] or, with one number per channel, [C]; None if it is anything
    else."""
    array = graph.tensors.get(name)
    if array is None and name in made and made[name].op == "Constant":
        array = made[name].get("value", made[name].get("value_float"))
    if array is None or np.asarray(array).dtype.kind != "f" or np.size(array) > 4:
        return None
    array = np.asarray(array, np.float64)
    shape = (1,) * (4 - array.ndim) + array.shape
    if any(size != 1 for i, size in enumerate(shape) if i != axis):
        return None
    return array.reshape(-1)
