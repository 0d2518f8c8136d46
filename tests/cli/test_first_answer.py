"""`jaxbd scan` without data, `jaxbd calibrate`, and scans that are compared with clean models."""

import json
import random
import signal
import subprocess
import sys

import kills
import numpy as np
import pytest

from jaxbd.base import UserError
from jaxbd.cli import common, first_answer
from jaxbd.cli.main import main
from jaxbd.pipelines import margin_scan
from jaxbd.training.run import Run

FAST = ["--margin.starts", "2", "--margin.steps", "150"]
SHORT = [*FAST, "--levels", "0.9", "--steps", "3", "--locate-steps", "3", "--mesa.hidden", "8"]
DATA = ["--data", "digits", "--limit", "300"]


def plant(path, *flags):
    words = ["--arch", "cnn", "--width", "4", "--num-steps", "240", "--image-shape", "8", "8", "1"]
    assert main(["attack", "--data", "digits", "--out", str(path), *words, *flags]) == 0
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("first") / "model", "--no-attack")


def read(path):
    return json.loads(path.read_text())


def test_a_first_answer_needs_no_image_and_is_no_verdict(model, tmp_path, capsys):
    out = tmp_path / "scan.json"
    assert main(["scan", str(model), *FAST, "--out", str(out)]) == 3
    said, found = capsys.readouterr().out, read(out)
    assert "SUSPICIOUS" in said or "NOTHING STANDS OUT" in said
    assert "Margins miss" in said
    assert found["verdict"] == "inconclusive" and found["data"] is None and not found["targets"]
    assert np.shape(found["margin"]["statistics"]) == (10,) and 0 < found["margin"]["p_value"] <= 1
    assert found["model"]["sha256"] in json.dumps(found["model"]["manifest"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "mesa"], "searches with images; give --data"),
        (["--report", "page.html"], "--report shows triggers on images"),
        (["--no-with-margin"], "only margins can be searched"),
    ],
)
def test_what_needs_images_is_refused_without_them(model, tmp_path, capsys, flags, words):
    flags = [str(tmp_path / flag) if flag.endswith("html") else flag for flag in flags]
    assert main(["scan", str(model), *flags]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_form_that_is_assumed_is_said_and_recorded(tmp_path, capsys):
    """Where a net pools, and its activation, leave no trace in its weights."""
    torch = pytest.importorskip("torch")
    # with two classes nothing is searched
    shapes = {"conv1": (4, 1, 3, 3), "conv2": (4, 4, 3, 3), "conv3": (4, 4, 3, 3), "out": (2, 36)}
    state = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "m.pth")

    def answer(*form):
        reading = common.Reading(form=form, image_shape=(12, 12, 1))
        model = first_answer.open_suspect(tmp_path / "m.pth", reading)
        content = first_answer.search(Run(), model, reading, margin_scan.Config())
        return content["model"]["form"], capsys.readouterr().err

    assumed, said = answer()
    assert assumed and f"assuming {' '.join(assumed)} (set it with --form NAME=VALUE" in said
    given = [*assumed[:-1], "activation=tanh"]
    assert answer(*given)[0] == given and "which form" not in answer(*given)[1]
    with pytest.raises(UserError, match="is not a form of this net"):
        answer("activation=none")
    # a repair without images opens the model too
    reading = common.Reading(form=tuple(given), image_shape=(12, 12, 1), normalisation="none")
    alone = common.open_alone(tmp_path / "m.pth", reading)
    assert alone.spec.options["activation"] == "tanh"


def test_targets_are_checked_before_any_image_is_read(model, capsys):
    assert main(["scan", str(model), "--data", "nowhere.npz", "--targets", "12"]) == 2
    assert "target 12 is out of range" in capsys.readouterr().err


def test_a_calibration_grows_and_is_compared_with(model, tmp_path, capsys):
    """One model, the same again, and a scan that is told what the clean model does."""
    out = tmp_path / "null.json"
    command = ["calibrate", str(model), *DATA, *SHORT, "--out", str(out)]
    assert main(command) == 0
    assert "Alarms on 1 clean models" in capsys.readouterr().out
    first = read(out)
    assert [m["architecture"] for m in first["models"]] == ["cnn"]
    assert main(command) == 2 and "give --add to add to it" in capsys.readouterr().err
    assert main([*command, "--add"]) == 0 and read(out) == first
    assert main([*command, "--add", "--batch-size", "9"]) == 2
    assert "different settings" in capsys.readouterr().err and read(out) == first
    scan = tmp_path / "scan.json"
    flags = [*DATA, *SHORT, "--calibration", str(out), "--out", str(scan)]
    assert main(["scan", str(model), *flags]) in (0, 1, 3)
    compared = read(scan)["calibration"]
    assert compared["models"] == compared["of_architecture"] == 1
    # the same model scores as it did: of two models, itself counted in, both score as much
    assert compared["margin_excess"]["p_value"] == 1.0
    assert "of the calibration's 1 clean models" in capsys.readouterr().out


@pytest.mark.slow
def test_ten_kills(model, tmp_path):
    """A calibration killed at any file event goes on with --add, to the same statistics."""
    models = [str(model), str(plant(tmp_path / "second", "--no-attack", "--seed", "1"))]
    command = ["calibrate", *models, *DATA, *SHORT, "--add", "--out"]
    assert main([*command, str(tmp_path / "whole.json")]) == 0
    out, rng, ends = tmp_path / "null.json", random.Random(0), []
    for _ in range(10):
        event = rng.randrange(1, 5)
        call = f"""if True:
            import sys, kills
            from jaxbd.base import UserError
from jaxbd.cli import common, first_answer
from jaxbd.cli.main import main
from jaxbd.pipelines import margin_scan
from jaxbd.training.run import Run
            kills.die_at_file({out.name!r}, {event})
            sys.exit(main({[*command, str(out)]!r}))"""
        words, known = [sys.executable, "-c", call], kills.environment()
        ends.append(subprocess.run(words, env=known, capture_output=True).returncode)
        if ends[-1] == 0:  # it was done before its time came
            out.unlink()
    assert {*ends} <= {0, -signal.SIGKILL} and ends.count(-signal.SIGKILL) > 5
    assert main([*command, str(out)]) == 0
    assert read(out) == read(tmp_path / "whole.json")
    assert not list(tmp_path.glob("null.json?*")), "nothing half-written is in sight"


@pytest.mark.parametrize(
    "content, words", [("{}", "not a calibration"), ("[", "null.json"), (None, "null.json")]
)
def test_a_file_that_is_no_calibration_is_named(model, tmp_path, capsys, content, words):
    path = tmp_path / "null.json"
    if content is not None:
        path.write_text(content)
    assert main(["scan", str(model), *DATA, "--calibration", str(path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "missing: MODEL"),
        (["m", "--method", "mesa"], "has no statistics"),
        (["m", "--targets", "1"], "needs all classes"),
    ],
)
def test_calibrate_says_what_it_lacks(tmp_path, capsys, flags, words):
    out = tmp_path / "null.json"
    assert main(["calibrate", *flags, *DATA, "--out", str(out)]) == 2
    assert words in capsys.readouterr().err and not out.exists()
