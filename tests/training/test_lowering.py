"""Every compiled step lowers for cuda and tpu: in float32, without callbacks, transfers to the host
or shapes that depend on values, and with all of its donated state reused.

Nets are tiny and nothing is compiled or run, so no accelerator is needed.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd import devices, methods
from jaxbd.attacks import badnets, latent, poison, trojan
from jaxbd.base import ANY_SOURCE, Batch, Cell, Problem, RepairData, Suspect
from jaxbd.data import draw
from jaxbd.detection import guard, strip
from jaxbd.inversion import margin, mesa, neural_cleanse, pixel, plain, pt_red
from jaxbd.metrics import activations, batches, distances, evaluate, sweep_rates
from jaxbd.models import build
from jaxbd.pipelines import repair as repairing
from jaxbd.training import loop, slots, supervised, sweep, table
from jaxbd.training.program import Program

PLATFORMS = ("cuda", "tpu")
KEY, SHAPE, CLASSES, ROWS = jax.random.key(0), (8, 8, 3), 4, 8
SPEC = build.Spec(arch="cnn", classes=CLASSES, image_shape=SHAPE, options={"width": 2, "stages": 1})
NET = build.net(SPEC)
FORBIDDEN = {
    "float64": r"\bf64\b",
    "callback": r"callback",
    "host transfer": r"stablehlo\.(send|recv|infeed|outfeed)|xla_host|annotate_device_placement",
    "dynamic shape": r"tensor<[^>]*\?",
}
INVERSIONS = {
    "margin": (margin, margin.Config()),
    "mesa": (mesa, mesa.Config(hidden=4, noise_dim=4)),
    "mesa, searched place": (mesa, mesa.Config(hidden=4, noise_dim=4, place="searched")),
    "mesa, stopping": (mesa, mesa.Config(hidden=4, noise_dim=4, stop_after=10)),
    "neural-cleanse": (neural_cleanse, neural_cleanse.Config()),
    "neural-cleanse, pairs": (neural_cleanse, neural_cleanse.for_pairs()),
    "pixel": (pixel, pixel.Config()),
    "plain": (plain, plain.Config()),
    "pt-red": (pt_red, pt_red.Config()),
}
SMALL = {
    "dhbe": dict(batch_size=ROWS, width=2, noise_dim=4, trigger_size=3, inner_steps=1),
}
"""Settings of repairs whose defaults are too large to be traced in a test."""


@functools.cache
def variables():
    return NET.init(KEY)


@functools.cache
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, *SHAPE), np.uint8)
    return jax.tree.map(jnp.asarray, Batch(images, (np.arange(24) % CLASSES).astype(np.int32)))


def check(program, *args, donated=0, platforms=PLATFORMS):
    """Lowers `program`, of which the first argument's `donated` leaves must be reused."""
    for platform in platforms:
        _check_one(program, platform, *args, donated=donated)


def _check_one(program, platform, *args, donated):
    text = program.lower(*args, platform=platform)
    found = [name for name, pattern in FORBIDDEN.items() if re.search(pattern, text)]
    assert not found, f"{found} for {platform}"
    signature = re.search(r"func\.func public @main\((.*?)\) -> ", text, re.DOTALL)
    assert signature is not None
    reused = re.findall(r"tf\.aliasing_output|jax\.buffer_donor", signature[1])
    assert len(reused) >= donated, f"{len(reused)} of {donated} donated arrays are reused"


def leaves(tree) -> int:
    return len(jax.tree.leaves(tree))


def task_of(name, over_time, course=False):
    module, config = INVERSIONS[name]
    method = module.make(NET, SHAPE, config)
    settings = dict(num_steps=9, over_time=over_time, chunk=4, course=course)
    drawn, rows = (margin.no_batch, None) if module is margin else (draw.uniform(ROWS), data())
    task = (method, drawn, rows, sweep.grid(range(CLASSES)), variables())
    return slots.make_task(KEY, *task, **settings)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("name", INVERSIONS)
def test_slots_of_every_inversion(name, count, monkeypatch):
    """As on an accelerator: a chunk of steps is one program."""
    monkeypatch.setenv(devices.LIMIT, str(count))
    _check_slots(task_of(name, "scan"))


def test_no_inversion_is_missing():
    known = {
        methods.find("inversion", m.name).module for m in methods.TABLE if m.kind == "inversion"
    }
    assert known == {module for module, _ in INVERSIONS.values()}


@pytest.mark.parametrize("name", ["neural-cleanse, pairs", "pt-red", "plain"])
def test_one_trigger_for_several_sources(name):
    """As a scan over pairs searches it: a target for each source, in one cell."""
    module, config = INVERSIONS[name]
    method = module.make(NET, SHAPE, config)
    state = jax.eval_shape(method.init, KEY)
    cell = Cell(jnp.zeros(CLASSES, jnp.int32), jnp.int32(ANY_SOURCE), jnp.float32(0))
    check_fit(method.step, draw.uniform(ROWS), data(), state, (cell, variables()))


@pytest.mark.parametrize("over_time, count", [("host", 1), ("scan", 8)])
def test_slots_step_by_step_with_a_course_and_on_several_devices(over_time, count, monkeypatch):
    monkeypatch.setenv(devices.LIMIT, str(count))
    _check_slots(task_of("pixel", over_time, course=True))


def _check_slots(task):
    at = table.open_table(task._replace(in_lanes=False), CLASSES, np.arange(CLASSES))
    donated = leaves(at.slots)
    check(task.programs.advance, *table._arguments(task, at, 4), donated=donated)
    taken = jnp.ones(len(at.numbers), bool)
    refilled = at.slots, *devices.by_cell((taken,), task.over), at.placed[0], task.shared[1], {}
    check(task.programs.refill, *refilled, donated=donated)
    check(table._picker(), (at.slots.state, at.slots.info), np.zeros(2, np.int32))


def check_fit(step, drawn, rows, state, extra=(), key=KEY):
    """One step, and a chunk of them as one program."""
    advance = loop.with_batches(step, drawn)
    for program in loop._programs(advance, 3):
        check(program, state, key, rows, extra, donated=leaves(state))


@pytest.mark.parametrize("count", [1, 8])
def test_supervised_training(count, monkeypatch):
    monkeypatch.setenv(devices.LIMIT, str(count))
    trainer = supervised.make(NET, supervised.Config())
    state = trainer.init(variables())
    check_divided(trainer.step, draw.uniform(ROWS), data(), state)


def check_divided(step, drawn, rows, state):
    """`check_fit` with each batch divided among the devices in use."""
    over = devices.mesh("data")
    state, rows, key = devices.on_each((state, rows, KEY), over)
    check_fit(step, drawn, rows, state, key=key)


def test_poisoned_and_adaptive_training():
    attack = badnets.make(SHAPE, CLASSES, badnets.Config())
    trainer = supervised.make(NET, supervised.Config())
    drawn = draw.Batching(ROWS, 1, True).draw()
    rows = data(), attack.init(KEY)
    check_fit(trainer.step, poison.dynamic(attack, drawn), rows, trainer.init(variables()))
    config = latent.Config()
    adaptive = latent.make(NET, latent.penultimate(NET), SHAPE, CLASSES, config)
    state = jax.eval_shape(adaptive.init, KEY, variables())
    for step in (adaptive.step, adaptive.second):
        check_fit(step, drawn, data(), state)


def test_the_search_for_a_trojan_trigger():
    search = trojan.search(NET, SHAPE, CLASSES, trojan.Config(neurons=2))
    state = search.init(KEY, variables())
    check_fit(search.step, draw.uniform(ROWS), data(), state, (variables(),))


@functools.cache
def repair_data() -> tuple[RepairData, object]:
    attack = badnets.make(SHAPE, CLASSES, badnets.Config())
    rows = data()
    sources, target = (draw.of_classes(rows, classes) for classes in ((1, 2, 3), (0,)))
    return RepairData(rows, sources, target, attack.init(KEY)), attack.stamp


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("name", [each.name for each in methods.TABLE if each.kind == "repair"])
def test_the_start_and_every_phase_of_every_repair(name, count, monkeypatch):
    monkeypatch.setenv(devices.LIMIT, str(count))
    found, (rows, stamp) = methods.find("repair", name), repair_data()
    config = found.module.Config(**SMALL.get(name, {}))
    rows = rows if "clean" in found.needs else RepairData()
    config = _adapted(found, config, rows)
    made = found.module.make(Problem(NET, SHAPE, CLASSES, stamp=stamp), config)
    state = jax.eval_shape(made.init, KEY, variables(), rows)
    check(Program(made.init), KEY, variables(), rows)
    for phase in made.phases:
        state = state if phase.begin is None else jax.eval_shape(phase.begin, state)
        source = None if phase.draws is None else getattr(rows, phase.draws)
        drawn = None if source is None else draw.uniform(ROWS)
        if count == 1:
            check_fit(phase.step, drawn, source, state)
        else:
            blank = jax.tree.map(_blank, state)
            check_divided(phase.step, drawn, source, blank)


def _blank(leaf):
    """An array of a leaf's shape and type; a key of zeros where it is one."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.zeros((*leaf.shape, 2), jnp.uint32))
    return jnp.zeros(leaf.shape, leaf.dtype)


def _adapted(found, config, rows):
    return repairing.adapt(found, config, Suspect(NET, variables(), SHAPE, CLASSES), rows, ROWS)


def test_rates():
    """Both loops over batches: in the program, and on the host."""
    _, stamp = repair_data()
    trigger, (portion,) = repair_data()[0].trigger_params, batches.portions(data(), ROWS, most=9)
    measures = {
        evaluate.predictor(NET.apply): variables(),
        evaluate.stamped_predictor(NET.apply, stamp): (variables(), trigger),
    }
    for measure, known in measures.items():
        one, every = batches._programs(measure)
        check(one, KEY, known, portion.numbers[0], portion.images[0])
        check(every, KEY, known, portion.numbers, portion.images)


@pytest.mark.parametrize("count", [1, 8])
def test_rates_of_a_sweep(count, monkeypatch):
    monkeypatch.setenv(devices.LIMIT, str(count))
    module, config = INVERSIONS["mesa"]
    method, mesh = module.make(NET, SHAPE, config), devices.mesh()
    states = jax.vmap(method.init)(jax.random.split(KEY, CLASSES))
    cells = (jnp.arange(CLASSES, dtype=jnp.int32), states, sweep.grid(range(CLASSES)))
    (portion,) = batches.portions(data(), ROWS, most=9)
    shared = devices.on_each(jax.tree.map(jnp.asarray, (KEY, variables(), portion)), mesh)
    program = sweep_rates.count_hits(NET.apply, method.stamp)
    check(program, shared[0], *devices.by_cell(cells, mesh), *shared[1:])


def test_the_guarded_net():
    guarded = guard.make(NET, (0, 2), slots=4)
    (portion,) = batches.portions(data(), ROWS, most=9)
    known = guarded.init(KEY)
    one, _ = batches._programs(evaluate.predictor(guarded.apply))
    check(one, KEY, known, portion.numbers[0], portion.images[0])
    flag = evaluate._stamping(guard.flag(NET, (0, 2), slots=4), None)
    check(batches._programs(flag)[1], KEY, (known, ()), *portion[:2])


def test_strip():
    (portion,) = batches.portions(data(), ROWS, most=9)
    flag = evaluate._stamping(strip.flag(NET, strip.Config(overlays=2)), None)
    known = variables(), data().images, jnp.float32(1)
    for program, first in zip(batches._programs(flag), (0, slice(None)), strict=True):
        check(program, KEY, (known, ()), portion.numbers[first], portion.images[first])


def test_distances_and_divergences():
    rows, stamp = repair_data()
    diverge = activations._diverger(NET, stamp, 0.1, 4)
    check(diverge, variables(), variables(), rows.trigger_params, data().images)
    check(distances._projector(), data().images, jnp.ones((2, int(np.prod(SHAPE)))))
    values, pairs = jnp.ones((2, 5, 3)), jnp.zeros((1, 2), jnp.int32)
    check(distances._pairwise(2.0), values, jnp.full(2, 5), pairs)


def test_what_is_looked_for_is_found():
    """A callback, float64, a donated array that nothing reuses."""
    said = Program(lambda x: (jax.debug.callback(lambda _: None, x), x)[1], donate=(0,))
    with pytest.raises(AssertionError, match="callback"):
        check(said, jnp.ones(3), platforms=["cpu"])
    with pytest.raises(ValueError, match="different from the lowering platform"):
        check(said, jnp.ones(3))
    with jax.enable_x64(True), pytest.raises(AssertionError, match="float64"):
        check(Program(lambda x: x * 2), jnp.ones(3, jnp.float64))
    with pytest.warns(UserWarning, match="donated"), pytest.raises(AssertionError, match="0 of 1"):
        check(Program(lambda x: x.sum(), donate=(0,)), jnp.ones(3), donated=1)
