"""The record of repairs of published models: when its bars are met."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments import repair_published as published
from experiments import units
from experiments.verdict import reproduce_verdict
from experiments.verdict.published import are_there


def outcome(rates, drops=None, named=(1,)):
    """The check of models with these rates after the repair that a person would get."""
    names = list(published.TRIGGERS)[: len(rates)]
    drops = drops or [0.0] * len(rates)
    before = {name: {"named": list(named), "accuracy": 0.8} for name in names}
    method = "hold" if named else "clip"
    rows = [
        {"model": name, "method": method, "asr": rate, "accuracy": 0.8 - drop}
        for name, rate, drop in zip(names, rates, drops, strict=True)
    ]
    others = [{**row, "method": "finetune", "asr": 1.0} for row in rows]
    return published.check([*rows, *others, {"model": names[0], "method": "x"}], before)


def test_four_of_five_have_to_hold_and_none_may_be_high():
    assert outcome([0.05, 0.01, 0.2, 0.0, 0.05])["met"]
    assert not outcome([0.05, 0.01, 0.21, 0.0, 0.05])["met"], "one above 20 %"
    assert not outcome([0.05, 0.06, 0.2, 0.0, 0.05])["met"], "three of five"
    assert not outcome([0.01] * 5, [0.019, 0.021, 0.0, 0.03, 0])["met"], "two cost too much"
    assert outcome([0.01] * 5, named=())["met"], "judged by clip where nothing was named"


def test_models_that_were_not_measured_leave_the_bars_unmet():
    found = outcome([0.01] * 4)
    assert not found["met"] and found["models"] == 4 and found["worst"] == 0.01


def test_a_unit_is_measured_once_and_found_by_every_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(units, "RESULTS", tmp_path)
    monkeypatch.setattr(units, "MISSING", [])
    monkeypatch.setattr(units, "KEPT_ONLY", [True])
    settings, never = {"model": "m", "method": "hold"}, lambda: pytest.fail("measured again")
    ask = lambda function, stated=settings: published.take_or_measure(
        published.NAME, "m-hold", stated, function
    )
    assert ask(never) is None and units.MISSING == ["repair/published/m-hold"]
    units.KEPT_ONLY[0] = False
    assert ask(lambda: {"asr": 0.1}) == {"asr": 0.1} == ask(never)
    assert ask(lambda: {"asr": 0.2}, {**settings, "hold": 1}) == {"asr": 0.2}, "other settings"
    assert len(list(tmp_path.rglob("m-hold-*.json"))) == 2


def test_what_other_code_measured_is_measured_again_and_marked_where_nothing_runs(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(units, "RESULTS", tmp_path)
    monkeypatch.setattr(units, "KEPT_ONLY", [False])
    ask = lambda rate: published.take_or_measure(
        published.NAME, "m-hold", {"model": "m"}, lambda: {"asr": rate}
    )
    ask(0.1)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(path.read_text().replace('"work": "', '"work": "0'))
    units.KEPT_ONLY[0] = True
    assert ask(0.2) == {"asr": 0.1, "code": "older"}
    units.KEPT_ONLY[0] = False
    assert ask(0.2) == {"asr": 0.2} == ask(0.3)


def test_methods_stand_side_by_side_and_say_what_was_not_run():
    before = [{"model": name, "asr": 1.0, "accuracy": 0.8} for name in ("a", "b")]
    after = [
        {"model": "a", "method": "unlearn", "asr": 0.0625, "accuracy": 0.75},
        {"model": "b", "method": "unlearn", "not run": "no class was named"},
        {"model": "b", "method": "clip", "asr": 0.5, "accuracy": 0.7},
    ]
    tables = {reproduce_verdict.SUSPECTS: before, reproduce_verdict.REPAIRED: after}
    assert reproduce_verdict.compare_repairs({"tables": tables}) == [
        {"method": "as it came", "a": "1.000, 0.800", "b": "1.000, 0.800"},
        {"method": "unlearn", "a": "0.062, 0.750", "b": "no class was named"},
        {"method": "clip", "a": "", "b": "0.500, 0.700"},
    ]


@pytest.mark.slow
def test_it_runs_at_its_smoke_size(monkeypatch, tmp_path, capsys):
    if not are_there():
        pytest.skip("the published models are not beside the repository")
    monkeypatch.setattr(units, "RUNS", tmp_path)
    assert published.main(smoke=True) == 0
    assert "badnets_8_02" in capsys.readouterr().out
