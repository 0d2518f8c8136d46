"""DHBE: one iteration against PyTorch, what stays as it was, and that no data is asked for."""

import ast
import dataclasses
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_dhbe
import toys

from jaxbd import images, losses
from jaxbd.base import Batch, Problem, RepairData, Suspect, UserError
from jaxbd.caching import cached
from jaxbd.models import build
from jaxbd.models.norm import NORMALISATIONS
from jaxbd.models.synthesis import SampleGenerator, TriggerGenerator
from jaxbd.pipelines import erase, repair
from jaxbd.repairs import dhbe
from jaxbd.training.loop import Chunk
from jaxbd.training.run import Run

SHAPE = (10, 10, 3)
MEAN, STD = NORMALISATIONS["cifar10"]
SPEC = build.Spec(
    arch="cnn", classes=4, image_shape=SHAPE, mean=MEAN, std=STD, options={"width": 3, "stages": 2}
)
NET, NET64 = build.net(SPEC), build.net(dataclasses.replace(SPEC, dtype="float64"))
PROBLEM = Problem(NET, SHAPE, 4, MEAN, STD)
NOTHING = RepairData()
SMALL = dict(batch_size=6, width=2, noise_dim=5, trigger_size=3, mean=MEAN, std=STD)
CONFIG = dhbe.Config(inner_steps=2, trigger_scale=0.7, prior_weight=0.01, num_steps=100, **SMALL)
START, ITERATE = jax.random.key(1), jax.random.key(2)


@pytest.fixture(scope="module")
def victim():
    """Weights and running moments away from their usual start."""
    variables = jax.jit(NET.init)(jax.random.key(0))
    moments = jax.tree.map(
        lambda leaf: leaf + jnp.linspace(0.1, 0.4, leaf.size), variables["batch_stats"]
    )
    return {**variables, "batch_stats": moments}


@cached(32)
def compiled(config: dhbe.Config, net=NET):
    """init, step and how often the step was traced."""
    method, traces = dhbe.make(PROBLEM._replace(net=net), config), []

    def step(key, state):
        traces.append(1)
        return method.phases[0].step(key, state)

    init = jax.jit(lambda key, variables: method.init(key, variables, NOTHING))
    return init, jax.jit(step), traces


def same(one, other) -> bool:
    return all(
        bool((a == b).all())
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def torch_nets(state: dhbe.State):
    generator = lambda start, images: torch_dhbe.Generator(
        CONFIG.noise_dim, start, int(images), 3, CONFIG.width, images=images
    )
    parts = [
        (torch_dhbe.Student(4, 3, 3), state.teacher),
        (torch_dhbe.Student(4, 3, 3), state.student.variables),
        (generator(5, True), state.generator.variables),
        (generator(3, False), state.trigger.variables),
    ]
    return [torch_dhbe.load(net, variables) for net, variables in parts]


def torch_draws(key):
    """The step's random numbers: (noise of images, noise of triggers, place) for every phase."""
    draw = lambda key: torch.tensor(
        np.asarray(jax.random.normal(key, (CONFIG.batch_size, CONFIG.noise_dim)))
    )
    keys = jax.random.split(key, CONFIG.inner_steps + 2)
    found = []
    for number, phase in enumerate(keys):
        if number == CONFIG.inner_steps:
            found.append((draw(phase), None, None))
            continue
        fake, trigger = jax.random.split(phase)
        noise, place = jax.random.split(trigger)
        found.append(
            (
                draw(fake),
                draw(noise),
                jax.random.randint(place, (1, 2), 0, jnp.full((1, 2), 8))[0].tolist(),
            )
        )
    return found


def test_two_iterations_give_what_pytorch_gives(victim):
    """Parameters and running moments of all four nets: order and number of passes, losses, and all
    three optimisers."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD)
    )
    with jax.enable_x64(True):
        init, step, _ = compiled(CONFIG, NET64)
        state = toys.widen(init(START, toys.widen(victim)))
        nets = torch_nets(state)
        optimisers = [
            torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
            torch.optim.Adam(nets[2].parameters(), lr=1e-3),
            torch.optim.Adam(nets[3].parameters(), lr=1e-3),
        ]
        # the float32 numbers of the state, so that both sides start from the same ones
        weight = float(state.strength.regularisation)
        for group, rate in zip(optimisers, state.strength[1:4], strict=True):
            group.param_groups[0]["lr"] = float(rate)
        for number in range(2):
            key = jax.random.fold_in(ITERATE, number)
            state, _ = step(key, state)
            torch_dhbe.iteration(
                nets,
                optimisers,
                torch_draws(key),
                regularisation=weight,
                prior_weight=0.01,
                scale=0.7,
                mean=mean,
                std=std,
            )
        for net, expected in zip(torch_nets(state), nets, strict=True):
            for name, value in net.state_dict().items():
                if not name.endswith("tracked"):
                    np.testing.assert_allclose(
                        value,
                        expected.state_dict()[name],
                        rtol=1e-7,
                        atol=1e-10,
                        err_msg=f"{type(net)} {name}",
                    )


def test_unrolled_and_scanned_updates_agree(victim):
    with jax.enable_x64(True):
        found = []
        for inner in ("unrolled", "scan"):
            init, step, _ = compiled(dataclasses.replace(CONFIG, inner=inner), NET64)
            found.append(step(ITERATE, toys.widen(init(START, toys.widen(victim)))))
        toys.assert_close(*found, 1e-9)


@pytest.fixture(scope="module")
def after_one(victim):
    """State before, state after and Info of one iteration, by what is varied."""
    init, step, traces = compiled(CONFIG)
    state = init(START, victim)
    strength, first = state.strength, len(traces)
    found = {
        "plain": step(ITERATE, state),
        "weight 0": step(
            ITERATE, state._replace(strength=strength._replace(regularisation=jnp.float32(0)))
        ),
        "weight 5": step(
            ITERATE, state._replace(strength=strength._replace(regularisation=jnp.float32(5)))
        ),
        "late": step(ITERATE, state._replace(step=jnp.int32(80))),
        "short": step(
            ITERATE,
            state._replace(step=jnp.int32(30), strength=strength._replace(num_steps=jnp.int32(50))),
        ),
    }
    found["traces"] = len(traces) - first
    _, step, _ = compiled(dataclasses.replace(CONFIG, milestones=(0.5,)))
    found["one drop"] = step(ITERATE, state._replace(step=jnp.int32(80)))
    init, step, _ = compiled(dataclasses.replace(CONFIG, pure=True))
    return {"before": state, "pure": step(ITERATE, init(START, victim)), **found}


def test_lambda_the_rates_and_the_length_do_not_compile_anew(after_one):
    assert after_one["traces"] <= 1
    assert not same(after_one["plain"][0].student, after_one["weight 5"][0].student)


def test_teacher_never_changes_and_student_begins_as_its_copy(victim, after_one):
    before, (after, _) = after_one["before"], after_one["plain"]
    assert same(before.teacher, victim) and same(before.student.variables, victim)
    assert same(after.teacher, victim)
    for part in ("student", "generator", "trigger"):
        changed = jax.tree.map(
            lambda a, b: bool((a != b).any()), getattr(before, part), getattr(after, part)
        )
        assert all(jax.tree.leaves(changed.variables["batch_stats"])), part
        assert all(jax.tree.leaves(changed.variables["params"])), part
    assert after.step == 1 and same(after.strength, before.strength)


def test_weight_zero_is_not_pure_distillation(after_one):
    """The same weights, but triggered images have passed through the student's running moments."""
    zero, pure = after_one["weight 0"][0], after_one["pure"][0]
    toys.assert_close(zero.student.variables["params"], pure.student.variables["params"], 1e-4)
    for one, other in zip(
        *(jax.tree.leaves(s.student.variables["batch_stats"]) for s in (zero, pure)), strict=True
    ):
        assert float(abs(one - other).max()) > 1e-3
    assert same(pure.trigger, after_one["before"].trigger) and not same(zero.trigger, pure.trigger)
    assert after_one["pure"][1].regulariser == 0 and after_one["weight 0"][1].regulariser > 0


@pytest.mark.parametrize("name, factor", [("late", 0.01), ("short", 0.1), ("one drop", 0.1)])
def test_all_three_rates_fall_together(after_one, name, factor):
    """Adam's first update is its rate times a sign, so it shows the rate; the student's rate is
    reported."""
    before, (plain, _), (slow, info) = after_one["before"], after_one["plain"], after_one[name]
    assert np.isclose(info.learning_rate, 0.1 * factor) and np.isclose(
        after_one["plain"][1].learning_rate, 0.1
    )
    for part in ("generator", "trigger"):
        start, fast, late = (
            getattr(s, part).variables["params"]["body"]["out"]["kernel"]
            for s in (before, plain, slow)
        )
        assert np.isclose(np.median(abs(fast - start)), 1e-3, rtol=0.02), part
        assert np.isclose(np.median(abs(late - start)), 1e-3 * factor, rtol=0.02), part


def test_schedule_of_the_paper():
    """50 iterations in each of 300 epochs: x0.1 at epochs 180 and 240."""
    steps = jnp.array([0, 180 * 50 - 1, 180 * 50, 240 * 50 - 1, 240 * 50, 15_000])
    np.testing.assert_allclose(dhbe.decay(steps, jnp.int32(15_000)), [1, 1, 0.1, 0.1, 0.01, 0.01])
    np.testing.assert_allclose(dhbe.decay(steps, jnp.int32(15_000), (0.8,)), [1, 1, 1, 1, 0.1, 0.1])
    np.testing.assert_allclose(dhbe.decay(jnp.array([0, 9]), jnp.int32(10), ()), [1, 1])
    assert (dhbe.Config().num_steps, dhbe.Config().learning_rate, dhbe.Config().generator_rate) == (
        15_000,
        0.1,
        1e-3,
    )


def test_presets_are_what_paper_and_code_say():
    pick = lambda c: (
        c.inner_steps,
        c.batch_size,
        c.prior_weight,
        c.trigger_scale,
        c.regularisation,
    )
    assert pick(dhbe.paper(trigger_scale=0.5)) == (3, 128, 0.0, 0.5, 0.1)
    assert pick(dhbe.released()) == (5, 256, 1e-4, 1.0, 0.1)
    assert dhbe.released(width=8).width == 8
    assert (
        pick(dhbe.quick(batch_size=64)) == (10, 64, 1e-2, 2.5, 0.1)
        and dhbe.quick().place == "edges"
    )


def test_image_prior_is_the_released_one():
    images = np.random.default_rng(0).normal(size=(3, 6, 5, 2))
    expected = torch_dhbe.roughness(torch.tensor(images).permute(0, 3, 1, 2))
    assert np.isclose(losses.image_roughness(jnp.asarray(images, jnp.float32)), expected, rtol=1e-5)
    assert float(abs(jax.grad(losses.image_roughness)(jnp.ones((2, 4, 4, 1)))).max()) == 0


def test_no_data_is_taken(victim):
    """Neither by the pictures, whose module does not even know batches, nor by the method."""
    tree = ast.parse(pathlib.Path(erase.__file__).read_text())
    named = {
        a.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for a in node.names
    }
    assert not named & {"Batch", "Dataset", "data", "draw"}
    method = dhbe.make(PROBLEM, CONFIG)
    assert method.needs == frozenset() and method.phases[0].draws is None
    batch = Batch(jnp.zeros((2, *SHAPE)), jnp.zeros(2, jnp.int32))
    with pytest.raises(UserError, match="no data"):
        method.phases[0].step(ITERATE, None, batch)
    for data in (RepairData(clean=batch), RepairData(trigger_params=jnp.ones(3))):
        with pytest.raises(UserError, match="no data and no trigger"):
            method.init(START, victim, data)


def test_places_of_triggers_are_drawn_as_stated(victim, monkeypatch):
    """One for the whole batch, or one per image; uniformly, or oftener at corners and edges."""
    asked = []
    for name in ("random_places", "edge_places"):
        draw = getattr(images, name)
        spy = lambda key, count, *shapes, name=name, draw=draw: (
            asked.append((name, count)) or draw(key, count, *shapes)
        )
        monkeypatch.setattr(images, name, spy)
    every = CONFIG.batch_size
    for place, wanted in (
        ("batch", ("random_places", 1)),
        ("image", ("random_places", every)),
        ("edges", ("edge_places", every)),
    ):
        asked.clear()
        method = dhbe.make(PROBLEM, dataclasses.replace(CONFIG, place=place, inner_steps=1))
        jax.eval_shape(method.phases[0].step, ITERATE, method.init(START, victim, NOTHING))
        assert set(asked) == {wanted}


def test_generated_images_follow_the_net(victim):
    own = dataclasses.replace(CONFIG, mean=(0.3,), std=(0.4,))
    suspect = Suspect(NET, victim, SHAPE, 4, *NORMALISATIONS["cifar100"])
    assert erase.adapt(own, suspect).mean == NORMALISATIONS["cifar100"][0]
    plain = suspect._replace(mean=(0.0,), std=(1.0,))
    assert (erase.adapt(own, plain).mean, erase.adapt(own, plain).std) == ((0.3,), (0.4,))


def test_the_updates_are_a_loop_where_the_iterations_are(victim, monkeypatch):
    suspect = Suspect(NET, victim, SHAPE, 4, MEAN, STD)
    for backend, inner, chunk in (("cpu", "unrolled", 1), ("gpu", "scan", 20)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        config = erase.adapt(CONFIG, suspect)
        phase = dhbe.make(PROBLEM, config).phases[0]
        assert (config.inner, phase.chunk, phase.rows) == (inner, chunk, CONFIG.batch_size)


def test_another_lambda_rate_or_length_compiles_nothing(victim):
    config = dataclasses.replace(CONFIG, num_steps=4, inner_steps=1, learning_rate=0.02)
    suspect, seen = Suspect(NET, victim, SHAPE, 4, MEAN, STD), []
    run = Run(observers=(lambda name, chunk, first: seen.append(chunk.done),))
    whole = repair.repair(run, START, suspect, None, [], "dhbe", config)
    rates = whole.infos["dhbe"].learning_rate
    assert seen == [1, 2, 3, 4] and np.allclose(rates, [0.02, 0.02, 0.02, 0.002], rtol=1e-5)
    assert jax.tree.map(jnp.shape, whole.variables) == jax.tree.map(jnp.shape, dict(victim))
    other = dataclasses.replace(config, regularisation=0.01, learning_rate=0.2, num_steps=1)
    one, two = (dhbe.make(PROBLEM, each).phases[0] for each in (config, other))
    assert one.step is two.step and (one.num_steps, two.num_steps) == (4, 1)
    again = repair.repair(Run(), START, suspect, None, [], "dhbe", other)
    assert not same(again.variables, whole.variables)


def test_the_last_students_are_averaged(victim):
    """Weights and running moments of the last 0.4 of 5 iterations; before them the repaired net is
    the student's own, and the way there does not change."""
    config = dataclasses.replace(CONFIG, num_steps=5, inner_steps=1, average=0.4)
    method = dhbe.make(PROBLEM, config)
    init, step, _ = compiled(config)
    state, plain = init(START, victim), compiled(dataclasses.replace(config, average=0.0))
    other, students = plain[0](START, victim), []
    assert other.averaged == {} and same(method.extract(state), victim)
    for number in range(5):
        key = jax.random.fold_in(ITERATE, number)
        (state, _), (other, _) = step(key, state), plain[1](key, other)
        students.append(state.student.variables)
        assert same(students[-1], other.student.variables)
        if number < 4:
            assert same(method.extract(state), students[-1])
    wanted = jax.tree.map(lambda one, last: (one + last) / 2, *students[-2:])
    chex.assert_trees_all_close(method.extract(state), wanted, rtol=1e-5, atol=1e-7)
    assert not same(method.extract(state), students[-1])


BAD = [
    dict(inner_steps=0),
    dict(batch_size=1),
    dict(num_steps=0),
    dict(noise_dim=0),
    dict(width=0),
    dict(regularisation=-0.1),
    dict(regularisation=float("nan")),
    dict(prior_weight=-1.0),
    dict(trigger_scale=0.0),
    dict(learning_rate=0.0),
    dict(generator_rate=float("nan")),
    dict(trigger_rate=-1.0),
    dict(momentum=1.0),
    dict(weight_decay=-1.0),
    dict(std=(0.0,)),
    dict(mean=()),
    dict(trigger_size=2),
    dict(trigger_size=11),
    dict(milestones=(0.8, 0.6)),
    dict(milestones=(0.5, 0.5)),
    dict(milestones=(0.0,)),
    dict(milestones=(1.0,)),
    dict(milestones=(float("nan"),)),
    dict(average=-0.1),
    dict(average=1.1),
    dict(average=float("nan")),
]


@pytest.mark.parametrize(
    "change", BAD, ids=[f"{next(iter(change))}-{n}" for n, change in enumerate(BAD)]
)
def test_bad_values_are_refused_in_one_line(change):
    with pytest.raises(UserError) as caught:
        dhbe.Config(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shape, change, words",
    [
        ((8, 10, 3), {}, "square"),
        ((11, 11, 3), {}, "11 pixels"),
        ((8, 8, 3), dict(trigger_size=9), "9x9"),
        ((8, 8, 3), dict(std=(0.1, 0.2)), "3 channels"),
    ],
)
def test_what_does_not_fit_the_images_is_refused(shape, change, words):
    with pytest.raises(UserError, match=words):
        dhbe.make(Problem(NET, shape, 4), dhbe.Config(**change))


@pytest.fixture(scope="module")
def pictured(victim):
    """Pictures of a run of which every chunk is one iteration but counts for twenty, and the last
    state."""
    init, step, _ = compiled(CONFIG)
    state = init(START, victim)
    suspect = Suspect(NET, victim, SHAPE, 4, MEAN, STD)
    album = erase.Album(jax.random.key(9), suspect, CONFIG, shares=(0, 0.1, 0.5, 0.6, 1), count=3)
    asked = []
    for done in range(20, 101, 20):
        state, info = step(jax.random.fold_in(ITERATE, done), state)
        get_state = lambda state=state, done=done: asked.append(done) or state
        album.observe("dhbe", Chunk(done - 20, get_state, info), 20)
        album.observe("another stage", Chunk(done, get_state, ()), 0)
    assert asked == [20, 60, 100], "a state is copied only for a picture"
    return album.pictures, state


def test_pictures_are_of_the_moments_asked_for(pictured):
    pictures, _ = pictured
    assert [picture.step for picture in pictures] == [20, 60, 100]
    for picture in pictures:
        assert picture.samples.shape == (3, *SHAPE) and picture.triggers.shape == (3, 3, 3, 3)
        assert picture.samples.dtype == picture.triggers.dtype == np.uint8
    assert (pictures[0].samples != pictures[-1].samples).any() and (
        pictures[0].triggers != pictures[-1].triggers
    ).any()


def test_pictures_show_what_a_training_batch_looks_like(pictured):
    """Batch moments of a whole batch, whatever is shown of it, and fixed noise; the state stays as
    it was."""
    (pictures, state), config = pictured, CONFIG
    one, other = jax.random.split(jax.random.key(9))
    before = jax.tree.map(jnp.copy, state)
    whole = erase.samples(one, state, SHAPE, config, config.batch_size)
    assert (whole[:3] == pictures[-1].samples).all()
    values = whole / 255
    noise = jax.random.normal(one, (config.batch_size, config.noise_dim))
    made, _ = SampleGenerator(SHAPE, config.width).apply(
        state.generator.variables, noise, train=True, mutable=["batch_stats"]
    )
    expected = np.clip(np.asarray(made) * np.array(config.std) + np.array(config.mean), 0, 1)
    np.testing.assert_allclose(values, expected, atol=0.51 / 255)
    noise = jax.random.normal(other, (config.batch_size, config.noise_dim))
    made, _ = TriggerGenerator(3, 3, config.width).apply(
        state.trigger.variables, noise, train=True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(
        pictures[-1].triggers / 255, 0.5 + np.asarray(made[:3]) / 2, atol=0.51 / 255
    )
    assert same(before, state)


def test_no_pictures_are_refused(pictured):
    for function in (erase.samples, erase.triggers):
        with pytest.raises(UserError, match="at least 1"):
            function(jax.random.key(0), pictured[1], SHAPE, CONFIG, 0)


def test_an_album_begins_with_what_the_run_begins_with(victim):
    suspect = Suspect(NET, victim, SHAPE, 4, MEAN, STD)
    album = erase.Album(jax.random.key(9), suspect, CONFIG, count=3)
    state = erase.start(START, suspect, CONFIG)
    album.add(0, state)
    assert [picture.step for picture in album.pictures] == [0]
    config = dataclasses.replace(CONFIG, num_steps=1, learning_rate=1e-9, generator_rate=1e-9)
    states = []
    run = Run(observers=(lambda name, chunk, first: states.append(chunk.get_state()),))
    repair.repair(run, START, suspect, None, [], "dhbe", config)
    for part in ("generator", "trigger"):
        before, after = (getattr(each, part).variables["params"] for each in (state, states[-1]))
        chex.assert_trees_all_close(before, after, atol=2e-3)


def test_answers_to_untrained_generators():
    """A net that tells bright from dark images hears of both, one that does not only of its one
    class."""
    seen = []

    def bright(variables, images, *, train):
        seen.append(np.asarray(images))
        brightness = images[..., 0].mean((1, 2))
        return jnp.stack([jnp.full(len(images), CONFIG.mean[0]), brightness], -1), {}

    variables, key = NET.init(jax.random.key(0)), jax.random.key(1)
    suspect = Suspect(NET._replace(apply=bright), variables, SHAPE, 4, MEAN, STD)
    answered = erase.ask_untrained(key, suspect, CONFIG, 64)
    assert [batch.shape for batch in seen] == [(64, *SHAPE)] * erase.UNTRAINED
    assert (
        (seen[0] != seen[1]).any() and min(map(np.min, seen)) >= 0 and max(map(np.max, seen)) <= 1
    )
    brightness = np.concatenate(seen)[..., 0].mean((1, 2))
    assert (answered == (brightness > CONFIG.mean[0])).all() and 0 < answered.mean() < 1
    constant = NET._replace(
        apply=lambda variables, images, *, train: (jnp.eye(4)[jnp.full(len(images), 2)], {})
    )
    answered = erase.ask_untrained(key, suspect._replace(net=constant), CONFIG)
    assert erase.most_frequent(answered) == (2, 1.0)
    assert erase.most_frequent(np.array([3, 1, 3, 0])) == (3, 0.5)


def test_answers_to_noise():
    """Noise comes in cells of several sizes over the whole range of pixels, the same for equal
    keys; a side with fewer pixels than cells has one for each pixel."""
    seen = []

    def bright(variables, images, *, train):
        seen.append(np.asarray(images))
        brightness = images[..., 0].mean((1, 2))
        return jnp.stack([jnp.full(len(images), 0.5), brightness], -1), {}

    variables, key, shape = NET.init(jax.random.key(0)), jax.random.key(1), (16, 24, 3)
    suspect = Suspect(NET._replace(apply=bright), variables, shape, 4)
    answered = erase.ask_noise(key, suspect, 50)
    assert [batch.shape for batch in seen] == [(50, *shape)] * len(erase.CELLS)
    for batch, cells in zip(seen, erase.CELLS, strict=True):
        changes = [np.diff(batch, axis=axis).any((0, 3 - axis, 3)).sum() + 1 for axis in (1, 2)]
        assert changes == [min(cells, 16), min(cells, 24)]
        assert 0 <= batch.min() < 0.05 and 0.95 < batch.max() <= 1
    brightness = np.concatenate(seen)[..., 0].mean((1, 2))
    assert (answered == (brightness > 0.5)).all() and 0 < answered.mean() < 1
    np.testing.assert_array_equal(answered, erase.ask_noise(key, suspect, 50))
    with pytest.raises(UserError, match="at least 1 image"):
        erase.ask_noise(key, suspect, 0)
