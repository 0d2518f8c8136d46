"""Which output of an ONNX file is scanned: the logits, never probabilities, features or class
numbers."""

import jax
import numpy as np
import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from jaxbd.base import UserError  # noqa: E402
from jaxbd.cli.main import main as jaxbd  # noqa: E402
from jaxbd.interop import graph_model, inspect, load  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 8, 8, 3)).astype(np.float32)
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node
BODY = [
    node("Conv", ["x", "c"], ["h"]),
    node("Relu", ["h"], ["r"]),
    node("GlobalAveragePool", ["r"], ["g"]),
    node("Flatten", ["g"], ["f"]),
]


def weights(classes):
    normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
    return {
        "c": normal(4, 3, 3, 3),
        "w": normal(classes, 4),
        "b": normal(classes),
        "v": normal(2, 4),
        "half": np.float32(0.5),
        "flat": np.array([-1, classes]),
        "sheet": np.array([-1, classes, 1, 1]),
        "row": np.array([0, 1, -1]),
        "one": np.array([1]),
        "two": np.array([2]),
    }


def save(path, nodes, outputs, classes=5, opset=17):
    """A file of the body, a Gemm to logits "y" and `nodes`.

    `outputs`: name -> (columns, element type).
    """
    head = node("Gemm", ["f", "w", "b"], ["y"], transB=1)
    stored = [numpy_helper.from_array(np.asarray(a), n) for n, a in weights(classes).items()]
    info = helper.make_tensor_value_info
    ends = [
        info(name, kind, None if columns is None else ["n", columns])
        for name, (columns, kind) in outputs.items()
    ]
    image = info("x", FLOAT, ["n", 3, 8, 8])
    graph = helper.make_graph([*BODY, head, *nodes], "net", [image], ends, stored)
    sets = [helper.make_opsetid("", opset)]
    path.write_bytes(helper.make_model(graph, opset_imports=sets, ir_version=8).SerializeToString())
    return path


def in_onnxruntime(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": IMAGES.transpose(0, 3, 1, 2)})


def answer(model):
    return np.asarray(jax.jit(model.net.apply)(model.variables, IMAGES)[0])


AFTER = {
    "softmax": [node("Softmax", ["y"], ["p"])],
    "cast": [node("Softmax", ["y"], ["q"]), node("Cast", ["q"], ["p"], to=FLOAT)],
    "to half and back": [
        node("Cast", ["y"], ["y16"], to=TensorProto.FLOAT16),
        node("Softmax", ["y16"], ["q"]),
        node("Cast", ["q"], ["p"], to=FLOAT),
    ],
    "reshape": [node("Softmax", ["y"], ["q"]), node("Reshape", ["q", "flat"], ["p"])],
    "flatten": [
        node("Reshape", ["y", "sheet"], ["z"]),
        node("Softmax", ["z"], ["q"], axis=1),
        node("Flatten", ["q"], ["p"]),
    ],
    "squeeze": [
        node("Reshape", ["y", "row"], ["z"]),
        node("Softmax", ["z"], ["q"]),
        node("Squeeze", ["q", "one"], ["p"]),
    ],
    "unsqueeze": [
        node("Softmax", ["y"], ["q"]),
        node("Unsqueeze", ["q", "two"], ["u"]),
        node("Squeeze", ["u", "two"], ["i"]),
        node("Identity", ["i"], ["p"]),
    ],
    "softmax of softmax": [node("Softmax", ["y"], ["q"]), node("Softmax", ["q"], ["p"])],
}


@pytest.mark.parametrize("case", AFTER)
def test_a_last_softmax_is_left_out_through_casts_and_reshapes(tmp_path, case):
    model = load.open_model(save(tmp_path / "m.onnx", AFTER[case], {"p": (5, FLOAT)}))
    (expected,) = in_onnxruntime(model.path)
    logits = answer(model)
    assert model.graph.graph.answer == "Softmax" and np.ptp(logits) > 1
    chances = jax.nn.softmax(logits)
    chances = jax.nn.softmax(chances) if case == "softmax of softmax" else chances
    np.testing.assert_allclose(expected, chances, rtol=1e-2 if "half" in case else 1e-5, atol=1e-6)


@pytest.mark.parametrize("last", ["Cast", "Reshape"])
def test_a_sigmoid_of_one_output_is_left_out_too(tmp_path, last):
    more = ["p"] if last == "Cast" else ["p", "flat"]
    nodes = [
        node("Sigmoid", ["y"], ["p"]),
        node(last, more, ["z"], **({"to": FLOAT} if last == "Cast" else {})),
    ]
    model = load.open_model(save(tmp_path / "m.onnx", nodes, {"z": (1, FLOAT)}, classes=1))
    chances = jax.nn.softmax(answer(model))[:, 1:]
    np.testing.assert_allclose(in_onnxruntime(model.path)[0], chances, rtol=1e-5)


PROBABILITIES = {
    "axis of images": ([node("Softmax", ["y"], ["p"], axis=0)], 17, "runs over axis 0, not over"),
    "axis of images, before 13": ([node("Softmax", ["y"], ["p"], axis=0)], 11, "over axis 0"),
    "other axis": (
        [
            node("Reshape", ["y", "sheet"], ["z"]),
            node("Softmax", ["z"], ["q"], axis=-1),
            node("Flatten", ["q"], ["p"]),
        ],
        17,
        "over axis 3",
    ),
    "one class": (
        [node("ReduceSum", ["y", "one"], ["z"]), node("Softmax", ["z"], ["p"])],
        17,
        "only one class",
    ),
    "clipped": (
        [node("Softmax", ["y"], ["q"]), node("Clip", ["q", "", "half"], ["p"])],
        17,
        "'p' is made of the probabilities of Softmax 'q'; export the logits",
    ),
    "a column": (
        [node("Softmax", ["y"], ["q"]), node("Gather", ["q", "one"], ["p"], axis=1)],
        17,
        "probabilities of Softmax",
    ),
    "both classes of a sigmoid": (
        [
            node("Sigmoid", ["y"], ["q"]),
            node("Sub", ["half", "q"], ["s"]),
            node("Concat", ["s", "q"], ["p"], axis=1),
        ],
        17,
        "probabilities of Sigmoid",
    ),
    "mean of two": (
        [
            node("Gemm", ["f", "w"], ["z"], transB=1),
            node("Softmax", ["y"], ["q"]),
            node("Softmax", ["z"], ["r2"]),
            node("Mean", ["q", "r2"], ["p"]),
        ],
        17,
        "probabilities of Softmax",
    ),
}


@pytest.mark.parametrize("case", PROBABILITIES)
def test_probabilities_are_never_taken_for_logits(tmp_path, case):
    nodes, opset, match = PROBABILITIES[case]
    path = save(tmp_path / "m.onnx", nodes, {"p": (None, FLOAT)}, opset=opset)
    with pytest.raises(UserError, match=match):
        load.open_model(path)


def test_a_gate_gives_no_probabilities(tmp_path):
    nodes = [
        node("Sigmoid", ["f"], ["s"]),
        node("Mul", ["f", "s"], ["t"]),
        node("Gemm", ["t", "w"], ["p"], transB=1),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"p": (5, FLOAT)})
    np.testing.assert_allclose(
        answer(load.open_model(path)), in_onnxruntime(path)[0], rtol=1e-5, atol=1e-6
    )


SEVERAL = {
    "features first": ([], {"f": (4, FLOAT), "y": (5, FLOAT)}),
    "logits first": ([], {"y": (5, FLOAT), "f": (4, FLOAT)}),
    "feature map of no stated shape": ([], {"r": (None, FLOAT), "y": (None, FLOAT)}),
    "probabilities too": (
        [node("Softmax", ["y"], ["p"]), node("LogSoftmax", ["y"], ["l"])],
        {"p": (5, FLOAT), "l": (5, FLOAT), "y": (5, FLOAT)},
    ),
    "a class number too": (
        [node("ArgMax", ["y"], ["k"], axis=1)],
        {"k": (1, INT), "y": (5, FLOAT)},
    ),
    "the largest too": (
        [node("Softmax", ["y"], ["p"]), node("ReduceMax", ["p"], ["m"], axes=[1])],
        {"m": (1, FLOAT), "p": (5, FLOAT)},
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_of_several_outputs_the_logits_are_taken(tmp_path, case):
    nodes, outputs = SEVERAL[case]
    model = load.open_model(save(tmp_path / "m.onnx", nodes, outputs))
    assert model.graph.graph.logits == "y" and model.spec.classes == 5
    assert f"has {len(outputs)} outputs" in graph_model.remark(model.graph)
    chosen = inspect.describe(model.path)["options"]["logits"]
    assert chosen == f"from output {model.graph.graph.chosen!r}"


def test_a_head_of_one_column_on_features_is_no_summary(tmp_path):
    path = save(tmp_path / "m.onnx", [], {"f": (4, FLOAT), "y": (1, FLOAT)}, classes=1)
    assert load.open_model(path).graph.graph.logits == "y"


def test_two_heads_are_refused_and_key_chooses(tmp_path, capsys):
    nodes = [node("Gemm", ["f", "v"], ["other"], transB=1)]
    path = save(tmp_path / "m.onnx", nodes, {"y": (5, FLOAT), "other": (2, FLOAT)})
    with pytest.raises(UserError, match=r"2 outputs that may be logits, 'y', 'other'; .*--key"):
        load.open_model(path)
    expected = in_onnxruntime(path)
    for key, logits in zip(("y", "other"), expected, strict=True):
        model = load.open_model(path, key=key)
        np.testing.assert_allclose(answer(model), logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="no output 'head'; it has 'y', 'other'"):
        load.open_model(path, key="head")
    assert jaxbd(["inspect", str(path), "--key", "other"]) == 0
    assert "logits from output 'other'" in " ".join(capsys.readouterr().out.split())
    back = tmp_path / "back.onnx"
    assert jaxbd(["convert", str(path), "--key", "other", "--out", str(back)]) == 0
    assert "taken from 'other'" in capsys.readouterr().err
    for found, logits in zip(in_onnxruntime(back), expected, strict=True):
        np.testing.assert_allclose(found, logits)


def test_a_hundred_outputs_are_refused(tmp_path):
    nodes = [node("Mul", ["y", "half"], [f"y{i}"]) for i in range(100)]
    path = save(tmp_path / "m.onnx", nodes, {f"y{i}": (5, FLOAT) for i in range(100)})
    with pytest.raises(UserError, match=r"has 100 outputs that may be logits, 'y0', .*…"):
        load.open_model(path)
    assert load.open_model(path, key="y7").spec.classes == 5


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_class_number_alone_is_refused_by_name(tmp_path, keepdims):
    nodes = [node("ArgMax", ["y"], ["k"], axis=1, keepdims=keepdims)]
    path = save(tmp_path / "m.onnx", nodes, {"k": (1 if keepdims else None, INT)})
    with pytest.raises(UserError, match=r"output 'k' is not float but a class number.*logits"):
        load.open_model(path)
