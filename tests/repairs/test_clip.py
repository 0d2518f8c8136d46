"""Bounds without a trigger: a channel that only the trigger drives is clipped, accuracy stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.base import Batch, Problem, RepairData, Suspect, UserError
from jaxbd.models import build
from jaxbd.pipelines import repair
from jaxbd.repairs import clip
from jaxbd.training.run import Run

TARGET = 2
SPEC = build.Spec(
    arch="cnn",
    classes=toys.CLASSES,
    image_shape=toys.SHAPE,
    options={"width": 5, "stages": 1, "norm": False},
)
NET = build.net(SPEC)
QUICK = clip.Config(num_steps=120, batch_size=32)


def brightness(seed: int, count: int) -> Batch:
    """uint8 images [count, 8, 8, 1] of four grey levels, the label; a net of means can tell."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % toys.CLASSES).astype(np.int32)
    images = (
        0.1 + 0.2 * labels[:, None, None, None] + rng.uniform(-0.03, 0.03, (count, *toys.SHAPE))
    )
    return Batch(np.round(images * 255).astype(np.uint8), labels)


def stamp(images: np.ndarray) -> np.ndarray:
    """A white pixel on black, which no clean image has anywhere."""
    stamped = images.copy()
    stamped[:, :3, :3] = 0
    stamped[:, 1, 1] = 255
    return stamped


def planted() -> dict:
    """Channels 0 to 3 tell grey levels apart; channel 4 fires on a bright pixel amid dark ones, and
    leads to TARGET. Built by hand."""
    shapes = dict(jax.eval_shape(NET.init, jax.random.key(0)))
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    kernel, bias = fresh["params"]["conv0"]["kernel"], fresh["params"]["conv0"]["bias"]
    kernel[1, 1, 0, :4] = 1.0
    bias[:4] = [1.0, -0.2, -0.4, -0.6]
    kernel[..., 0, 4], kernel[1, 1, 0, 4], bias[4] = -1.0, 8.0, -3.0
    head = fresh["params"]["head"]
    # relu(x - 0.2), relu(x - 0.4) and relu(x - 0.6) bend the line through the grey levels
    levels = 0.1 + 0.2 * np.arange(4)
    features = np.maximum(levels[:, None] + bias[None, :4], 0)
    head["kernel"][:4] = np.linalg.solve(features, 20 * np.eye(4))
    head["kernel"][4, TARGET] = 300.0
    return jax.tree.map(jnp.asarray, fresh)


MADE = clip.make(Problem(NET, toys.SHAPE, toys.CLASSES), QUICK)


def started(variables, count: int = 300) -> clip.State:
    """The state before the first step."""
    data = RepairData(jax.tree.map(jnp.asarray, brightness(0, count)))
    return jax.jit(MADE.init)(jax.random.key(0), variables, data)


def rates(variables) -> tuple[float, float, float]:
    """Accuracy on clean images, and the shares of stamped ones called TARGET, and their own
    class."""
    data = brightness(5, 200)
    answers = lambda images: np.asarray(NET.apply(variables, images / np.float32(255))[0]).argmax(1)
    others = data.labels != TARGET
    stamped = answers(stamp(data.images[others]))
    clean = (answers(data.images) == data.labels).mean()
    return clean, (stamped == TARGET).mean(), (stamped == data.labels[others]).mean()


@pytest.fixture(scope="module")
def repaired():
    suspect = Suspect(NET, planted(), toys.SHAPE, toys.CLASSES)
    data = brightness(0, 300)
    return repair.repair(Run(), jax.random.key(1), suspect, data, [], "clip", QUICK)


def test_the_channel_that_only_the_trigger_drives_is_clipped(repaired):
    before, after = rates(planted()), rates(repaired.variables)
    assert before[:2] == (1.0, 1.0)
    assert after[0] >= 1 - QUICK.max_drop and after[1] == 0.0 and after[2] > 0.9


def test_no_weight_changes_and_the_bounds_are_a_collection(repaired):
    assert set(repaired.variables) == {*planted(), "bounds"}
    for one, other in zip(
        jax.tree.leaves(planted()),
        jax.tree.leaves({k: repaired.variables[k] for k in planted()}),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_the_result_is_the_tightest_within_the_budget(repaired):
    infos = repaired.infos["clip"]
    good = infos.accuracy >= infos.accuracy[0] - QUICK.max_drop
    assert not good.all(), "the cost never grew until accuracy fell"
    state, step = started(planted()), jax.jit(MADE.phases[0].step)
    first = state.reach
    for number in range(3):
        state, info = step(jax.random.key(number), state, None)
    assert info.size < clip.mean_bound(first)
    assert clip.mean_bound(state.best) == pytest.approx(float(state.best_size))
    strict = state._replace(least_accuracy=jnp.float32(2.0))
    after, _ = step(jax.random.key(9), strict, None)
    assert after.best_size == state.best_size, "bounds beyond the budget must not be taken"


def test_bounds_that_were_there_stay_where_they_are_tighter():
    had = {"norm0": {"lower": jnp.full(5, -0.5), "upper": jnp.array([0.1, 9, 9, 9, 9.0])}}
    bounds = MADE.extract(started({**planted(), "bounds": had}))["bounds"]["norm0"]
    assert bounds["upper"][0] == pytest.approx(0.1) and (bounds["upper"][1:] < 9).all()
    np.testing.assert_array_equal(bounds["lower"], had["norm0"]["lower"])


def test_the_cost_follows_the_runs_of_good_and_bad_steps():
    state, costs = started(planted()), []
    for is_good in [True] * 5 + [False] * 5 + [True] * 4:
        state = state._replace(**clip._schedule(state, jnp.bool_(is_good), QUICK))
        costs.append(float(state.cost))
    assert costs[3:5] == pytest.approx([1e-3, 2e-3])
    assert costs[8:10] == pytest.approx([2e-3, 2e-3 / 2**1.5])
    assert costs[13] == costs[9]


def test_moments_are_those_of_the_layers():
    images = brightness(0, 128).images
    moments = clip.measure_moments(NET, planted(), jnp.asarray(images))
    _, shown = NET.outputs(planted(), images / np.float32(255))
    for layer, values in shown.items():
        flat = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
        np.testing.assert_allclose(moments[layer].mean, flat.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(moments[layer].std, flat.std(0), rtol=1e-2, atol=1e-4)


def test_moments_far_from_zero_keep_their_spread():
    far = NET._replace(outputs=lambda variables, images: (None, {"norm0": images + 4096.0}))
    images = np.random.default_rng(0).uniform(0, 1, (512, *toys.SHAPE)).astype(np.float32)
    moments = clip.measure_moments(far, {}, jnp.asarray(images))["norm0"]
    rounded = (images + np.float32(4096)).astype(np.float64)
    np.testing.assert_allclose(moments.std, rounded.std() + clip.LEAST_STD, rtol=1e-3)


def test_what_cannot_be_clipped_is_refused():
    with pytest.raises(UserError, match="bare apply"):
        clip.make(Problem(toys.NET, toys.SHAPE, toys.CLASSES), QUICK)
    with pytest.raises(UserError, match="1 clean images cannot be divided"):
        started(planted(), count=1)
    for bad in (dict(max_drop=1.0), dict(held_share=0.0), dict(learning_rate=float("nan"))):
        with pytest.raises(UserError, match=next(iter(bad))):
            clip.Config(**bad)
