"""The verdict in one sentence, and the rates of saved triggers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxbd.cli import by_class, recovered
from jaxbd.interop.evidence_file import Saved
from jaxbd.report import sarif


def backdoored(rates: dict[str, Any]) -> dict[str, Any]:
    names = ("bird", "cat")
    rows = [{"class": k, "name": name, "attack_success_rate": None} for k, name in enumerate(names)]
    rows[1] |= {"attack_success_rate": 0.026} | rates
    return {"verdict": "backdoored", "targets": [1], "classes": rows, "data": {"held_out": 500}}


@pytest.mark.parametrize(
    "rates, shown",
    [
        ({}, "2.6 %"),
        ({"mask_rate": 0.97}, "97.0 %"),
        ({"mask_rate": None, "additive_rate": 0.91}, "91.0 %"),
        ({"mask_rate": float("nan"), "additive_rate": 0.01}, "2.6 %"),
        ({"attack_success_rate": None}, "–"),
    ],
)
def test_the_strongest_trigger_is_named_of_whatever_kind(rates, shown):
    """Patches hardly reach a class that is entered by a mask or by a pattern over the image."""
    assert f": {shown} of them to class 1 (cat)." in by_class.verdict(backdoored(rates))


def test_sarif_names_the_same_rate():
    ((_, target, text),) = sarif.list_results(backdoored({"mask_rate": 0.97}))
    assert target == 1 and "They work on 97.0 % of held-out images." in text


def test_a_mask_has_its_own_rate():
    """That of the patches at its place is another's."""
    mask = Saved("mask", 1, ())
    found: Any = SimpleNamespace(
        rates=np.array([0.1, 0.2]), located=SimpleNamespace(states=0), states=1, mask_rates=None
    )
    assert recovered._rate(found, mask) is None
    found.mask_rates = np.array([np.nan, 0.9])
    assert recovered._rate(found, mask) == 0.9
    assert recovered._rate(found, Saved("mask", 0, ())) is None
