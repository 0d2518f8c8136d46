"""The moments that the first normalisation layer stored tell a wrong preprocessing from a poor
model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_preprocess import COLOURS, SPEC, coloured

from jaxbd.base import Batch, Net, UserError
from jaxbd.interop import moments, preprocess
from jaxbd.interop.load import Model
from jaxbd.models import build
from jaxbd.models.norm import NORMALISATIONS, normalise

IMAGES = np.random.default_rng(0).uniform(size=(64, 16, 16, 3)).astype(np.float32) ** 2


@pytest.mark.parametrize("name", ["none", "half", "imagenet", "per-image", "0-255", "centred"])
@pytest.mark.parametrize("arch", ["cnn", "wrn16-1"])
def test_a_net_knows_the_images_it_was_trained_on(name, arch):
    spec = build.Spec(arch=arch, classes=4, image_shape=(16, 16, 3))
    net = build.net(spec)
    variables = net.init(jax.random.key(0))
    inputs = np.asarray(normalise(jnp.asarray(IMAGES), *NORMALISATIONS[name]))
    layer = moments.first_layer(net, variables, IMAGES[:1])
    # the layer is fresh: its outputs are its inputs
    output = np.asarray(net.outputs(variables, jnp.asarray(inputs))[1][layer])
    stored = {"mean": output.mean((0, 1, 2)), "var": output.var((0, 1, 2)) * (1 + 1e-5)}
    place = variables["batch_stats"]
    for part in layer.split("/"):
        place = place[part]
    place.update({key: jnp.asarray(value) for key, value in stored.items()})
    found = {
        other: moments.measure(
            net,
            variables,
            layer,
            np.asarray(normalise(jnp.asarray(IMAGES), *NORMALISATIONS[other])),
        ).distance
        for other in ("none", "half", "imagenet", "per-image", "0-255", "centred")
    }
    assert min(found, key=found.get) == name and found[name] < 0.01
    assert all(distance > 0.5 for other, distance in found.items() if other != name), found


def test_a_layer_is_found_in_order_of_execution_and_not_behind_bounds():
    net = build.net(dataclasses.replace(SPEC, arch="wrn16-1", options={}))
    variables = net.init(jax.random.key(0))
    assert moments.first_layer(net, variables, IMAGES[:1, :8, :8]) == "block1_0/bn1"
    bounded = {
        **variables,
        "bounds": {"block1_0": {"bn1": {"lower": -jnp.ones(16), "upper": jnp.ones(16)}}},
    }
    assert moments.first_layer(net, bounded, IMAGES[:1, :8, :8]) is None
    bare = build.from_apply(lambda variables, images: images.mean((1, 2)))
    assert moments.first_layer(bare, {"params": {}}, IMAGES[:1]) is None


def test_dead_channels_do_not_count():
    net = build.net(SPEC)
    variables = net.init(jax.random.key(0))
    layer = moments.first_layer(net, variables, IMAGES[:1, :8, :8])
    inputs = IMAGES[:, :8, :8]
    before = moments.measure(net, variables, layer, inputs)
    scale = variables["params"][layer]["scale"]
    variables["params"][layer]["scale"] = scale.at[0].set(0.0)
    after = moments.measure(net, variables, layer, inputs)
    assert np.isfinite(after.distance) and 0.2 < after.spread / before.spread < 5
    variables["params"][layer]["scale"] = jnp.zeros_like(scale)
    assert moments.measure(net, variables, layer, inputs) is None


def colour_model(mean, std, spec=SPEC):
    """A net that answers with the nearest colour, after a layer with the moments of `coloured`
    under (x - mean) / std."""
    pixels = (coloured().images / np.float32(255) - mean) / std
    stored = {"mean": pixels.mean((0, 1, 2)), "var": pixels.var((0, 1, 2))}
    centres = ((COLOURS - mean) / std - stored["mean"]) / np.sqrt(stored["var"])

    def outputs(variables, images):
        stats = variables["batch_stats"]["norm"]
        flat = lambda value: jnp.asarray(value)[None, None, None]
        out = (images - flat(stats["mean"])) / jnp.sqrt(flat(stats["var"]))
        distance = jnp.square(out.mean((1, 2))[:, None] - variables["params"]["centres"][None])
        return -distance.sum(-1), {"norm": out}

    def apply(variables, images, *, train=False):
        return outputs(variables, images)[0], variables["batch_stats"]

    net = Net(None, apply, outputs)
    variables = {"params": {"centres": jnp.asarray(centres)}, "batch_stats": {"norm": stored}}
    return Model(spec, net, variables, "0" * 64, "net.pth", None, None)


def partly_wrong(share):
    """`coloured` with a share of the labels moved by one."""
    images, labels = coloured()
    wrong = np.random.default_rng(1).uniform(size=len(labels)) < share
    return Batch(images, np.where(wrong, (labels + 1) % 4, labels).astype(np.int32))


@pytest.mark.parametrize("name", ["none", "half", "imagenet"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_an_honest_model_of_any_accuracy_is_accepted(name, share):
    data = partly_wrong(share)
    table = preprocess.check(colour_model(*NORMALISATIONS[name]), data)
    assert table.used.normalisation == name and table.used.distance < 0.01 and not table.doubt
    assert table.used.accuracy == pytest.approx(1 - share, abs=0.08)
    # candidates with far other moments are not measured where one is convincing
    assert all(row.distance <= 1 + 1e-3 for row in table.rows)


def test_a_mediocre_best_with_other_moments_is_refused():
    model = colour_model(0.25, 0.35)  # of nobody's table
    data = partly_wrong(0.2)
    with pytest.raises(UserError) as caught:
        preprocess.check(model, data)
    message = str(caught.value)
    assert "is probably not this model's preprocessing" in message and "\n" not in message
    assert "inputs of layer norm" in message and "--accept-accuracy" in message
    table = preprocess.check(model, data, accept=True)
    assert table.doubt and 0.25 < table.used.accuracy < 0.95
    stated = preprocess.check(model, data, ((0.25,), (0.35,)))
    assert not stated.doubt and stated.used.accuracy > 0.75


def test_a_wrong_statement_is_doubted_but_followed():
    """The person has the last word."""
    table = preprocess.check(colour_model(0.0, 1.0), partly_wrong(0.2), ((0.05,), (1.0,)))
    assert table.stated and "probably not" in table.doubt


def test_moments_choose_between_candidates_that_are_as_accurate():
    row = lambda name, accuracy, distance: preprocess.Row(
        name, "rgb", (0.0,), (1.0,), accuracy, distance
    )
    rows = [row("a", 0.80, 0.6), row("b", 0.79, 0.1), row("c", 0.60, 0.0), row("d", 0.785, 0.12)]
    assert preprocess.choose(rows, 256).normalisation == "b"
    unknown = [each._replace(distance=None) for each in rows]
    assert preprocess.choose(unknown, 256).normalisation == "a"


def test_standardising_each_image_is_adopted(tmp_path):
    from jaxbd.interop import load as models

    net = build.net(SPEC)
    variables = net.init(jax.random.key(0))
    opened = Model(SPEC, net, variables, "0" * 64, "net.pth", None, None)
    row = preprocess.Row("per-image", "rgb", (), (), 1.0)
    adopted = preprocess.adopt(opened, preprocess.Table((row,), row, 1, 0.1, 0.2, False))
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 3))
    each = np.asarray(images)
    mean, std = (getattr(each, name)((1, 2, 3), keepdims=True) for name in ("mean", "std"))
    expected, _ = net.apply(variables, jnp.asarray((each - mean) / std))
    np.testing.assert_allclose(adopted.net.apply(variables, images)[0], expected, atol=1e-4)
    models.save_model(tmp_path / "m", adopted, variables)
    again = models.open_model(tmp_path / "m")
    assert again.spec.mean == again.spec.std == ()
    np.testing.assert_allclose(again.net.apply(variables, images)[0], expected, atol=1e-4)
