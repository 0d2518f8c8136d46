"""The benchmarks: their smallest runs, and that verdicts follow rows."""

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd.base import UserError
from jaxbd.models import build

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"


def script(name: str):
    """A file of `scripts/` as a module."""
    if str(SCRIPTS) not in sys.path:  # scripts import each other
        sys.path.insert(0, str(SCRIPTS))
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
    for task, batched in (("mesa", "vmap"), ("students", "loop")):
        rows = [row for row in found["rows"] if row["task"] == task]
        timed = {(row["over_cells"], row["over_time"]) for row in rows}
        patches = {("patches", "host")} if task == "students" else set()
        assert (
            timed
            == {(how, "host") for how in ("lanes", "vmap", "map", "loop")}
            | {(batched, "scan")}
            | patches
        )
        assert min(row["slower"] for row in rows) == 1
        for row in rows:
            assert row["seconds_compile"] > 0 and row["chunks"] == 1
            images = row["images_per_second"] * row["seconds_chunk"]["median"]
            assert abs(images - 4 * 2 * 2) < 1e-6
            assert f"{row['images_per_second']:.0f}" in printed
    assert len(found["verdicts"]) == 4 and printed.count("the default, ") == 4


def test_time_loops_says_which_default_is_not_the_fastest():
    bench = script("bench_time_loops")
    speeds = {
        ("lanes", "host"): 2.0,
        ("vmap", "host"): 3.0,
        ("map", "host"): 1.0,
        ("loop", "host"): 4.0,
    }
    rows = [
        {"task": task, "over_cells": cells, "over_time": time, "slower": slower}
        for task, batched in bench.BATCHED.items()
        for (cells, time), slower in {**speeds, (batched, "scan"): 40.0}.items()
    ]
    said = [bench.sentence(verdict) for verdict in bench.verdicts(rows)]
    assert said == [
        "mesa, over time: host 1.0x, scan 20.0x; the default, host, is right",
        (
            "mesa, over cells: lanes 2.0x, vmap 3.0x, map 1.0x, loop 4.0x; the default, lanes, is"
            " not the fastest here"
        ),
        "students, over time: host 1.0x, scan 20.0x; the default, host, is right",
        (
            "students, over cells: lanes 2.0x, vmap 3.0x, map 1.0x, loop 4.0x; the default, lanes,"
            " is not the fastest here"
        ),
    ]


@pytest.mark.parametrize("size, stride, padding", [(3, 1, 1), (3, 2, 1), (1, 2, 0)])
def test_convolutions_as_products_of_patches(size, stride, padding):
    bench, rng = script("bench_time_loops"), np.random.default_rng(0)
    with jax.enable_x64(True):
        images, kernel = (
            jnp.asarray(rng.normal(size=shape)) for shape in ((2, 6, 5, 3), (size, size, 3, 4))
        )
        settings = dict(
            window_strides=(stride, stride),
            padding=[(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        wanted = jax.lax.conv_general_dilated(images, kernel, **settings)
        found = bench.by_patches(
            images,
            kernel,
            (stride, stride),
            settings["padding"],
            dimension_numbers=settings["dimension_numbers"],
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_net_with_patches_is_the_net_and_has_no_grouped_convolution():
    bench = script("bench_time_loops")
    net = build.net(
        build.Spec(arch="cnn", classes=3, image_shape=(8, 8, 3), options={"width": 4, "stages": 2})
    )
    images, keys = jnp.ones((2, 4, 8, 8, 3)), jax.random.split(jax.random.key(0), 2)
    variables = jax.vmap(net.init)(keys)
    both = [jax.jit(jax.vmap(each.apply)) for each in (net, bench.with_patches(net))]
    grouped, product = (each.lower(variables, images).as_text() for each in both)
    assert "feature_group_count = 2" in grouped and "feature_group_count = 2" not in product
    np.testing.assert_allclose(
        both[1](variables, images)[0], both[0](variables, images)[0], rtol=1e-5, atol=1e-5
    )


def test_dhbe_quick(tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(SCRIPTS)
    bench, threads = script("bench_dhbe"), torch.get_num_threads()
    bench.main(arch=("vgg",), quick=True, out=tmp_path / "bench.json")
    torch.set_num_threads(threads)
    found, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert (
        found["backend"] == jax.default_backend()
        and found["versions"]["torch"] == torch.__version__
    )
    (row,) = found["rows"]
    assert found["quick"] and row["case"]["batch"] == 4 and row["case"]["inner_steps"] == 2
    assert row["images_iteration"] == 2 * 2 * 4 and row["operations_iteration"] > 1e6
    assert row["jaxbd"]["seconds_compile"] > 0 and row["torch"]["seconds_compile"] == 0
    sides = ("jaxbd", "torch", "torch_channels_last", "torch_bfloat16")
    seconds = {name: row[name]["seconds_iteration"]["median"] for name in sides}
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
    monkeypatch.setattr(bench, "in_torch", lambda case, threads, form: side(6))
    with pytest.raises(UserError, match="differ in parameters"):
        bench.bench(bench.CASES["vgg"], 1, 1, 1, lambda text: None)


def test_dhbe_compares_with_plain_pytorch_at_least():
    bench = script("bench_dhbe")
    for forms in (("bfloat16",), ("eager", "compiled")):
        with pytest.raises(UserError, match="give eager"):
            bench.main(arch=("vgg",), quick=True, torch=forms)


def test_dhbe_says_how_to_get_pytorch(monkeypatch):
    bench = script("bench_dhbe")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install"):
        bench.main(quick=True)


def test_paste_quick(tmp_path, capsys):
    """All ways give the same images and gradients; each has a row."""
    bench = script("bench_paste")
    bench.main(quick=True, out=tmp_path / "bench.json")
    found, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert [row["way"] for row in found["rows"]] == list(bench.WAYS)
    assert found["rows"][0]["times_scatter"] == 1 and found["quick"]
    assert [row["way"] for row in found["tables"][bench.TITLE]] == list(bench.WAYS)
    assert all(row["images_per_second"] > 0 and row["way"] in printed for row in found["rows"])


def test_paste_refuses_ways_that_differ(monkeypatch):
    """One pixel beside the patch, or another gradient."""
    bench = script("bench_paste")
    moved = lambda pictures, patches, places: bench.gather(pictures, patches, places) + 1e-3
    monkeypatch.setitem(bench.WAYS, "gather", moved)
    with pytest.raises(UserError, match="gather pastes something else"):
        bench.bench(bench.QUICK, 1, 1)
    halved = lambda pictures, patches, places: bench.gather(
        pictures, patches * 0.5 + jax.lax.stop_gradient(patches * 0.5), places
    )
    monkeypatch.setitem(bench.WAYS, "gather", halved)
    with pytest.raises(UserError, match="gather pastes something else"):
        bench.bench(bench.QUICK, 1, 1)
