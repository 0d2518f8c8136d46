"""The command line on ONNX files of a backdoored net: verdicts as of its source, and repairs that
onnxruntime confirms."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from jaxbd.cli.main import main  # noqa: E402
from jaxbd.data import load as data  # noqa: E402
from jaxbd.interop import load  # noqa: E402

pytestmark = pytest.mark.slow
DATA = ["--data", "digits", "--limit", "300"]
VICTIM = "--arch cnn --width 4 --num-steps 240 --image-shape 8 8 1 --target 3 --poison-rate 0.2"


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    path = tmp_path_factory.mktemp("verbs") / "victim"
    assert main(["attack", "--data", "digits", "--out", str(path), *VICTIM.split()]) == 0
    return path


@pytest.fixture(scope="module")
def exported(victim):
    path = victim.parent / "victim.onnx"
    assert main(["convert", str(victim), "--out", str(path)]) == 0
    return path


def answers(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.transpose(0, 3, 1, 2)})


def rates(path):
    return json.loads(path.read_text())


def test_scan_says_what_it_says_of_the_source(victim, exported):
    small = ["--steps", "60", "--batch-size", "32", "--targets", "3"]
    codes, found = [], []
    for model in (victim, exported):
        out = victim.parent / f"{model.name}.json"
        codes.append(main(["scan", str(model), *DATA, *small, "--out", str(out)]))
        found.append(rates(out))
    assert codes[0] == codes[1] and codes[0] in (0, 1, 3)
    assert found[0]["model"]["sha256"] != found[1]["model"]["sha256"]


def test_unlearned_and_written_back(victim, exported):
    out = victim.parent / "repaired.onnx"
    known = ["--trigger", str(victim / "trigger.npz"), "--target", "3"]
    command = ["repair", "--method", "unlearn", str(exported), *DATA, *known]
    assert main([*command, "--out", str(out)]) == 0
    stated = rates(victim.parent / "repaired.repair.json")
    assert stated["after"]["attack_success_rate"] < stated["before"]["attack_success_rate"] - 0.3
    images = data.load("digits", image_shape=(8, 8, 1)).images.astype(np.float32) / 255
    model = load.open_model(out)
    expected = jax.jit(model.net.apply)(model.variables, images[:64])[0]
    np.testing.assert_allclose(answers(out, images[:64])[0], expected, rtol=1e-4, atol=1e-4)


def test_corrected_and_written_as_a_guarded_graph(victim, exported):
    out = victim.parent / "guarded.onnx"
    known = ["--trigger", str(victim / "trigger.npz"), "--target", "3"]
    steps = ["--steps", "40"]
    command = ["repair", "--method", "bna", str(exported), *DATA, *known, *steps]
    assert main([*command, "--out", str(out)]) == 0
    stated = rates(victim.parent / "guarded.repair.json")
    assert stated["after"]["attack_success_rate"] < stated["before"]["attack_success_rate"] - 0.1
    assert stated["after"]["clean_accuracy"] > stated["before"]["clean_accuracy"] - 0.06
    images = data.load("digits", image_shape=(8, 8, 1)).images[:64].astype(np.float32) / 255
    guarded, suspect = answers(out, images)
    whole, plain = load.open_model(out), load.open_model(exported)
    for model, found in ((whole, guarded), (plain, suspect)):
        expected = jax.jit(model.net.apply)(model.variables, images)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    asked = suspect.argmax(-1) == 3
    assert asked.any() and not asked.all()
    np.testing.assert_array_equal(guarded[~asked], suspect[~asked])
    assert np.abs(guarded[asked] - suspect[asked]).min(-1).max() > 0, "a correction answers there"


def test_evaluate(victim, exported):
    found = []
    for model in (victim, exported):
        out = victim.parent / f"{model.name}.rates.json"
        known = ["--trigger", str(victim / "trigger.npz"), "--target", "3"]
        assert main(["evaluate", str(model), *DATA, *known, "--out", str(out)]) == 0
        found.append(rates(out))
    apart = {"inputs": None, "model": None, "preprocessing": None}
    assert found[0]["attack_success_rate"] > 0.5
    assert {**found[0], **apart} == {**found[1], **apart}
