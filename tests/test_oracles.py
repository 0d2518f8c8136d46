"""Victims whose backdoor is known because it was built by hand or planted here: it must be found, and removed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd import detect, evaluate, loop, supervised, sweep
from jaxbd.attacks import badnets, poison
from jaxbd.data import draw
from jaxbd.inversion import mesa, neural_cleanse, pixel
from jaxbd.models import build
from jaxbd.repair import unlearn

TARGET, PLACE = 2, (1, 4)
SMALL = dict(hidden=64, noise_dim=16, learning_rate=2e-3)
CELLS = sweep.grid(range(toys.CLASSES), level=(0.8,))
DRAW = draw.uniform(64)
ROW, COLUMN = PLACE

VICTIMS = {
    "everywhere": toys.victim(TARGET),
    "one-place": toys.victim(TARGET, PLACE),
    "clean": toys.victim(TARGET, gain=0.0),
}


@pytest.fixture(scope="module")
def data():
    return jax.tree.map(jnp.asarray, toys.quadrants(0, 400)), toys.quadrants(1, 200)


def test_the_hand_built_victims_are_what_they_claim(data):
    """Right on clean images; the pattern works at every place, or at the one place, or nowhere."""
    _, held_out = data
    for victim, here, elsewhere in (("everywhere", 1, 1), ("one-place", 1, 0), ("clean", 0, 0)):
        for (row, column), rate in ((PLACE, here), ((5, 0), elsewhere)):
            config = badnets.Config(pattern=170, place="fixed", row=row, column=column, target=TARGET)
            attack = badnets.make(toys.SHAPE, toys.CLASSES, config)
            rates = evaluate.rates(
                jax.random.key(0), toys.NET, VICTIMS[victim], held_out, attack, attack.init(jax.random.key(0))
            )
            assert (rates.clean_accuracy, rates.attack_success_rate) == (1.0, rate)


INVERSIONS = {
    "mesa": mesa.make(toys.NET, toys.SHAPE, mesa.Config(**SMALL)),
    "mesa-fixed": mesa.make(toys.NET, toys.SHAPE, mesa.Config(place="fixed", row=ROW, column=COLUMN, **SMALL)),
    "mesa-searched": mesa.make(toys.NET, toys.SHAPE, mesa.Config(place="searched", **SMALL)),
    "pixel": pixel.make(toys.NET, toys.SHAPE, pixel.Config()),
    "pixel-fixed": pixel.make(toys.NET, toys.SHAPE, pixel.Config(place="fixed", row=ROW, column=COLUMN)),
    "neural-cleanse": neural_cleanse.make(toys.NET, toys.SHAPE, neural_cleanse.Config()),
}


@pytest.fixture(scope="module")
def found(data):
    """(inversion, victim, place of a fixed trigger) -> states and success rates of all classes; each is run once."""
    images, held_out = data

    @functools.cache
    def run(name, victim, place=None):
        key, inversion, victim = jax.random.key(0), INVERSIONS[name], VICTIMS[victim]
        states = sweep.init(key, inversion, CELLS)
        if place is not None:
            states = states._replace(place=jnp.tile(jnp.array(place), (toys.CLASSES, 1)))
        states, _, _ = sweep.fit(key, inversion, DRAW, images, CELLS, victim, num_steps=250, states=states)
        return states, sweep.attack_success(key, toys.NET, inversion, states, CELLS, victim, held_out)

    return run


@pytest.mark.parametrize(
    "name, victim",
    [
        ("mesa", "everywhere"),
        ("mesa-fixed", "one-place"),
        ("mesa-searched", "one-place"),
        ("pixel", "everywhere"),
        ("pixel-fixed", "one-place"),
    ],
)
def test_an_inversion_finds_the_target_and_no_other_class(found, name, victim):
    _, rates = found(name, victim)
    decision = detect.decide(rates)
    assert (decision.verdict, decision.targets) == ("backdoored", [TARGET]), rates
    assert np.delete(rates, TARGET).max() < 0.1


@pytest.mark.parametrize(
    "name, victim, place",
    [
        ("mesa", "clean", None),
        ("mesa-fixed", "one-place", (5, 0)),
        ("mesa-searched", "clean", None),
        ("pixel", "clean", None),
    ],
)
def test_an_inversion_finds_nothing_where_nothing_is(found, name, victim, place):
    """The clean twin, and the right victim at a place where its trigger does not work."""
    _, rates = found(name, victim, place)
    assert detect.decide(rates).verdict == "clean", rates


def samples(found, name, victim) -> np.ndarray:
    """400 triggers [N, 9] recovered for the target."""
    of_target = jax.tree.map(lambda leaf: leaf[TARGET], found(name, victim)[0])
    return np.asarray(INVERSIONS[name].sample(jax.random.key(5), of_target, 400)).reshape(400, 9)


def likeness(triggers: np.ndarray) -> np.ndarray:
    """Correlation [N] with the planted pattern in [-1, 1], as the victim measures it.

    The inverted pattern works at random places too: moved by one pixel it is the pattern in six of nine pixels.
    """
    return (2 * triggers - 1) @ (2 * toys.PATTERN.ravel() - 1) / 9


@pytest.mark.parametrize("name, victim", [("mesa", "everywhere"), ("mesa-fixed", "one-place"), ("pixel", "everywhere")])
def test_recovered_triggers_look_like_the_planted_one(found, name, victim):
    match = likeness(samples(found, name, victim))
    assert (match if name == "mesa-fixed" else np.abs(match)).mean() > 0.5


def test_mesa_recovers_a_distribution_and_the_baseline_one_point(found):
    """Valid triggers are many here; one point misses them."""
    assert samples(found, "mesa", "everywhere").std(0).max() > 0.05
    assert samples(found, "pixel", "everywhere").std(0).max() == 0


def test_the_searched_place_is_the_planted_one_give_or_take_a_pixel(found):
    states, _ = found("mesa-searched", "one-place")
    probabilities = np.asarray(jax.nn.softmax(states.place_logits[TARGET])).reshape(toys.PLACES)
    where = np.unravel_index(probabilities.argmax(), toys.PLACES)
    assert np.abs(np.subtract(where, PLACE)).max() <= 1


def test_neural_cleanse_needs_the_smallest_mask_for_the_target(found):
    states, rates = found("neural-cleanse", "everywhere")
    assert rates[TARGET] > 0.9 and np.argmin(states.best_norm) == TARGET


NET = build.net(build.Spec(arch="cnn", classes=toys.CLASSES, image_shape=toys.SHAPE, options={"width": 8, "stages": 2}))
PLANTED = badnets.make(toys.SHAPE, toys.CLASSES, badnets.Config(target=1, pattern=170, poison_rate=0.15))


@pytest.fixture(scope="module")
def planted():
    """A small CNN with a backdoor trained into it, its trigger, and clean images to repair and to judge with."""
    clean = jax.tree.map(jnp.asarray, toys.stripes(0, 400))
    trigger = PLANTED.init(jax.random.key(0))
    trainer = supervised.make(NET, supervised.Config(learning_rate=0.1, num_steps=250))
    state = trainer.init(jax.jit(NET.init)(jax.random.key(1)))
    state, _, _ = loop.fit(
        jax.random.key(2), trainer.step, poison.dynamic(PLANTED, DRAW), (clean, trigger), state, num_steps=250
    )
    return state.variables, trigger, clean, toys.stripes(1, 200)


REPAIR = unlearn.make(NET, PLANTED.stamp, unlearn.Config(stamp_rate=0.3, learning_rate=0.02))


def repaired(planted, model) -> evaluate.Rates:
    """Rates after unlearning with the evidence of one trigger."""
    variables, trigger, clean, held_out = planted
    state = REPAIR.init(jax.random.key(3), variables, unlearn.single(model))
    state, _, _ = loop.fit(jax.random.key(4), REPAIR.step, DRAW, clean, state, num_steps=150)
    return evaluate.rates(jax.random.key(5), NET, REPAIR.extract(state), held_out, PLANTED, trigger)


def test_the_planted_backdoor_works(planted):
    variables, trigger, _, held_out = planted
    before = evaluate.rates(jax.random.key(5), NET, variables, held_out, PLANTED, trigger)
    assert before.clean_accuracy > 0.95 and before.attack_success_rate > 0.95
    assert before.n_triggered == 150


def test_unlearning_the_true_trigger_removes_the_backdoor(planted):
    after = repaired(planted, planted[1])
    assert after.attack_success_rate < 0.05 and after.clean_accuracy > 0.95
    assert after.source_inference_accuracy > 0.9


def test_unlearning_a_useless_trigger_does_not(planted):
    """Same images, same steps, same labels: what removes the backdoor is the evidence."""
    blank = planted[1]._replace(pattern=jnp.full((3, 3, 1), 0.5))
    after = repaired(planted, blank)
    assert after.attack_success_rate > 0.5 and after.clean_accuracy > 0.95
