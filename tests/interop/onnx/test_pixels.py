"""Graphs for integer images, graphs that round, and what range of pixels a graph takes."""

import jax
import numpy as np
import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from jaxbd.base import UserError  # noqa: E402
from jaxbd.interop import load  # noqa: E402

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
T = TensorProto
WEIGHTS = {
    "c": RNG.normal(size=(5, 3, 3, 3)).astype(np.float32),
    "scale": np.float32(1 / 255),
    "byte": np.uint8(100),
    "number": np.int32(128),
    "table": RNG.normal(size=(256,)).astype(np.float32),
    "to": np.array([7]),
    "from": np.array([0]),
    "axis": np.array([2]),
}
node = helper.make_node


def save(path, nodes, kind=T.UINT8, **more):
    """A file that makes "z" of images "x" by `nodes`, and logits of "z"."""
    last = [
        node("Conv", ["z", "c"], ["h"]),
        node("GlobalAveragePool", ["h"], ["g"]),
        node("Flatten", ["g"], ["y"]),
    ]
    tensors = {**WEIGHTS, **{name: np.asarray(array, np.float32) for name, array in more.items()}}
    stored = [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()]
    info = helper.make_tensor_value_info
    image, logits = info("x", kind, ["n", 3, 8, 8]), info("y", T.FLOAT, ["n", 5])
    graph = helper.make_graph([*nodes, *last], "net", [image], [logits], stored)
    sets = [helper.make_opsetid("", 17)]
    path.write_bytes(helper.make_model(graph, opset_imports=sets, ir_version=8).SerializeToString())
    return path


LOSSLESS = {
    "one cast": [node("Cast", ["x"], ["f"], to=T.FLOAT)],
    "two casts": [node("Cast", ["x"], ["i"], to=T.INT32), node("Cast", ["i"], ["f"], to=T.FLOAT)],
    "casts and moves": [
        node("Cast", ["x"], ["i"], to=T.INT64),
        node("Slice", ["i", "from", "to", "axis"], ["s"]),
        node("Cast", ["s"], ["u"], to=T.UINT8),
        node("Transpose", ["u"], ["t"], perm=[0, 1, 3, 2]),
        node("Cast", ["t"], ["f"], to=T.FLOAT),
    ],
    "cast like": [
        node("CastLike", ["x", "number"], ["i"]),
        node("CastLike", ["i", "scale"], ["f"]),
    ],
    "to half": [node("Cast", ["x"], ["i"], to=T.FLOAT16), node("Cast", ["i"], ["f"], to=T.FLOAT)],
}


@pytest.mark.parametrize("case", LOSSLESS)
def test_casts_of_integer_pixels_keep_the_gradient(tmp_path, case):
    path = save(tmp_path / "m.onnx", [*LOSSLESS[case], node("Mul", ["f", "scale"], ["z"])])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": BYTES.transpose(0, 3, 1, 2)})
    model = load.open_model(path)
    logits = lambda images: model.net.apply(model.variables, images)[0]
    images = BYTES / np.float32(255)
    np.testing.assert_allclose(logits(images), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(jax.grad(lambda images: logits(images)[:, 0].sum())(images)).max() > 1e-3


COMPUTED = {
    "division of bytes": [node("Div", ["x", "byte"], ["i"])],
    "subtraction": [
        node("Cast", ["x"], ["w"], to=T.INT32),
        node("Sub", ["w", "number"], ["i"], name="centre"),
    ],
    "a narrower type": [node("Cast", ["x"], ["i"], to=T.INT8)],
    "a look-up": [
        node("Cast", ["x"], ["w"], to=T.INT32),
        node("Gather", ["table", "w"], ["i"]),
    ],
}


@pytest.mark.parametrize("case", COMPUTED)
def test_arithmetic_with_integer_pixels_is_refused_by_name(tmp_path, case):
    nodes = [*COMPUTED[case], node("Cast", ["i"], ["z"], to=T.FLOAT)]
    last = nodes[-2]
    match = f"{last.op_type} of node '{last.name or 'i'}' computes with the image as integers"
    with pytest.raises(UserError, match=match):
        load.open_model(save(tmp_path / "m.onnx", nodes))


def test_signed_bytes_are_refused(tmp_path):
    with pytest.raises(UserError, match="int8 images"):
        load.open_model(save(tmp_path / "m.onnx", [node("Cast", ["x"], ["z"], to=1)], T.INT8))


ROUNDS = {
    "cast": [node("Cast", ["x"], ["i"], to=T.UINT8), node("Cast", ["i"], ["z"], to=T.FLOAT)],
    "round": [node("Round", ["x"], ["z"])],
    "compare": [node("Less", ["x", "scale"], ["i"]), node("Cast", ["i"], ["z"], to=T.FLOAT)],
}


@pytest.mark.parametrize("case", ROUNDS)
def test_a_graph_that_rounds_the_image_is_refused(tmp_path, case):
    with pytest.raises(UserError, match=f"{ROUNDS[case][0].op_type} of node .* rounds what the"):
        load.open_model(save(tmp_path / "m.onnx", ROUNDS[case], T.FLOAT))


def test_rounding_beside_a_smooth_way_is_read(tmp_path):
    nodes = [node("Sign", ["x"], ["s"]), node("Mul", ["x", "s"], ["z"])]
    load.open_model(save(tmp_path / "m.onnx", nodes, T.FLOAT))


@pytest.mark.parametrize(
    ("mean", "std", "largest"),
    [
        (0, 1 / 0.2, 1),
        (0, 1 / 0.4, 1),
        (0.45, 0.25, 1),
        (0, 10, 1),
        (0, 255, 255),
        (127.5, 127.5, 255),
        (117, 1, 255),
        (33.3, 78.6, 255),
    ],
)
def test_large_constants_are_for_pixels_of_bytes(tmp_path, mean, std, largest):
    """A small scale in front of the net is for pixels in [0, 1]."""
    nodes = [node("Sub", ["x", "mean"], ["m"]), node("Mul", ["m", "factor"], ["z"])]
    model = load.open_model(
        save(tmp_path / "m.onnx", nodes, T.FLOAT, mean=mean, factor=1 / np.float32(std))
    )
    assert model.spec.std == (1 / largest,)
