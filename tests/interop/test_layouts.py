"""State_dicts are matched by name, refused by name, and come back as they were where nothing
changed."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import torch_twins as twins

from jaxbd.base import UserError
from jaxbd.interop import layouts
from jaxbd.models import build


def _resnet18(naming="torchvision", stem="cifar", classes=10, width=4):
    return twins.tensors(
        twins.randomise(twins.ResNet((2, 2, 2, 2), classes, width, stem, naming), seed=1)
    )


def _vgg(classes=10, width=4, side=32):
    return twins.tensors(twins.randomise(twins.SmallVGG(classes, width, side), seed=1))


def test_spec_is_read_off_names_and_shapes():
    spec = layouts.recognise(_resnet18("kuangliu", "imagenet", classes=6, width=12)).spec
    assert spec == build.Spec(
        arch="resnet18",
        classes=6,
        image_shape=(224, 224, 3),
        options={"width": 12, "stem": "imagenet"},
    )
    assert layouts.recognise(_resnet18()).spec.image_shape == (32, 32, 3)
    spec = layouts.recognise(_resnet18(stem="64px")).spec
    assert (spec.image_shape, spec.options["stem"]) == ((64, 64, 3), "64px")
    assert layouts.recognise(_resnet18(), image_shape=(64, 48, 3)).spec.image_shape == (64, 48, 3)
    assert layouts.recognise(_vgg(side=48)).spec.image_shape == (48, 48, 3)
    assert layouts.recognise(
        twins.tensors(twins.WideResNet(40, 2, 10, 4, channels=1))
    ).spec == build.Spec(arch="wrn40-2", classes=10, image_shape=(32, 32, 1), options={"width": 4})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_round_trip_returns_the_original_arrays(dtype):
    cast = lambda t: t.astype(dtype) if t.dtype == np.float32 else t
    tensors = {name: cast(tensor) for name, tensor in _resnet18().items()}
    tensors["fc.bias"] = np.linspace(0, 1, 10).astype(
        dtype
    )  # in float64 not representable in float32
    layout = layouts.recognise(tensors)
    variables = layouts.to_variables(tensors, layout)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    back = layouts.to_tensors(variables, layout, tensors)
    assert list(back) == list(tensors)
    assert all(
        back[name].dtype == t.dtype and back[name].tobytes() == t.tobytes()
        for name, t in tensors.items()
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_only_what_changed_is_written(dtype):
    tensors = {
        n: t.astype(dtype) if t.dtype == np.float32 else t for n, t in _resnet18("kuangliu").items()
    }
    layout = layouts.recognise(tensors)
    variables = layouts.to_variables(tensors, layout)
    scale = variables["params"]["layer2_0"]["shortcut_norm"]["scale"]
    variables["params"]["layer2_0"]["shortcut_norm"]["scale"] = scale.at[1].add(1.0)
    back = layouts.to_tensors({**variables, "bounds": {}}, layout, tensors)
    assert [n for n in tensors if back[n] is not tensors[n]] == ["layer2.0.shortcut.1.weight"]
    changed, original = back["layer2.0.shortcut.1.weight"], tensors["layer2.0.shortcut.1.weight"]
    assert changed.dtype == dtype
    np.testing.assert_allclose(changed - original, np.eye(8)[1], atol=2e-3)
    assert back["bn1.num_batches_tracked"] == 17


def test_a_changed_convolution_comes_back_in_pytorch_order():
    tensors = _vgg()
    layout = layouts.recognise(tensors)
    variables = layouts.to_variables(tensors, layout)
    variables["params"]["conv1_0"]["kernel"] = (
        variables["params"]["conv1_0"]["kernel"].at[0, 2, 3, 5].set(9.0)
    )
    variables["params"]["head"]["kernel"] = (
        variables["params"]["head"]["kernel"].at[100, 7].set(8.0)
    )
    back = layouts.to_tensors(variables, layout, tensors)
    assert np.argwhere(back["features.8.weight"] != tensors["features.8.weight"]).tolist() == [
        [5, 3, 0, 2]
    ]
    assert np.argwhere(back["classifier.weight"] != tensors["classifier.weight"]).tolist() == [
        [7, 100]
    ]


def test_values_that_do_not_fit_the_files_type_are_refused():
    tensors = {
        n: t.astype(np.float16) if t.dtype == np.float32 else t for n, t in _resnet18().items()
    }
    layout = layouts.recognise(tensors)
    variables = layouts.to_variables(tensors, layout)
    variables["params"]["head"]["bias"] = variables["params"]["head"]["bias"].at[0].set(1e6)
    with pytest.raises(UserError, match=r"fc\.bias do not fit float16"):
        layouts.to_tensors(variables, layout, tensors)


def test_order_in_the_file_means_nothing():
    tensors = _resnet18()
    shuffled = dict(sorted(tensors.items(), reverse=True))
    one, other = (
        layouts.to_variables(each, layouts.recognise(each)) for each in (tensors, shuffled)
    )
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_tensors_of_one_shape_follow_their_names():
    tensors = _resnet18()
    first, second = "layer1.0.conv1.weight", "layer1.1.conv2.weight"
    swapped = {
        {first: second, second: first}.get(name, name): tensor for name, tensor in tensors.items()
    }
    params = layouts.to_variables(swapped, layouts.recognise(swapped))["params"]
    np.testing.assert_array_equal(
        params["layer1_0"]["conv1"]["kernel"], tensors[second].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(
        params["layer1_1"]["conv2"]["kernel"], tensors[first].transpose(2, 3, 1, 0)
    )


def test_a_renamed_tensor_is_not_matched_by_position():
    tensors = {n.replace("layer1.0.conv1", "layer1.0.conv_a"): t for n, t in _resnet18().items()}
    with pytest.raises(
        UserError, match=r"1 missing \(layer1\.0\.conv1\.weight\); 1 extra \(layer1\.0\.conv_a"
    ):
        layouts.recognise(tensors)


@pytest.mark.parametrize(
    "name", ["conv1.weight", "fc.weight", "layer3.1.bn2.running_var", "layer4.0.bn1.bias"]
)
def test_a_missing_tensor_is_named(name):
    tensors = {n: t for n, t in _resnet18().items() if n != name}
    with pytest.raises(UserError, match=rf"1 missing \({name}\)"):
        layouts.recognise(tensors)


def test_extra_and_misshaped_tensors_are_named_and_counted():
    tensors = _resnet18()
    tensors |= {f"other.{i}\n": np.zeros(3, np.float32) for i in range(9)}
    tensors["layer1.0.bn1.weight"] = np.ones(5, np.float32)
    with pytest.raises(
        UserError, match=r"9 extra \(other\.0\\n, .* and 5 more\); 1 of another shape"
    ) as caught:
        layouts.recognise(tensors)
    assert "layer1.0.bn1.weight is 5, expected 4" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_counter_without_its_norm_is_extra_and_old_files_may_lack_counters():
    tensors = _resnet18()
    old = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    layout = layouts.recognise(old)
    assert list(layouts.to_tensors(layouts.to_variables(old, layout), layout, old)) == list(old)
    with pytest.raises(UserError, match=r"extra \(fc\.num_batches_tracked\)"):
        layouts.recognise(tensors | {"fc.num_batches_tracked": np.zeros((), np.int64)})


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, {}, "no known architecture"),
        ({"a": np.ones(3, np.float32)}, {}, "its tensors are a; known: "),
        ({"conv1.weight": np.ones((0, 3, 3, 3), np.float32)}, {}, "conv1.weight are empty"),
        (_resnet18(), {"arch": "resnet99"}, "unknown architecture 'resnet99'"),
        (
            _resnet18(),
            {"arch": "resnet34"},
            "do not fit resnet34 in torchvision naming: .* missing",
        ),
        (_resnet18(), {"arch": "vgg"}, "do not fit vgg"),
        (_resnet18(), {"image_shape": (32, 32, 1)}, "images of 3 channels, not 1"),
        (_vgg(), {"image_shape": (64, 64, 3)}, "made for 32x32 images, not 64x64"),
        (
            _resnet18() | {"fc.bias": np.zeros(10, np.int8)},
            {},
            r"1 not floating-point \(fc\.bias\)",
        ),
        (
            _resnet18() | {"conv1.weight": np.ones((4, 3, 9, 9), np.float32)},
            {},
            "conv1.weight is 4x3x9x9",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tensors, options, message):
    with pytest.raises(UserError, match=message):
        layouts.recognise(tensors, **options)


def test_variables_of_another_net_are_refused():
    tensors = _resnet18()
    layout = layouts.recognise(tensors)
    other = layouts.recognise(_resnet18(width=8))
    with pytest.raises(UserError, match="not those of resnet18"):
        layouts.to_tensors(layouts.to_variables(_resnet18(width=8), other), layout, tensors)


TWINS = {
    "cnn": lambda: twins.SmallCNN(10, 4),
    "mobilenet": lambda: twins.MobileNet(10, 4),
    "preactresnet18": lambda: twins.PreActResNet18(10, 4),
    "resnet18": lambda: twins.ResNet((2, 2, 2, 2), 10, 4, "cifar", "torchvision"),
    "resnet34": lambda: twins.ResNet((3, 4, 6, 3), 10, 4, "cifar", "torchvision"),
    "vgg": lambda: twins.SmallVGG(10, 4, side=16),
    "wrn16-1": lambda: twins.WideResNet(16, 1, 10, 4),
    "wrn28-10": lambda: twins.WideResNet(28, 10, 10, 1),
    "wrn40-1": lambda: twins.WideResNet(40, 1, 10, 4),
    "wrn40-2": lambda: twins.WideResNet(40, 2, 10, 4),
}


@pytest.mark.parametrize("arch", sorted(build.MODULES))
def test_nets_of_ours_load_strictly_in_pytorch_and_are_recognised_again(arch):
    width = 1 if arch == "wrn28-10" else 4
    spec = build.Spec(arch=arch, classes=10, image_shape=(16, 16, 3), options={"width": width})
    layout = layouts.export_names(spec)
    assert len(set(layout.names.values())) == len(layout.names)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(build.net(spec).init, jax.random.key(0))
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1, leaf.shape), jnp.float32), shapes
    )
    tensors = layouts.to_tensors(variables, layout)
    TWINS[arch]().load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items()}, strict=True)
    again = layouts.recognise(tensors, image_shape=(16, 16, 3))
    assert (again.spec.arch, again.names) == (arch, layout.names)
    assert all(
        map(
            np.array_equal,
            jax.tree.leaves(variables),
            jax.tree.leaves(layouts.to_variables(tensors, again)),
        )
    )


def test_depth_of_the_small_cnn_is_read_off_the_file():
    spec = build.Spec(
        arch="cnn", classes=3, image_shape=(8, 8, 1), options={"width": 2, "stages": 2}
    )
    tensors = layouts.to_tensors(
        build.net(spec).init(jax.random.key(0)), layouts.export_names(spec)
    )
    assert layouts.recognise(tensors, image_shape=(8, 8, 1)).spec == spec
