"""ONNX files and torch.export archives as models: the part of `interop.onnx` that `interop.load`
uses."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Net, UserError, Variables
from jaxbd.caching import cached
from jaxbd.interop import foreign, safetensors_file, torch_zip
from jaxbd.interop.container import Container
from jaxbd.interop.onnx import open as graphs
from jaxbd.interop.onnx import outputs, pt2
from jaxbd.interop.onnx.open import Opened
from jaxbd.limits import Limits, Refusal
from jaxbd.models import build

SUFFIXES = (".onnx", ".pt2")
Write = Callable[[pathlib.Path], None]
LARGE = 16
"""A graph that begins with (pixels - mean) / std takes pixels of 0..255 if a constant is larger: a
std of 58 to 255, or a mean of about 120. For pixels in [0, 1] a std above 1 is a mere scale, like
that of a quantiser, and hardly ever above 10."""


def is_graph(path: pathlib.Path) -> bool:
    """Whether `path` is an ONNX file or a torch.export archive, by suffix or content.

    The suffix alone is enough, so that a damaged graph gets an error message about graphs.
    """
    if not path.is_file():
        return False
    if path.suffix in SUFFIXES:
        return True
    with path.open("rb") as file:
        head = file.read(512)
        size = os.fstat(file.fileno()).st_size
        if head.startswith(torch_zip.MAGIC):
            try:
                return pt2.is_pt2(torch_zip.directory(file, size, Limits()))
            except Refusal:
                return False
    return foreign.is_onnx(head) and not safetensors_file.looks_like(head, size)


def open_graph(
    path: pathlib.Path, image_shape: tuple[int, int, int] | None = None, output: str | None = None
) -> Opened:
    """See `interop.onnx.open.open_graph`."""
    return graphs.open_graph(path, image_shape=image_shape, output=output)


def remark(graph: Opened) -> str:
    """See `interop.onnx.outputs.remark`."""
    return outputs.remark(graph.graph)


def spec_of(graph: Opened) -> build.Spec:
    """A spec with the kind of file as its `arch`; it describes inputs and outputs, not how the net
    is built.

    A graph with one output becomes a net with two classes, see `one_output`. A graph that begins by
    rescaling pixels of 0..255 is given pixels in that range.
    """
    # std 1/255 scales [0, 1] up to 0..255
    largest = 0.0 if graph.std is None else max(map(abs, (*graph.std, *(graph.mean or ()))))
    std = (1 / 255,) if largest > LARGE else (1.0,)
    shape, classes = graph.image_shape, max(graph.classes, 2)
    return build.Spec(arch=graph.graph.kind, classes=classes, image_shape=shape, std=std)


def container_of(graph: Opened, spec: build.Spec) -> Container:
    """The file's weights as a container; `config` has the normalisation if the graph begins with
    one."""
    kind: Any = graph.graph.kind
    config = {} if graph.mean is None else {"mean": spec.mean, "std": spec.std}
    return Container(
        tensors(graph),
        kind,
        (),
        "",
        {},
        (),
        graph.sha256,
        graph.path,
        graph.bytes,
        config=config,
    )


class _Known(NamedTuple):
    """An opened graph, hashed and compared by its file's SHA-256, image shape and output, so that
    each file's net is built only once."""

    graph: Opened

    def __hash__(self) -> int:
        return hash(self.graph.sha256)

    def __eq__(self, other: object) -> bool:
        key = lambda graph: (graph.sha256, graph.image_shape, graph.graph.chosen)
        return isinstance(other, _Known) and key(self.graph) == key(other.graph)


def to_net(graph: Opened, spec: build.Spec) -> tuple[Net, Variables]:
    """The net with the normalisation of `spec`, and its arrays. The same file gives the same
    function objects.

    Raises: UserError if the spec asks for a type other than float32.
    """
    if spec.dtype != "float32":
        raise UserError(f"a graph computes in float32, not {spec.dtype}; leave --compute-dtype out")
    return _make(_Known(graph), tuple(spec.mean), tuple(spec.std))


@cached(64)
def _make(known: _Known, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Net, Variables]:
    net, variables = graphs.to_net(known.graph, mean=mean, std=std)
    return (_widen(net) if known.graph.classes == 1 else net), variables


def _widen(net: Net) -> Net:
    """Turns a net with one output into one with two: a constant logit 0 goes before it."""
    widen = lambda logits: jnp.concatenate([jnp.zeros_like(logits), logits], -1)

    def apply(variables: Variables, images: Array, *, train: bool = False):
        logits, moments = net.apply(variables, images, train=train)
        return widen(logits), moments

    def outputs(variables: Variables, images: Array):
        assert net.outputs is not None
        logits, layers = net.outputs(variables, images)
        return widen(logits), layers

    return net._replace(apply=apply, outputs=outputs)


def tensors(graph: Opened, variables: Variables | None = None) -> dict[str, np.ndarray]:
    """Weights and moments with the file's names and types. The values are the file's own, or those
    in `variables` if given."""
    from jaxbd.interop.onnx import write

    tidied, layout = write.prepare(graph)
    names = [name for name in tidied.tensors if name in layout.slots]
    if variables is None:
        return {name: tidied.tensors[name] for name in names}
    return {name: write.updated(tidied.tensors[name], layout, name, variables) for name in names}


def writer(graph: Opened, variables: Variables, targets: Sequence[int]) -> Write:
    """A function that writes the graph with `variables` to a path; with `targets`, it writes the
    guarded net."""
    from jaxbd.interop.onnx import write, write_guarded

    if not targets:
        return lambda path: write.write(path, graph, variables)
    suspect, corrected = _divide(variables, len(targets))
    return lambda path: write_guarded.write_guarded(path, graph, suspect, corrected, targets)


def writer_of_net(
    spec: build.Spec, names: Mapping[str, str], variables: Variables, targets: Sequence[int]
) -> Write:
    """A function that writes the net of `spec` as a graph; with `targets`, it writes the guarded
    net.

    Args:
      names: path of an array -> name of its tensor in the file.
    """
    from jaxbd.interop.onnx import trace, write, write_guarded

    net = build.net(spec)
    trace_one = lambda arrays: trace.to_graph(net, arrays, spec.image_shape, names)
    if not targets:
        graph = trace_one(variables)
        whole = write.as_model(graph, write.parts_of(graph), spec.classes)
        return lambda path: write.save(path, whole)
    suspect, corrected = _divide(variables, len(targets))
    graph = trace_one(suspect)
    parts = [write.parts_of(trace_one(each)) for each in corrected]
    return lambda path: write_guarded.save_guarded(
        path, graph, write.parts_of(graph), parts, targets, spec.classes
    )


def _divide(variables: Variables, count: int) -> tuple[Variables, list[Variables]]:
    """Splits a guarded net's variables into those of the suspect and of the corrected net for each
    target."""
    suspect = variables["suspect"]
    part = lambda index: jax.tree.map(lambda leaf: leaf[index], dict(variables["corrected"]))
    return suspect, [{**suspect, **part(index)} for index in range(count)]


def note(spec: build.Spec, graph: Opened | None, *, guarded: bool) -> str:
    """A note for the user: what images the written file takes, and what it outputs."""
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (spec.mean, spec.std))
    plain = (set(spec.mean), set(spec.std)) == ({0.0}, {1.0})
    if plain:
        takes = "it takes pixels in [0, 1]"
    elif graph is None:
        takes = f"it takes pixels in [0, 1] and normalises them itself (mean {mean}; std {std})"
    else:
        takes = f"as before, pixels are normalised outside it: mean {mean}; std {std}"
    more = "; its second output is the suspect's own answer" if guarded else ""
    return f"{takes}{more}"
