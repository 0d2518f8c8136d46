"""The interval trick: equal to the formulas in NumPy, differentiable, and in memory that bins do
not enlarge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd import losses
from jaxbd.repairs import histogram

CHANNELS, WIDTH, TAU, BINS = 5, 0.1, 150.0, 40
LOW = np.array([-1.0, 0.0, 0.3, -2.0, 0.05])
HIGH = np.array([1.5, 0.04, 3.1, 4.0, 0.05])
"""Ranges of many intervals, of one, of some, of more than `BINS`, and of none at all."""


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def by_formula(values, low, width, count, tau, bins):
    """Eq. (5) and (6) word for word, every value against every edge, channel by channel."""
    result = np.zeros((values.shape[-1], bins))
    for channel, column in enumerate(values.reshape(-1, values.shape[-1]).T):
        for i in range(1, count[channel] + 1):
            lower = (
                sigmoid(tau * (column - (low[channel] + (i - 1) * width[channel])))
                if i > 1
                else 1.0
            )
            upper = (
                sigmoid(tau * (column - (low[channel] + i * width[channel])))
                if i < count[channel]
                else 0.0
            )
            result[channel, i - 1] = np.mean(lower - upper)
    return result


def case(dtype=jnp.float32):
    values = np.random.default_rng(0).normal(0.5, 1.5, (6, 4, 3, CHANNELS))
    return jnp.asarray(values, dtype), histogram.grid(
        jnp.asarray(LOW, dtype), jnp.asarray(HIGH, dtype), WIDTH, BINS
    )


def test_the_grid_covers_the_range_with_intervals_of_the_width_or_wider_where_there_are_too_few():
    _, grid = case()
    np.testing.assert_array_equal(grid.intervals, [25, 1, 28, BINS, 1])
    np.testing.assert_allclose(grid.width, [WIDTH, WIDTH, WIDTH, 6 / BINS, WIDTH], rtol=1e-6)
    np.testing.assert_array_equal(grid.low, LOW.astype(np.float32))


@pytest.mark.parametrize(
    "tau, width", [(150.0, 0.1), (50.0, 0.1), (150.0, 0.05), (20.0, 0.2), (500.0, 0.1)]
)
def test_soft_is_the_papers_formula(tau, width):
    values, _ = case()
    grid = histogram.grid(
        jnp.asarray(LOW, jnp.float32), jnp.asarray(HIGH, jnp.float32), width, BINS
    )
    soft = jax.jit(lambda v, g: histogram.soft(v, g, BINS, tau, histogram.reach(tau, width)))(
        values, grid
    )
    expected = by_formula(
        np.asarray(values, float),
        *(np.asarray(leaf, float) for leaf in grid[:2]),
        np.asarray(grid.intervals),
        tau,
        BINS,
    )
    np.testing.assert_allclose(soft, expected, atol=2e-6)
    np.testing.assert_allclose(soft.sum(-1), 1, atol=1e-5)


def test_a_reach_too_short_would_be_noticed():
    values, grid = case()
    soft = jax.jit(histogram.soft, static_argnums=(2, 3, 4))
    near, enough = (
        soft(values, grid, BINS, 20.0, reach) for reach in (1, histogram.reach(20.0, WIDTH))
    )
    assert histogram.reach(20.0, WIDTH) == 8 and np.abs(near - enough).max() > 1e-3


def test_hard_counts_what_numpy_counts():
    values, grid = case()
    counts = histogram.hard(values, grid, BINS)
    assert counts.dtype == jnp.int32
    for channel, column in enumerate(np.asarray(values).reshape(-1, CHANNELS).T):
        count = int(grid.intervals[channel])
        inner = (
            np.asarray(grid.low)[channel] + np.arange(1, count) * np.asarray(grid.width)[channel]
        )
        expected, _ = np.histogram(column, [-np.inf, *inner, np.inf])
        np.testing.assert_array_equal(counts[channel, :count], expected)
        assert not counts[channel, count:].any()


def test_a_large_tau_makes_soft_hard():
    values, grid = case()
    counts = histogram.hard(values, grid, BINS)
    share = counts / counts.sum(-1, keepdims=True)
    # a value may lie 1e-5 from an edge
    np.testing.assert_allclose(histogram.soft(values, grid, BINS, 1e5), share, atol=2e-3)


@pytest.mark.parametrize("tau", [30.0, 150.0])
def test_gradients_are_those_of_finite_differences(tau):
    with jax.enable_x64(True):
        values, grid = case(jnp.float64)
        weight = jnp.asarray(np.random.default_rng(1).normal(size=(CHANNELS, BINS)))
        reach = histogram.reach(tau, WIDTH)
        loss = lambda v: (weight * histogram.soft(v, grid, BINS, tau, reach)).sum()
        gradient = np.asarray(jax.grad(loss)(values))
        exact = lambda v: (
            np.asarray(weight)
            * by_formula(
                v,
                np.asarray(grid.low),
                np.asarray(grid.width),
                np.asarray(grid.intervals),
                tau,
                BINS,
            )
        ).sum()
        for index in np.random.default_rng(2).permutation(values.size)[:40]:
            moved = [np.array(values) for _ in range(2)]
            for array, sign in zip(moved, (1, -1), strict=True):
                array.reshape(-1)[index] += sign * 1e-5
            slope = (exact(moved[0]) - exact(moved[1])) / 2e-5
            np.testing.assert_allclose(gradient.reshape(-1)[index], slope, atol=2e-6)
        assert np.abs(gradient).max() > 0.01


def test_values_far_outside_and_bins_beyond_the_count_are_harmless():
    _, grid = case()
    values = jnp.full((3, CHANNELS), 1e30) * jnp.array([[1.0], [-1.0], [0.0]])
    soft, pull = jax.vjp(lambda v: histogram.soft(v, grid, BINS, TAU), values)
    np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-6)
    assert all(not soft[c, int(grid.intervals[c]) :].any() for c in range(CHANNELS))
    assert jnp.isfinite(pull(jnp.ones_like(soft))[0]).all()


def temporary_bytes(bins: int, images: int = 16) -> tuple[float, float]:
    """Scratch memory of value and gradient of one program, in units of its input, and the input's
    bytes."""
    values = jax.ShapeDtypeStruct((images, 32, 32, 32), jnp.float32)
    grid = histogram.Grid(
        *(jax.ShapeDtypeStruct((32,), d) for d in (jnp.float32, jnp.float32, jnp.int32))
    )
    weight = jax.ShapeDtypeStruct((32, bins), jnp.float32)
    loss = lambda v, g, w: (w * histogram.soft(v, g, bins, TAU)).sum()
    compiled = jax.jit(jax.value_and_grad(loss)).lower(values, grid, weight).compile()
    size = images * 32 * 32 * 32 * 4
    return compiled.memory_analysis().temp_size_in_bytes / size, size


def test_memory_is_a_small_multiple_of_the_activations_whatever_the_number_of_bins():
    few, many = temporary_bytes(10)[0], temporary_bytes(640)[0]
    assert few < 10 and many < few + 0.5


def test_equal_distributions_do_not_diverge_and_zeros_are_safe():
    p = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    for form in (losses.total_variation, losses.jensen_shannon, losses.kullback_leibler):
        np.testing.assert_array_equal(form(p, p), 0)
        value, gradient = jax.value_and_grad(lambda q, form=form: form(p, q).sum())(p[::-1])
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and value > 0
    np.testing.assert_allclose(losses.total_variation(p[0], p[1]), 0.5)


def test_divergences_are_expectations_under_q_of_the_papers_functions():
    """D_k(p || q) = E_q[k(p / q)] with k as printed; that of Jensen-Shannon gives twice the usual
    divergence."""
    rng = np.random.default_rng(3)
    p, q = (x / x.sum(-1, keepdims=True) for x in rng.uniform(0.1, 1, (2, 4, 7)))
    r = p / q
    k = {
        losses.total_variation: np.abs(r - 1) / 2,
        losses.jensen_shannon: r * np.log(2 * r / (r + 1)) + np.log(2 / (r + 1)),
        losses.kullback_leibler: r * np.log(r),
    }
    for form, values in k.items():
        ours = form(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
        np.testing.assert_allclose(ours, (q * values).sum(-1), atol=2e-5)
    disjoint = jnp.eye(2)
    np.testing.assert_allclose(
        losses.jensen_shannon(disjoint[0], disjoint[1]), 2 * np.log(2), atol=1e-4
    )
