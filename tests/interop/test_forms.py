"""The form of a net is chosen by its answers on images."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_families as nets
import torch_twins as twins

import jaxbd
from jaxbd.base import Batch, Dataset, UserError
from jaxbd.interop import forms, load, preprocess, screen
from jaxbd.interop.matching import Matched
from jaxbd.interop.probe import Row
from jaxbd.models.families import chain

torch.set_num_threads(1)
IMAGES = np.random.default_rng(1).integers(0, 256, (192, 4, 4, 1), np.uint8)
IMAGES = IMAGES.repeat(2, 1).repeat(2, 2)


@pytest.fixture(autouse=True)
def few_forms(monkeypatch):
    """Fewer forms than usual, to save time."""
    monkeypatch.setattr(chain, "MOST_FORMS", 16)


def plain(pool, act):
    """A small net with random weights, whose answers use all classes."""
    convs = [(6, 3, 1, 1), (8, 3, 1, 1)]
    net = twins.randomise(nets.Plain(1, convs, (32, 5), "11", act, pool), seed=3).eval()
    with torch.no_grad():
        logits = net(nets.chw(IMAGES / np.float32(255)))
        head: Any = net.fc1
        head.bias -= logits.mean(0)
        head.weight /= logits.std(0)[:, None]
        head.bias /= logits.std(0)
        return net, net(nets.chw(IMAGES / np.float32(255))).argmax(1).numpy()


def test_the_form_that_knows_the_labels_is_taken(tmp_path):
    net, labels = plain(F.avg_pool2d, F.elu)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    suspect = jaxbd.open_model(tmp_path / "net.pth", IMAGES, labels)
    options = suspect.source.spec.options
    assert (options["pooling"], options["activation"], options["pools"]) == ("avg", "elu", "11")
    logits, _ = suspect.net.apply(suspect.variables, IMAGES / np.float32(255))
    with torch.no_grad():
        nets.assert_close(logits, net(nets.chw(IMAGES / np.float32(255))), 1e-4)


def choose_among(logits, tmp_path, monkeypatch):
    """The activation chosen for a net with two forms of equal accuracy that answer `logits`."""
    torch.save(twins.SmallVGG(4, 2, 8, 1).state_dict(), tmp_path / "net.pth")
    model = load.open_model(tmp_path / "net.pth")
    row = Row("none", "grey", (0.0,), (1.0,), 0.75)
    table = preprocess.Table((row,), row, 64, 0.25, 0.5, False)
    data = Batch(np.zeros((64, 8, 8, 1), np.uint8), np.zeros(64, np.int32))
    answers = iter(logits)
    monkeypatch.setattr(forms.evaluate, "logits", lambda *_: next(answers))
    monkeypatch.setattr(screen, "distance", lambda *_: None)
    match = lambda candidate, _: Matched(candidate, Dataset(*data, (), ""), table)
    return forms.choose(model, match, lambda _: data).model.spec.options["activation"]


def test_of_equally_accurate_forms_the_one_with_likelier_labels_is_taken(tmp_path, monkeypatch):
    right = np.arange(64) % 4 > 0
    sure = np.eye(4)[np.where(right, 0, 1)] * 3
    unsure = sure + 2 * np.random.default_rng(0).normal(size=sure.shape)
    for logits, expected in (
        ((unsure, sure), "relu"),
        ((sure, unsure), "elu"),
        ((sure, sure), "elu"),
    ):
        assert choose_among(logits, tmp_path, monkeypatch) == expected


def test_forms_that_are_equally_good_but_differ_are_refused(tmp_path, monkeypatch):
    one, other = (np.eye(4)[np.where(np.arange(64) % 4 == rest, 1, 0)] for rest in (0, 1))
    with pytest.raises(UserError, match=r"equally .*activation=elu.*activation=relu.*--form"):
        choose_among((one, other), tmp_path, monkeypatch)


def test_stored_moments_tell_activations_apart(tmp_path):
    act = lambda x: F.leaky_relu(x, 0.2)
    net: Any = nets.Plain(1, [(6, 3, 1, 1), (8, 3, 1, 1)], (32, 5), "11", act, norm=True)
    for layer in (net.bn1, net.bn2):
        layer.momentum = None  # the stored moments become those of the images
    with torch.no_grad():
        twins.randomise(net, seed=2).train()
        for layer in (net.bn1, net.bn2):
            layer.reset_running_stats()
        net(nets.chw(IMAGES / np.float32(255)))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    model = load.open_model(tmp_path / "net.pth", image_shape=(8, 8, 1))
    data = Batch(IMAGES, np.zeros(len(IMAGES), np.int32))
    found = {
        name: screen.distance(forms.stated(model, [f"activation={name}"]), data) or 0
        for name in ("leaky0.2", "relu")
    }
    assert found["leaky0.2"] < 0.01 and found["relu"] > 0.03


def test_images_of_a_size_that_no_form_takes_are_refused(tmp_path):
    net, labels = plain(F.max_pool2d, F.relu)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match="images must be"):
        jaxbd.open_model(tmp_path / "net.pth", IMAGES[:, :5, :5], labels)


def test_confidence_alone_makes_no_form_likelier():
    logits = np.random.default_rng(0).normal(size=(64, 3))
    labels = np.where(np.arange(64) % 4, logits.argmax(1), logits.argmin(1))
    found = screen.likelihoods(logits, labels)
    np.testing.assert_allclose(screen.likelihoods(20 * logits + 3, labels), found, rtol=1e-9)
    assert found.mean() > screen.likelihoods(logits[::-1], labels).mean()
