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
