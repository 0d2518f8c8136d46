"""The benchmark of the ways over time and cells: its smallest run, and that its verdicts follow its rows."""

import importlib.util
import json
import pathlib

import jax

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
