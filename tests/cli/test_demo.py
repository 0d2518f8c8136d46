"""What the demo says at its end, and its exit code."""

from types import SimpleNamespace
from typing import Any

import pytest

from jaxbd.cli.commands import demo
from jaxbd.detection.detect import Decision
from jaxbd.detection.verdict import Judgement


def scanned(verdict: Any, targets: list[int], leads: list[int]) -> Any:
    judgement = Judgement(verdict, targets, leads, [], [])
    return SimpleNamespace(decision=Decision(verdict, targets, []), judgement=judgement)


@pytest.mark.parametrize(
    "suspect, twin, code, words",
    [
        ([7], ("clean", [], []), 0, "Clean twin: clean (9 s"),
        ([7], ("inconclusive", [], [3]), 0, "inconclusive, since it shows one sign of a backdoor"),
        ([7], ("backdoored", [2], []), 1, "class 2; in fact class 7 was attacked and the twin is"),
        ([5], ("clean", [], []), 1, "class 5. Clean twin: clean; in fact class 7 was attacked"),
    ],
)
def test_a_twin_that_is_not_accused_is_no_failure(capsys, suspect, twin, code, words):
    """Clean models show one sign now and then; that leaves them inconclusive."""
    found: Any = SimpleNamespace(
        scans={"suspect": scanned("backdoored", suspect, []), "twin": scanned(*twin)},
        case=SimpleNamespace(target=7),
        before={},
        after={},
    )
    assert demo._say(demo.Args(), found, 9.0) == code
    assert words in " ".join(capsys.readouterr().out.split())
