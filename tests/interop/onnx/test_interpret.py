"""Graph nets keep the contract of `base.Net`: any number of images, moments of a batch, bounds,
frozen variables."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from jaxbd.base import UserError  # noqa: E402
from jaxbd.detection import guard  # noqa: E402
from jaxbd.interop.onnx import open as graphs  # noqa: E402
from jaxbd.interop.onnx import write, write_guarded  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = RNG.random((5, 8, 8, 3)).astype(np.float32)


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


WEIGHTS = {
    "c.weight": floats(4, 3, 3, 3),
    "c.bias": floats(4),
    "n.weight": floats(4),
    "n.bias": floats(4),
    "n.running_mean": floats(4),
    "n.running_var": floats(4) ** 2 + 0.5,
    "d.weight": floats(6, 4, 3, 3),
    "d.bias": floats(6),
    "f.weight": floats(5, 6),
    "f.bias": floats(5),
}
BODY = [
    helper.make_node("Conv", ["x", "c.weight", "c.bias"], ["c"], pads=[1, 1, 1, 1]),
    helper.make_node(
        "BatchNormalization", ["c", "n.weight", "n.bias", "n.running_mean", "n.running_var"], ["n"]
    ),
    helper.make_node("Relu", ["n"], ["r"]),
    helper.make_node("Conv", ["r", "d.weight", "d.bias"], ["d"], strides=[2, 2]),
    helper.make_node("Relu", ["d"], ["s"]),
    helper.make_node("GlobalAveragePool", ["s"], ["g"]),
]
HEAD = [
    helper.make_node("Flatten", ["g"], ["h"]),
    helper.make_node("Gemm", ["h", "f.weight", "f.bias"], ["y"], transB=1),
]


def save(path, nodes, weights=WEIGHTS, shape=("batch", 3, 8, 8), output="y", opset=17):
    """An ONNX file of `nodes` from "x" to `output`."""
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    logits = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "net", [image], [logits], stored)
    path.write_bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
        ).SerializeToString()
    )
    return path


@functools.cache
def compiled(apply):
    return jax.jit(apply)


def jitted(net):
    """`net.apply` as one program, compiled once."""
    return compiled(net.apply)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return graphs.open_graph(save(tmp_path_factory.mktemp("graph") / "net.onnx", BODY + HEAD))


@pytest.fixture(scope="module")
def net(found):
    return graphs.to_net(found)


def in_onnxruntime(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})


def test_variables_are_named_and_laid_out_as_those_of_jaxbd(found, net):
    _, variables = net
    shapes = jax.tree.map(np.shape, variables)
    assert shapes == {
        "params": {
            "c": {"kernel": (3, 3, 3, 4), "bias": (4,)},
            "n": {"scale": (4,), "bias": (4,)},
            "d": {"kernel": (3, 3, 4, 6), "bias": (6,)},
            "f": {"kernel": (6, 5), "bias": (5,)},
        },
        "batch_stats": {"n": {"mean": (4,), "var": (4,)}},
    }
    assert (found.image_shape, found.classes, found.channels_first) == ((8, 8, 3), 5, True)


@pytest.mark.parametrize("baked", ["stated", "Reshape", "Expand", "of three"])
def test_any_number_of_images(tmp_path, found, net, baked):
    """A batch size that an export wrote into input and shapes changes no answer."""
    expected = in_onnxruntime(found.path, IMAGES.transpose(0, 3, 1, 2))[0]
    size = 3 if baked == "of three" else 1
    head, weights = (
        HEAD,
        {**WEIGHTS, "shape": np.array([size, 6]), "many": np.array([size, 6, 1, 1])},
    )
    if baked in ("Reshape", "of three"):
        head = [helper.make_node("Reshape", ["g", "shape"], ["h"]), HEAD[1]]
    if baked == "Expand":
        weights["zero"] = np.zeros((1, 1, 1, 1), np.float32)
        head = [
            helper.make_node("Expand", ["zero", "many"], ["z"]),
            helper.make_node("Concat", ["z", "g"], ["w"], axis=1),
            helper.make_node("Slice", ["w", "from", "to", "at"], ["v"]),
            helper.make_node("Flatten", ["v"], ["h"]),
            HEAD[1],
        ]
        weights |= {"from": np.array([6]), "to": np.array([12]), "at": np.array([1])}
    path = save(
        tmp_path / "baked.onnx",
        BODY + head,
        weights,
        (size if baked != "of three" else "batch", 3, 8, 8),
    )
    one, variables = graphs.to_net(graphs.open_graph(path))
    for count in (1, 2, 5):
        np.testing.assert_allclose(
            jitted(one)(variables, IMAGES[:count])[0], expected[:count], rtol=1e-5, atol=1e-5
        )


def test_channels_last_graph(tmp_path, found):
    """As tf2onnx and Keras export: the first operation turns the axes."""
    turn = helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])
    body = [
        turn,
        helper.make_node("Conv", ["t", *BODY[0].input[1:]], ["c"], pads=[1, 1, 1, 1]),
        *BODY[1:],
    ]
    opened = graphs.open_graph(save(tmp_path / "last.onnx", body + HEAD, shape=("n", 8, 8, 3)))
    net, variables = graphs.to_net(opened)
    expected = in_onnxruntime(found.path, IMAGES.transpose(0, 3, 1, 2))[0]
    assert not opened.channels_first and opened.image_shape == (8, 8, 3)
    np.testing.assert_allclose(jitted(net)(variables, IMAGES)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_logits_are_what_a_last_softmax_reads(tmp_path, net, op):
    opened = graphs.open_graph(
        save(tmp_path / "soft.onnx", [*BODY, *HEAD, helper.make_node(op, ["y"], ["p"])], output="p")
    )
    same, variables = graphs.to_net(opened)
    assert opened.graph.answer == op
    np.testing.assert_allclose(
        jitted(same)(variables, IMAGES)[0], jitted(net[0])(net[1], IMAGES)[0]
    )


def test_normalisation_inside_is_found_and_is_no_weight(tmp_path):
    mean, std = (
        np.array(v, np.float32).reshape(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    )
    first = [
        helper.make_node("Sub", ["x", "mean"], ["a"]),
        helper.make_node("Div", ["a", "std"], ["b"]),
    ]
    body = [
        *first,
        helper.make_node("Conv", ["b", *BODY[0].input[1:]], ["c"], pads=[1, 1, 1, 1]),
        *BODY[1:],
    ]
    opened = graphs.open_graph(
        save(tmp_path / "in.onnx", body + HEAD, {**WEIGHTS, "mean": mean, "std": std})
    )
    np.testing.assert_allclose(opened.mean, [0.4, 0.5, 0.6], rtol=1e-6)
    np.testing.assert_allclose(opened.std, [0.2, 0.3, 0.4], rtol=1e-6)
    _, variables = graphs.to_net(opened)
    assert set(variables["params"]) == {"c", "n", "d", "f"}


def test_no_normalisation_inside(found):
    assert (found.mean, found.std) == (None, None)


def test_own_normalisation_is_the_first_operation(found, net):
    plain, variables = net
    other, _ = graphs.to_net(found, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    shifted = (IMAGES - np.array([0.1, 0.2, 0.3], np.float32)) / np.array(
        [0.5, 0.6, 0.7], np.float32
    )
    np.testing.assert_allclose(
        jitted(other)(variables, IMAGES)[0],
        jitted(plain)(variables, shifted)[0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_training_uses_the_moments_of_the_batch_as_pytorch_does(net):
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    apply, variables = net[0].apply, net[1]
    w = {name: torch.tensor(array) for name, array in WEIGHTS.items()}
    x = F.conv2d(torch.tensor(IMAGES).permute(0, 3, 1, 2), w["c.weight"], w["c.bias"], padding=1)
    mean, var = w["n.running_mean"].clone(), w["n.running_var"].clone()
    x = F.relu(F.batch_norm(x, mean, var, w["n.weight"], w["n.bias"], training=True, momentum=0.1))
    x = F.relu(F.conv2d(x, w["d.weight"], w["d.bias"], stride=2)).mean((2, 3))
    logits, moments = jax.jit(lambda v, x: apply(v, x, train=True))(variables, IMAGES)
    np.testing.assert_allclose(
        logits, F.linear(x, w["f.weight"], w["f.bias"]), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(moments["n"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments["n"]["var"], var, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        np.testing.assert_array_equal,
        jitted(net[0])(variables, IMAGES)[1],
        variables["batch_stats"],
    )


def test_outputs_show_norms_convolutions_without_one_and_features(net):
    logits, shown = jax.jit(net[0].outputs)(net[1], IMAGES)
    assert {name: value.shape for name, value in shown.items()} == {
        "n": (5, 8, 8, 4),
        "d": (5, 3, 3, 6),
        "features": (5, 6),
    }
    assert list(net[0].outputs(net[1], IMAGES)[1]) == ["n", "d", "features"], (
        "in order of execution"
    )
    np.testing.assert_allclose(logits, jitted(net[0])(net[1], IMAGES)[0])


@pytest.fixture(scope="module")
def bounds(net):
    shown = jax.jit(net[0].outputs)(net[1], IMAGES)[1]
    cut = lambda v, q: np.quantile(np.asarray(v).reshape(-1, v.shape[-1]), q, axis=0).astype(
        np.float32
    )
    found = {
        name: {"lower": cut(value, 0.2), "upper": cut(value, 0.7)} for name, value in shown.items()
    }
    found["d"] |= {"mean": floats(6), "std": floats(6) ** 2 + 0.5}
    return found


def test_bounds_clip_and_shift_layers_by_name(net, bounds):
    apply, outputs, variables = (
        jitted(net[0]),
        jax.jit(net[0].outputs),
        {**net[1], "bounds": bounds},
    )
    _, shown = outputs(variables, IMAGES)
    for name, value in shown.items():
        value = np.asarray(value)
        assert (value >= bounds[name]["lower"] - 1e-6).all() and (
            value <= bounds[name]["upper"] + 1e-6
        ).all()
    raw = np.asarray(outputs({**net[1], "bounds": {"n": bounds["n"]}}, IMAGES)[1]["d"])
    moved = np.clip(
        (raw - bounds["d"]["mean"]) / bounds["d"]["std"], bounds["d"]["lower"], bounds["d"]["upper"]
    )
    np.testing.assert_allclose(shown["d"], moved, rtol=1e-5, atol=1e-5)
    assert not np.allclose(apply(variables, IMAGES)[0], apply(net[1], IMAGES)[0])


def test_frozen_variables_answer_alike_and_cannot_be_trained(net, bounds):
    plain, variables = net
    for given in (variables, {**variables, "bounds": bounds}):
        frozen = plain.frozen(given)
        assert "n" not in frozen["params"] and frozen["folded"]["n"]["shift"].shape == (4,)
        chex.assert_trees_all_equal(plain.frozen(frozen), frozen)
        np.testing.assert_allclose(
            jitted(plain)(frozen, IMAGES)[0], jitted(plain)(given, IMAGES)[0], rtol=1e-5, atol=1e-5
        )
    with pytest.raises(UserError, match="cannot be trained"):
        plain.apply(plain.frozen(variables), IMAGES, train=True)


@pytest.mark.parametrize("other", ["bias of a convolution", "factor", "scale of its own"])
def test_a_parameter_that_a_norm_shares_is_its_own(tmp_path, other):
    """Folding and repairs change it for the norm alone, and the written file too."""
    inputs, more = ["n.weight", "n.bias", "n.running_mean", "n.running_var"], []
    if other == "bias of a convolution":
        inputs[1] = "c.bias"
    elif other == "factor":
        more = [
            helper.make_node("Reshape", ["n.weight", "tall"], ["t"]),
            helper.make_node("Mul", ["m", "t"], ["n"]),
        ]
    else:
        inputs[1] = "n.weight"
    norm = helper.make_node("BatchNormalization", ["c", *inputs], ["m" if more else "n"])
    nodes = [BODY[0], norm, *more, *BODY[2:], *HEAD]
    path = save(tmp_path / "shared.onnx", nodes, {**WEIGHTS, "tall": np.array([4, 1, 1])})
    opened, given = graphs.open_graph(path), IMAGES.transpose(0, 3, 1, 2)
    net, variables = graphs.to_net(opened)
    apply = lambda variables: net.apply(variables, IMAGES)[0]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(apply(variables), in_onnxruntime(path, given)[0])
    close(apply(net.frozen(variables)), apply(variables))
    (layer,) = variables["batch_stats"]
    new = jax.tree.map(lambda a: a, variables)
    new["params"][layer] = jax.tree.map(lambda a: a + 0.3, new["params"][layer])
    assert not np.allclose(apply(new), apply(variables))
    back = tmp_path / "back.onnx"
    write.write(back, opened, new)
    close(in_onnxruntime(back, given)[0], apply(new))
    close(apply(net.frozen(new)), apply(new))


def test_norms_that_share_through_an_identity_keep_the_names(tmp_path):
    """PyTorch's exporter stores equal tensors once."""
    inputs = ["c", "n.weight", "n.bias", "n.running_mean", "n.running_var"]
    twin = ["m", "twin.weight", *inputs[2:]]
    nodes = [
        BODY[0],
        helper.make_node("Identity", ["n.weight"], ["twin.weight"]),
        helper.make_node("BatchNormalization", inputs, ["m"]),
        helper.make_node("BatchNormalization", twin, ["n"]),
        *BODY[2:],
        *HEAD,
    ]
    opened = graphs.open_graph(save(tmp_path / "twins.onnx", nodes))
    assert {"n.weight", "twin.weight", "n.bias_copy"} <= set(write.prepare(opened)[0].tensors)


def test_an_export_in_training_mode_is_refused(tmp_path):
    inputs = ["c", "n.weight", "n.bias", "n.running_mean", "n.running_var"]
    more = [["n", "mean", "var"], ["n", "mean", "var", "mean2", "var2"]]
    for opset, outputs, settings in ((17, more[0], {"training_mode": 1}), (11, more[1], {})):
        norm = helper.make_node("BatchNormalization", inputs, outputs, **settings)
        path = save(tmp_path / "t.onnx", [BODY[0], norm, *BODY[2:], *HEAD], opset=opset)
        with pytest.raises(UserError, match=r"of node 'n': .*in training mode; call .eval"):
            graphs.open_graph(path)
    for ratio, active in ((0.5, True), (0.0, True), (0.5, False)):
        drop = helper.make_node("Dropout", ["h", "ratio", "active"], ["z"])
        head = [HEAD[0], drop, helper.make_node("Gemm", ["z", *HEAD[1].input[1:]], ["y"], transB=1)]
        settings = {"ratio": np.float32(ratio), "active": np.array(active)}
        path = save(tmp_path / "d.onnx", [*BODY, *head], {**WEIGHTS, **settings})
        if ratio and active:
            with pytest.raises(UserError, match=r"Dropout of node 'z': .*training mode"):
                graphs.open_graph(path)
        else:
            graphs.open_graph(path)


def test_a_further_output_that_is_not_supported_is_named(tmp_path):
    norm = helper.make_node("LayerNormalization", ["h", "n6"], ["l", "mean"])
    head = [HEAD[0], norm, helper.make_node("Add", ["l", "mean"], ["z"])]
    head.append(helper.make_node("Gemm", ["z", *HEAD[1].input[1:]], ["y"], transB=1))
    path = save(tmp_path / "l.onnx", [*BODY, *head], {**WEIGHTS, "n6": floats(6)})
    with pytest.raises(UserError, match="value 'mean' is an output that is not supported"):
        graphs.open_graph(path)


def test_fresh_variables_have_the_same_form(net):
    fresh = net[0].init(jax.random.key(0))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, net[1])
    assert not np.allclose(fresh["params"]["d"]["kernel"], net[1]["params"]["d"]["kernel"])


def test_mapped_over_variables_as_one_by_one(net):
    """Many students at once, each with weights of its own."""
    many = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), net[1])
    both = jax.jit(jax.vmap(lambda v: net[0].apply(v, IMAGES)[0]))(many)
    np.testing.assert_allclose(both[0], jitted(net[0])(net[1], IMAGES)[0], rtol=1e-4, atol=1e-5)


def test_written_unchanged_is_the_same_bit_for_bit(tmp_path, found, net):
    back = tmp_path / "back.onnx"
    write.write(back, found, net[1])
    old, new = (onnx.load(str(path)) for path in (found.path, back))
    stored = lambda model: {
        t.name: numpy_helper.to_array(t).tobytes() for t in model.graph.initializer
    }
    assert stored(old) == stored(new)
    assert [(n.op_type, list(n.input), list(n.output)) for n in old.graph.node] == [
        (n.op_type, list(n.input), list(n.output)) for n in new.graph.node
    ]
    onnx.checker.check_model(str(back), full_check=True)


def test_bounds_are_written_as_nodes(tmp_path, found, net, bounds):
    back, variables = tmp_path / "back.onnx", {**net[1], "bounds": bounds}
    write.write(back, found, variables)
    onnx.checker.check_model(str(back), full_check=True)
    expected = jitted(net[0])(variables, IMAGES)[0]
    np.testing.assert_allclose(
        in_onnxruntime(back, IMAGES.transpose(0, 3, 1, 2))[0], expected, rtol=1e-5, atol=1e-5
    )
    again, read = graphs.to_net(graphs.open_graph(back))
    np.testing.assert_allclose(jitted(again)(read, IMAGES)[0], expected, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(read) == jax.tree.structure(net[1]), (
        "bounds are settings, not weights"
    )


def test_guarded_net_is_written_whole(tmp_path, found, net, bounds):
    labels = np.unique(jitted(net[0])(net[1], IMAGES)[0].argmax(-1))
    other = jax.tree.map(lambda a: a * 0.5, net[1]["batch_stats"])
    corrected = [{**net[1], "bounds": bounds, "batch_stats": other} for _ in labels]
    path, targets = tmp_path / "guarded.onnx", [int(label) for label in labels]
    write_guarded.write_guarded(path, found, net[1], corrected, targets)
    onnx.checker.check_model(str(path), full_check=True)
    expected = jitted(guard.make(net[0], targets))(guard.pack(net[1], corrected), IMAGES)[0]
    logits, suspect = in_onnxruntime(path, IMAGES.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(suspect, jitted(net[0])(net[1], IMAGES)[0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(logits, suspect)


def test_size_that_the_file_leaves_open_must_be_given(tmp_path):
    path = save(tmp_path / "open.onnx", BODY + HEAD, shape=("n", 3, "h", "w"))
    with pytest.raises(UserError, match="--image-shape"):
        graphs.open_graph(path)
    assert graphs.open_graph(path, image_shape=(12, 10, 3)).image_shape == (12, 10, 3)
    with pytest.raises(UserError, match="images of"):
        graphs.open_graph(pathlib.Path(path), image_shape=(12, 10, 1))


def test_half_precision_is_computed_in_float32_and_kept_in_the_file(tmp_path, net, bounds):
    """Weights of two bytes: what is written back has their type, bounds too."""
    half = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    nodes = [
        helper.make_node("Cast", ["x"], ["h16"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h16", *BODY[0].input[1:]], ["c"], pads=[1, 1, 1, 1]),
        *BODY[1:],
        HEAD[0],
        helper.make_node("Gemm", ["h", "f.weight", "f.bias"], ["z"], transB=1),
        helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT),
    ]
    opened = graphs.open_graph(save(tmp_path / "half.onnx", nodes, half))
    plain, variables = graphs.to_net(opened)
    found = jitted(plain)(variables, IMAGES)[0]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, jitted(net[0])(net[1], IMAGES)[0], rtol=2e-2, atol=2e-2)
    back = tmp_path / "back.onnx"
    write.write(back, opened, {**variables, "bounds": bounds})
    onnx.checker.check_model(str(back), full_check=True)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(back)).graph.initializer}
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float16)}
    expected = jitted(plain)({**variables, "bounds": bounds}, IMAGES)[0]
    (answer,) = in_onnxruntime(back, IMAGES.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(answer, expected, rtol=5e-2, atol=5e-2)
