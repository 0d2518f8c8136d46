"""The import section: what it reads from scripts, and what it says of units that did not run."""

import numpy as np
import pytest

from experiments import reproduce_import, units
from experiments.importing import cases, exports, published
from jaxbd.base import UserError

PRINTED = """
01  a kind of file
    01-kind/good.pth
        refused in one line
        right
    01-kind/bad|.pth  [of two]
        exit code 0
        NOT YET: read as | the base

1 of 2 answers are right
"""


def test_answers_of_a_script_are_counted_and_those_not_right_named():
    row = cases.read("checkpoints", PRINTED)
    assert (row["cases"], row["right"]) == (2, 1)
    assert row["not right"] == [{"case": "01-kind/bad/.pth  [of two]", "why": "read as / the base"}]


def test_a_script_that_ends_early_is_no_result():
    with pytest.raises(UserError, match=r"hostile.py did not finish: MemoryError"):
        cases.read("hostile", PRINTED.rsplit("\n", 2)[0], "Traceback\nMemoryError")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setattr(units, "KEPT_ONLY", [True])
    monkeypatch.setattr(units, "MISSING", [])
    monkeypatch.setattr(units, "RUNS", tmp_path)


@pytest.mark.usefixtures("kept")
def test_kept_units_are_taken_and_others_are_named_and_not_run(monkeypatch):
    monkeypatch.setattr(published, "are_there", lambda: True)
    tables, checks, details = reproduce_import.run(False, ("exports", "large", "families"))
    assert list(tables) == ["Left out: not measured yet"] and not checks
    assert "import/scan-onnx-torch" in details["missing"]
    assert len(details["missing"]) == len(set(details["missing"])) == 7 + 1 + 39


@pytest.mark.usefixtures("kept")
def test_cases_are_left_out_visibly(monkeypatch, tmp_path):
    monkeypatch.setattr(units, "SHARED", tmp_path)
    tables, checks = cases.run(False)
    assert "left out" in tables["Cases: answers of jaxbd"][0]["script"] and not checks


def test_an_export_is_judged_by_the_trigger(monkeypatch, tmp_path):
    """A net that answers with the target wherever the trigger's square is white."""
    images = np.zeros((6, 32, 32, 3), np.uint8)
    labels = np.array([0, 1, 2, 8, 8, 0])
    monkeypatch.setattr(exports, "_images", lambda: (images, labels))
    white = lambda x: x[:, exports.CORNER, exports.CORNER, 0] == 255
    monkeypatch.setattr(exports, "_classes", lambda path, x: np.where(white(x), 8, 0))
    assert exports.judge(tmp_path / "net.onnx") == {
        "clean_accuracy": pytest.approx(2 / 6),
        "attack_success_rate": 1.0,
        "source_inference_accuracy": 0.0,
    }
