"""Graph files through the same doors as other model files: open, inspect, scan's and repair's
needs, save."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from jaxbd.base import UserError  # noqa: E402
from jaxbd.cli.main import main as jaxbd  # noqa: E402
from jaxbd.detection import guard  # noqa: E402
from jaxbd.interop import folder, graph_model, inspect, load  # noqa: E402
from jaxbd.interop.layouts import naming  # noqa: E402
from jaxbd.models import build  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = RNG.random((4, 8, 8, 3)).astype(np.float32)
SPEC = build.Spec(
    arch="cnn",
    classes=4,
    image_shape=(8, 8, 3),
    options={"width": 4},
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
)


def in_onnxruntime(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: IMAGES.transpose(0, 3, 1, 2)})


def moved(variables):
    return jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + RNG.uniform(0.1, 0.3, a.shape), a.dtype),
        dict(variables),
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A model folder, and the model in it."""
    path = tmp_path_factory.mktemp("ours") / "model"
    folder.save(path, SPEC, moved(jax.jit(build.net(SPEC).init)(jax.random.key(0))))
    return load.open_model(path)


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    load.save_model(path, ours, ours.variables)
    return path


def answer(model, variables=None):
    return jax.jit(model.net.apply)(model.variables if variables is None else variables, IMAGES)[0]


@pytest.mark.parametrize(
    ("arch", "options", "shape"),
    [
        ("cnn", {"width": 2}, (12, 12, 1)),
        ("cnn", {"width": 2, "norm": False}, (8, 8, 3)),
        pytest.param("mobilenet", {"width": 2}, (32, 32, 3), marks=pytest.mark.slow),
        pytest.param("preactresnet18", {"width": 2}, (32, 32, 3), marks=pytest.mark.slow),
        pytest.param(
            "resnet18", {"width": 2, "stem": "imagenet"}, (64, 64, 3), marks=pytest.mark.slow
        ),
        ("vgg", {"width": 2}, (8, 8, 3)),
        pytest.param("wrn16-1", {"width": 4}, (32, 32, 3), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("with_bounds", [False, True])
def test_our_nets_as_onnx_files(tmp_path, arch, options, shape, with_bounds):
    spec = build.Spec(
        arch=arch, classes=5, image_shape=shape, options=options, mean=(0.4,), std=(0.25,)
    )
    net = build.net(spec)
    variables = moved(jax.jit(net.init)(jax.random.key(1)))
    images = RNG.random((3, *shape)).astype(np.float32)
    if with_bounds:
        variables["bounds"] = folder.unflatten(bounds_of(net, variables, images))["bounds"]
    path = tmp_path / "net.onnx"
    graph_model.writer_of_net(spec, naming.export_names(spec).names, variables, ())(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = np.asarray(jax.jit(net.apply)(variables, images)[0])
    (found,) = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    read = load.open_model(path)
    assert (
        np.abs(jax.jit(read.net.apply)(read.variables, images)[0] - expected).max()
        <= 1e-5 * np.abs(expected).max()
    )
    assert len(read.variables["batch_stats"]) == sum(
        "var" in name for name in folder.flatten(variables)
    ), "norms survive"


def bounds_of(net, variables, images):
    """Bounds that clip a fifth of every layer's values on either side."""
    found = {}
    for layer, values in jax.jit(net.outputs)(variables, images)[1].items():
        flat = np.asarray(values).reshape(-1, values.shape[-1])
        low, high = (np.quantile(flat, share, axis=0).astype(np.float32) for share in (0.2, 0.8))
        found |= {f"bounds/{layer}/lower": low, f"bounds/{layer}/upper": high}
        if f"batch_stats/{layer}/mean" not in folder.flatten(variables):
            found |= {f"bounds/{layer}/mean": 0.1 * low, f"bounds/{layer}/std": 1 + np.abs(low)}
    return found


def test_a_graph_is_known_by_its_content(exported, tmp_path, ours):
    other = tmp_path / "weights.bin"
    other.write_bytes(exported.read_bytes())
    assert graph_model.is_graph(other)
    assert not graph_model.is_graph(tmp_path)
    load.save_model(tmp_path / "w.safetensors", ours, ours.variables)
    load.save_model(tmp_path / "w.pth", ours, ours.variables)
    assert not graph_model.is_graph(tmp_path / "w.safetensors")
    assert not graph_model.is_graph(tmp_path / "w.pth")


def test_it_answers_as_its_source_and_states_its_normalisation(ours, exported):
    model = load.open_model(exported)
    assert (model.spec.arch, model.spec.classes, model.spec.image_shape) == ("onnx", 4, (8, 8, 3))
    assert model.states_normalisation()
    np.testing.assert_allclose(model.graph.mean, SPEC.mean, rtol=1e-6)
    np.testing.assert_allclose(answer(model), answer(ours), rtol=1e-4, atol=1e-5)
    assert load.open_model(exported).net is model.net, "one file's net is made once"


def test_its_layers_are_those_of_its_source(ours, exported):
    """So that a defence that corrects layers does the same to both."""
    model = load.open_model(exported)
    logits, own = jax.jit(ours.net.outputs)(ours.variables, IMAGES)
    same, shown = jax.jit(model.net.outputs)(model.variables, IMAGES)
    np.testing.assert_allclose(same, logits, rtol=1e-4, atol=1e-5)
    assert shown.keys() == own.keys()
    for name, values in shown.items():
        np.testing.assert_allclose(values, own[name], rtol=1e-4, atol=1e-5)
    assert jax.tree.map(np.shape, model.variables) == jax.tree.map(np.shape, ours.variables)


def test_inspect(exported, capsys):
    facts = inspect.describe(exported)
    assert facts["kind"] == "onnx" and not facts["refused"] and facts["nonfinite"] == {}
    assert facts["architecture"] == "graph of onnx, 4 classes, images 8x8x3"
    assert ("conv0.weight", (4, 3, 3, 3), "float32") in facts["tensors"]
    assert jaxbd(["inspect", str(exported)]) == 0
    assert "graph of onnx" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_refused(exported, tmp_path):
    model = load.open_model(exported)
    broken = {
        **model.variables,
        "params": {
            **model.variables["params"],
            "head": {**model.variables["params"]["head"], "bias": jnp.full(4, jnp.nan)},
        },
    }
    load.save_model(tmp_path / "nan.onnx", model, broken)
    with pytest.raises(UserError, match="NaN or infinite"):
        load.open_model(tmp_path / "nan.onnx")


def test_repaired_and_guarded_graphs_are_onnx_files(exported, tmp_path):
    model = load.open_model(exported)
    repaired = moved(model.variables)
    load.save_model(tmp_path / "repaired.onnx", model, repaired)
    np.testing.assert_allclose(
        in_onnxruntime(tmp_path / "repaired.onnx")[0], answer(model, repaired), rtol=1e-4, atol=1e-5
    )
    targets = tuple(int(label) for label in np.unique(answer(model).argmax(-1)))
    packed = guard.pack(
        model.variables,
        [{**model.variables, "batch_stats": moved(model.variables["batch_stats"])}] * len(targets),
    )
    load.save_onnx(tmp_path / "guarded.onnx", model, packed, targets)
    expected = jax.jit(guard.make(model.net, targets).apply)(packed, IMAGES)[0]
    np.testing.assert_allclose(
        in_onnxruntime(tmp_path / "guarded.onnx")[0], expected, rtol=1e-4, atol=1e-5
    )


def test_a_guarded_folder_as_an_onnx_file(ours, tmp_path):
    from jaxbd.interop import guarded

    targets = tuple(int(label) for label in np.unique(answer(ours).argmax(-1)))
    fixed = {**ours.variables, "batch_stats": moved(ours.variables["batch_stats"])}
    guarded.save(
        tmp_path / "guarded", SPEC, guard.pack(ours.variables, [fixed] * len(targets)), targets
    )
    model = load.open_model(tmp_path / "guarded")
    load.save_model(tmp_path / "guarded.onnx", model, model.variables)
    logits, suspect = in_onnxruntime(tmp_path / "guarded.onnx")
    np.testing.assert_allclose(logits, answer(model), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(suspect, answer(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_weights_alone(exported, tmp_path, name):
    model = load.open_model(exported)
    note = load.save_model(tmp_path / name, model, model.variables)
    assert "only the weights" in note
    tensors = load.containers.read(tmp_path / name).tensors
    np.testing.assert_array_equal(tensors["conv0.weight"], model.container.tensors["conv0.weight"])


def test_what_cannot_be_is_said(exported, tmp_path):
    model = load.open_model(exported)
    with pytest.raises(UserError, match="cannot become a model folder"):
        load.save_model(tmp_path / "folder", model, model.variables)
    with pytest.raises(UserError, match="leave --arch out"):
        load.open_model(exported, arch="cnn")


def test_convert(ours, exported, tmp_path, capsys):
    assert jaxbd(["convert", ours.path, "--out", str(tmp_path / "c.onnx")]) == 0
    assert "pixels in [0, 1]" in capsys.readouterr().out
    assert jaxbd(["convert", str(exported), "--out", str(tmp_path / "d.onnx")]) == 0
    np.testing.assert_allclose(
        in_onnxruntime(tmp_path / "d.onnx")[0], in_onnxruntime(tmp_path / "c.onnx")[0]
    )


def test_a_graph_of_one_output_has_two_classes(tmp_path):
    """sigmoid(z) is softmax of (0, z)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kernel = RNG.normal(size=(1, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["g"]),
            helper.make_node("Flatten", ["g"], ["f"]),
            helper.make_node("Gemm", ["f", "fc.weight"], ["z"], transB=1),
            helper.make_node("Sigmoid", ["z"], ["y"]),
        ],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(kernel, "fc.weight")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "one.onnx")
    model = load.open_model(tmp_path / "one.onnx")
    logits = answer(model)
    assert model.spec.classes == 2 and not np.asarray(logits[:, 0]).any()
    chances = jax.nn.softmax(logits)[:, 1:]
    np.testing.assert_allclose(in_onnxruntime(tmp_path / "one.onnx")[0], chances, rtol=1e-5)
    load.save_model(tmp_path / "back.onnx", model, model.variables)
    np.testing.assert_allclose(in_onnxruntime(tmp_path / "back.onnx")[0], chances, rtol=1e-5)
