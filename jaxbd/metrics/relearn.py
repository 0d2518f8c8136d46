"""Relearning: how little training brings a backdoor back (the retuning attack of Min et al. 2024,
arXiv:2410.09838).

After a repair that only hides a backdoor, it returns within a few steps on a few poisoned images. A
clean net needs more.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import ArrayTree, Attack, Batch, Key, Net, UserError, Variables
from jaxbd.data import draw
from jaxbd.images import to_float
from jaxbd.metrics import evaluate
from jaxbd.training import supervised
from jaxbd.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of relearning.

    Attributes:
      poison_rate: share of the images to poison with the trigger and the attacker's label; at least
        one image.
      brought_back: the backdoor counts as back at this attack success rate.
      learning_rate: constant learning rate of SGD.
      momentum: momentum of SGD.
      batch_size: images per step.
      every: steps between two measurements.
      num_steps: maximum number of steps.
    """

    poison_rate: float = 0.01
    brought_back: float = 0.5
    learning_rate: float = 0.01
    momentum: float = 0.9
    batch_size: int = 64
    every: int = 10
    num_steps: int = 300

    def __post_init__(self):
        if not (0 < self.poison_rate < 1 and 0 < self.brought_back <= 1):
            raise UserError("relearn: poison_rate and brought_back must be shares above 0")
        if not self.learning_rate > 0 or min(self.batch_size, self.every, self.num_steps) < 1:
            raise UserError(
                "relearn: learning_rate must be > 0; batch_size, every and num_steps at least 1"
            )


class Relearned(NamedTuple):
    """Result of `relearn`.

    Attributes:
      steps: steps done at the first measurement with the backdoor back; None if it never was.
      poisoned: number of poisoned images.
      course: [n, 2], steps and attack success rate of every measurement; the first is at step 0.
    """

    steps: int | None
    poisoned: int
    course: np.ndarray


def relearn(
    run: Run,
    key: Key,
    net: Net,
    variables: Variables,
    images: Batch,
    judge: Batch,
    attack: Attack,
    trigger: ArrayTree,
    config: Config,
    *,
    label: str = "relearn",
) -> Relearned:
    """Trains a net on `images`, a few of them poisoned, until the backdoor is back.

    Args:
      images: uint8 or float, with labels.
      judge: other images, to measure the attack success rate on.
      attack, trigger: only `attack.stamp` and `attack.relabel` are used.
    Raises: UserError when no image can be poisoned or there are fewer images than a batch;
      NotFinite; Stopped.
    """
    if len(images.labels) < config.batch_size:
        raise UserError(
            f"relearn: {len(images.labels)} images, fewer than a batch of {config.batch_size}"
        )
    poisoned, count = poison_few(jax.random.fold_in(key, 0), images, attack, trigger, config)
    rule = supervised.Config(
        learning_rate=config.learning_rate,
        schedule="constant",
        momentum=config.momentum,
        weight_decay=0.0,
        num_steps=config.num_steps,
    )
    trainer = supervised.make(net, rule)
    # a net without normalisation has no batch_stats, but the trainer expects the collection
    state, course = trainer.init({"batch_stats": {}, **variables}), []
    for done in range(0, config.num_steps + 1, config.every):
        if done:
            fitted = run.fit(
                f"{label}, to step {done}",
                jax.random.fold_in(key, 1),  # the step in the state continues the key stream
                trainer.step,
                draw.uniform(config.batch_size),
                poisoned,
                state,
                info=supervised.Info,
                num_steps=config.every,
                chunk=config.every,
            )
            state = fitted.state
        found = evaluate.rates(
            jax.random.fold_in(key, 2), net, state.variables, judge, attack, trigger
        )
        course.append((done, found.attack_success_rate or 0.0))
        if course[-1][1] >= config.brought_back:
            return Relearned(done, count, np.array(course))
    return Relearned(None, count, np.array(course))


def poison_few(
    key: Key, images: Batch, attack: Attack, trigger: ArrayTree, config: Config
) -> tuple[Batch, int]:
    """Poisons a share `poison_rate` of `images`, chosen among those that the attack relabels.

    Returns: (the images as floats, with the poisoned ones stamped and relabelled; how many).
    """
    labels = jnp.asarray(images.labels)
    wanted = attack.relabel(labels)
    able = np.flatnonzero(np.asarray(wanted != labels))
    if not len(able):
        raise UserError("relearn: the trigger leads every image to its own class; nothing to learn")
    count = max(1, round(config.poison_rate * len(labels)))
    stamp_key, choose_key = jax.random.split(key)
    rows = jax.random.choice(choose_key, able, (min(count, len(able)),), replace=False)
    floats = to_float(jnp.asarray(images.images))
    stamped = attack.stamp(stamp_key, trigger, floats[rows])
    return Batch(floats.at[rows].set(stamped), labels.at[rows].set(wanted[rows])), len(rows)
