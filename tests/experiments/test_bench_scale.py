"""The scale benchmark: its PyTorch sides compute what ours do, its smallest run, and what is made
of its rows."""

import dataclasses
import importlib
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd import images as image_ops
from jaxbd.base import ANY_SOURCE, Batch, Cell, UserError
from jaxbd.interop import layouts
from jaxbd.inversion import margin, mesa, neural_cleanse
from jaxbd.models import build
from jaxbd.training import supervised

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPE, CLASSES, COUNT = (8, 8, 3), 5, 6
CLOSE = dict(rtol=1e-6, atol=1e-9)


@pytest.fixture
def side(monkeypatch):
    """(a loader of files in `scripts/`, PyTorch in float64)."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield importlib.import_module, torch
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def chw(images):
    import torch

    return torch.tensor(np.asarray(images).transpose(0, 3, 1, 2).copy())


def both(side, arch):
    """A small classifier in PyTorch with random weights, and ours with the same, in float64;
    normalisation included."""
    import torch_twins as twins

    nets = side[0]("training_in_torch")
    plain = twins.randomise(nets.CLASSIFIERS[arch](3, 8, CLASSES, 4).double(), seed=1)
    names = (
        plain.state_dict() if arch == "wrn16-1" else twins.SmallVGG(CLASSES, 4, side=8).state_dict()
    )
    tensors = dict(zip(names, twins.tensors(plain).values(), strict=True))
    layout = layouts.recognise(tensors, image_shape=SHAPE)
    assert layout.spec.arch == arch
    spec = dataclasses.replace(layout.spec, dtype="float64", mean=(0.5,), std=(0.25,))
    return (
        nets.Normalised(plain, 0.5, 0.25),
        build.net(spec),
        toys.widen(layouts.to_variables(tensors, layout)),
    )


def batch(seed):
    rng = np.random.default_rng(seed)
    labels = jnp.asarray(rng.integers(0, CLASSES, COUNT), jnp.int32)
    return Batch(jnp.asarray(rng.uniform(size=(COUNT, *SHAPE))), labels)


TO_CHW = np.arange(27).reshape(3, 3, 3).transpose(2, 0, 1).ravel()
"""Where PyTorch's flattened 3x3 triggers have each value of ours."""


def linear(params, outputs=slice(None), inputs=slice(None)):
    """A Flax layer as PyTorch's [weight, bias]."""
    weight = np.asarray(params["kernel"]).T[outputs][:, inputs]
    return [weight, np.asarray(params["bias"])[outputs]] if "bias" in params else [weight]


def layers(generator, critic):
    """Parameters of ours, in the order of PyTorch's `parameters()`: (generator's, statistics
    network's)."""
    norms = [
        [np.asarray(generator[f"BatchNorm_{n}"][name]) for name in ("scale", "bias")]
        for n in range(3)
    ]
    hidden = [linear(generator[f"Dense_{n}"]) for n in range(3)]
    maps = [linear(critic["Dense_0"]), linear(critic["Dense_1"], inputs=TO_CHW)]
    first = [*hidden, *norms, linear(generator["Dense_3"], outputs=TO_CHW)]
    second = [*maps, linear(critic["Dense_2"]), linear(critic["Dense_3"])]
    return [*itertools.chain(*first)], [*itertools.chain(*second)]


def test_a_mesa_step_in_pytorch_is_ours(side):
    load, torch = side
    with jax.enable_x64(True):
        plain, net, victim = both(side, "wrn16-1")
        config = mesa.Config(hidden=8, noise_dim=8, debias_rate=0.1)
        inversion = mesa.make(net, SHAPE, config)
        state, cell = (
            toys.widen(inversion.init(jax.random.key(0))),
            Cell(jnp.int32(2), jnp.int32(-1), jnp.float64(0.8)),
        )
        settings = load("bench_scale").settings_of(load("mesa_in_torch"), config)
        plain.requires_grad_(False)
        model = load("mesa_in_torch").SubModel(plain, 3, 2, 0.8, settings, torch.device("cpu"))
        given = layers(state.generator["params"], state.critic)
        for net_, values in zip((model.generator, model.statistics), given, strict=True):
            for parameter, value in zip(net_.parameters(), values, strict=True):
                parameter.data.copy_(torch.tensor(value.copy()))
        step = jax.jit(inversion.step)
        for number in range(2):
            images = batch(number).images
            key = jax.random.key(number)
            keys = jax.random.split(key, 6)
            noises = [jax.random.uniform(keys[n], (COUNT, 8)) for n in (0, 1, 4, 5)]
            noises = [torch.tensor(np.asarray(noise)) for noise in noises]
            place = tuple(np.asarray(image_ops.random_places(keys[2], 1, SHAPE, (3, 3)))[0])
            jitter = chw(jax.random.normal(keys[3], (COUNT, 3, 3, 3)))
            mu = layers(state.generator_opt[0].mu, state.critic_opt[0].mu)
            state, info = step(key, state, batch(number), cell, victim)
            first = model.generator_loss(chw(images), *noises[:2], place, jitter)
            load("dhbe_in_torch").descend(model.generator_rule, first)
            second = model.statistics_loss(*noises[2:])
            load("dhbe_in_torch").descend(model.statistics_rule, second)
            np.testing.assert_allclose(info.generator_loss, first.detach(), **CLOSE)
            np.testing.assert_allclose(info.critic_loss, second.detach(), **CLOSE)
            after = layers(state.generator_opt[0].mu, state.critic_opt[0].mu)
            for net_, old, new in zip((model.generator, model.statistics), mu, after, strict=True):
                for parameter, before, now in zip(net_.parameters(), old, new, strict=True):
                    gradient = (now - 0.5 * before) / 0.5
                    np.testing.assert_allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-8)
        assert abs(float(first.detach())) > 1e-3
        moved = state.generator["batch_stats"]["BatchNorm_1"]
        np.testing.assert_allclose(moved["mean"], model.generator.norms[1].running_mean, **CLOSE)
        np.testing.assert_allclose(moved["var"], model.generator.norms[1].running_var, **CLOSE)


def test_a_search_in_pytorch_is_ours(side):
    load, torch = side
    with jax.enable_x64(True):
        plain, net, victim = both(side, "vgg")
        plain.requires_grad_(False)
        target = int(jax.jit(net.apply)(victim, batch(0).images)[0].argmax(-1)[0])
        config = neural_cleanse.for_pairs(attack_threshold=0.1, patience=2)
        inversion = neural_cleanse.make(net, SHAPE, config)
        state = toys.widen(inversion.init(jax.random.key(0)))
        cell = Cell(jnp.int32(target), jnp.int32(ANY_SOURCE), jnp.float64(0.8))
        settings = load("bench_scale").settings_of(load("cleanse_in_torch"), config)
        search = load("cleanse_in_torch").Search(
            plain, (3, 8, 8), target, settings, torch.device("cpu")
        )
        search.mask.data.copy_(torch.tensor(np.asarray(state.parameters.mask[..., 0])))
        search.pattern.data.copy_(chw(state.parameters.pattern[None])[0])
        step, costs = jax.jit(inversion.step), set()
        for number in range(9):
            cost = float(state.cost)
            state, info = step(jax.random.key(0), state, batch(number), cell, victim)
            loss = search.step(chw(batch(number).images))
            np.testing.assert_allclose(loss, info.loss + cost * info.mask_norm, **CLOSE)
            np.testing.assert_allclose(search.cost, state.cost, **CLOSE)
            costs.add(cost)
        assert len(costs) > 2, "settings that test nothing"
        for name in (
            "best_norm",
            "stop_norm",
            "stalled",
            "worked",
            "failed",
            "raised",
            "lowered",
            "rate",
        ):
            np.testing.assert_allclose(
                getattr(search, name), getattr(state, name), err_msg=name, **CLOSE
            )
        np.testing.assert_allclose(
            search.mask.detach(), state.parameters.mask[..., 0], rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            search.best[0].detach(), state.best_mask[..., 0], rtol=1e-4, atol=1e-6
        )


def test_a_training_step_in_pytorch_is_ours(side):
    load, torch = side
    with jax.enable_x64(True):
        plain, net, variables = both(side, "vgg")
        config = load("bench_scale").TRAINING
        training = load("training_in_torch").Training(
            plain, config.learning_rate, config.momentum, config.weight_decay
        )
        trainer = supervised.make(net, config)
        state, step = trainer.init(variables), jax.jit(trainer.step)
        for number in range(3):
            state, info = step(jax.random.key(0), state, batch(number))
            labels = torch.tensor(np.asarray(batch(number).labels)).long()
            np.testing.assert_allclose(
                training.step(chw(batch(number).images), labels), info.loss, **CLOSE
            )


def test_a_margin_step_in_pytorch_is_ours(side):
    """Two starts of one class, as two cells of ours."""
    load, torch = side
    with jax.enable_x64(True):
        plain, net, victim = both(side, "wrn16-1")
        plain.requires_grad_(False)
        rate = 0.5
        inversion = margin.make(net, SHAPE, margin.Config(learning_rate=rate))
        cell = Cell(jnp.int32(2), jnp.int32(ANY_SOURCE), jnp.float64(0))
        states = [toys.widen(inversion.init(jax.random.key(seed))) for seed in (0, 1)]
        first = np.stack([state.image for state in states])
        search = load("margin_in_torch").Search(plain, (2, 3, 8, 8), 2, rate, torch.device("cpu"))
        search.images, step = chw(first), jax.jit(inversion.step)
        for _ in range(3):
            pairs = [step(jax.random.key(0), state, None, cell, victim) for state in states]
            states, infos = zip(*pairs, strict=True)
            margins = search.step()
            # margins are differences of larger logits
            np.testing.assert_allclose(margins, [info.margin for info in infos], rtol=2e-5)
        for name, theirs in (("image", search.images), ("best", search.best)):
            ours = np.stack([getattr(state, name) for state in states])
            # the twin's images are float32
            np.testing.assert_allclose(theirs, chw(ours), err_msg=name, atol=1e-6)
        assert not np.allclose(search.images, chw(first), atol=1e-3)


@pytest.mark.parametrize("form", ["channels-last", "bfloat16"])
def test_forms_of_pytorch_compute_the_same(form, side):
    """Channels last changes no number, bfloat16 the third digit; both are what they say."""
    load, torch = side
    torch.set_default_dtype(torch.float32)
    seen, scale, cases = {}, load("scale_in_torch"), load("scale_cases")
    case = cases.case_of("training", "vgg", side=8, batch=4, width=4)
    training = load("training_in_torch")

    class Training(training.Training):
        def step(self, images, labels):
            first = next(self.net.parameters())
            is_last = dict(memory_format=torch.channels_last)
            seen[asked] = [super().step(images, labels), images.is_contiguous(**is_last)]
            seen[asked] += [first.is_contiguous(**is_last), self.autocast]

    training.Training, plain = Training, training.Training
    try:
        for asked in ("eager", form):
            scale.in_torch(case, 1, asked).run(1)
    finally:
        training.Training = plain
    (loss, *_), (other, *marks) = seen["eager"], seen[form]
    assert marks == [True, True, torch.bfloat16 if form == "bfloat16" else None]
    assert seen["eager"][1:] == [False, False, None]
    close = dict(rtol=1e-5) if form == "channels-last" else dict(rtol=0.05)
    np.testing.assert_allclose(other, loss, **close)


@pytest.mark.parametrize("task", ["mesa", "cleanse", "margin", "training"])
def test_quick(task, side, tmp_path, capsys):
    load, torch = side
    torch.set_default_dtype(torch.float32)
    load("bench_scale").main(
        task=(task,), arch=("vgg",), quick=True, unfolded=True, out=tmp_path / "bench.json"
    )
    found, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert found["quick"] and found["versions"]["torch"] == torch.__version__
    assert found["matrix_operations_per_second"]["float32"] > 1e6
    (row,) = found["rows"]
    images = {"mesa": 4 * 2, "cleanse": 4 * 2, "margin": 4 * 2, "training": 4}[task]
    sides = {"jaxbd", "torch", "torch_channels_last", "torch_bfloat16"}
    sides |= {"vmap", "unfolded"} if task != "training" else set()
    sides |= {"loop"} if task in ("mesa", "cleanse") else set()
    assert row["images_step"] == images and sides <= row.keys() and row["operations_step"] > 1e3
    for name in sides:
        assert (
            abs(row[name]["images_per_second"] * row[name]["seconds_step"]["median"] - images)
            < 1e-6
        )
        assert (row[name]["seconds_compile"] > 0) != name.startswith("torch")
        assert f"{row[name]['images_per_second']:.0f}" in printed
    ratio = row["torch"]["seconds_step"]["median"] / row["jaxbd"]["seconds_step"]["median"]
    assert abs(row["torch_over_jaxbd"]["median"] - ratio) < 1e-9
    assert f"PyTorch {ratio:.2f} times as long" in printed
    share = row["operations_step"] / row["jaxbd"]["seconds_step"]["median"]
    assert (
        abs(
            row["jaxbd"]["share_of_peak"] * found["matrix_operations_per_second"]["float32"] - share
        )
        < 1e-3 * share
    )


def test_thirty_cells_each(side):
    scale = side[0]("bench_scale")
    assert [scale.case_of(task, "vgg").images for task in ("mesa", "cleanse", "training")] == [
        960,
        960,
        32,
    ]


def test_compares_equal_nets_only(side, monkeypatch):
    scale = side[0]("bench_scale")
    one = lambda count: scale.Side(lambda steps: None, (count,), 0.0, None)
    monkeypatch.setattr(scale, "in_jax", lambda case, steps, unfolded: {"jaxbd": one(5)})
    monkeypatch.setattr(scale, "in_torch", lambda case, threads, form: one(6))
    with pytest.raises(UserError, match="differ in parameters"):
        scale.bench(scale.case_of("mesa", "vgg"), scale.Turns(1, 1, 1), 1e9, lambda text: None)


def _figures(rate):
    return {"images_per_second": rate, "seconds_compile": 1.0, "share_of_peak": 0.25}


def _row(task, arch, ratio):
    case = {
        "task": task,
        "arch": arch,
        "classes": 10,
        "levels": [0.5, 0.8, 0.9],
        "width": 16,
        "side": 32,
        "batch": 32,
    }
    over = {"median": ratio, "quartiles": [ratio, ratio]}
    sides = {"jaxbd": _figures(900.0 * ratio), "loop": _figures(700.0), "torch": _figures(900.0)}
    return {"case": {**case, "dtype": "float32"}, **sides, "torch_over_jaxbd": over}


@pytest.fixture
def section(monkeypatch):
    """`reproduce_scale` with every part's measurement replaced."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    scale = importlib.import_module("experiments.scale.reproduce_scale")
    retired = lambda seeds=10: {
        "rows": [{"a": 1}],
        "saving": 4.0,
        "same_verdict": 2 * seeds,
        "models": 2 * seeds,
    }
    monkeypatch.setattr(scale.retiring, "run", retired)

    def benchmark(folder, unit, name, *flags):
        task, arch = flags[1], flags[3] if len(flags) > 3 else ""
        return {
            "rows": [_row(task, arch, {"wrn16-1": 0.7, "vgg": 1.2}.get(arch, 1.0))]
            if name == "bench_scale"
            else [],
            "matrix_operations_per_second": {"float32": 1e9},
            "verdicts": [],
        }

    monkeypatch.setattr(scale, "benchmark", benchmark)
    cells = {
        "cells": 9900,
        "all done": True,
        "budget MB": 16.0,
        "results MB": 5.0,
        "peak MB": 500.0,
    }
    monkeypatch.setattr(scale.many_cells, "run", lambda *sizes: {**cells, "peak MB before": 300.0})
    ways = {"verdict, full": "backdoored 0", "verdict, retiring": "backdoored 0"}
    race = [
        {"net": net, "PyTorch / retiring": fold, **ways}
        for net, fold in (("wrn16-1-16", 4.0), ("vgg-32", 2.5))
    ]
    monkeypatch.setattr(scale.racing, "run", lambda: {"rows": race})
    found = {
        "rows": [{"process": "p", "seconds": 0.3}],
        "compile": [{"seconds compiling": s} for s in (20.0, 1.0)],
    }
    monkeypatch.setattr(scale.startup, "run", lambda quick: found)
    return scale


def test_the_section_names_what_is_missed(section):
    tables, checks, details = section.run(False, ("bench", "retire", "race", "memory", "startup"))
    assert set(details) >= {"bench", "retire", "race", "memory", "startup"} and len(tables) == 6
    assert [check.name for check in checks if not check.met()] == [
        "images/s over PyTorch's, mesa 10x3, wrn16-1-16 32 b32",
        "PyTorch's seconds (per step, times all steps) over ours with retiring, vgg-32",
    ]
    values = {check.name: check.value for check in checks}
    assert values["seconds of jaxbd --help"] == 0.3 and values["all of 9900 cells done"] == 1


def test_a_race(side, monkeypatch):
    """Both scans and PyTorch's time of a tiny victim; no cell retires here, the ways differ in
    their steps."""
    race, torch = side[0]("experiments.scale.race"), side[1]
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(race, "SIDE", 8)
    settings = dataclasses.replace(race.Settings(), training=supervised.Config(num_steps=2))
    mesa_config = dataclasses.replace(settings.scan.mesa, hidden=8, noise_dim=8)
    scan = dataclasses.replace(
        settings.scan, steps=4, levels=(0.8,), batch_size=4, mesa=mesa_config
    )
    configs = {"full": scan, "retiring": dataclasses.replace(scan, steps=2)}
    row = race.one("vgg", 2, settings, configs)
    assert row["image-steps, full"] == 2 * row["image-steps, retiring"] == 10 * 4 * 4
    assert row["verdict, full"].split()[0] in ("clean", "backdoored", "inconclusive")
    assert (
        abs(row["PyTorch / retiring"] * row["seconds, retiring"] - row["seconds, PyTorch"]) < 1e-9
    )
    assert row["seconds, PyTorch"] > 0


def test_the_section_runs_parts_alone(section):
    tables, checks, details = section.run(True, ("startup",))
    assert list(details) == ["startup"] and len(tables) == 2 and len(checks) == 2
