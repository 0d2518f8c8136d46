"""`jaxbd convert` with a normalisation of the user's own."""

import json

import jax
import pytest

from jaxbd.cli.main import main
from jaxbd.interop import folder, load
from jaxbd.models import build


@pytest.fixture
def file(tmp_path):
    """An untrained net as a file, which states no normalisation."""
    spec = build.Spec(arch="cnn", classes=3, image_shape=(8, 8, 1), options={"width": 2})
    folder.save(tmp_path / "net", spec, build.net(spec).init(jax.random.key(0)), {})
    model = load.open_model(tmp_path / "net")
    load.save_model(tmp_path / "net.pth", model, model.variables)
    return tmp_path / "net.pth"


def test_a_file_becomes_a_folder_with_its_own_constants(file, tmp_path, capsys):
    command = ["convert", str(file), "--out", str(tmp_path / "out"), "--image-shape", "8", "8", "1"]
    assert main(command) == 2
    assert "give --normalisation, or --mean and --std" in capsys.readouterr().err
    assert main([*command, "--mean", "0.3", "--std", "0.2"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mean"], config["std"]) == ([0.3], [0.2])
