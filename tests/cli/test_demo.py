"""What the demo says at its end, and its exit code."""

from types import SimpleNamespace
from typing import Any

import pytest

from jaxbd.cli.commands import demo
from jaxbd.cli.main import main
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


def test_a_demo_replaces_an_earlier_demo_and_nothing_else(tmp_path, monkeypatch, capsys):
    """Above all no case, whose scan.json and report.html have the same names."""
    started = []
    monkeypatch.setattr(demo, "_plant", lambda *args: started.append(args) or 1 / 0)
    out = tmp_path / "out"

    def refused() -> bool:
        started.clear()
        code = main(["demo", "--out", str(out)])
        said = capsys.readouterr().err
        return code == 2 and "is not overwritten: it contains" in said and not started

    assert not refused() and started
    (out / "triggers").mkdir(parents=True)
    (out / "scan.json").write_text("mine")
    assert refused() and (out / "scan.json").read_text() == "mine"
    (out / "triggers").rmdir()
    assert refused()
    (out / "suspect").mkdir()
    for name in ("scan-twin.json", "suspect/model.safetensors", "suspect/config.json"):
        (out / name).write_text("the demo's")
    assert not refused() and started
    (out / "triggers").mkdir()
    assert refused()
