"""Which class number a folder gets."""

import os

import pytest
from samples import refused

from jaxbd.data import labels

TEN = labels.Classes(10)


def numbers(names, classes):
    return labels.number_folders(sorted(names), classes, "data d")


def test_folders_are_numbered_in_order():
    assert numbers("cab", labels.Classes(3)) == ([0, 1, 2], ("a", "b", "c"), ())
    assert numbers(["3", "5", "7"], labels.Classes()) == ([0, 1, 2], ("3", "5", "7"), ())
    assert numbers([str(k + 1) for k in range(3)], labels.Classes(3))[0] == [0, 1, 2]


def test_some_numbered_folders_of_a_models_classes_keep_their_numbers():
    found, names, (note,) = numbers(["3", "5", "7"], TEN)
    assert found == [3, 5, 7] and names == tuple("0123456789")
    assert "3 class folders, the model has 10 classes" in note
    assert numbers(["00003", "00040"], labels.Classes(43))[0] == [3, 40]


@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        ([f"n{k}" for k in range(8)], 10, "8 class folders ('n0', 'n1', 'n2', 'n3', …), the model"),
        ([f"n{k}" for k in range(8)], 10, "has 10 classes; name all classes in the model's order"),
        ("abc", 2, "3 class folders ('a', 'b', 'c'), the model has 2 classes"),
        (["images"], 200, "1 class folder ('images'), the model has 200 classes"),
        (["3", "12"], 10, "as text class folder 12 comes before 3"),
        ([f"{k}.0" for k in range(11)], 11, "as text class folder 10.0 comes before 2.0"),
        (["03", "12"], 10, "2 class folders ('03', '12'), the model has 10 classes"),
    ],
)
def test_folders_that_are_not_the_models_classes(names, count, message):
    refused(message, numbers, names, labels.Classes(count))


def test_names_in_the_models_order():
    """As the person states it, or as the model's own folder has it."""
    stated = labels.Classes(4, ("dog", "cat", "10", "2"), stated=True)
    assert numbers(["2", "10", "cat"], stated)[0] == [2, 3, 1]
    animals = labels.Classes(4, ("dog", "cat", "eel", "ape"), stated=True)
    assert numbers(["1", "3"], animals)[:2] == ([1, 3], animals.names)
    refused("class folder 'eel' is not among the 4 names", numbers, ["eel"], stated)
    own = labels.Classes(3, ("dog", "cat", "eel"))
    assert numbers(["cat", "dog"], own)[0] == [1, 0]
    assert numbers(["a", "b", "c"], own)[0] == [0, 1, 2]
    refused("2 class folders ('a', 'cat'), the model has 3", numbers, ["a", "cat"], own)


def test_files_of_class_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeffdog\n cat \n\neel\n", encoding="utf-8")
    assert labels.read_names(path, 3) == ("dog", "cat", "eel")
    refused("names 3; name all 10 classes of the model", labels.read_names, path, 10)
    path.write_text("a\nb\na\n")
    refused("names 'a' twice", labels.read_names, path, 3)
    path.write_text("\u00e9\nb\ne\u0301\n", encoding="utf-8")
    refused("twice", labels.read_names, path, 3)
    path.write_bytes(b"\xff\xfe")
    refused("is not UTF-8 text", labels.read_names, path, 3)
    refused("cannot be read", labels.read_names, tmp_path / "missing", 3)
    os.mkfifo(tmp_path / "pipe")
    refused("it is a named pipe", labels.read_names, tmp_path / "pipe", 3)
