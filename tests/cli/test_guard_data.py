"""Which images `jaxbd guard` judges, and what it says about the others."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxbd.cli.main import main
from jaxbd.detection import guard
from jaxbd.interop import guarded
from jaxbd.models import build


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """An untrained net of 3 classes, guarded for class 1 by itself."""
    path = tmp_path_factory.mktemp("guard") / "net"
    spec = build.Spec(
        arch="cnn",
        classes=3,
        image_shape=(8, 8, 1),
        options={"width": 2},
        class_names=("ape", "cat", "dog"),
    )
    variables = build.net(spec).init(jax.random.key(0))
    guarded.save(path, spec, guard.pack(variables, [variables]), [1])
    return path


@pytest.fixture
def judge(net, capsys):
    """Runs the verb: (exit code, lines of JSON, what it says)."""

    def run(*flags):
        capsys.readouterr()
        code = main(["guard", str(net), *map(str, flags)])
        said = capsys.readouterr()
        return code, [json.loads(line) for line in said.out.splitlines()], said.err

    return run


def fill(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"{number}.png")


def test_pictures_beside_a_folder_that_is_no_class(judge, tmp_path):
    fill(tmp_path / "inbox", 3)
    fill(tmp_path / "inbox" / "done", 2)
    code, lines, said = judge("--data", tmp_path / "inbox")
    assert code == 0 and [line["file"] for line in lines] == ["0.png", "1.png", "2.png"]
    assert "note: the pictures in sub-folders are left out (done)" in said


def test_class_folders_beside_a_picture_are_labels(judge, tmp_path):
    fill(tmp_path / "d", 1)
    for name in ("cat", "dog"):
        fill(tmp_path / "d" / name, 2)
    code, lines, said = judge("--data", tmp_path / "d")
    assert code == 0 and [line["true_label"] for line in lines] == [1, 1, 2, 2]
    assert "skipped 1 images outside the class folders" in said


def test_what_the_limit_leaves_out_is_said(judge, tmp_path):
    fill(tmp_path / "d", 5)
    images = np.zeros((5, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "d.npz", images=images)
    np.savez(tmp_path / "l.npz", images=images, labels=np.arange(5) % 3)
    for name in ("d", "d.npz"):
        _, lines, said = judge("--data", tmp_path / name, "--limit", 2)
        assert len(lines) == 2 and "--limit left out 3 of 5 images." in said
    assert (
        "the 2 images that --limit allows" in judge("--data", tmp_path / "l.npz", "--limit", 2)[2]
    )
    for name in ("d", "l.npz"):
        assert "--limit" not in judge("--data", tmp_path / name)[2]


def test_flags_about_labels_need_labels(judge, tmp_path):
    fill(tmp_path / "d", 2)
    (tmp_path / "names.txt").write_text("ape\ncat\ndog\n")
    for data in (tmp_path / "d", tmp_path / "d" / "0.png"):
        code, _, said = judge("--data", data, "--classes", tmp_path / "names.txt")
        assert code == 2 and "--classes is about labels" in said
        code, _, said = judge("--data", data, "--form", "stride=2")
        assert code == 2 and "--form stride=2 is not a form of this net" in said


def test_one_clean_image_is_too_few_for_strip(judge, tmp_path):
    fill(tmp_path / "d", 2)
    np.savez(tmp_path / "one.npz", images=np.zeros((1, 8, 8, 1), np.uint8), labels=[0])
    code, _, said = judge("--data", tmp_path / "d", "--strip", tmp_path / "one.npz")
    assert code == 2 and "has 1 image(s), too few to divide; give at least 2" in said


def test_its_answers_are_not_its_next_labels(net, judge, tmp_path):
    """The answers lie beside the folder, under its name, where a list of labels may lie."""
    fill(tmp_path / "d", 2)
    data = str(tmp_path / "d")
    assert main(["guard", str(net), "--data", data, "--out", f"{data}.jsonl"]) == 0
    _, lines, said = judge("--data", data)
    assert len(lines) == 2 and "true_label" not in lines[0] and "Correct by" not in said
