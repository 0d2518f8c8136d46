"""ONNX files and archives of torch.export in the fuzzing, where the package has readers of them.

What both jaxbd and onnxruntime or PyTorch accept must hold the same tensors, bit for bit. A graph
that the other refuses (an operator with one input too many) is no difference here: reading does
not compute it.
"""

import functools
import importlib
import io
import logging
import pathlib
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.reader import archives, mutate

SIDE = 8


def reader_of(module: str, function: str) -> Callable[[bytes], Any] | None:
    """A reader of the package, a pure function of bytes; None where the package, or what it needs,
    is not there."""
    try:
        return getattr(importlib.import_module(f"jaxbd.interop.onnx.{module}"), function)
    except ImportError:
        return None


# ONNX


@functools.cache
def _good_onnx() -> bytes:
    """Conv, BatchNormalization, Relu, GlobalAveragePool, Flatten, Gemm."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), "s": (4,), "b": (4,), "m": (4,), "v": (4,), "g": (4, 5), "c": (5,)}
    arrays = {name: rng.uniform(0.5, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["1"], pads=[1, 1, 1, 1], strides=[1, 1]),
        helper.make_node("BatchNormalization", ["1", "s", "b", "m", "v"], ["2"], epsilon=1e-5),
        helper.make_node("Relu", ["2"], ["3"]),
        helper.make_node("GlobalAveragePool", ["3"], ["4"]),
        helper.make_node("Flatten", ["4"], ["5"], axis=1),
        helper.make_node("Gemm", ["5", "g", "c"], ["y"]),
    ]
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", ["n", 3, SIDE, SIDE])],
        [value("y", ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def make_onnx(rng: random.Random) -> bytes:
    """The good graph, with edited bytes, or with one field of a node or tensor changed."""
    import onnx

    if rng.random() < 0.5:
        return mutate.edit(rng, _good_onnx(), 2)
    model = onnx.load_model_from_string(_good_onnx())
    node, tensor = rng.choice(model.graph.node), rng.choice(model.graph.initializer)
    kind = rng.choice(
        ("nothing", "input", "output", "op", "dims", "type", "data", "twice", "opset")
    )
    names = ["x", "y", "1", "w", "", *(each.name for each in model.graph.initializer)]
    if kind == "input":
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == "output":
        node.output[0] = rng.choice(names)
    elif kind == "op":
        node.op_type = rng.choice(("Relu", "Sigmoid", "Add", "If", "Loop", "X", "Gemm"))
    elif kind == "dims":
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, 2, 4, 5, -1, 2**40))
    elif kind == "type":
        tensor.data_type = rng.randrange(24)
    elif kind == "data":
        tensor.raw_data = tensor.raw_data[: rng.randrange(64)] + rng.randbytes(rng.randrange(8))
    elif kind == "twice":
        model.graph.initializer.append(tensor)
    elif kind == "opset":
        model.opset_import[0].version = rng.choice((0, 1, 8, 9, 13, 21, 99, -1))
    return model.SerializeToString()


def onnx_difference(graph: Any, data: bytes, path: pathlib.Path) -> str:
    """Where the onnx package finds other tensors than were read, if onnxruntime takes the graph."""
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:
        return ""
    stored = onnx.load_model_from_string(data).graph.initializer
    return _unequal({each.name: numpy_helper.to_array(each) for each in stored}, graph.tensors)


# torch.export


@functools.cache
def _good_pt2() -> dict[str, bytes]:
    """The members of an archive of a small net, without those that are no part of it."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(4, 5)).eval()
    out = io.BytesIO()
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, SIDE, SIDE),)), out)
    with zipfile.ZipFile(out) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def make_pt2(rng: random.Random) -> bytes:
    """The good archive, with another layout, an edited member, or edited bytes."""
    held = _good_pt2()
    members = [archives.Member(name.encode(), data) for name, data in held.items()]
    kind = rng.choice(("layout", "member", "member", "bytes", "nothing"))
    if kind == "layout":
        return archives.changed(rng, members)
    if kind == "member":
        at = rng.randrange(len(members))
        edited = mutate.edit(rng, members[at].data, 2) if members[at].data else b"x"
        members[at] = members[at]._replace(data=edited)
    data = archives.zip_file(members)
    return mutate.edit(rng, data, 2) if kind == "bytes" else data


def pt2_difference(graph: Any, data: bytes, path: pathlib.Path) -> str:
    """Where PyTorch finds other weights than were read, if it takes the archive."""
    import torch

    logging.getLogger("torch.export").setLevel(logging.CRITICAL)
    try:
        theirs = torch.export.load(io.BytesIO(data)).state_dict
    except Exception:
        return ""
    return _unequal({name: value.detach().numpy() for name, value in theirs.items()}, graph.tensors)


def _unequal(theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> str:
    """The first tensor that both have and that differs; those that nobody uses may be left out."""
    for name in sorted(theirs.keys() & ours.keys()):
        one, other = theirs[name], np.asarray(ours[name])
        if one.shape != other.shape or one.tobytes() != other.tobytes():
            return f"{name!r} is {one.dtype} {one.shape} elsewhere, or holds other values"
    return "" if theirs.keys() & ours.keys() else "no tensor is found under its name"
