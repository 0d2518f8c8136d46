"""Victims whose backdoor is known because it was built by hand or planted here: it must be found,
and removed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd import methods
from jaxbd.attacks import badnets, poison
from jaxbd.base import Evidence, Suspect
from jaxbd.data import draw
from jaxbd.detection import detect, guard
from jaxbd.inversion import mesa, neural_cleanse, pixel
from jaxbd.metrics import evaluate, sweep_rates
from jaxbd.models import build
from jaxbd.pipelines import correct
from jaxbd.repairs import (
    anp,
    argd,
    bna,
    fine_pruning,
    finetune,
    ft_sam,
    ibau,
    mcr,
    mixture,
    nad,
    nc_unlearn,
    unlearn,
)
from jaxbd.training import supervised, sweep
from jaxbd.training.run import Run

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
            config = badnets.Config(
                pattern=170, place="fixed", row=row, column=column, target=TARGET
            )
            attack = badnets.make(toys.SHAPE, toys.CLASSES, config)
            rates = evaluate.rates(
                jax.random.key(0),
                toys.NET,
                VICTIMS[victim],
                held_out,
                attack,
                attack.init(jax.random.key(0)),
            )
            assert (rates.clean_accuracy, rates.attack_success_rate) == (1.0, rate)


INVERSIONS = {
    "mesa": mesa.make(toys.NET, toys.SHAPE, mesa.Config(**SMALL)),
    "mesa-fixed": mesa.make(
        toys.NET, toys.SHAPE, mesa.Config(place="fixed", row=ROW, column=COLUMN, **SMALL)
    ),
    "mesa-searched": mesa.make(toys.NET, toys.SHAPE, mesa.Config(place="searched", **SMALL)),
    "pixel": pixel.make(toys.NET, toys.SHAPE, pixel.Config()),
    "pixel-fixed": pixel.make(
        toys.NET, toys.SHAPE, pixel.Config(place="fixed", row=ROW, column=COLUMN)
    ),
    "neural-cleanse": neural_cleanse.make(toys.NET, toys.SHAPE, neural_cleanse.Config()),
}


@pytest.fixture(scope="module")
def found(data):
    """(inversion, victim, place of a fixed trigger) -> states and success rates of all classes;
    each is run once."""
    images, held_out = data

    @functools.cache
    def run(name, victim, place=None):
        key, inversion, victim = jax.random.key(0), INVERSIONS[name], VICTIMS[victim]
        given = None if place is None else {"place": np.tile(place, (toys.CLASSES, 1))}
        task = inversion, DRAW, images, CELLS, victim
        states = sweep.search(Run(), name, key, *task, num_steps=250, given=given).states
        return states, sweep_rates.attack_success(
            key, toys.NET, inversion, states, CELLS, victim, held_out
        )

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

    The inverted pattern works at random places too: moved by one pixel it is the pattern in six of
    nine pixels.
    """
    return (2 * triggers - 1) @ (2 * toys.PATTERN.ravel() - 1) / 9


@pytest.mark.parametrize(
    "name, victim", [("mesa", "everywhere"), ("mesa-fixed", "one-place"), ("pixel", "everywhere")]
)
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


NET = build.net(
    build.Spec(
        arch="cnn", classes=toys.CLASSES, image_shape=toys.SHAPE, options={"width": 8, "stages": 2}
    )
)
PLANTED = badnets.make(
    toys.SHAPE, toys.CLASSES, badnets.Config(target=1, pattern=170, poison_rate=0.15)
)


@pytest.fixture(scope="module")
def planted():
    """A small CNN with a backdoor trained into it, its trigger, and clean images to repair and to
    judge with."""
    clean = jax.tree.map(jnp.asarray, toys.stripes(0, 400))
    trigger = PLANTED.init(jax.random.key(0))
    trainer = supervised.make(NET, supervised.Config(learning_rate=0.1, num_steps=250))
    state = trainer.init(jax.jit(NET.init)(jax.random.key(1)))
    state = (
        Run()
        .fit(
            "training",
            jax.random.key(2),
            trainer.step,
            poison.dynamic(PLANTED, DRAW),
            (clean, trigger),
            state,
            info=supervised.Info,
            num_steps=250,
        )
        .state
    )
    return state.variables, trigger, clean, toys.stripes(1, 200)


REPAIRS = {
    "unlearn": unlearn.Config(stamp_rate=0.3, learning_rate=0.02, num_steps=150),
    # with the default weight of 1 this small net still sends 12 % of triggered images to the target
    # after two retries; with 0, the paper's objective, it loses the clean images of the class
    "bna": correct.Config(correction=bna.Config(keep=0.3)),
    "finetune": finetune.Config(learning_rate=0.05, num_steps=300),
    # the rate and the length of fine-tuning
    "ft-sam": ft_sam.quick(learning_rate=0.05),
    "fine-pruning": fine_pruning.quick(),
    "nad": nad.quick(),
    "argd": argd.quick(),
    "nc-unlearn": nc_unlearn.Config(learning_rate=0.02, num_steps=150),
    "anp": anp.quick(by="number", points=10, most=0.9),
    "ibau": ibau.quick(),
    # smaller steps stay near the suspect and keep the backdoor, as fine-tuning does below
    "mcr": mcr.quick(
        points=3,
        finetune_learning_rate=0.5,
        learning_rate=0.5,
        weight_decay=5e-3,
        finetune_steps=150,
        num_steps=150,
    ),
}
"""Repairs on images; `tests/repairs/test_dhbe.py` and the experiments have DHBE's."""
MOST_LEFT = {"unlearn": 0.05, "bna": 0.2, "nc-unlearn": 0.05}
"""Attack success rate that a repair may leave. What BNA leaves depends on rounding in training:
0.02 on one kind of CPU and 0.10 on another."""
NEEDS_TRIGGER = [name for name in REPAIRS if "trigger" in methods.find("repair", name).needs]


def repaired(planted, name, trigger) -> evaluate.Rates:
    """The repaired net's rates under the attacker's own trigger; the repair knows `trigger`."""
    variables, true_trigger, clean, held_out = planted
    suspect = Suspect(NET, variables, toys.SHAPE, toys.CLASSES)
    known = Evidence(1, (), mixture.mix(PLANTED.stamp), mixture.single(trigger))
    key = jax.random.key(4)
    driver = methods.find("repair", name).driver
    result = driver.repair(Run(), key, suspect, clean, [known], name, REPAIRS[name])
    net = guard.make(NET, result.guarded) if result.guarded else NET
    key = jax.random.key(5)
    return evaluate.rates(key, net, result.variables, held_out, PLANTED, true_trigger)


def test_the_planted_backdoor_works(planted):
    variables, trigger, _, held_out = planted
    before = evaluate.rates(jax.random.key(5), NET, variables, held_out, PLANTED, trigger)
    assert before.clean_accuracy > 0.95 and before.attack_success_rate > 0.95
    assert before.n_triggered == 150


@pytest.mark.parametrize("name", NEEDS_TRIGGER)
def test_repairing_with_the_true_trigger_removes_the_backdoor(planted, name):
    after = repaired(planted, name, planted[1])
    most = MOST_LEFT[name]
    assert after.attack_success_rate < most and after.clean_accuracy > 0.95
    assert after.source_inference_accuracy > 0.95 - most


@pytest.mark.parametrize("name", NEEDS_TRIGGER)
def test_repairing_with_a_useless_trigger_does_not(planted, name):
    """Same images, same steps, same labels: what removes the backdoor is the evidence."""
    blank = planted[1]._replace(pattern=jnp.full((3, 3, 1), 0.5))
    after = repaired(planted, name, blank)
    assert after.attack_success_rate > 0.5 and after.clean_accuracy > 0.95


@pytest.mark.parametrize("name, rate", [("anp", 0.8), ("ibau", 0.6), ("mcr", 0.3)])
def test_repairing_without_any_trigger_lowers_its_success(planted, name, rate):
    after = repaired(planted, name, planted[1])
    assert after.attack_success_rate < rate and after.clean_accuracy > 0.95


@pytest.mark.parametrize(
    "name, most",
    [
        ("ft-sam", 0.1),
        ("fine-pruning", 0.6),
        pytest.param("nad", 0.2, marks=pytest.mark.slow),
        pytest.param("argd", 0.2, marks=pytest.mark.slow),
    ],
)
def test_repairs_that_know_no_trigger_do_more_than_fine_tuning(planted, name, most):
    after = repaired(planted, name, planted[1])
    assert after.attack_success_rate < most and after.clean_accuracy > 0.95


def test_fine_tuning_leaves_a_backdoor_that_it_does_not_see(planted):
    """Why the trigger is worth knowing."""
    after = repaired(planted, "finetune", planted[1])
    assert after.clean_accuracy > 0.95 and after.attack_success_rate > 0.5
