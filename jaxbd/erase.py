"""Erases a net's backdoors without any data (DHBE): the driver of `repair.dhbe`.

Composition like `workflow`: nothing is printed, no file is opened, and nothing here takes an image.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxbd import loop
from jaxbd.base import Key, Net, Variables
from jaxbd.models.norm import NORMALISATIONS
from jaxbd.repair import dhbe
from jaxbd.workflow import Progress, Repaired


@functools.lru_cache(maxsize=32)
def _method(net: Net, image_shape: tuple[int, int, int], config: dhbe.Config):
    """The method, and its step keyed by the state's own step number; kept, so that nothing is traced twice."""
    method = dhbe.make(net, image_shape, config)

    def advance(state, key):
        return method.step(jax.random.fold_in(key, state.step), state)

    return method, advance


def settled(
    config: dhbe.Config,
    mean: tuple[float, ...] = NORMALISATIONS["none"][0],
    std: tuple[float, ...] = NORMALISATIONS["none"][1],
    over_time: loop.Time = "auto",
) -> dhbe.Config:
    """`config` for a net with input normalisation `mean`, `std`, and for the way over time.

    The images generated for a net that normalises have its constants for moments, so that it sees zero mean and unit
    variance, as released; for a net that does not, `config.mean` and `config.std` stay. The student's updates are a
    loop of the program where the iterations are.
    """
    over_time = loop.default_time() if over_time == "auto" else over_time
    if (tuple(mean), tuple(std)) != NORMALISATIONS["none"]:
        config = dataclasses.replace(config, mean=tuple(mean), std=tuple(std))
    return dataclasses.replace(config, inner="scan" if over_time == "scan" else "unrolled")


def start(key: Key, net: Net, image_shape: tuple[int, int, int], variables: Variables, config: dhbe.Config):
    """The state that `run` begins with; `config` as `settled` gives it."""
    method, _ = _prepared(net, image_shape, config)
    state = method.init(jax.random.fold_in(key, 0), variables)
    return state._replace(strength=dhbe.strength(config))


def _prepared(net: Net, image_shape: tuple[int, int, int], config: dhbe.Config):
    """The method for `config` with its traced numbers left at their defaults: all their values share one program."""
    plain = {name: getattr(dhbe.Config(), name) for name in dhbe.Strength._fields}
    return _method(net, tuple(image_shape), dataclasses.replace(config, **plain))


def run(
    key: Key,
    net: Net,
    image_shape: tuple[int, int, int],
    variables: Variables,
    config: dhbe.Config,
    *,
    mean: tuple[float, ...] = NORMALISATIONS["none"][0],
    std: tuple[float, ...] = NORMALISATIONS["none"][1],
    state: dhbe.State | None = None,
    over_time: loop.Time = "auto",
    chunk: int = 10,
    progress: Progress | None = None,
    on_chunk: Callable[[int, dhbe.State, Any], None] | None = None,
    label: str = "erase",
) -> Repaired:
    """Erases whatever backdoors the net with weights `variables` has; no data is needed.

    Args:
      mean, std: the net's own input normalisation, see `settled`.
      state: goes on from a saved state (it is used up), bit for bit as if the run had never stopped.
      on_chunk: (iterations done, state, infos of the chunk) after every `chunk` iterations; the state is only valid
        during the call.

    Returns: variables of the repaired net, infos [iterations run], seconds.
    Raises: UserError when the net's images or the trigger size do not fit; loop.NotFinite on divergence.
    """
    config = settled(config, mean, std, over_time)
    method, advance = _prepared(net, image_shape, config)
    state = start(key, net, image_shape, variables, config) if state is None else state
    before, report = int(state.step), progress or (lambda *_: None)
    report(label, before, config.num_steps)

    def after_chunk(done: int, now: dhbe.State, infos: Any) -> None:
        report(label, before + done, config.num_steps)
        if on_chunk is not None:
            on_chunk(before + done, now, infos)

    state, infos, seconds = loop.run(
        advance,
        state,
        jax.random.fold_in(key, 1),
        num_steps=config.num_steps - before,
        over_time=over_time,
        chunk=chunk,
        on_chunk=after_chunk,
        rows=config.batch_size,
    )
    return Repaired(method.extract(state), infos, seconds)
