"""Images that fit a model: its classes first, the pictures' own size, its preprocessing."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxbd.base import UserError
from jaxbd.data import load
from jaxbd.interop import load as models
from jaxbd.interop import matching
from jaxbd.interop.load import Model
from jaxbd.models import build

SPEC = build.Spec(arch="cnn", classes=4, image_shape=(32, 32, 1), options={"width": 4})


def stripes(side, label):
    """A picture with `label` + 1 white stripes, each a twelfth of it."""
    image = np.zeros((side, side), np.uint8)
    for number in range(label + 1):
        image[(2 * number + 1) * side // 12 :][: side // 12] = 255
    return image


def pictures(place, sides, names="abcd"):
    rng = np.random.default_rng(0)
    for row in range(80):
        label, side = row % 4, sides[row % len(sides)]
        folder = place / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        image = np.roll(stripes(side, label), rng.integers(0, 3), 0)
        Image.fromarray(image).save(folder / f"{row:02}.png")
    return str(place)


def counting(side, spec=SPEC):
    """A net that counts stripes, on pictures of `side` pixels and no others."""

    def apply(variables, images):
        white = 12 * images.mean((1, 2, 3))
        distance = jnp.square(white[:, None] - jnp.arange(1.0, 5.0)[None])
        return -distance if images.shape[1] == side else distance

    return Model(spec, build.from_apply(apply), {"params": {}}, "0" * 64, "net.pth", None, None)


@pytest.mark.parametrize("side", [12, 24, 40])
def test_pictures_that_agree_keep_their_size(tmp_path, side):
    source = matching.Source(spec=pictures(tmp_path, [side]))
    model, dataset, table = matching.match(counting(side), source)
    assert model.spec.image_shape == (side, side, 1) == dataset.images.shape[1:]
    assert table.used.size == (side, side) and table.used.accuracy == 1


@pytest.mark.parametrize("side", [32, 48, 64])
def test_pictures_that_do_not_are_tried_at_several_sizes(tmp_path, side):
    """The net's usual side is 32."""
    source = matching.Source(spec=pictures(tmp_path, [48, 96, 97]))
    found = matching.match(counting(side), source)
    assert found.table.used.size == (side, side) == found.dataset.images.shape[1:3]
    assert found.table.used.accuracy == 1 and found.model.spec.image_shape == (side, side, 1)
    assert {row.size[0] for row in found.table.rows} >= ({32} if side == 32 else {32, 48, 64})


def test_a_stated_size_is_kept(tmp_path):
    source = matching.Source(spec=pictures(tmp_path, [24]))
    spec = dataclasses.replace(SPEC, image_shape=(12, 12, 1))
    found = matching.match(counting(12, spec), source, fixed_size=True)
    assert found.table.used.size == (12, 12) == found.dataset.images.shape[1:3]


def test_counts_of_classes_come_before_anything_else(tmp_path):
    place = pictures(tmp_path, [24])
    (tmp_path / "a" / "bad.png").write_bytes(b"no image")
    wide = counting(24, dataclasses.replace(SPEC, classes=10))
    with pytest.raises(UserError, match=r"4 class folders .* the model has 10 classes"):
        matching.match(wide, matching.Source(spec=place))


def test_the_models_own_names_and_stated_ones_order_the_classes(tmp_path):
    place = pictures(tmp_path / "d", [24], names="dcba")
    own = counting(24, dataclasses.replace(SPEC, class_names=("d", "c", "b", "a")))
    assert matching.match(own, matching.Source(spec=place)).table.used.accuracy == 1
    (tmp_path / "names.txt").write_text("d\nc\nb\na\n")
    stated = matching.Source(spec=place, class_names=pathlib.Path(tmp_path / "names.txt"))
    found = matching.match(counting(24), stated)
    assert found.table.used.accuracy == 1 and found.dataset.class_names == ("d", "c", "b", "a")
    plain = matching.read(matching.Source(spec=place), counting(24), (24, 24, 1), None)
    assert plain.class_names == ("a", "b", "c", "d")
    assert sorted(3 - plain.labels) == sorted(found.dataset.labels)
    assert (plain.labels[0], found.dataset.labels[0]) == (0, 3)


def test_arrays_keep_their_size(tmp_path):
    images = np.stack([stripes(24, row % 4) for row in range(80)])
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(80) % 4)
    model, _, table = matching.match(counting(24), matching.Source(spec=str(tmp_path / "d.npz")))
    assert model.spec.image_shape == (24, 24, 1) and table.used.accuracy == 1


# nets of one output


@pytest.fixture(scope="module")
def sigmoid(tmp_path_factory):
    """A state_dict of one output, and the net of two that it was cut from."""
    spec = dataclasses.replace(SPEC, classes=2, image_shape=(16, 16, 1))
    net = build.net(spec)
    variables = net.init(jax.random.key(3))
    path = tmp_path_factory.mktemp("sigmoid") / "net.pth"
    blank = Model(spec, net, variables, "0" * 64, "net.pth", None, None)
    models.save_model(path.with_name("two.pth"), blank, variables)
    two = models.open_model(path.with_name("two.pth"), image_shape=(16, 16, 1))
    head = {name: leaf for name, leaf in two.container.tensors.items() if name.startswith("head")}
    tensors = {**two.container.tensors}
    tensors |= {name: leaf[1:] - leaf[:1] for name, leaf in head.items()}
    container = two.container._replace(tensors=tensors)
    models.containers.write(path, container, tensors, "torch-zip")
    return path, net, variables


def test_a_net_of_one_output_becomes_one_of_two(sigmoid, tmp_path):
    path, net, variables = sigmoid
    model = models.open_model(path, image_shape=(16, 16, 1))
    assert model.spec.classes == 2
    images = jax.random.uniform(jax.random.key(0), (5, 16, 16, 1))
    found, expected = (
        n.apply(v, images)[0] for n, v in ((model.net, model.variables), (net, variables))
    )
    assert (found[:, 0] == 0).all()
    np.testing.assert_allclose(jax.nn.softmax(found), jax.nn.softmax(expected), atol=1e-5)
    models.save_model(tmp_path / "again.pth", model, model.variables)
    again = models.open_model(tmp_path / "again.pth", image_shape=(16, 16, 1))
    assert {n: t.shape for n, t in again.container.tensors.items()} == {
        n: t.shape for n, t in model.container.tensors.items()
    }
    np.testing.assert_array_equal(again.net.apply(again.variables, images)[0], found)


def test_what_a_repair_did_to_either_logit_is_written(sigmoid, tmp_path):
    path, _, _ = sigmoid
    model = models.open_model(path, image_shape=(16, 16, 1))
    changed = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape),
        model.variables,
    )
    models.save_model(tmp_path / "changed.pth", model, changed)
    again = models.open_model(tmp_path / "changed.pth", image_shape=(16, 16, 1))
    images = jax.random.uniform(jax.random.key(0), (5, 16, 16, 1))
    found, expected = (
        jax.nn.softmax(n.net.apply(v, images)[0])
        for n, v in ((again, again.variables), (model, changed))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_digits_need_no_size():
    assert load.load("digits", image_shape=(0, 0, 1)).images.shape == (1797, 16, 16, 1)
