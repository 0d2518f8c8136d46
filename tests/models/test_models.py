"""Every classifier computes what its PyTorch twin computes, in evaluation and in training mode."""

import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_twins as twins
from twin_cases import CASES, as_torch, assert_close, images_of

from jaxbd.base import UserError
from jaxbd.interop import layouts
from jaxbd.models import build, fold

torch.set_num_threads(1)


def _both(case: str):
    """The twin with random weights, our net and variables read from it by recognition, and
    images."""
    arch, make, width, side = CASES[case]
    twin = twins.randomise(make(width), seed=sum(map(ord, case)))
    layout = layouts.recognise(twins.tensors(twin), image_shape=(side, side, 3))
    assert layout.spec.arch == arch
    return (
        twin,
        build.net(layout.spec),
        layouts.to_variables(twins.tensors(twin), layout),
        images_of(side),
        layout,
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_pytorch_twin(case):
    twin, net, variables, images, _ = _both(case)
    logits, stats = jax.jit(net.apply)(variables, images)
    with torch.no_grad():
        expected = twin(as_torch(images))
    # the net must still tell the images apart, or equal logits would prove little
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max()
    assert_close(logits, expected)
    assert all(
        map(np.array_equal, jax.tree.leaves(stats), jax.tree.leaves(variables["batch_stats"]))
    )


@pytest.mark.parametrize("case", ["resnet18-imagenet-torchvision", "wrn16-1", "vgg"])
def test_training_mode_uses_and_updates_the_moments_as_pytorch_does(case):
    twin, net, variables, images, layout = _both(case)
    before = twins.tensors(twin)
    logits, stats = jax.jit(lambda v, x: net.apply(v, x, train=True))(variables, images)
    with torch.no_grad():
        assert_close(logits, twin.train()(as_torch(images)))
    after = layouts.to_tensors({**variables, "batch_stats": stats}, layout, before)
    for name, expected in twins.tensors(twin).items():
        if name.endswith(("running_mean", "running_var")):
            assert not np.array_equal(expected, before[name])
            np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", ["preactresnet18", "mobilenet", "vgg"])
def test_input_gradients_equal_those_of_the_pytorch_twin(case):
    twin, net, variables, images, _ = _both(case)
    gradient = jax.jit(jax.grad(lambda x: net.apply(variables, x)[0][:, 2].sum()))(images)
    inputs = as_torch(images).requires_grad_()
    twin(inputs)[:, 2].sum().backward()
    assert_close(gradient, inputs.grad.permute(0, 2, 3, 1))


@pytest.mark.parametrize("arch", sorted(build.MODULES))
def test_bfloat16_keeps_parameters_and_statistics_in_float32(arch):
    spec = build.Spec(
        arch=arch, classes=5, image_shape=(16, 16, 3), dtype="bfloat16", options={"width": 4}
    )
    variables, logits = jax.eval_shape(
        lambda key, x: ((v := build.net(spec).init(key)), build.net(spec).apply(v, x)[0]),
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32),
    )
    assert logits.dtype == jnp.float32 and logits.shape == (2, 5)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet18", {"stem": "tiny"}, "stem 'tiny'"),
        ("wrn16-1", {"depth": 18}, "depth 18"),
        ("vgg", {"side": 3}, "side"),
    ],
)
def test_options_that_make_no_net_are_refused(arch, options, message):
    with pytest.raises(UserError, match=message):
        build.module(build.Spec(arch=arch, classes=10, image_shape=(32, 32, 3), options=options))


def test_an_activation_that_the_vgg_does_not_have_is_refused():
    spec = build.Spec(arch="vgg", classes=10, image_shape=(8, 8, 3), options={"activation": "gelu"})
    with pytest.raises(UserError, match="activation elu or relu, not 'gelu'"):
        build.net(spec).init(jax.random.key(0))


def test_images_too_small_for_the_vgg_are_refused():
    net = build.net(build.Spec(arch="vgg", classes=10, image_shape=(7, 9, 3)))
    with pytest.raises(UserError, match="at least 8x8"):
        jax.eval_shape(net.init, jax.random.key(0))


@pytest.mark.parametrize(
    ("file", "first_logits"),
    [
        ("badnets_8_02_ckpt.pth", (0.9306, 4.9086, -0.1523, -1.8751)),
        ("l2_inv_0_02_ckpt.pth", (0.2757, 3.5017, -4.4305, -0.6872)),
    ],
)
def test_published_models_give_their_published_logits(file, first_logits):
    shared = pathlib.Path(__file__).resolve().parents[3] / "shared"
    model, images = shared / "models" / "ibau" / file, shared / "data" / "cifar10" / "test.parquet"
    if not (model.exists() and images.exists()):
        pytest.skip(f"{file} or the CIFAR-10 test images are not on this machine")
    import io

    import pyarrow.parquet
    from PIL import Image

    state = torch.load(model, map_location="cpu", weights_only=True)["net"]
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    layout = layouts.recognise(tensors)
    assert (layout.spec.arch, layout.spec.classes, layout.spec.image_shape) == (
        "vgg",
        10,
        (32, 32, 3),
    )
    row = next(pyarrow.parquet.ParquetFile(images).iter_batches(batch_size=1)).to_pylist()[0]
    encoded = next(value["bytes"] for value in row.values() if isinstance(value, dict))
    image = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.float32) / 255
    logits, _ = build.net(layout.spec).apply(layouts.to_variables(tensors, layout), image[None])
    np.testing.assert_allclose(logits[0, :4], first_logits, atol=1e-3)


def _frozen(arch, dtype="float32"):
    """(net, random variables, the same folded, images) in float64."""
    side = 8 if arch != "vgg" else 16
    spec = build.Spec(
        arch=arch, classes=5, image_shape=(side, side, 3), dtype=dtype, options={"width": 4}
    )
    net, rng = build.net(spec), np.random.default_rng(3)
    shapes = jax.eval_shape(net.init, jax.random.key(0))

    def fill(path, leaf):
        low, high = (0.5, 1.5) if path[-1].key in ("var", "scale") else (-0.5, 0.5)
        return jnp.asarray(rng.uniform(low, high, leaf.shape))

    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    return net, variables, net.frozen(variables), jnp.asarray(rng.uniform(size=(3, side, side, 3)))


@pytest.mark.parametrize(
    "arch", ["cnn", "mobilenet", "preactresnet18", "resnet18", "vgg", "wrn16-1"]
)
def test_frozen_variables_answer_the_same(arch):
    with jax.enable_x64(True):
        net, variables, frozen, images = _frozen(arch, "float64")
        chex.assert_trees_all_equal(net.frozen(frozen), frozen)
        folded = jax.tree.leaves(frozen["folded"])
        assert len(folded) >= 3 and len(jax.tree.leaves(frozen)) == len(
            jax.tree.leaves(variables)
        ) - 3 * len(folded)
        both = jax.jit(lambda v, x: net.outputs(v, x))
        (logits, outputs), (again, shown) = both(variables, images), both(frozen, images)
        np.testing.assert_allclose(again, logits, rtol=1e-9, atol=1e-9)
        assert list(shown) == list(outputs)
        for name, output in outputs.items():
            np.testing.assert_allclose(shown[name], output, rtol=1e-9, atol=1e-9, err_msg=name)


def test_every_architecture_says_what_it_folds():
    assert set(fold.CONVOLUTIONS) == set(build.MODULES)


def test_folding_keeps_bounds_and_convolutions_with_bias():
    with jax.enable_x64(True):
        net, variables, _, images = _frozen("vgg", "float64")
        bounds = {"bn0_0": {"lower": jnp.full(4, -0.1), "upper": jnp.full(4, 0.2)}}
        clipped = {**variables, "bounds": bounds}
        logits, stats = net.apply(net.frozen(clipped), images)
        np.testing.assert_allclose(logits, net.apply(clipped, images)[0], rtol=1e-9, atol=1e-9)
        assert jnp.abs(logits - net.apply(variables, images)[0]).max() > 1e-3
        assert not jax.tree.leaves(stats)


def test_frozen_variables_cannot_be_trained():
    net, _, frozen, images = _frozen("cnn")
    with pytest.raises(UserError, match="folded"):
        net.apply(frozen, images.astype(jnp.float32), train=True)


def test_bfloat16_sums_in_float32():
    """4,096 ones make 4,096; summed in bfloat16 they would stop at 256."""
    ones = jnp.ones((1, 8, 8, 64), jnp.bfloat16)
    conv = nn.Conv(
        1, (8, 8), padding=0, use_bias=False, kernel_init=nn.initializers.ones, dtype=jnp.bfloat16
    )
    dense = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.ones, dtype=jnp.bfloat16)
    for layer, x in ((conv, ones), (dense, ones.reshape(1, -1))):
        assert (
            jax.jit(lambda x, layer=layer: layer.init_with_output(jax.random.key(0), x)[0])(
                x
            ).ravel()
            == 4096
        )
    assert jax.jit(lambda x: x.sum())(ones) == 4096
