"""Every operator against onnxruntime, on small inputs, as what depends on the image and as what
does not."""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, defs, helper, numpy_helper  # noqa: E402

from jaxbd.interop.onnx import ops  # noqa: E402
from jaxbd.interop.onnx.graph import Node  # noqa: E402
from jaxbd.interop.onnx.interpret import compute  # noqa: E402
from jaxbd.limits import Refusal  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 4, 7, 6)).astype(np.float32)
Y = RNG.normal(size=(2, 4, 7, 6)).astype(np.float32)
ROW = RNG.normal(size=(4,)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
WHOLE = RNG.integers(-9, 9, (2, 3, 4))
SQUARE = RNG.normal(size=(2, 3, 5, 5)).astype(np.float32)
KERNEL = RNG.normal(size=(6, 4, 3, 3)).astype(np.float32)
GROUPED = RNG.normal(size=(6, 2, 3, 3)).astype(np.float32)
BIAS = RNG.normal(size=(6,)).astype(np.float32)
A, B, C = (RNG.normal(size=s).astype(np.float32) for s in ((3, 5), (5, 4), (4,)))
LINE = RNG.normal(size=(2, 4, 9)).astype(np.float32)
TALL = RNG.normal(size=(1, 2, 10, 13)).astype(np.float32)
VOLUME = RNG.normal(size=(1, 2, 5, 5, 5)).astype(np.float32)
NO = None


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float32)


UNARY = {
    "Relu": X,
    "Sigmoid": X,
    "Tanh": X,
    "Exp": X,
    "Log": POSITIVE,
    "Sqrt": POSITIVE,
    "Neg": X,
    "Abs": X,
    "Floor": X,
    "Ceil": X,
    "Round": X,
    "Sign": X,
    "Sin": X,
    "Cos": X,
    "Reciprocal": POSITIVE,
    "Erf": X,
    "Softplus": X,
    "Softsign": X,
    "Identity": X,
    "HardSwish": X,
    "Mish": X,
    "Elu": X,
    "Selu": X,
    "Celu": X,
    "LeakyRelu": X,
    "ThresholdedRelu": X,
    "HardSigmoid": X,
    "Not": X > 0,
    "Gelu": X,
    "GlobalAveragePool": X,
    "GlobalMaxPool": X,
    "Flatten": X,
    "Transpose": X,
    "Shape": X,
    "Size": X,
    "Softmax": X,
    "LogSoftmax": X,
    "LpNormalization": X,
    "Dropout": X,
    "Swish": X,
}
NEEDS = {"Swish": 24, "Gelu": 20, "Mish": 18}
"""Operators that are younger than opset 17."""
CASES = [(op, NEEDS.get(op, 17), {}, [x], 1) for op, x in UNARY.items()]
CASES += [
    (op, 17, {}, [X, other], 1)
    for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")
    for other in (Y, ROW[:, None, None], Y[0, :, :1], floats(0.5))
]
CASES += [
    (op, 17, {}, [np.round(X), np.round(Y)], 1)
    for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
]
CASES += [(op, 17, {}, [X > 0, Y > 0], 1) for op in ("And", "Or", "Xor")]
CASES += [
    ("Div", 17, {}, [WHOLE, ints(3)], 1),
    ("Div", 17, {}, [WHOLE, ints(-4)], 1),
    ("Mod", 17, {}, [WHOLE, ints(3)], 1),
    ("Mod", 17, {}, [WHOLE, ints(-4)], 1),
    ("Mod", 17, {"fmod": 1}, [X, floats(0.7)], 1),
    ("Pow", 17, {}, [X, floats(2)], 1),
    ("Pow", 17, {}, [X, floats(3)], 1),
    ("Pow", 17, {}, [POSITIVE, floats(0.5)], 1),
    ("Pow", 17, {}, [POSITIVE, Y], 1),
    ("PRelu", 17, {}, [X, ROW[:, None, None]], 1),
    ("LeakyRelu", 17, {"alpha": 0.3}, [X], 1),
    ("Elu", 17, {"alpha": 0.3}, [X], 1),
    ("Celu", 17, {"alpha": 2.0}, [X], 1),
    ("Selu", 17, {"alpha": 1.2, "gamma": 0.7}, [X], 1),
    ("HardSigmoid", 17, {"alpha": 0.3, "beta": 0.4}, [X], 1),
    ("Gelu", 20, {"approximate": "tanh"}, [X], 1),
    ("Swish", 24, {"alpha": 1.7}, [X], 1),
    ("Clip", 10, {"min": -0.5, "max": 0.7}, [X], 1),
    ("Clip", 10, {"max": 0.7}, [X], 1),
    ("Clip", 13, {}, [X, floats(-0.5).reshape(()), floats(0.7).reshape(())], 1),
    ("Clip", 13, {}, [X, NO, floats(0.7).reshape(())], 1),
    ("Where", 17, {}, [X > 0, X, floats(3)], 1),
    ("Cast", 17, {"to": TensorProto.INT64}, [X * 3], 1),
    ("Cast", 17, {"to": TensorProto.FLOAT}, [WHOLE], 1),
    ("Cast", 17, {"to": TensorProto.BOOL}, [WHOLE], 1),
    ("CastLike", 17, {}, [WHOLE, floats(1)], 1),
    # shapes
    ("Shape", 17, {"start": 1, "end": -1}, [X], 1),
    ("Reshape", 17, {}, [X, ints(0, -1, 3)], 1),
    ("Reshape", 17, {}, [X, ints(2, 0, 42)], 1),
    ("Flatten", 17, {"axis": 2}, [X], 1),
    ("Flatten", 17, {"axis": -1}, [X], 1),
    ("Flatten", 17, {"axis": 0}, [X], 1),
    ("Transpose", 17, {"perm": [0, 2, 3, 1]}, [X], 1),
    ("Concat", 17, {"axis": 1}, [X, Y[:, :2]], 1),
    ("Concat", 17, {"axis": -1}, [X, Y, X], 1),
    ("Split", 11, {"axis": 1}, [X], 2),
    ("Split", 11, {"axis": 1, "split": [1, 3]}, [X], 2),
    ("Split", 13, {"axis": 3}, [X, ints(1, 3, 2)], 3),
    ("Split", 18, {"axis": 2, "num_outputs": 3}, [X], 3),
    ("Slice", 9, {"starts": [1, -3], "ends": [3, 100], "axes": [1, 3]}, [X], 1),
    ("Slice", 9, {"starts": [0, 1], "ends": [2, -1]}, [X], 1),
    ("Slice", 13, {}, [X, ints(1, -1), ints(2**62, -(2**62)), ints(2, 3), ints(2, -1)], 1),
    ("Slice", 13, {}, [X, ints(-2), ints(0), ints(1), ints(-1)], 1),
    ("Slice", 13, {}, [X, ints(1), ints(2)], 1),
    ("Gather", 17, {"axis": 1}, [X, ints(2, -1)], 1),
    ("Gather", 17, {"axis": 3}, [X, np.array(-2)], 1),
    ("Gather", 17, {}, [X, ints(1, 0).reshape(2, 1)], 1),
    ("GatherElements", 17, {"axis": 1}, [WHOLE.astype(np.float32), WHOLE % 3], 1),
    ("GatherND", 17, {}, [X, ints(1, 2, 0, 3).reshape(2, 2)], 1),
    ("ScatterND", 17, {}, [X, ints(1, 0).reshape(2, 1), Y], 1),
    ("ScatterND", 17, {}, [X, ints(1, 2).reshape(1, 2), Y[:1, 0]], 1),
    ("Squeeze", 11, {"axes": [0, -1]}, [X[:1, :, :, :1]], 1),
    ("Squeeze", 13, {}, [X[:1, :, :, :1], ints(0)], 1),
    ("Squeeze", 13, {}, [X[:1, :, :, :1]], 1),
    ("Unsqueeze", 11, {"axes": [0, 4]}, [X], 1),
    ("Unsqueeze", 13, {}, [X, ints(-1, 1)], 1),
    ("Expand", 17, {}, [X[:1], ints(3, 1, 1, 6)], 1),
    ("Expand", 17, {}, [ROW, ints(2, 3, 1)], 1),
    ("Tile", 17, {}, [X, ints(1, 2, 1, 3)], 1),
    ("Pad", 10, {"pads": [0, 0, 1, 2, 0, 0, 0, 1], "value": 0.5}, [X], 1),
    ("Pad", 13, {}, [X, ints(0, 0, 1, 2, 0, 0, 0, 1), floats(0.5).reshape(())], 1),
    ("Pad", 13, {"mode": "reflect"}, [X, ints(0, 0, 1, 2, 0, 0, 0, 1)], 1),
    ("Pad", 13, {"mode": "edge"}, [X, ints(0, 0, 1, 2, 0, 0, 0, 1)], 1),
    ("Pad", 13, {}, [X, ints(0, 0, -1, 1, 0, 0, -2, 0)], 1),
    ("Pad", 18, {}, [X, ints(1, 2), NO, ints(3)], 1),
    ("Range", 17, {}, [np.array(1), np.array(9), np.array(3)], 1),
    ("Range", 17, {}, [np.array(5), np.array(-2), np.array(-2)], 1),
    ("ConstantOfShape", 17, {"value": numpy_helper.from_array(floats(2.5))}, [ints(2, 3)], 1),
    ("ConstantOfShape", 17, {}, [ints(2)], 1),
    ("Constant", 17, {"value_ints": [3, 4]}, [], 1),
    ("Constant", 17, {"value": numpy_helper.from_array(ROW)}, [], 1),
    ("DepthToSpace", 17, {"blocksize": 2}, [X], 1),
    ("DepthToSpace", 17, {"blocksize": 2, "mode": "CRD"}, [X], 1),
    ("SpaceToDepth", 17, {"blocksize": 3}, [X[:, :, :6]], 1),
    ("Trilu", 17, {"upper": 0}, [SQUARE], 1),
    ("Trilu", 17, {}, [SQUARE, np.array(1)], 1),
    ("OneHot", 17, {"axis": 1}, [WHOLE % 3, np.array(3), floats(-1, 2)], 1),
    ("Einsum", 17, {"equation": "bchw,c->bhw"}, [X, ROW], 1),
    ("CumSum", 17, {}, [X, np.array(2)], 1),
    # windows
    ("Conv", 17, {}, [X, KERNEL, BIAS], 1),
    ("Conv", 17, {"pads": [1, 2, 0, 1], "strides": [2, 1]}, [X, KERNEL], 1),
    ("Conv", 17, {"group": 2, "dilations": [2, 1], "pads": [2, 1, 2, 1]}, [X, GROUPED, BIAS], 1),
    ("Conv", 17, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, [X, KERNEL], 1),
    ("Conv", 17, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, [X, KERNEL], 1),
    ("Conv", 17, {"auto_pad": "VALID"}, [X, KERNEL], 1),
    ("Conv", 17, {"pads": [1, 1]}, [LINE, KERNEL[..., 0]], 1),
    ("Conv", 17, {}, [VOLUME, RNG.normal(size=(3, 2, 2, 2, 2)).astype(np.float32)], 1),
    ("MaxPool", 17, {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}, [X], 1),
    ("MaxPool", 17, {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, [X], 1),
    ("MaxPool", 17, {"kernel_shape": [2, 2], "dilations": [2, 2]}, [X], 1),
    ("MaxPool", 17, {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, [X], 1),
    ("AveragePool", 17, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, [X], 1),
    (
        "AveragePool",
        17,
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1, "strides": [2, 2]},
        [X],
        1,
    ),
    ("AveragePool", 19, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, [X], 1),
    ("AveragePool", 17, {"kernel_shape": [2, 2], "strides": [2, 2]}, [X], 1),
    ("LRN", 17, {"size": 3, "alpha": 0.1, "beta": 0.6, "bias": 1.5}, [X], 1),
    (
        "Resize",
        11,
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
        [X, floats(), floats(1, 1, 2, 2)],
        1,
    ),
    (
        "Resize",
        13,
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        [X, NO, NO, ints(2, 4, 9, 4)],
        1,
    ),
    (
        "Resize",
        13,
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        [X, NO, NO, ints(2, 4, 10, 12)],
        1,
    ),
    (
        "Resize",
        13,
        {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel"},
        [X, NO, NO, ints(2, 4, 13, 9)],
        1,
    ),
    ("Resize", 13, {"mode": "nearest"}, [X, NO, floats(1, 1, 1.5, 2)], 1),
    ("Upsample", 9, {"mode": "nearest"}, [X, floats(1, 1, 2, 3)], 1),
    # products, norms, reductions
    ("Gemm", 17, {}, [A, B, C], 1),
    ("Gemm", 17, {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}, [A.T, B.T, C], 1),
    ("Gemm", 17, {}, [A, B], 1),
    ("MatMul", 17, {}, [X, RNG.normal(size=(6, 3)).astype(np.float32)], 1),
    ("MatMul", 17, {}, [SQUARE, SQUARE], 1),
    ("BatchNormalization", 9, {"epsilon": 1e-3}, [X, ROW, ROW + 1, ROW - 1, ROW**2 + 0.1], 1),
    (
        "BatchNormalization",
        17,
        {},
        [
            A,
            ROW[[0, 1, 2, 3, 0]],
            ROW[[0, 1, 2, 3, 0]],
            C[[0, 1, 2, 3, 0]],
            C[[0, 1, 2, 3, 0]] ** 2 + 0.1,
        ],
        1,
    ),
    ("LayerNormalization", 17, {"axis": -1}, [SQUARE, A[0], B[:, 0]], 1),
    ("LayerNormalization", 17, {"axis": 2, "epsilon": 1e-2}, [SQUARE, SQUARE[0, 0]], 1),
    ("InstanceNormalization", 17, {}, [X, ROW, ROW + 1], 1),
    ("GroupNormalization", 21, {"num_groups": 2}, [X, ROW, ROW + 1], 1),
    ("RMSNormalization", 23, {}, [SQUARE, A[0]], 1),
    ("LpNormalization", 17, {"p": 1, "axis": 1}, [X], 1),
    ("Softmax", 11, {}, [X], 1),
    ("Softmax", 11, {"axis": 3}, [X], 1),
    ("Softmax", 13, {"axis": 1}, [X], 1),
    ("LogSoftmax", 11, {"axis": 2}, [X], 1),
    ("ReduceMean", 11, {"axes": [2, 3], "keepdims": 0}, [X], 1),
    ("ReduceMean", 18, {}, [X, ints(-1)], 1),
    ("ReduceMean", 18, {"noop_with_empty_axes": 1}, [X], 1),
    ("ReduceSum", 11, {"axes": [1]}, [X], 1),
    ("ReduceSum", 13, {"keepdims": 0}, [X, ints(1, 2)], 1),
    ("ReduceMax", 17, {"axes": [1]}, [X], 1),
    ("ReduceMin", 18, {}, [X, ints(1)], 1),
    ("ReduceProd", 17, {}, [WHOLE], 1),
    ("ReduceL1", 17, {"axes": [1]}, [X], 1),
    ("ReduceL2", 17, {"axes": [1]}, [X], 1),
    ("ReduceSumSquare", 17, {"axes": [1]}, [X], 1),
    ("ReduceLogSumExp", 17, {"axes": [1]}, [X], 1),
    ("ReduceLogSumExp", 17, {"axes": [1, 3], "keepdims": 0}, [X], 1),
    ("ReduceLogSumExp", 17, {}, [X + 200], 1),
    ("ArgMax", 17, {"axis": 1}, [X], 1),
    ("ArgMin", 17, {"axis": 2, "keepdims": 0}, [X], 1),
    ("Attention", 23, {}, [SQUARE, SQUARE + 1, SQUARE - 1], 1),
    ("Attention", 23, {"q_num_heads": 2, "kv_num_heads": 2, "scale": 0.4}, [X[0], Y[0], X[1]], 1),
    ("Attention", 23, {"is_causal": 1}, [SQUARE, SQUARE + 1, SQUARE - 1], 1),
    # edges of the standard, and what onnxruntime makes of them
    ("Slice", 13, {}, [X, ints(-100), ints(-100), ints(1), ints(-1)], 1),
    ("Slice", 13, {}, [X, ints(100), ints(-100), ints(1), ints(-2)], 1),
    ("Pow", 17, {}, [ints(5, 9), floats(0.5)], 1),
    ("OneHot", 17, {}, [ints(0, 3, -1, -4, 5), np.array(3), floats(-1, 2)], 1),
    ("LpNormalization", 17, {"axis": 1}, [np.maximum(X - 1, 0)], 1),
    ("LpNormalization", 17, {"p": 1, "axis": 3}, [np.maximum(X - 1, 0)], 1),
    ("ReduceMean", 13, {"axes": [1]}, [WHOLE], 1),
    ("ReduceL1", 18, {"noop_with_empty_axes": 1}, [X], 1),
    ("ReduceL2", 18, {"noop_with_empty_axes": 1}, [X, ints()], 1),
    ("ReduceSumSquare", 18, {"noop_with_empty_axes": 1}, [X], 1),
    ("Dropout", 13, {}, [X, floats(0.0).reshape(()), np.array(True)], 1),
    (
        "AveragePool",
        19,
        {"kernel_shape": [2, 2], "dilations": [3, 2], "pads": [1, 1, 1, 1]},
        [X],
        1,
    ),
    ("Resize", 10, {"mode": "nearest"}, [X, floats(1, 1, 0.5, 0.67)], 1),
    ("Resize", 10, {"mode": "nearest"}, [X, floats(1, 1, 0.7, 1.9)], 1),
    ("Resize", 10, {"mode": "nearest"}, [TALL, floats(1, 1, 0.7, 0.9)], 1),
    ("Resize", 10, {"mode": "linear"}, [TALL, floats(1, 1, 1.04, 1.03)], 1),
    ("Upsample", 9, {"mode": "nearest"}, [TALL, floats(1, 1, 1.8, 1.6)], 1),
    ("Upsample", 9, {"mode": "linear"}, [TALL, floats(1, 1, 1.1, 2.9)], 1),
    (
        "Resize",
        18,
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "pytorch_half_pixel",
            "nearest_mode": "ceil",
        },
        [TALL, NO, floats(1, 1, 1.8, 3)],
        1,
    ),
    (
        "Resize",
        19,
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"},
        [TALL, NO, floats(1, 1, 1.7, 0.6)],
        1,
    ),
]


def run_in_onnxruntime(op, opset, attributes, inputs, count):
    names = [f"x{i}" if value is not None else "" for i, value in enumerate(inputs)]
    given = {name: np.asarray(value) for name, value in zip(names, inputs, strict=True) if name}
    outputs = [f"y{i}" for i in range(count)]
    kinds = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in given.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs, **attributes)],
        "one",
        kinds,
        [onnx_value(name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        pytest.skip(f"onnxruntime does not have {op} of opset {opset}: {str(error)[:200]}")
    return session.run(outputs, given)


def onnx_value(name):
    from onnx import ValueInfoProto

    return ValueInfoProto(name=name)


def as_node(op, opset, attributes, count):
    plain = {
        n: numpy_helper.to_array(v)
        if hasattr(v, "dims")
        else tuple(v)
        if isinstance(v, list)
        else v
        for n, v in attributes.items()
    }
    return Node(op, "n", (), tuple(f"y{i}" for i in range(count)), plain, opset)


def is_dynamic(value):
    """Floats depend on the image; integers and flags beside them are shapes and places."""
    return value is not None and np.ndim(value) > 1 and value.dtype == np.float32


@pytest.fixture(scope="module")
def computed():
    """Results of all cases from one compiled program, which takes less than one for each; or why
    there are none."""
    failures = {}

    def run(arrays):
        results = []
        for number, (op, opset, attributes, inputs, count) in enumerate(CASES):
            given = [arrays.get(f"{number} {i}", value) for i, value in enumerate(inputs)]
            try:
                results.append(compute(as_node(op, opset, attributes, count), given))
            except Refusal as refusal:
                failures[number] = refusal
                results.append(())
        return results

    arrays = {
        f"{n} {i}": v
        for n, case in enumerate(CASES)
        for i, v in enumerate(case[3])
        if is_dynamic(v)
    }
    return jax.jit(run)(arrays), failures


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n][0]}-{CASES[n][1]}"
)
def test_as_onnxruntime(number, computed):
    op, opset, attributes, inputs, count = CASES[number]
    expected = run_in_onnxruntime(op, opset, attributes, inputs, count)
    results, failures = computed
    assert number not in failures
    ways = [results[number]] if any(map(is_dynamic, inputs)) else []
    if not is_jax(op):
        ways.append(compute(as_node(op, opset, attributes, count), inputs))
        assert all(isinstance(value, np.ndarray | np.generic) for value in ways[-1])
    for way in ways:
        for mine, theirs in zip(way, expected, strict=True):
            assert np.shape(mine) == theirs.shape
            np.testing.assert_allclose(np.asarray(mine), theirs, rtol=2e-5, atol=2e-5)


def is_jax(op):
    """Whether an operator is computed by JAX even where nothing depends on the image."""
    return "computed" in ops.TABLE[op].__qualname__


def test_what_jax_computes_of_static_values_is_static():
    (result,) = compute(as_node("Conv", 17, {}, 1), [X, KERNEL, BIAS])
    assert isinstance(result, np.ndarray)


def test_every_operator_has_a_case():
    assert set(ops.TABLE) - {op for op, *_ in CASES} == set()


HARMLESS = {
    "Attention": {"qk_matmul_output_mode", "softmax_precision"},
    "Cast": {"round_mode", "saturate"},
    "CastLike": {"round_mode", "saturate"},
    "Constant": {"sparse_value", "value_string", "value_strings"},
    "Dropout": {"ratio", "seed"},
    "GroupNormalization": {"stash_type"},
    "LayerNormalization": {"stash_type"},
    "RMSNormalization": {"stash_type"},
    "Range": {"stash_type"},
    "Resize": {"extrapolation_value"},
}
"""Attributes that nothing here reads: they matter for types, outputs and modes that are refused, or
for the precision alone."""


def test_every_attribute_of_the_standard_is_read_or_harmless():
    """An attribute that a handler ignores would give another net without a word."""
    folder = pathlib.Path(ops.__file__).parent
    words = {
        word
        for file in (*folder.glob("ops_*.py"), folder / "interpret.py")
        for word in re.findall(r'"(\w+)"', file.read_text())
    }
    opsets = range(9, min(28, defs.onnx_opset_version()) + 1)
    unread = {
        (op, name)
        for op, opset in itertools.product(ops.TABLE, opsets)
        if defs.has(op, opset, "")
        for name in set(defs.get_schema(op, opset, "").attributes) - words - HARMLESS.get(op, set())
    }
    assert not unread


@pytest.mark.parametrize(
    ("op", "opset", "attributes", "inputs"),
    [
        ("Reshape", 17, {}, [X, ints(5, -1)]),
        ("ConstantOfShape", 17, {}, [ints(1 << 20, 1 << 20)]),
        ("Expand", 17, {}, [ROW, ints(1 << 30, 4)]),
        ("Tile", 17, {}, [X, ints(1 << 20, 1, 1, 1 << 20)]),
        ("Range", 17, {}, [np.array(0), np.array(1 << 40), np.array(1)]),
        ("Range", 17, {}, [np.array(0), np.array(9), np.array(0)]),
        ("Pad", 13, {}, [X, ints(0, 0, 0, 0, 0, 0, 0, 1 << 40)]),
        ("Gather", 17, {}, [X, ints(2)]),
        ("Div", 17, {}, [WHOLE, ints(0)]),
        ("Split", 13, {"axis": 1}, [X, ints(1, 2)]),
        ("Conv", 17, {"group": 3}, [X, KERNEL]),
        ("MaxPool", 17, {"kernel_shape": [1 << 30, 1 << 30]}, [X]),
        ("Resize", 13, {"mode": "linear"}, [X, NO, floats(1, 1, 1e9, 1)]),
        ("OneHot", 17, {}, [WHOLE, np.array(1 << 40), floats(0, 1)]),
        ("Transpose", 17, {"perm": [0, 0, 1, 2]}, [X]),
        ("Squeeze", 13, {}, [X, ints(7)]),
        ("Conv", 17, {"kernel_shape": [1, 1]}, [X, KERNEL]),
        ("Conv", 17, {"auto_pad": "SAME_UPPER", "dilations": [2, 2]}, [X, KERNEL]),
        ("BatchNormalization", 15, {"training_mode": 1}, [X, ROW, ROW, ROW, ROW**2]),
        ("Dropout", 13, {}, [X, NO, np.array(True)]),
        ("Split", 18, {"num_outputs": 3}, [X]),
    ],
    ids=lambda v: str(v)[:24],
)
def test_what_does_not_fit_is_refused_by_name(op, opset, attributes, inputs):
    with pytest.raises(Refusal, match=op):
        compute(as_node(op, opset, attributes, 2), inputs)


def test_an_attention_within_a_window_is_refused():
    node = as_node("Attention", 25, {"left_window_size": 1}, 1)
    with pytest.raises(Refusal, match="a window"):
        compute(node, [SQUARE, SQUARE, SQUARE])


@pytest.mark.parametrize("op", ["LpNormalization", "ReduceL2"])
def test_norms_of_zeros_have_a_gradient(op):
    """A net's dead features must not make a search's gradient NaN."""
    node = as_node(op, 17, {"axes": [1]} if op == "ReduceL2" else {"axis": 1}, 1)
    zeros = jnp.zeros((2, 3, 4, 4))
    gradient = jax.grad(lambda x: compute(node, [x])[0].sum())(zeros)
    assert np.isfinite(gradient).all()


def test_powers_of_negative_numbers_have_a_gradient():
    node = as_node("Pow", 17, {}, 1)
    gradient = jax.grad(lambda x: compute(node, [x, floats(2)])[0].sum())(jnp.asarray(X))
    np.testing.assert_allclose(gradient, 2 * X, rtol=1e-6)
