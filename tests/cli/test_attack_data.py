"""Which classes `jaxbd attack` gives its training and test images."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxbd.base import UserError
from jaxbd.cli.commands import attack

NAMES = tuple("0123456789")


@pytest.fixture
def read(tmp_path):
    """Reads training and test images as the verb does; paths are relative to `tmp_path`."""

    def run(data, test_data, clean=None, **flags):
        flags = dict(image_shape=None, seed=0, download=False, limit=None, classes=None) | flags
        places = dict(data=str(tmp_path / data), test_data=str(tmp_path / test_data))
        args: Any = SimpleNamespace(batch_size=2, **places, **flags)
        return attack._data(args, clean)

    return run


def folders(root, names):
    """One picture for each class, as bright as the class's place in `names`."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4), place, np.uint8)).save(root / name / "x.png")


def table(root, words):
    """A picture for each label, and their list."""
    root.mkdir()
    for place in range(len(words)):
        Image.fromarray(np.full((4, 4), place, np.uint8)).save(root / f"{place}.png")
    (root / "l.csv").write_text("".join(f"{place}.png,{w}\n" for place, w in enumerate(words)))


@pytest.mark.parametrize(
    ("train", "test", "wanted"),
    [
        (NAMES, NAMES[2:], range(2, 10)),
        (("00000", "00001", "00002"), ("00001", "00002"), (1, 2)),
        (("ape", "cat", "dog"), ("cat", "dog"), (1, 2)),
        (("ape", "cat", "dog"), ("1", "2"), (1, 2)),
    ],
)
def test_test_images_have_the_classes_of_the_training_images(read, tmp_path, train, test, wanted):
    folders(tmp_path / "train", train)
    folders(tmp_path / "test", test)
    trained, tested = read("train", "test")
    assert trained.labels.tolist() == list(range(len(train)))
    assert tested.labels.tolist() == list(wanted)
    assert tested.class_names == trained.class_names == train


def test_test_images_of_other_classes_are_refused(read, tmp_path):
    folders(tmp_path / "train", ("ape", "cat", "dog"))
    folders(tmp_path / "test", ("cat", "dog", "eel"))
    with pytest.raises(UserError, match="class folder 'eel' is not among the 3 names"):
        read("train", "test")


def test_numbers_of_a_list_fit_numbered_and_named_classes(read, tmp_path):
    """As in GTSRB, whose training images are in folders and whose test images are in a list."""
    table(tmp_path / "list", ["2", "1.0"])
    np.savez(tmp_path / "d.npz", images=np.ones((3, 4, 4, 1), np.uint8), labels=[2, 1, 0])
    for place, names in (("numbers", ("00", "01", "02")), ("words", ("ape", "cat", "dog"))):
        folders(tmp_path / place, names)
        for test, wanted in (("list", [2, 1]), ("d.npz", [2, 1, 0])):
            assert read(place, test)[1].labels.tolist() == wanted


def test_the_classes_of_a_clean_net_or_of_a_file_are_those_of_the_data(read, tmp_path):
    folders(tmp_path / "train", ("cat", "dog"))
    spec = SimpleNamespace(image_shape=(4, 4, 1), classes=3, class_names=("dog", "eel", "cat"))
    clean = SimpleNamespace(spec=spec)
    trained, tested = read("train", "train", clean)
    assert trained.labels.tolist() == tested.labels.tolist() == [2, 0]
    folders(tmp_path / "numbers", [str(k) for k in range(11)])
    with pytest.raises(UserError, match="give the model's order with --classes FILE"):
        read("numbers", "numbers")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(str(k) for k in range(11)))
    trained, tested = read("numbers", "numbers", classes=names)
    assert sorted(trained.labels) == sorted(tested.labels) == list(range(11))
    assert [trained.class_names[k] for k in trained.labels] == sorted(trained.class_names)
