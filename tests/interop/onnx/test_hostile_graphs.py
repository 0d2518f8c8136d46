"""Graph files that are damaged, hostile, or of a kind that is not read: refused in one line,
cheaply, and nothing in them run."""

import random
import tracemalloc

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from jaxbd.base import UserError  # noqa: E402
from jaxbd.interop.onnx import open as graphs  # noqa: E402
from jaxbd.interop.onnx.graph import GraphLimits  # noqa: E402
from jaxbd.interop.onnx.read import read_onnx  # noqa: E402
from jaxbd.limits import Refusal  # noqa: E402

W = np.arange(3 * 4, dtype=np.float32).reshape(4, 3)
NODES = [
    helper.make_node("GlobalAveragePool", ["x"], ["g"], name="pool"),
    helper.make_node("Flatten", ["g"], ["f"]),
    helper.make_node("Gemm", ["f", "w"], ["y"], transB=1),
]


def model(nodes=NODES, weights=None, shape=(1, 3, 8, 8), opset=17, outputs=("y",)):
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {"w": W}).items()]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in outputs],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def refused(made, match, **limits):
    data = made if isinstance(made, bytes) else made.SerializeToString()
    with pytest.raises(Refusal, match=match or None) as caught:
        read_onnx(data, GraphLimits(**limits))
    assert "\n" not in str(caught.value)


def changed(change, **settings):
    made = model(**settings)
    change(made)
    return made


def test_the_plain_file_is_read():
    graph = read_onnx(model().SerializeToString())
    assert [node.op for node in graph.nodes] == ["GlobalAveragePool", "Flatten", "Gemm"]


def with_domain(made):
    made.graph.node[1].domain = "com.microsoft"
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def with_function(made):
    function = helper.make_function(
        "mine", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], []
    )
    made.functions.append(function)


def with_branch(made):
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["b"])], "b", [], [])
    made.graph.node[1].CopyFrom(
        helper.make_node("If", ["x"], ["f"], name="branch", then_branch=inner)
    )


def with_sparse(made):
    made.graph.sparse_initializer.add().dims.extend([3, 3])


def with_outside(location, **more):
    def change(made):
        tensor = made.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **more}.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


REFUSALS = {
    "custom domain": (
        changed(with_domain),
        "'Flatten' of node '' is from the custom domain 'com.microsoft'",
    ),
    "functions": (changed(with_function), "functions of its own"),
    "control flow": (changed(with_branch), "'If' of node 'branch' is control flow"),
    "sparse": (changed(with_sparse), "sparse weights"),
    "unknown operator": (
        changed(lambda m: setattr(m.graph.node[0], "op_type", "NonMaxSuppression")),
        "'NonMaxSuppression' of node 'pool' is not known .the file uses opset 17.",
    ),
    "quantised": (
        changed(lambda m: setattr(m.graph.node[0], "op_type", "QLinearConv")),
        "quantised",
    ),
    "old opset": (model(opset=8), "opset 8; opsets 9 to"),
    "new opset": (model(opset=99), "opset 99"),
    "no opset": (changed(lambda m: m.ClearField("opset_import")), "0 opsets"),
    "two opsets": (changed(lambda m: m.opset_import.append(helper.make_opsetid("", 9))), "opsets"),
    "training": (changed(lambda m: m.training_info.add()), "training graph"),
    "external data": (changed(with_outside("w.bin")), "is in another file"),
    "a tensor of other size": (
        changed(lambda m: setattr(m.graph.initializer[0], "raw_data", b"12345678")),
        "8 bytes where 48",
    ),
    "a huge tensor": (
        changed(lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 40)),
        "tensors are larger than",
    ),
    "truth values of 2": (
        model(weights={"w": W, "b": np.array([2], np.uint8)})
        .SerializeToString()
        .replace(b"\x08\x01\x10\x02B\x01bJ", b"\x08\x01\x10\x09B\x01bJ"),
        "neither 0 nor 1",
    ),
    "a negative tensor": (
        changed(lambda m: m.graph.initializer[0].dims.__setitem__(0, -1)),
        "shape",
    ),
    "text": (changed(lambda m: setattr(m.graph.initializer[0], "data_type", 8)), "type 8"),
    "four bits": (changed(lambda m: setattr(m.graph.initializer[0], "data_type", 22)), "type 22"),
    "two inputs": (
        changed(lambda m: m.graph.input.append(helper.make_tensor_value_info("z", 1, [1]))),
        "2 inputs",
    ),
    "an input of two axes": (model(shape=(1, 3)), "2 axes; images have four"),
    "a value made twice": (
        changed(lambda m: m.graph.node[1].output.__setitem__(0, "g")),
        "made twice",
    ),
    "a value from nowhere": (
        changed(lambda m: m.graph.node[1].input.__setitem__(0, "q")),
        "nothing makes",
    ),
    "no logits": (
        changed(lambda m: m.graph.output[0].type.tensor_type.shape.dim.add(dim_value=2)),
        "two axes",
    ),
    "a tensor twice": (
        changed(lambda m: m.graph.initializer.append(m.graph.initializer[0])),
        "twice",
    ),
    "an attribute twice": (
        changed(lambda m: m.graph.node[2].attribute.append(m.graph.node[2].attribute[0])),
        "attribute twice",
    ),
    "an attribute of no standard": (
        changed(lambda m: m.graph.node[2].attribute.append(helper.make_attribute("foo", 3))),
        "'Gemm' of node 'y' has an attribute 'foo', which opset 17 does not define",
    ),
    "an attribute of another opset": (
        model([helper.make_node("ReduceMean", ["x"], ["g"], axes=[2, 3]), *NODES[1:]], opset=18),
        "'axes', which opset 18 does not",
    ),
    "an attribute of another type": (
        model([NODES[0], helper.make_node("Flatten", ["g"], ["f"], axis=1.0), NODES[2]]),
        "'axis' is of another type",
    ),
    "an operator that is gone": (
        model([helper.make_node("Upsample", ["x", "w"], ["g"]), *NODES[1:]], opset=13),
        "'Upsample' of node 'g' does not exist in opset 13",
    ),
    "an input too many": (
        model([helper.make_node("ReduceMean", ["x", "w"], ["g"]), *NODES[1:]]),
        "2 inputs; in opset 17 it has at most 1",
    ),
    "an input too few": (
        model([NODES[0], NODES[1], helper.make_node("Gemm", ["f"], ["y"])]),
        "1 inputs; it needs 2",
    ),
    "a long name": (
        changed(lambda m: setattr(m.graph.node[0], "name", "n" * 5000)),
        "name of 5,000",
    ),
    "a long list": (
        changed(
            lambda m: m.graph.node[1].attribute.append(helper.make_attribute("axes", [1] * 5000))
        ),
        "5,000 values",
    ),
    "empty": (b"", "no graph"),
    "text file": (b"<html>" * 100, ""),
    "cut off": (model().SerializeToString()[:-20], "cut off"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case):
    refused(*REFUSALS[case])


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"nodes": 2}, "3 nodes"),
        ({"tensors": 0}, "0 tensors"),
        ({"fields": 20}, "fields"),
        ({"file_bytes": 10}, "limit is 10"),
        ({"unpacked_bytes": 8}, "larger than 8"),
        ({"depth": 1}, "deeper"),
    ],
)
def test_limits(limits, match):
    refused(model(), match, **limits)


def test_many_empty_messages_are_counted_before_they_are_parsed():
    """Two bytes each in the file, a hundred in memory."""
    nodes = b"\x0a\x00" * 5_000_000
    data = b"\x08\x0a\x3a" + varint(len(nodes)) + nodes
    tracemalloc.start()
    refused(data, "more than 50,000 fields", fields=50_000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def varint(number):
    out = b""
    while number >= 128:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/hostname", "a/../../w.bin", "C:\\w.bin", "link/w.bin", ""]
)
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (inside / "link").symlink_to(tmp_path)
    path = inside / "m.onnx"
    path.write_bytes(changed(with_outside(location)).SerializeToString())
    with pytest.raises(UserError, match="outside its folder"):
        graphs.open_graph(path)


def test_external_data_beside_the_file_is_read(tmp_path):
    path, other = tmp_path / "m.onnx", tmp_path / "w.bin"
    path.write_bytes(changed(with_outside("w.bin", offset=8, length=48)).SerializeToString())
    with pytest.raises(UserError, match=r"'w\.bin', which is missing from its folder"):
        graphs.open_graph(path)
    other.write_bytes(bytes(8) + W.tobytes())
    found = graphs.open_graph(path)
    np.testing.assert_array_equal(found.graph.tensors["w"], W)
    other.write_bytes(bytes(8) + (W + 1).tobytes())
    assert graphs.open_graph(path).sha256 != found.sha256
    assert sorted(found.files) == ["m.onnx", "w.bin"]
    other.write_bytes(bytes(8))
    with pytest.raises(UserError, match="ends in the middle"):
        graphs.open_graph(path)


def test_one_part_of_a_file_many_times_is_refused(tmp_path):
    made = model(weights={f"w{i}": W for i in range(9)})
    for tensor in made.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.dims[:] = [3 << 20]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    (tmp_path / "w.bin").write_bytes(bytes(12 << 20))
    with pytest.raises(UserError, match="many times larger than its files; first 'w8'"):
        graphs.open_graph(tmp_path / "m.onnx")


def test_constants_that_take_long_to_compute_are_given_up(tmp_path):
    """Each node reads the same large constant and makes next to nothing of it."""
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["c"])]
    nodes += [helper.make_node("ReduceSum", ["c"], [f"r{i}"], keepdims=0) for i in range(400)]
    nodes += [helper.make_node("Sum", ["g", *[f"r{i}" for i in range(400)]], ["h"])]
    weights = {"w": W, "s": np.array([1 << 11, 1 << 12])}
    path = tmp_path / "m.onnx"
    path.write_bytes(
        model(
            [NODES[0], *nodes, helper.make_node("Flatten", ["h"], ["f"]), NODES[2]], weights
        ).SerializeToString()
    )
    with pytest.raises(UserError, match="its constants takes more than"):
        graphs.open_graph(path, GraphLimits(tracing_seconds=0.2))


@pytest.mark.parametrize(
    ("nodes", "weights", "match"),
    [
        (
            [
                helper.make_node("ConstantOfShape", ["s"], ["c"]),
                helper.make_node("Add", ["x", "c"], ["y"]),
            ],
            {"s": np.array([1 << 20, 1 << 20])},
            "ConstantOfShape.*too large",
        ),
        (
            [helper.make_node("Expand", ["x", "s"], ["y"])],
            {"s": np.array([1 << 16, 3, 1 << 10, 8])},
            "Expand",
        ),
        (
            [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1 << 30] * 4)],
            {"w": np.ones((4, 3, 1, 1), np.float32)},
            "Conv",
        ),
        ([helper.make_node("Reshape", ["x", "s"], ["y"])], {"s": np.array([7, -1])}, "Reshape"),
        ([helper.make_node("Relu", ["x"], ["y"])], {"w": W}, "logits have two axes"),
        (
            [
                *[helper.make_node("ConstantOfShape", ["s"], [f"c{i}"]) for i in range(40)],
                helper.make_node("Sum", ["x", *[f"c{i}" for i in range(40)]], ["y"]),
            ],
            {"s": np.array([1 << 12, 1 << 12])},
            "constants have more than",
        ),
        ([helper.make_node("Gather", ["x", "s"], ["y"], axis=1)], {"s": np.array([99])}, "Gather"),
    ],
    ids=["constant", "expand", "pads", "reshape", "no logits", "many constants", "gather"],
)
def test_graphs_that_cannot_be_computed_are_refused_on_opening(tmp_path, nodes, weights, match):
    path = tmp_path / "m.onnx"
    path.write_bytes(model(nodes, weights).SerializeToString())
    with pytest.raises(UserError, match=match):
        graphs.open_graph(path)


def test_changed_graphs_are_refused_or_opened_and_nothing_else(tmp_path):
    """Operators, inputs and attributes of a graph changed one by one, and the result traced."""
    from jaxbd.interop.onnx.ops import TABLE

    rng = random.Random(2)
    values = ["x", "g", "f", "w", "s", "", "y"]
    attributes = [
        0,
        -1,
        7,
        1 << 40,
        (0, 1),
        (3, -1, 1 << 40, 0),
        (),
        0.5,
        "SAME_UPPER",
        (0, 2, 3, 1),
        (0.5, 2.0),
    ]
    names = [
        "axis",
        "axes",
        "perm",
        "pads",
        "strides",
        "kernel_shape",
        "group",
        "to",
        "mode",
        "split",
        "dilations",
    ]
    weights = {"w": W, "s": np.array([1, -1])}
    whole = read_onnx(model(weights=weights).SerializeToString())
    opened = 0
    for _ in range(250):
        nodes = list(whole.nodes)
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(3)
            node = nodes[at]
            node = node._replace(op=rng.choice(sorted(TABLE))) if rng.random() < 0.6 else node
            if rng.random() < 0.5:
                inputs = [
                    rng.choice(values[: at + 5] if at else ["x", "w", "s", ""])
                    for _ in range(rng.randint(0, 4))
                ]
                node = node._replace(inputs=tuple(v for v in inputs if v not in node.outputs))
            if rng.random() < 0.6:
                node = node._replace(attributes={rng.choice(names): rng.choice(attributes)})
            nodes[at] = node
        try:
            graphs.examine(whole._replace(nodes=tuple(nodes)), tmp_path, "", 0)
            opened += 1
        except Refusal:
            continue
    assert opened > 5
