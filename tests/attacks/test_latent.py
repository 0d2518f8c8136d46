"""The adaptive attack: what each half of a step moves, when the stages change, and that hiding
hides."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from scipy import stats

from jaxbd import losses
from jaxbd.attacks import latent
from jaxbd.base import Batch, Net, UserError
from jaxbd.data import draw
from jaxbd.metrics import evaluate
from jaxbd.models import build
from jaxbd.models.norm import BatchNorm
from jaxbd.models.unet import UNet
from jaxbd.pipelines import plant
from jaxbd.training import supervised
from jaxbd.training.run import Run

SMALL = latent.Config(
    target=1, width=4, first_steps=2, second_steps=2, generator_learning_rate=5e-3
)


class Shallow(nn.Module):
    """One hidden layer with BatchNorm between the image and the head: seconds on a CPU, and every
    part BNA needs."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(16, name="hidden")(x.reshape(x.shape[0], -1))
        x = nn.relu(BatchNorm(not train, name="norm")(x))
        self.sow("intermediates", "features", x)
        return nn.Dense(toys.CLASSES, name="head")(x)


def shown() -> Net:
    """`Shallow` as a net that shows its features."""
    module = Shallow()

    def outputs(variables, images):
        logits, sown = module.apply(variables, images, train=False, mutable=["intermediates"])
        return logits, {"features": sown["intermediates"]["features"][0]}

    return build.from_flax(module, toys.SHAPE)._replace(outputs=outputs)


NET = shown()


def batch_of(count: int = 16) -> Batch:
    return Batch(*map(jnp.asarray, toys.quadrants(0, count, np.float32)))


def trainer(**changes) -> latent.Trainer:
    config = dataclasses.replace(SMALL, **changes)
    return latent.make(NET, latent.penultimate(NET), toys.SHAPE, toys.CLASSES, config)


def same(one, other) -> bool:
    return all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def moves_at_all(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(float(jnp.abs(a - b).max()) > 1e-12 for a, b in pairs)


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(NET.init)(jax.random.key(0))


def test_sliced_wasserstein_is_the_mean_of_scipy_s_distances():
    rng = np.random.default_rng(0)
    a, b, rows = rng.normal(size=(40, 5)), rng.normal(1, 2, size=(40, 5)), rng.normal(size=(3, 5))
    wanted = np.mean([stats.wasserstein_distance(a @ row, b @ row) for row in rows])
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            losses.sliced_wasserstein(*map(jnp.asarray, (a, b, rows))), wanted, rtol=1e-12
        )
        shuffled = jnp.asarray(a[rng.permutation(40)])
        np.testing.assert_allclose(
            losses.sliced_wasserstein(shuffled, jnp.asarray(a), jnp.asarray(rows)), 0, atol=1e-15
        )


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (30, 18, 3), (64, 64, 3)])
def test_perturbations_have_the_images_shape_and_are_bounded(shape):
    unet, images = UNet(shape[2], 4), jax.random.uniform(jax.random.key(0), (2, *shape))
    params, apply = jax.jit(unet.init)(jax.random.key(1), images), jax.jit(unet.apply)
    out = apply(jax.tree.map(lambda leaf: 50 * leaf, params), images)
    assert out.shape == images.shape and 0.9 < jnp.abs(out).max() <= 1
    other = images.at[1].set(0)
    np.testing.assert_array_equal(apply(params, other)[0], apply(params, images)[0])


@pytest.mark.parametrize("eight_bit", [False, True])
def test_stamps_stay_within_epsilon_and_the_pixel_range(eight_bit):
    attack = latent.attack(
        toys.SHAPE, toys.CLASSES, dataclasses.replace(SMALL, eight_bit=eight_bit)
    )
    stamp, small = jax.jit(attack.stamp), jax.jit(attack.init)(jax.random.key(0))
    trigger = small._replace(generator=jax.tree.map(lambda leaf: 30 * leaf, small.generator))
    images = jnp.round(jax.random.uniform(jax.random.key(1), (9, *toys.SHAPE)) * 255) / 255
    stamped = stamp(jax.random.key(2), trigger, images)
    allowed = SMALL.epsilon + (0.5 / 255 if eight_bit else 0) + 1e-6
    assert stamped.min() >= 0 and stamped.max() <= 1
    assert SMALL.epsilon * 0.9 < jnp.abs(stamped - images).max() <= allowed
    assert eight_bit == np.allclose(stamped * 255, np.round(stamped * 255), atol=1e-4)
    gradient = jax.jit(jax.grad(lambda t: attack.stamp(jax.random.key(2), t, images).sum()))(small)
    assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient.generator))


def test_labels_are_one_target_s_or_each_the_next():
    labels = jnp.array([0, 1, 2, 3])
    one, every = (
        latent.attack(toys.SHAPE, toys.CLASSES, dataclasses.replace(SMALL, all_to_all=a))
        for a in (False, True)
    )
    np.testing.assert_array_equal(one.relabel(labels), [1, 1, 1, 1])
    np.testing.assert_array_equal(every.relabel(labels), [1, 2, 3, 0])


def test_the_two_losses_are_those_of_the_paper(fresh):
    """One step of each side from the net's own outputs: the generator's first, on raw rows, then
    the classifier's."""
    method, batch = trainer(stamped_weight=0.3, latent_weight=2.0), batch_of()
    state = jax.jit(method.init)(jax.random.key(0), fresh)
    after, info = jax.jit(method.step)(jax.random.key(1), state, batch)
    attack, wanted = latent.attack(toys.SHAPE, toys.CLASSES, SMALL), jnp.ones_like(batch.labels)

    def stamped(generator):
        trigger = latent.Trigger(jnp.float32(SMALL.epsilon), generator)
        return attack.stamp(jax.random.key(1), trigger, batch.images)

    def generator_loss(generator):
        # on raw rows the projections are the logits up to their bias, and that cancels
        logits, clean = (
            NET.apply(fresh, images)[0] for images in (stamped(generator), batch.images)
        )
        distance = jnp.abs(jnp.sort(logits, 0) - jnp.sort(clean, 0)).mean()
        return losses.cross_entropy(logits, wanted) + 2 * distance, distance

    gradient, distance = jax.jit(jax.grad(generator_loss, has_aux=True))(state.generator)
    np.testing.assert_allclose(info.distance, distance, rtol=1e-5)
    rule = optax.adam(SMALL.generator_learning_rate)
    moved = optax.apply_updates(
        state.generator, rule.update(gradient, rule.init(state.generator))[0]
    )
    toys.assert_close(after.generator, moved, 1e-5)

    both = jnp.concatenate([batch.images, stamped(after.generator)])
    logits, moments = NET.apply(fresh, both, train=True)
    clean, triggered = (
        losses.cross_entropy(*half) for half in ((logits[:16], batch.labels), (logits[16:], wanted))
    )
    np.testing.assert_allclose(info.loss, 0.7 * clean + 0.3 * triggered, rtol=1e-5)
    toys.assert_close(after.variables["batch_stats"], moments, 1e-5)


def test_each_half_of_a_step_moves_its_own_side_only(fresh):
    """With a rate too small to be seen on one side, only the other side moves."""
    batch, nothing = batch_of(), 1e-30
    for changes, moves in (
        (dict(learning_rate=nothing, weight_decay=0.0), "generator"),
        (dict(generator_learning_rate=nothing), "variables"),
    ):
        method = trainer(**changes)
        state = jax.jit(method.init)(jax.random.key(0), fresh)
        after, _ = jax.jit(method.step)(jax.random.key(1), state, batch)
        moved = {
            "generator": moves_at_all(after.generator, state.generator),
            "variables": moves_at_all(after.variables["params"], state.variables["params"]),
        }
        assert moved == {"generator": moves == "generator", "variables": moves == "variables"}


def test_stages_change_at_the_configured_step_in_one_trace(fresh):
    traces = []

    def counted(*args):
        traces.append(1)
        return method.step(*args)

    method, batch = trainer(second_epsilon=0.02), batch_of()
    step, states, infos = jax.jit(counted), [jax.jit(method.init)(jax.random.key(0), fresh)], []
    for number in range(4):
        state, info = step(jax.random.key(number), states[-1], batch)
        states.append(state)
        infos.append(info)
    moved = [not same(new.generator, old.generator) for old, new in itertools.pairwise(states)]
    assert moved == [True, True, False, False]
    assert [float(info.distance) > 0 for info in infos] == moved
    assert not any(
        same(new.variables["params"], old.variables["params"])
        for old, new in itertools.pairwise(states)
    )
    np.testing.assert_allclose(
        [method.extract(s)[1].epsilon for s in states], [0.1, 0.1, 0.1, 0.02, 0.02]
    )
    assert len(traces) == 1 and all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves((states, infos))
    )
    assert jax.tree.structure(states[-1]) == jax.tree.structure(states[0])
    assert same(
        jax.tree.map(lambda leaf: leaf.dtype.num, states[-1]),
        jax.tree.map(lambda leaf: leaf.dtype.num, states[0]),
    )


def test_the_cheap_step_of_stage_two_is_the_step(fresh):
    method, batch = trainer(first_steps=1), batch_of()
    step, second = jax.jit(method.step), jax.jit(method.second)
    state, _ = step(jax.random.key(0), jax.jit(method.init)(jax.random.key(0), fresh), batch)
    toys.assert_close(
        second(jax.random.key(1), state, batch), step(jax.random.key(1), state, batch), 1e-6
    )


def test_the_driver_runs_both_stages(fresh):
    data, seen = batch_of(32), []
    run = Run(progress=lambda *said: seen.append(said))
    variables, trigger, infos, _ = plant.train_adaptive(
        run,
        "train",
        jax.random.key(0),
        NET,
        data,
        toys.CLASSES,
        SMALL,
        variables=fresh,
        batching=draw.Batching(16),
    )
    stages = "train: first stage", "train: second stage"
    assert len(infos.loss) == 4
    assert seen == [(stage, done, 2) for stage in stages for done in (0, 2)]
    assert (infos.distance[:2] > 0).all() and (infos.distance[2:] == 0).all()
    assert moves_at_all(variables["params"], fresh["params"]) and trigger.epsilon == np.float32(
        SMALL.epsilon
    )


def attacked(data: Batch, base, weight: float):
    """Rates of an attack trained from `base`, and the distance of triggered and clean features on
    the images."""
    config = dataclasses.replace(
        SMALL,
        latent_weight=weight,
        epsilon=0.3,
        first_steps=100,
        second_steps=0,
        learning_rate=0.05,
    )
    variables, trigger, _, _ = plant.train_adaptive(
        Run(),
        "train",
        jax.random.key(0),
        NET,
        data,
        toys.CLASSES,
        config,
        variables=base,
        batching=draw.Batching(32),
    )
    attack = latent.attack(toys.SHAPE, toys.CLASSES, config)
    rates = evaluate.rates(jax.random.key(0), NET, variables, data, attack, trigger)
    images = jnp.asarray(data.images, jnp.float32) / 255
    stamped = jax.jit(attack.stamp)(jax.random.key(0), trigger, images)
    clean, triggered = (jax.jit(latent.penultimate(NET))(variables, x) for x in (images, stamped))
    return rates, float(losses.sliced_wasserstein(triggered.features, clean.features, clean.rows))


def test_the_latent_term_hides_the_trigger_and_the_attack_still_works():
    data = Batch(*map(jnp.asarray, toys.quadrants(1, 128)))
    base, _, _ = plant.train(
        Run(),
        "base",
        jax.random.key(5),
        NET,
        data,
        supervised.Config(num_steps=60),
        batching=draw.Batching(32),
    )
    (plain, apart), (hidden, closer) = (attacked(data, base, weight) for weight in (0.0, 0.3))
    for rates in (plain, hidden):
        assert rates.clean_accuracy > 0.95 and rates.attack_success_rate > 0.95
    assert closer < 0.7 * apart


def test_a_net_without_features_is_refused():
    with pytest.raises(UserError, match="features"):
        latent.penultimate(toys.NET)(toys.victim(0), jnp.zeros((1, *toys.SHAPE)))
