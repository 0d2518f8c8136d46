"""Opens a graph file of either kind and finds out what images it takes and what it answers."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Net, UserError, Variables
from jaxbd.interop.onnx import interpret, pt2, read
from jaxbd.interop.onnx.graph import Graph, GraphLimits, Node, readers
from jaxbd.interop.onnx.parameters import ARITHMETIC
from jaxbd.limits import Deadline, Limits, Refusal, opened, quote, refusing, sha256

ZIP = b"PK\x03\x04"
COLOURS = (1, 3)
PASSING = ("Identity", "Cast")


class Opened(NamedTuple):
    """A graph file that was read.

    Attributes:
      graph: what it holds; path, sha256, bytes: of the file, and of its external data.
      image_shape: (H, W, C); classes: K.
      channels_first: whether the graph takes [B, C, H, W]; batch: how many images at a time.
      files: {name: SHA-256} of the file and of those with its external data.
      mean, std: the normalisation that the graph does itself, of pixels in [0, 1]; None where it
        begins with none.
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
) -> Opened:
    """Reads an ONNX file or an archive of torch.export.

    Args:
      image_shape: (H, W, C) where the file leaves it open.
    Raises: UserError naming the file and what in it is refused, or that its image size must be
      given.
    """
    with refusing(path):
        with opened(path, Limits(file_bytes=limits.file_bytes)) as (file, size):
            data = file.read()
        if data.startswith(ZIP):
            graph, others = pt2.read_pt2(data, limits), ()
        else:
            graph, others = read.read_with_files(data, limits, path.parent)
        files = {path.name: hashlib.sha256(data).hexdigest()}
        del data
        for other in others:
            with opened(other, Limits(file_bytes=limits.file_bytes)) as (file, more):
                # by its place, since two folders may each hold a file of one name
                name = other.relative_to(path.parent).as_posix()
                size, files[name] = size + more, sha256(file)
        # weights elsewhere are part of what the file is
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
    """Traces `graph`, without computing anything, for the shape of its images and of its answer."""
    first = _takes_channels_first(graph)
    shape = _image_shape(graph, first, image_shape)
    inside = normalisation_inside(graph, first)
    mean, std = inside or (None, None)
    failures = []
    # what is known without an image is computed now, at a cost that no size of a file bounds
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
    """Number of classes that the graph answers with for `batch` images at a time."""
    images = jax.ShapeDtypeStruct((2 * batch, *shape), jnp.float32)
    try:
        net, variables = interpret.to_net(
            graph, channels_first=first, batch=batch, check=deadline.check
        )
        return jax.eval_shape(lambda v, x: net.apply(v, x)[0], variables, images).shape[1]
    except UserError as error:
        raise Refusal(str(error)) from None
    except Exception as error:  # whatever JAX makes of a graph that a stranger wrote
        reason = quote(str(error).partition(chr(10))[0])
        raise Refusal(
            f"the graph cannot be traced for images {'x'.join(map(str, shape))}: {reason}"
        ) from None


def _takes_channels_first(graph: Graph) -> bool:
    """By the stated dimensions; where they do not tell, by whether the first operation turns the
    axes."""
    _, second, _, last = graph.image_shape
    if (second in COLOURS) != (last in COLOURS):
        return second in COLOURS
    turned = [node for node in graph.nodes if graph.image in node.inputs and node.op == "Transpose"]
    return not any(node.get("perm") == (0, 3, 1, 2) for node in turned)


def _image_shape(
    graph: Graph, first: bool, given: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """(H, W, C) as stated, as `given` where the file leaves it open."""
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
    """Channels that the first convolution reads."""
    for node in graph.nodes:
        kernel = graph.tensors.get(node.inputs[1]) if node.op == "Conv" and node.has(1) else None
        if kernel is not None and kernel.ndim > 1:
            return kernel.shape[1] * node.get("group", 1)
    return None


def _batches(graph: Graph) -> list[int]:
    """Numbers of images to compute at a time: as stated; else one, or what an export wrote into its
    shapes."""
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
    """(mean, std) of the arithmetic with constants that the graph begins with: x -> (x - mean) /
    std; None without."""
    after, made = readers(graph.nodes), {node.outputs[0]: node for node in graph.nodes}
    value, factor, shift, found = graph.image, np.ones(1), np.zeros(1), False
    axis = 1 if first else 3
    while len(nodes := after.get(value, [])) == 1:
        node = nodes[0]
        if node.op == "Transpose" and sorted(node.get("perm", ())) == [0, 1, 2, 3]:
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
    """A number, or one for each channel, [1] or [C]; None where `name` is something else."""
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
