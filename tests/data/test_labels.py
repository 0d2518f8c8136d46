"""Labels in the forms that people save become class numbers, or are refused by name."""

import numpy as np
import pytest
from samples import refused

from jaxbd.data import labels

FOUR = labels.Classes(4)


def number(given, names=None, classes=FOUR):
    return labels.number(given, names, classes, "data d")


@pytest.mark.parametrize(
    "given",
    [
        [0, 3, 1],
        np.array([0, 3, 1], np.uint8),
        [[0], [3], [1]],
        [0.0, 3.0, 1.0],
        np.eye(4)[[0, 3, 1]],
        np.eye(4, dtype=bool)[[0, 3, 1]],
        ["0", "3", "1"],
        np.array([b"0", b"3", b"1"]),
    ],
)
def test_numbers_in_any_form(given):
    found, names = number(given)
    assert found.dtype == np.int32 and found.tolist() == [0, 3, 1] and names == tuple("0123")


def test_text_is_numbered_by_names_or_in_order():
    assert number(["b", "a", "c", "d"])[0].tolist() == [1, 0, 2, 3]
    assert number(["b", "a"], ["b", "c", "a", "x"])[0].tolist() == [0, 2]
    own = labels.Classes(3, ("b", "c", "a"))
    found, names = number(["b", "a"], None, own)
    assert found.tolist() == [0, 2] and names == own.names
    found, names = number(["9", "4"], None, labels.Classes(2, ("4", "9"), stated=True))
    assert found.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        ([0, 4], None, "at least 5 classes (label 4), the model has 4 classes"),
        ([0], [str(k) for k in range(100)], "100 classes ('0', '1', '2', '3', …), the model has 4"),
        (["a", "b"], None, "2 classes ('a', 'b'), the model has 4 classes"),
        (["a"], list("bcde"), "label 'a' is not among the class names"),
        ([0.5, 1], None, "with fractions"),
        ([np.nan, 1], None, "with fractions"),
        ([[1, 1, 0, 0]], None, "without exactly one 1 per row"),
        ([[2, 0, 0, 0]], None, "without exactly one 1 per row"),
        ([-1, 0], None, "labels run from -1 to 0"),
        ([1j], None, "labels are complex128"),
        (np.zeros((2, 2, 2), int), None, "labels are int64 [2, 2, 2]"),
        ([], None, "holds no images"),
    ],
)
def test_labels_that_are_not_the_models(given, names, message):
    refused(message, number, given, names)


def test_truth_values_are_two_classes():
    found, names = number([True, False, True], classes=labels.Classes(2))
    assert found.tolist() == [1, 0, 1] and names == ("0", "1")


@pytest.mark.parametrize(
    "spelling", ["{}", "{}.0", "{:02d}", "{:08d}", "+{}", "{}.", "{:.18e}"], ids=str
)
def test_numbers_as_text_are_never_sorted_as_words(spelling):
    """pandas writes 3.0 as soon as one label is missing; np.savetxt writes 3.000000e+00."""
    wanted = [11, 0, 10, 2, 1]
    twelve = labels.Classes(12)
    found, names = number([spelling.format(k) for k in wanted], classes=twelve)
    assert found.tolist() == wanted and names == tuple(str(k) for k in range(12))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["-1", "0"], "labels run from -1 to 0"),
        (["3.5", "0"], "with fractions"),
        (["12.0", "0"], "at least 13 classes (label 12), the model has 4"),
        (["1e999", "0"], "with fractions"),
        (["a", ""], "image 1 has no label"),
        (["1.0", " ", "0.0"], "image 1 has no label"),
        (["1.0", "0.0", "nan"], "image 2 has no label"),
    ],
)
def test_numbers_as_text_are_checked_like_numbers(given, message):
    refused(message, number, given)


def test_ids_are_names():
    """Numbers too large for classes, if their order as text and as numbers is the same."""
    found, names = number(["0000099", "0700001", "0000045"], classes=labels.Classes(3))
    assert found.tolist() == [1, 2, 0] and names == ("0000045", "0000099", "0700001")
    refused("labels run from 99 to 700001", number, ["700001", "99"], classes=labels.Classes(2))


def test_words_among_numbers_and_missing_words_are_names():
    assert number(["a", "1", "b", "0"])[0].tolist() == [2, 1, 3, 0]
    assert number(["nan", "roti"], classes=labels.Classes(2))[0].tolist() == [0, 1]


def test_stated_names_and_numbers():
    """Numbers are class numbers, unless a class is named by a number."""
    animals = labels.Classes(4, tuple("dcba"), stated=True)
    assert number(["3", "0.0"], classes=animals)[0].tolist() == [3, 0]
    assert number(["d", "a"], classes=animals)[0].tolist() == [0, 3]
    refused("label 'e' is not among the 4 names", number, ["d", "e"], classes=animals)
    ages = labels.Classes(3, ("4", "9", "old"), stated=True)
    refused("label '3' is not among the 3 names", number, ["4", "3"], classes=ages)


def test_accents_of_macos_are_the_usual_ones():
    composed, separate = "caf\u00e9", "cafe\u0301"
    for name, word in ((composed, separate), (separate, composed)):
        own = labels.Classes(2, ("tea", name), stated=True)
        assert number([word], classes=own)[0].tolist() == [1]
        assert number([word, "tea"], ["tea", name], labels.Classes(2))[0].tolist() == [1, 0]
        assert labels.number_folders([word], own, "data d")[0] == [1]
    assert number([composed, separate, "x"], classes=labels.Classes(2))[0].tolist() == [0, 0, 1]


def test_classes_without_an_image_are_counted():
    assert number([0, 2])[1] == tuple("0123")
