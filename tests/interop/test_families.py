"""Every family of architectures computes what PyTorch computes, whatever its depth and width."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_families as nets
import torch_twins as twins

from jaxbd.base import UserError
from jaxbd.interop import forms, layouts, load
from jaxbd.models import build, families

torch.set_num_threads(1)
LEAKY = lambda x: F.leaky_relu(x, 0.1)
STEM = lambda width: torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)

CASES = {
    "ResNet-14 option A": (
        lambda: nets.Stages(lambda i, w, s: nets.CifarBlock(i, w, s, "A"), (2, 2, 2), 4, 1, 7),
        "ResNet-14",
        {"pad": "both"},
        16,
    ),
    "ResNet-8 zeros at the end": (
        lambda: nets.Stages(lambda i, w, s: nets.CifarBlock(i, w, s, "end"), (1, 1, 1), 4, 1, 7),
        "ResNet-8",
        {"pad": "end"},
        16,
    ),
    "ResNet-20 option B": (
        lambda: nets.Stages(
            lambda i, w, s: nets.CifarBlock(i, w, s, "B"), (3, 3, 3), 4, 1, 7, "fc"
        ),
        "ResNet-20",
        {"pool": False},
        16,
    ),
    "bottlenecks": (
        lambda: nets.Stages(nets.Bottleneck, (2, 1, 2, 1), 4, 4, 7),
        "ResNet-20",
        {},
        16,
    ),
    "bottlenecks of ImageNet": (
        lambda: nets.Stages(
            lambda i, w, s: nets.Bottleneck(i, w, s, shortcut="downsample"),
            (1, 2, 1, 1),
            4,
            4,
            7,
            "fc",
            STEM(4),
        ),
        "ResNet-17",
        {"pool": True, "stem_stride": 2},
        32,
    ),
    "grouped, wide inside, of ImageNet": (
        lambda: nets.Stages(
            lambda i, w, s: nets.Bottleneck(i, w, s, groups=4, shortcut="downsample", wide=True),
            (1, 1, 1, 1),
            4,
            4,
            7,
            "fc",
            STEM(4),
        ),
        "ResNeXt-14",
        {},
        64,
    ),
    "RegNet": (
        lambda: nets.Stages(
            lambda i, w, s: nets.Bottleneck(i, w, s, groups=4, wide=True),
            (1, 1, 1, 1),
            4,
            4,
            7,
            strides=(1, 1, 2, 2),
        ),
        "RegNet-14",
        {},
        16,
    ),
    "grouped": (
        lambda: nets.Stages(lambda i, w, s: nets.Bottleneck(i, w, s, groups=2), (1, 1, 1), 4, 4, 7),
        "ResNeXt-11",
        {},
        16,
    ),
    "squeeze and excitation": (
        lambda: nets.Stages(
            lambda i, w, s: nets.Bottleneck(i, w, s, squeeze=True), (1, 1, 1), 4, 4, 7
        ),
        "SENet-11",
        {},
        16,
    ),
    "preactivated bottlenecks": (
        lambda: nets.PreActResNet((1, 2, 1, 1), 4, 7),
        "PreActResNet-17",
        {"raw": False},
        16,
    ),
    "WRN with biases": (
        lambda: nets.BiasedWideResNet(1, 3, 4, 7),
        "WRN-10-3",
        {"raw": True, "late": True},
        16,
    ),
    "WRN-10-3": (
        lambda: twins.WideResNet(10, 3, 7, 4),
        "WRN-10-3",
        {"raw": False, "late": False},
        16,
    ),
    "VGG with BatchNorm": (
        lambda: nets.sequential_vgg((4, 4, "M", 6, 6, "M", 8, "M"), (7,), True, 2),
        "VGG-8",
        {"pools": "01011"},
        16,
    ),
    "VGG of three linear layers": (
        lambda: nets.sequential_vgg((4, 4, "M", 6, 6, "M", 8, "M"), (9, 8, 7), False, 2),
        "VGG-8",
        {"pools": "01011"},
        16,
    ),
    "the small VGG": (lambda: twins.SmallVGG(7, 4, 16), "vgg", {"activation": "elu"}, 16),
    "the small VGG with ReLU": (
        lambda: twins.SmallVGG(7, 4, 16, activation=torch.nn.ReLU),
        "vgg",
        {"activation": "relu"},
        16,
    ),
    "LeNet": (lambda: nets.LeNet(7), "CNN-5", {"padded": False}, 28),
    "LeNet with padding": (lambda: nets.LeNet(7, 3, 32, 2), "CNN-5", {"padded": True}, 32),
    "three convolutions without padding": (
        lambda: nets.Plain(
            3, [(4, 3, 0, 1), (6, 3, 0, 1), (8, 3, 0, 1)], (128, 9, 7), "110", LEAKY
        ),
        "CNN-5",
        {"pools": "110", "padded": False, "activation": "leaky0.1"},
        32,
    ),
    "LeNet-5 of MNIST": (
        lambda: nets.Plain(
            1, [(6, 5, 2, 1), (8, 5, 0, 1)], (200, 7), "11", torch.sigmoid, F.avg_pool2d
        ),
        "CNN-3",
        {"padded": "first", "pooling": "avg", "activation": "sigmoid"},
        28,
    ),
    "pooling at the start": (
        lambda: nets.Plain(3, [(4, 3, 1, 1)] * 4, (64, 7), "1100", norm=True),
        "CNN-5",
        {"pools": "1100", "activation": "relu"},
        16,
    ),
    "mean over positions": (
        lambda: nets.Plain(3, [(4, 3, 1, 1)] * 5, (4, 7), "01010", norm=True),
        "VGG-8",
        {"pools": "01010", "padded": True},
        16,
    ),
    "strides in place of pooling": (
        lambda: nets.Plain(3, [(4, 3, 1, 2), (6, 3, 1, 2)], (96, 7), "00"),
        "CNN-3",
        {"pools": "11", "pooling": "stride"},
        16,
    ),
    "a dropout in a Sequential": (
        nets.sequential_with_dropout,
        "CNN-4",
        {"pools": "011", "padded": True},
        16,
    ),
    "MobileNetV2": (lambda: nets.MobileNetV2(7), "MobileNetV2", {"strides": "1222121"}, 64),
    "timm's MobileNetV2": (lambda: nets.TimmMobile(7, F.relu6), "MobileNetV2", {}, 32),
    "timm's MNASNet": (
        lambda: nets.TimmMobile(7, F.relu, (3, 3, 5, 5, 3, 5, 3)),
        "MobileNetV2",
        {},
        64,
    ),
    "DenseNet": (lambda: nets.DenseNet((2, 3, 1, 2), 3, 7), "DenseNet-21", {}, 16),
}
"""Name -> (the PyTorch net, what it is called, what its form is, side of the images)."""


def read(case: str):
    """The PyTorch net with random weights, its tensors, and the layout that was recognised."""
    make, title, form, side = CASES[case]
    twin = twins.randomise(make(), seed=sum(map(ord, case)))
    tensors = twins.tensors(twin)
    channels = next(t.shape[1] for t in tensors.values() if t.ndim == 4)
    layout = layouts.recognise(tensors, image_shape=(side, side, channels))
    assert build.title(layout.spec) == title
    images = nets.images(side, 3)[..., :channels]
    return twin, tensors, layout, form, images


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_pytorch_net(case):
    twin, tensors, layout, form, images = read(case)
    spec = forms.keep(layout.forms, [f"{name}={value}" for name, value in form.items()])[0]
    variables = layouts.to_variables(tensors, layout)
    logits, stats = jax.jit(build.net(spec).apply)(variables, images)
    with torch.no_grad():
        expected = twin(nets.chw(images))
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    nets.assert_close(logits, expected, 1e-5)
    back = layouts.to_tensors({**variables, "batch_stats": stats}, layout, tensors)
    assert all(back[name] is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize("case", ["ResNet-14 option A", "DenseNet", "VGG with BatchNorm"])
def test_training_mode_uses_and_updates_the_moments_as_pytorch_does(case):
    twin, tensors, layout, form, images = read(case)
    spec = forms.keep(layout.forms, [f"{name}={value}" for name, value in form.items()])[0]
    variables = layouts.to_variables(tensors, layout)
    logits, stats = build.net(spec).apply(variables, images, train=True)
    with torch.no_grad():
        nets.assert_close(logits, twin.train()(nets.chw(images)))
    after = layouts.to_tensors({**variables, "batch_stats": stats}, layout, tensors)
    for name, expected in twins.tensors(twin).items():
        if name.endswith(("running_mean", "running_var")):
            assert not np.array_equal(expected, tensors[name])
            np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", ["ResNet-14 option A", "LeNet", "MobileNetV2"])
def test_a_net_of_a_family_is_kept_in_a_folder(case, tmp_path):
    _, tensors, layout, _, images = read(case)
    torch.save({n: torch.from_numpy(t) for n, t in tensors.items()}, tmp_path / "m.pth")
    model = load.open_model(tmp_path / "m.pth", image_shape=layout.spec.image_shape)
    load.save_model(tmp_path / "folder", model, model.variables)
    again = load.open_model(tmp_path / "folder")
    assert again.spec == model.spec
    np.testing.assert_array_equal(
        again.net.apply(again.variables, images)[0], model.net.apply(model.variables, images)[0]
    )


@pytest.mark.parametrize(("case", "biased"), [("ResNet-14 option A", False), ("LeNet", True)])
def test_a_net_of_one_output_has_two_classes(case, biased, tmp_path):
    """Its probabilities are PyTorch's sigmoid, in every form, and it goes back as it was."""
    twin, _, _, form, images = read(case)
    name, last = [(n, m) for n, m in twin.named_modules() if isinstance(m, torch.nn.Linear)][-1]
    single = torch.nn.Linear(last.in_features, 1, bias=biased)
    twin.set_submodule(name, single)
    torch.save(twin.state_dict(), tmp_path / "m.pth")
    model = load.open_model(tmp_path / "m.pth", image_shape=images.shape[1:])
    model = forms.stated(model, [f"{name}={value}" for name, value in form.items()])
    assert {spec.classes for spec in (model.spec, *model.forms)} == {2}
    logits = model.net.apply(model.variables, images)[0]
    with torch.no_grad():
        expected = torch.sigmoid(twin(nets.chw(images)))
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 1:], expected, atol=1e-5)
    head = {**model.variables["params"][name]}
    head["kernel"] = head["kernel"].at[:, 1].add(0.5)
    changed = {**model.variables, "params": {**model.variables["params"], name: head}}
    load.save_model(tmp_path / "changed.pth", model, changed)
    single.load_state_dict(
        {
            key.removeprefix(f"{name}."): value
            for key, value in torch.load(tmp_path / "changed.pth").items()
            if key.startswith(f"{name}.")
        }
    )
    with torch.no_grad():
        expected = torch.sigmoid(twin(nets.chw(images)))
    logits = model.net.apply(changed, images)[0]
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 1:], expected, atol=1e-5)
    load.save_model(tmp_path / "folder", model, changed)
    again = load.open_model(tmp_path / "folder")
    np.testing.assert_array_equal(again.net.apply(again.variables, images)[0], logits)


def test_code_of_the_users_that_returns_one_logit_is_refused(tmp_path, monkeypatch):
    one = lambda tensors, images: images.mean((1, 2)) @ tensors["w.weight"].T
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(make=lambda: one))
    torch.save({"w.weight": torch.ones(1, 3)}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="returns one logit; let it return two"):
        load.open_model(tmp_path / "m.pth", arch="mine:make", image_shape=(8, 8, 3))


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_akamasters_names_are_read_at_any_depth(depth):
    count = (depth - 2) // 6
    block = lambda i, w, s: nets.CifarBlock(i, w, s, "A")
    tensors = twins.tensors(nets.Stages(block, (count,) * 3, 16, 1, 10))
    spec = layouts.recognise(tensors).spec
    assert build.title(spec) == f"ResNet-{depth}" and spec.image_shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layer2.0.conv2.weight", None, "no known architecture|missing"),
        ("layer2.0.extra.weight", np.ones((4, 4, 3, 3), np.float32), "no known architecture|extra"),
        ("layer1.0.bn1.weight", np.ones(5, np.float32), "no known architecture|another shape"),
    ],
)
def test_a_net_with_one_layer_more_or_less_is_none(name, tensor, message):
    _, tensors, _, _, _ = read("ResNet-14 option A")
    changed = {key: value for key, value in tensors.items() if key != name}
    if tensor is not None:
        changed[name] = tensor
    with pytest.raises(UserError, match=message):
        layouts.recognise(changed)


def test_a_convolution_has_groups_only_where_its_family_has_them():
    net = families.Layers({"a": (8, 2, 1, 1)}, frozenset(), jnp.float32, False)
    with pytest.raises(families.Mismatch, match="a does not take 4 channels"):
        net.conv("a", jnp.zeros((1, 8, 8, 4)))


def test_images_for_which_a_plain_net_is_too_large_are_refused():
    tensors = twins.tensors(nets.LeNet(7, 3, 32))
    assert layouts.recognise(tensors).spec.image_shape == (32, 32, 3)
    with pytest.raises(UserError, match=r"no images of 12x12, but of side 32, .*resize"):
        layouts.recognise(tensors, image_shape=(12, 12, 3))


def test_the_number_of_forms_is_bounded():
    small = layouts.recognise(twins.tensors(nets.Plain(3, [(4, 3, 1, 1)] * 8, (64, 7), "1" * 8)))
    assert len(small.forms) <= 4 * families.chain.MOST_FORMS
    plan = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
    with torch.device("meta"):
        shapes = {
            n: t.shape for n, t in nets.sequential_vgg(plan, (9, 9), False, 7).state_dict().items()
        }
    blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    large = layouts.recognise(blank, image_shape=(224, 224, 3)).forms
    assert len(large) == 4 and large[0].options["pools"] == "0101001001001"


def test_what_is_not_read_from_weights_alone_is_told_by_name():
    names = {"blocks.0.attn.qkv.weight": (12, 4), "blocks.0.attn.qkv.bias": (12,)}
    with pytest.raises(UserError, match=r"a transformer .*ONNX"):
        layouts.recognise({name: np.ones(shape, np.float32) for name, shape in names.items()})


def test_forms_that_the_user_states(tmp_path):
    _, _, layout, _, _ = read("ResNet-14 option A")
    assert [spec.options["pad"] for spec in layout.forms] == ["both", "end"]
    assert forms.keep(layout.forms, ["pad=end"]) == [layout.forms[1]]
    with pytest.raises(UserError, match="pad=left is not a form of this net; known: pad=both"):
        forms.keep(layout.forms, ["pad=left"])


def test_a_table_of_layers_that_no_net_has_is_refused():
    for layers in ({"a": "4x"}, {"a": "0x3"}, {"a": "9" * 9}, {"a\x1b": "3"}, {"a": 3}):
        with pytest.raises(UserError, match="is described by"):
            build.net(
                build.Spec(
                    arch="residual", classes=2, image_shape=(8, 8, 3), options={"layers": layers}
                )
            )
    huge = {f"l{i}": "99999x99999" for i in range(3)}
    with pytest.raises(UserError, match="is not built"):
        build.families.parse(huge)


def test_every_family_is_jittable_for_any_batch():
    _, tensors, layout, _, images = read("DenseNet")
    apply = jax.jit(build.net(layout.spec).apply)
    variables = layouts.to_variables(tensors, layout)
    few, many = apply(variables, images)[0], apply(variables, jnp.concatenate([images] * 2))[0]
    np.testing.assert_allclose(many[:3], few, rtol=1e-5, atol=1e-5)
