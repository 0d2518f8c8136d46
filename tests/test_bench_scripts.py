"""The benchmarks: their smallest runs, and that verdicts follow rows."""

import importlib.util
import json
import pathlib
import sys

import jax
import pytest

from jaxbd.base import UserError

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"


def script(name: str):
    """A file of `scripts/` as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_time_loops_quick(tmp_path, capsys):
    bench = script("bench_time_loops")
    bench.main(quick=True, out=tmp_path / "bench.json")
    found, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert found["backend"] == jax.default_backend() and found["versions"]["jax"] == jax.__version__
    assert found["quick"] and found["settings"]["batch"] == 4
    for task, usual in (("mesa", "vmap"), ("students", "loop")):
        rows = [row for row in found["rows"] if row["task"] == task]
        timed = {(row["over_cells"], row["over_time"]) for row in rows}
        assert timed == {("vmap", "host"), ("map", "host"), ("loop", "host"), (usual, "scan")}
        assert min(row["slower"] for row in rows) == 1
        for row in rows:
            assert row["seconds_compile"] > 0 and row["chunks"] == 1
            images = row["images_per_second"] * row["seconds_chunk"]["median"]
            assert abs(images - 4 * 2 * 2) < 1e-6
            assert f"{row['images_per_second']:.0f}" in printed
    assert len(found["verdicts"]) == 4 and printed.count("the default, ") == 4


def test_time_loops_says_which_default_is_not_the_fastest():
    bench = script("bench_time_loops")
    speeds = {("vmap", "host"): 2.0, ("map", "host"): 1.0, ("loop", "host"): 4.0}
    rows = [
        {"task": task, "over_cells": cells, "over_time": time, "slower": slower}
        for task, usual in bench.USUAL.items()
        for (cells, time), slower in {**speeds, (usual, "scan"): 40.0}.items()
    ]
    said = [bench.sentence(verdict) for verdict in bench.verdicts(rows)]
    assert said == [
        "mesa, over time: host 1.0x, scan 20.0x; the default, host, is right",
        "mesa, over cells: vmap 2.0x, map 1.0x, loop 4.0x; the default, vmap, is not the fastest here",
        "students, over time: host 1.0x, scan 10.0x; the default, host, is right",
        "students, over cells: vmap 2.0x, map 1.0x, loop 4.0x; the default, loop, is not the fastest here",
    ]


def test_dhbe_quick(tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(SCRIPTS)
    bench, threads = script("bench_dhbe"), torch.get_num_threads()
    bench.main(arch=("vgg",), quick=True, out=tmp_path / "bench.json")
    torch.set_num_threads(threads)
    found, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert found["backend"] == jax.default_backend() and found["versions"]["torch"] == torch.__version__
    (row,) = found["rows"]
    assert found["quick"] and row["case"]["batch"] == 4 and row["case"]["inner_steps"] == 2
    assert row["images_iteration"] == 2 * 2 * 4 and row["operations_iteration"] > 1e6
    assert row["jaxbd"]["seconds_compile"] > 0 and row["torch"]["seconds_compile"] == 0
    seconds = {name: row[name]["seconds_iteration"]["median"] for name in ("jaxbd", "torch")}
    for name in seconds:
        assert abs(row[name]["images_per_second"] * seconds[name] - 16) < 1e-6
        assert f"{row[name]['images_per_second']:.0f}" in printed
    assert abs(row["torch_over_jaxbd"]["median"] - seconds["torch"] / seconds["jaxbd"]) < 1e-9
    assert f"PyTorch takes {row['torch_over_jaxbd']['median']:.2f} times as long" in printed


def test_dhbe_sides_take_turns_and_a_round_warms_up():
    bench, order = script("bench_dhbe"), []
    side = lambda name: bench.Side(lambda count: order.append((name, count)), (1, 1, 1), 0.0, None)
    found = bench.measure({"jaxbd": side("jaxbd"), "torch": side("torch")}, rounds=3, iterations=2)
    assert order == [(name, 2) for name in ("torch", "jaxbd", "jaxbd", "torch") * 2]
    assert {name: len(seconds) for name, seconds in found.items()} == {"jaxbd": 3, "torch": 3}


def test_dhbe_compares_equal_nets_only(monkeypatch):
    bench = script("bench_dhbe")
    side = lambda count: bench.Side(lambda _: None, (count, 1, 1), 0.0, None)
    monkeypatch.setattr(bench, "in_jax", lambda case: side(5))
    monkeypatch.setattr(bench, "in_torch", lambda case, threads: side(6))
    with pytest.raises(UserError, match="differ in parameters"):
        bench.bench(bench.CASES["vgg"], 1, 1, 1, lambda text: None)


def test_dhbe_says_how_to_get_pytorch(monkeypatch):
    bench = script("bench_dhbe")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install"):
        bench.main(quick=True)
