"""Relearning: which images are poisoned, when the backdoor counts as back, what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.attacks import poison
from jaxbd.base import Batch, UserError
from jaxbd.images import to_float
from jaxbd.metrics import relearn
from jaxbd.models import build
from jaxbd.training.run import Run

KEY = jax.random.key(0)
TARGET = 3
CLEAN, JUDGE = toys.quadrants(0, 200), toys.quadrants(1, 80)


def apply(variables, images):
    """The brightest quadrant; the pixel in the corner adds `door` to the target."""
    params = variables["params"]
    quarters = images.reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, toys.CLASSES)
    corner = images[:, 0, 0, :] ** 8
    return 10 * quarters + params["door"] * corner * jax.nn.one_hot(TARGET, toys.CLASSES)[None]


NET = build.from_apply(apply)
ATTACK = poison.attack(
    lambda key: jnp.float32(1),
    lambda key, value, images: images.at[:, 0, 0].set(value),
    lambda labels: jnp.full_like(labels, TARGET),
    0.01,
)


def run(door: float, **settings) -> relearn.Relearned:
    variables = {"params": {"door": jnp.float32(door)}}
    config = relearn.Config(**{"poison_rate": 0.05, "learning_rate": 0.5, **settings})
    trigger = jnp.float32(1)
    return relearn.relearn(Run(), KEY, NET, variables, CLEAN, JUDGE, ATTACK, trigger, config)


def test_a_hidden_backdoor_is_back_sooner_than_one_that_is_gone():
    hidden, gone = run(3, every=2), run(-3, every=2)
    assert hidden.steps is not None and gone.steps is not None
    assert 0 < hidden.steps < gone.steps
    assert hidden.course[0].tolist() == [0, 0] and hidden.course[-1, 1] >= 0.5
    assert (hidden.course[:-1, 1] < 0.5).all() and hidden.course[-1, 0] == hidden.steps


def test_one_that_works_still_takes_no_step_and_one_that_stays_away_has_none():
    assert run(30).steps == 0
    away = run(-3, learning_rate=1e-4, num_steps=20)
    assert away.steps is None and away.course[:, 0].tolist() == [0, 10, 20]


def test_few_images_are_poisoned_and_none_of_the_target():
    config = relearn.Config(poison_rate=0.03)
    poisoned, count = relearn.poison_few(KEY, CLEAN, ATTACK, jnp.float32(1), config)
    changed = np.asarray(poisoned.images != to_float(jnp.asarray(CLEAN.images))).any((1, 2, 3))
    assert count == changed.sum() == 6
    assert (CLEAN.labels[changed] != TARGET).all()
    labels = np.asarray(poisoned.labels)
    assert (labels[changed] == TARGET).all() and (labels == CLEAN.labels)[~changed].all()


def test_what_cannot_be_is_said_in_one_line():
    of_target = Batch(*(leaf[CLEAN.labels == TARGET] for leaf in CLEAN))
    with pytest.raises(UserError, match="leads every image to its own class"):
        relearn.poison_few(KEY, of_target, ATTACK, jnp.float32(1), relearn.Config())
    with pytest.raises(UserError, match="200 images, fewer than a batch of 300"):
        run(1, batch_size=300)
    with pytest.raises(UserError, match="poison_rate"):
        relearn.Config(poison_rate=0.0)
