"""vmap, map, host loop, scan and four devices are one computation; a grid costs one trace.

In float64: in float32 one Adam step turns the rounding of a tiny gradient into a whole learning rate.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd import loop, sweep
from jaxbd.base import Batch
from jaxbd.data import draw
from jaxbd.inversion import mesa

CONFIG = mesa.Config(hidden=8, noise_dim=8, place="searched")
DRAW = draw.uniform(6)
CELLS = dict(target=(1, 3), level=(0.5, 0.9))
STEPS = 4


class Counted(toys.Counted):
    """With an inversion of the net whose traces are counted."""

    def __init__(self):
        super().__init__()
        self.inversion = mesa.make(self.net, toys.SHAPE, CONFIG)


def wide_data() -> Batch:
    return jax.tree.map(jnp.asarray, toys.quadrants(0, 24, np.float64))


def fit(inversion, how="vmap", over_time="host", place=lambda tree: tree, **settings):
    """States and infos of a small float64 grid; `place` moves states and cells to devices."""
    key, cells = jax.random.key(7), sweep.grid(**CELLS)
    cells = cells._replace(level=cells.level.astype(jnp.float64))
    states = toys.widen(sweep.init(key, inversion, cells))
    return sweep.fit(
        key, inversion, DRAW, wide_data(), place(cells), toys.victim(1, dtype=jnp.float64),
        states=place(states), num_steps=STEPS, how=how, over_time=over_time, chunk=2, **settings,
    )[:2]  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    """The reference: vmap over cells, a host loop over time, on one device."""
    counted = Counted()
    with jax.enable_x64(True):
        states, infos = fit(counted.inversion)
        assert all(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(states))
    return counted, jax.device_get(states), infos


@pytest.mark.parametrize(
    "how, over_time",
    [("lanes", "host"), ("map", "host"), ("loop", "host"), ("vmap", "scan"), ("lanes", "scan"), ("loop", "scan")],
)
def test_every_way_over_cells_and_time_is_the_same_computation(expected, how, over_time):
    counted, states, infos = expected
    with jax.enable_x64(True):
        result = fit(counted.inversion, how, over_time)
        toys.assert_close(result, (states, infos), 1e-9)
    assert np.ptp(infos.confidence, axis=1).max() > 1e-6, "cells differ from one another"


def test_four_devices_give_what_one_gives_and_cells_stay_where_they_were_put(expected):
    counted, states, infos = expected
    assert len(jax.devices()) >= 4
    mesh = jax.make_mesh((4,), ("cell",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("cell"))
    with jax.enable_x64(True):
        result = fit(counted.inversion, place=lambda tree: jax.device_put(tree, sharding))
        assert len(result[0].step.sharding.device_set) == 4
        toys.assert_close(jax.device_get(result), (states, infos), 1e-9)


def test_a_whole_grid_costs_one_trace_and_another_victim_none():
    counted, data = Counted(), jax.tree.map(jnp.asarray, toys.quadrants(0, 24))
    run = lambda victim, seed: sweep.fit(
        jax.random.key(seed), counted.inversion, DRAW, data, sweep.grid(**CELLS), victim,
        num_steps=3, over_time="host",
    )  # fmt: skip
    seconds = run(toys.victim(1), 0)[2]
    assert counted.traces == 1 and seconds.compile > 0
    seconds = run(toys.victim(2, place=(0, 3)), 1)[2]
    assert counted.traces == 1 and seconds.compile == 0


def test_success_of_a_whole_grid_costs_one_trace_and_another_victim_none():
    counted, cells = Counted(), sweep.grid(**CELLS)
    states, held_out = sweep.init(jax.random.key(0), counted.inversion, cells), toys.quadrants(1, 21)
    for seed, victim in enumerate((toys.victim(1), toys.victim(0))):
        rates = sweep.attack_success(
            jax.random.key(seed), counted.net, counted.inversion, states, cells, victim, held_out, batch_size=8
        )
        assert rates.shape == (4,) and counted.traces == 1


def test_saved_and_continued_elsewhere_equals_uninterrupted(expected):
    """States that went through the host's memory continue as if nothing had happened."""
    counted, states, _ = expected
    with jax.enable_x64(True):
        key, cells = jax.random.key(7), sweep.grid(**CELLS)
        cells = cells._replace(level=cells.level.astype(jnp.float64))
        part = toys.widen(sweep.init(key, counted.inversion, cells))
        for _ in range(2):
            part = jax.tree.map(np.asarray, part)
            part = sweep.fit(
                key, counted.inversion, DRAW, wide_data(), cells, toys.victim(1, dtype=jnp.float64),
                num_steps=STEPS // 2, states=jax.tree.map(jnp.asarray, part), over_time="host",
            )[0]  # fmt: skip
        toys.assert_close(jax.device_get(part), states, 0)


def test_the_default_over_time_follows_the_backend():
    assert loop.default_time() == ("host" if jax.default_backend() == "cpu" else "scan")
