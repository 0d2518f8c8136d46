"""The preprocessing check: picks what the net was made for, and says no where nothing fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd.base import Batch, UserError
from jaxbd.interop import preprocess, probe
from jaxbd.interop.load import Model
from jaxbd.models import build
from jaxbd.models.norm import NORMALISATIONS

SPEC = build.Spec(arch="cnn", classes=4, image_shape=(8, 8, 3), options={"width": 4})
COLOURS = np.array([[0.2, 0.3, 0.6], [0.3, 0.3, 0.5], [0.2, 0.4, 0.5], [0.3, 0.4, 0.6]], np.float32)
"""Mean colour of each class: near each other, so that a wrong scale or order of channels sends them
elsewhere."""


def coloured(count=200, seed=0):
    """uint8 images [count, 8, 8, 3] of the four colours with a little noise."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 4).astype(np.int32)
    images = COLOURS[labels][:, None, None] + rng.uniform(-0.05, 0.05, (count, 8, 8, 3))
    return Batch(np.round(images * 255).astype(np.uint8), labels)


def model(normalisation="none", order="rgb", spec=SPEC):
    """A net that answers with the class whose colour, under its own preprocessing, is nearest to
    the image's."""
    mean, std = (np.asarray(values, np.float32) for values in NORMALISATIONS[normalisation])
    centres = (COLOURS if order == "rgb" else COLOURS[:, ::-1]) - mean
    variables = {"params": {"centres": jnp.asarray(centres / std)}, "batch_stats": {}}

    def apply(variables, inputs):
        colour = inputs.mean((1, 2))
        return -jnp.square(colour[:, None] - variables["params"]["centres"][None]).sum(-1)

    return Model(spec, build.from_apply(apply), variables, "0" * 64, "net.pth", None, None)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("name", ["none", "half", "cifar10"])
def test_the_right_preprocessing_is_found(name, order):
    table = preprocess.check(model(name, order), coloured())
    assert (table.used.normalisation, table.used.channels, table.used.accuracy) == (
        name,
        order,
        1.0,
    )
    names = NORMALISATIONS.keys() - probe.STATED_ONLY
    assert {row.normalisation for row in table.rows} == names and not table.stated
    assert len(table.rows) == 2 * len(names) - len(probe.BGR_ONLY)


def test_a_normalisation_in_the_net_is_undone_before_another_is_tried():
    # the net's own first operation is that of `spec`, as `build.net` makes it
    spec = dataclasses.replace(SPEC, mean=(0.5,), std=(0.25,))
    bare = model("cifar10")
    wrapped = lambda variables, images: bare.net.apply(variables, (images - 0.5) / 0.25)[0]
    table = preprocess.check(bare._replace(spec=spec, net=build.from_apply(wrapped)), coloured())
    assert table.used.normalisation == "cifar10" and table.used.accuracy == 1


def test_what_is_stated_is_taken_though_another_is_better():
    table = preprocess.check(model("cifar10"), coloured(), NORMALISATIONS["cifar10-b"])
    assert table.stated and table.used.normalisation == "given"
    assert table.used.mean == NORMALISATIONS["cifar10-b"][0]
    assert max(row.accuracy for row in table.rows) == 1.0


def test_a_model_that_states_its_own_is_measured_once():
    table = preprocess.check(model(), coloured(), NORMALISATIONS["none"], only_given=True)
    assert [row.normalisation for row in table.rows] == ["given"]


def test_a_wrong_statement_is_refused_and_the_right_one_named():
    with pytest.raises(
        UserError, match=r"not the preprocessing .* with normalisation none it is 1.000$"
    ):
        preprocess.check(model("none"), coloured(), ((0.0,), (1e4,)), only_given=True)
    with pytest.raises(UserError, match="the images look BGR to this model"):
        preprocess.check(model("none", "bgr"), coloured(), ((0.0,), (1e4,)))


def test_the_wrong_data_get_no_verdict():
    images, labels = coloured()
    shuffled = Batch(images, np.random.default_rng(1).permutation(labels))
    with pytest.raises(UserError, match=r"not the preprocessing \(or not the data\) of this model"):
        preprocess.check(model(), shuffled)


def test_a_constant_answer_is_chance_however_uneven_the_classes():
    images, labels = coloured()
    images, labels = (
        np.concatenate([part, part[(labels == 2) | (np.arange(200) < 80)]])
        for part in (images, labels)
    )
    constant = model()._replace(net=build.from_apply(lambda v, x: jnp.eye(4)[jnp.full(len(x), 2)]))
    table_of = lambda net: preprocess.check(net, Batch(images, labels))
    assert table_of(model()).used.accuracy == 1
    with pytest.raises(UserError, match="near chance"):
        table_of(constant)


def test_images_of_one_class_tell_nothing():
    images, labels = coloured()
    with pytest.raises(UserError, match=r"100 % of them with the same label.* several classes"):
        preprocess.check(model(), Batch(images[labels == 1], labels[labels == 1]))


def test_too_few_images_tell_nothing():
    images, labels = coloured(5)
    with pytest.raises(UserError, match=r"5 images.* give more images"):
        preprocess.check(model(), Batch(images, labels))


def test_logits_that_are_not_finite_are_named():
    broken = model()._replace(
        variables={"params": {"centres": jnp.full((4, 3), jnp.nan)}, "batch_stats": {}}
    )
    with pytest.raises(UserError, match="NaN"):
        preprocess.check(broken, coloured())


@pytest.mark.parametrize(("chance", "count"), [(0.1, 256), (0.5, 256), (0.01, 256), (0.25, 50)])
def test_what_is_needed_is_above_chance_and_can_be_reached(chance, count):
    needed = preprocess.needed(chance, count)
    errors = (needed - chance) / np.sqrt(chance * (1 - chance) / count)
    assert errors >= 5 - 1e-9 and needed <= 1
    assert needed >= min(2 * chance, chance + (1 - chance) / 4) - 1e-9


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_adopting_makes_it_the_nets_first_operation(order):
    net = build.net(SPEC)
    variables = net.init(jax.random.key(0))
    opened = Model(SPEC, net, variables, "0" * 64, "net.pth", None, None)
    row = preprocess.Row("cifar10", order, *NORMALISATIONS["cifar10"], 1.0)
    adopted = preprocess.adopt(opened, preprocess.Table((row,), row, 1, 0.1, 0.2, False))
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 3))
    mean, std = (jnp.array(values) for values in NORMALISATIONS["cifar10"])
    fed = (images if order == "rgb" else images[..., ::-1]) - mean[None, None, None]
    expected, _ = net.apply(variables, fed / std[None, None, None])
    np.testing.assert_allclose(adopted.net.apply(variables, images)[0], expected, atol=1e-5)
    assert adopted.spec.mean == NORMALISATIONS["cifar10"][0] and opened.spec.mean == (0.0,)


def test_grey_images_have_no_order_and_no_colour_constants():
    spec = dataclasses.replace(SPEC, image_shape=(8, 8, 1))
    grey = model()._replace(
        spec=spec,
        net=build.from_apply(
            lambda v, x: -jnp.square(x.mean((1, 2)) - jnp.array([[0.2, 0.4, 0.6, 0.8]]))
        ),
    )
    labels = (np.arange(100) % 4).astype(np.int32)
    images = np.broadcast_to(
        (51 * (labels + 1)).astype(np.uint8)[:, None, None, None], (100, 8, 8, 1)
    )
    table = preprocess.check(grey, Batch(images, labels))
    single = {name for name, (mean, _) in NORMALISATIONS.items() if len(mean) < 2}
    assert {(row.normalisation, row.channels) for row in table.rows} == {
        (name, "grey") for name in single
    }
    assert table.used.normalisation == "none"


def test_the_record_is_plain():
    content = preprocess.as_record(preprocess.check(model(), coloured()))
    assert content["used"]["normalisation"] == "none" and content["rows"][0]["accuracy"] == 1.0
    assert {"images", "chance", "needed", "stated"} <= content.keys()
