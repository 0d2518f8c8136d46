"""What the page of a scan by class is made from."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import toys

from jaxbd.base import Suspect
from jaxbd.cli import class_page
from jaxbd.detection.detect import Decision
from jaxbd.detection.verdict import Judgement
from jaxbd.pipelines.class_scan import Located, ScanConfig

NAMES = ("nought", "one", "two", "three")


def found(targets=(2,), leads=(), searched=(0, 2, 3), cells=()) -> Any:
    """A scan whose smallest mask, of class 2, is the victim's own pattern at row and column 1."""
    mask, pattern = np.zeros((3, 8, 8, 1)), np.zeros((3, 8, 8, 1))
    mask[1, 1:4, 1:4], pattern[1, 1:4, 1:4, 0] = 1, toys.PATTERN
    norms = np.array([np.nan] * 4)
    norms[list(searched)] = [30, 9, 20]
    states = SimpleNamespace(best_mask=mask, best_pattern=pattern)
    return SimpleNamespace(
        decision=Decision("backdoored", list(targets), [0.0] * 4),
        judgement=Judgement("backdoored", list(targets), list(leads), [], []),
        rates=np.array([0.1, np.nan, np.nan, 0.4]),
        cells=SimpleNamespace(target=np.array(cells, int), level=np.full(len(cells), 0.9)),
        located=Located(norms, np.zeros(4), np.zeros((4, 2)), np.zeros(4), states),
        states=np.zeros(len(cells)),
        infos=(np.zeros((5, len(cells))),),
    )


def test_a_target_without_patches_is_shown_by_its_mask():
    suspect = Suspect(toys.NET, toys.victim(2), toys.SHAPE, toys.CLASSES)
    held_out = toys.quadrants(0, 40)
    config = ScanConfig(targets=(0, 2, 3))
    shown = class_page.show_triggers(found(cells=(0,)), suspect, held_out, NAMES, config)
    assert shown.target == "class 2 (two)" and shown.samples == {}
    assert [true for true, _ in shown.captions[:3]] == ["nought", "one", "three"]
    assert {answer for _, answer in shown.captions} == {"two"}
    assert shown.clean is not None and shown.stamped is not None and shown.mask is not None
    np.testing.assert_allclose(
        shown.stamped[:, 1:4, 1:4, 0], np.broadcast_to(toys.PATTERN, (6, 3, 3))
    )
    np.testing.assert_array_equal(shown.stamped[:, 5:], shown.clean[:, 5:])
    assert (shown.mask.norm, shown.mask.median) == (9, 20)
    assert class_page.curves(found(cells=(0,))) == {}


def test_the_class_that_is_shown():
    assert class_page.choose_class(found(targets=(2, 3))) == 2
    assert class_page.choose_class(found(targets=(), leads=(1,))) == 1
    assert class_page.choose_class(found(targets=())) == 3
    assert class_page.show_mask(found(), 1, ScanConfig(targets=(0, 2, 3))) is None


def test_the_record_becomes_rows_with_p_values():
    rows = [{"class": k, "name": n, "attack_success_rate": None} for k, n in enumerate(NAMES)]
    record = dict(
        verdict="inconclusive",
        targets=[],
        classes=rows,
        model={"sha256": "ab"},
        seconds={},
        decided_by="one sign",
        leads=[1],
        natural=[3],
        searched="masks",
        signs={"small": [], "patch": [3], "margin": [1]},
        margin={"p_value": 0.02, "class_p_values": [0.5, 0.02, None, 0.7]},
    )
    part = class_page.describe("m", record, ScanConfig(), 40)
    assert [row["margin_p"] for row in part.classes] == [0.5, 0.02, None, 0.7]
    assert (part.leads, part.natural, part.p_value, part.n_images) == ([1], [3], 0.02, 40)
    alone = class_page.describe("m", {**record, "signs": None, "margin": None}, ScanConfig(), 40)
    assert alone.classes == [] and alone.signs is None


def test_examples_are_of_as_many_classes_as_there_are():
    labels = np.array([0, 0, 0, 0, 0, 1, 2, 2, 3])
    np.testing.assert_array_equal(labels[class_page._one_of_each(labels, 2)], [0, 1, 3, 0, 0, 0])
