"""Trains clean nets, poisoned nets, and victims of the adaptive attack."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxbd.attacks import latent, poison
from jaxbd.base import Attack, Batch, Key, Net, Variables
from jaxbd.data import draw
from jaxbd.training import loop, supervised
from jaxbd.training.program import Seconds, total_seconds
from jaxbd.training.run import Run


class Trained(NamedTuple):
    """Result of training: the net's variables, infos [num_steps], seconds."""

    variables: Variables
    infos: Any
    seconds: Seconds


class Adapted(NamedTuple):
    """Result of the adaptive attack: the net's variables, its trigger, infos of both stages,
    seconds."""

    variables: Variables
    trigger: latent.Trigger
    infos: latent.Info
    seconds: Seconds


def train(
    run: Run,
    name: str,
    key: Key,
    net: Net,
    data: Batch,
    config: supervised.Config,
    *,
    batching: draw.Batching = draw.Batching(),
    attack: tuple[Attack, Any] | None = None,
    variables: Variables | None = None,
) -> Trained:
    """Trains a net as the stage `name`, from `variables` or from scratch.

    Args:
      attack: (attack, trigger) to poison a random share of every batch with; None for clean
        training.
    """
    trainer = supervised.make(net, config)
    if variables is None:
        variables = net.init(jax.random.fold_in(key, 0))
    drawn, source = batching.draw(), data
    if attack is not None:
        drawn, source = poison.dynamic(attack[0], drawn), (data, attack[1])
    fitted = run.fit(
        name,
        jax.random.fold_in(key, 1),
        trainer.step,
        drawn,
        source,
        trainer.init(variables),
        info=supervised.Info,
        num_steps=config.num_steps,
    )
    return Trained(fitted.state.variables, fitted.infos, fitted.seconds)


def train_adaptive(
    run: Run,
    name: str,
    key: Key,
    net: Net,
    data: Batch,
    classes: int,
    config: latent.Config,
    *,
    batching: draw.Batching = draw.Batching(),
    features: Callable[[Variables, jax.Array], latent.Seen] | None = None,
    variables: Variables | None = None,
) -> Adapted:
    """Trains a victim together with its trigger generator, from `variables` or from scratch.

    Args:
      features: (variables, images) -> the net's features; default: `latent.penultimate`, for nets
        that expose them.
    """
    features = latent.penultimate(net) if features is None else features
    trainer = latent.make(net, features, data.images.shape[1:], classes, config)
    variables = net.init(jax.random.fold_in(key, 0)) if variables is None else variables
    state = trainer.init(jax.random.fold_in(key, 2), variables)
    infos, seconds = [], Seconds(0.0, 0.0)
    for stage, step, length in (
        (f"{name}: first stage", trainer.step, config.first_steps),
        (f"{name}: second stage", trainer.second, config.second_steps),
    ):
        fitted = run.fit(
            stage,
            jax.random.fold_in(key, 1),
            step,
            batching.draw(),
            data,
            state,
            info=latent.Info,
            num_steps=length,
        )
        state, seconds = fitted.state, total_seconds(seconds, fitted.seconds)
        infos += [fitted.infos] if fitted.infos is not None else []
    return Adapted(*trainer.extract(state), loop.join_infos(infos), seconds)
