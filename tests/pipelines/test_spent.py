"""What the stages of a scan took, summed up and written down."""

import pytest

from jaxbd.pipelines.spent import NOTHING, spend, sum_up
from jaxbd.report import results
from jaxbd.training.program import Seconds


def test_a_stage_that_goes_on_adds_to_itself():
    spent = spend(NOTHING, "masks", 100, Seconds(2.0, 3.0))
    spent = spend(spent, "patches", 10, Seconds(0.5, 0.25))
    spent = spend(spent, "masks", 40, Seconds(0.0, 1.0))
    assert list(spent) == ["masks", "patches"] and not NOTHING
    assert spent["masks"][:2] == (140, (2.0, 4.0))
    assert sum_up(spent) == (150, (2.5, 4.25))


def test_nothing_sums_up_to_nothing():
    assert sum_up(NOTHING) == (0, (0, 0))


def test_the_peak_is_that_of_the_process():
    least = 50 * 2**20
    held = bytearray(least)
    held[::4096] = b"x" * len(held[::4096])
    assert spend(NOTHING, "masks", 1, Seconds(0, 0))["masks"].peak_bytes > least


def test_results_have_a_row_for_each_stage():
    (row,) = results.stages(spend(NOTHING, "margins", 6, Seconds(1.5, 2.0)))
    assert (row["stage"], row["image_steps"]) == ("margins", 6)
    assert row["seconds"]["run"] == pytest.approx(2.0) and row["peak_mb"] > 0
