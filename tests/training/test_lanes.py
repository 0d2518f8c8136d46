"""Groups of cells side by side: as wide as suits, all rows once, whatever does not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd.training import lanes
from jaxbd.training.program import Program


@pytest.mark.parametrize(
    "megabytes, count, expected",
    [
        (900, 32, 2),
        (300, 32, 2),
        (75, 32, 8),
        (0.01, 32, 16),
        (900, 4, 1),
        (900, 3, 1),
        (900, 6, 1),
        (900, 8, 2),
        (0, 1, 1),
        (0, 32, 2),
    ],
)
def test_a_group_fills_the_caches_and_leaves_every_worker_something(
    megabytes, count, expected, monkeypatch
):
    monkeypatch.setattr(lanes, "workers", lambda: 2)
    asked = []

    class Program:
        def traffic(self, cells, shared):
            asked.append(len(cells))
            return 1e6 * megabytes * len(cells)

    assert lanes.width(Program(), (jnp.arange(count), jnp.zeros(3)), (0,), count) == expected
    assert asked == ([lanes.START] if count > 6 else []), "asked where there is a choice"


def test_traffic_grows_with_the_work_and_compiles_nothing():
    program = Program(lambda x: jnp.tanh(x) @ x)
    small, large = (program.traffic(jnp.zeros((size, size))) for size in (8, 64))
    assert 0 < small < large and program.compile_seconds == 0
    traces = program.traces
    program._jitted = None
    assert program.traffic(jnp.ones((8, 8))) == small and program.traces == traces, "looked at once"


def test_a_worker_for_every_core():
    assert 1 <= lanes.workers() <= 4096 and lanes.are_default() == (jax.default_backend() == "cpu")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_all_rows_advance_once_in_every_group_size(size, workers, monkeypatch):
    """The last group repeats its last row, which nobody sees; keys of cells stay theirs."""
    monkeypatch.setattr(lanes, "workers", lambda: workers)
    program = Program(
        lambda carry, keys, shared: (
            {"sum": carry["sum"] + shared, "key": keys},
            carry["sum"] + jax.vmap(jax.random.uniform)(keys),
        )
    )
    keys = jax.random.split(jax.random.key(0), 7)
    carry = {"sum": jnp.arange(7.0), "key": keys}
    after, infos = lanes.advance(program, (carry, keys, jnp.float32(10)), (0, 1), 3, size)
    np.testing.assert_array_equal(after["sum"], np.arange(7.0) + 30)
    np.testing.assert_array_equal(jax.random.key_data(after["key"]), jax.random.key_data(keys))
    drawn = np.asarray(jax.vmap(jax.random.uniform)(keys))
    np.testing.assert_allclose(
        infos, [np.arange(7.0) + 10 * step + drawn for step in range(3)], rtol=1e-6
    )
    assert program.traces == 1 and not carry["sum"].is_deleted()


def test_what_a_group_raises_is_raised(monkeypatch):
    class Broken:
        def compiled(self, *args):
            return self

        def __call__(self, carry, *args):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        lanes.advance(Broken(), (jnp.arange(4.0),), (0,), 2, 2)
