"""Why `bna.released` moves fewer upper bounds than the released loop: where no clean activation is
near a bound, that loop follows the rounding of its intervals' centres."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxbd import losses
from jaxbd.repairs import bna, histogram

CONFIG = bna.released()
START, EPOCHS = 3.0, 10


class Channel(NamedTuple):
    """Activations [N] of one channel: clean, and triggered, which reach beyond the bound."""

    clean: np.ndarray
    triggered: np.ndarray


def channel(reach: float) -> Channel:
    """Clean activations that end at `reach`, triggered ones that end at 5."""
    rng = np.random.default_rng(0)
    draw = lambda mean, deviation, high: rng.normal(mean, deviation, 500).clip(-2.97, high)
    clean, triggered = draw(reach / 3, reach / 3, reach), draw(1.5, 1.0, 5.0)
    return Channel(clean.astype(np.float32), triggered.astype(np.float32))


FAR, NEAR = channel(2.0), channel(4.5)
"""Without and with clean activations near the bound, which is at 3."""


def released_loop(found: Channel, centres_as: torch.dtype) -> tuple[float, int]:
    """How far the loop of the released code moves the bound of a channel, and in how many steps.

    Written from its description: counts in finite intervals, a soft indicator around each centre,
    Adam on the sum of absolute differences, and an end where that hardly changes. All is float64
    but the centres, which are rounded to `centres_as`; they are float32 there.
    """
    both = np.concatenate(found)
    low, high = float(both.min()), float(both.max())
    count = math.ceil((high - low) / CONFIG.width)
    clean = torch.histc(torch.tensor(found.clean), count, low, high).double()
    centres = (low + CONFIG.width * (torch.arange(count).double() + 0.5)).to(centres_as).double()
    values = torch.tensor(found.triggered).double()
    bound = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimiser, before = torch.optim.Adam([bound], lr=CONFIG.learning_rate), None
    for epoch in range(EPOCHS):
        offset = torch.minimum(values, bound)[None] - centres[:, None]
        above = lambda half, offset=offset: torch.sigmoid(CONFIG.tau * (offset + half))
        soft = (above(CONFIG.width / 2) - above(-CONFIG.width / 2)).sum(1)
        loss = (soft - clean).abs().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if before is not None and abs(before - loss.item()) / before < 1e-5:
            return bound.item() - START, epoch + 1
        before = loss.item()
    return bound.item() - START, EPOCHS


def slope(found: Channel) -> float:
    """d loss / d bound of `bna.released` at the start, on the channel alone."""
    both = np.concatenate(found)
    low, high = (jnp.asarray([end], jnp.float32) for end in (both.min(), both.max()))
    grid = histogram.grid(low, high, CONFIG.width, CONFIG.bins)
    counts = histogram.hard(jnp.asarray(found.clean)[:, None], grid, CONFIG.bins)
    reach = histogram.reach(CONFIG.tau, CONFIG.width)

    def loss(bound: jax.Array) -> jax.Array:
        values = jnp.minimum(jnp.asarray(found.triggered)[:, None], bound)
        soft = histogram.soft(values, grid, CONFIG.bins, CONFIG.tau, reach)
        return losses.total_variation(counts / counts.sum(), soft).sum()

    return float(jax.grad(loss)(jnp.float32(START)))


def test_without_clean_activations_near_it_a_bound_has_no_slope():
    """All intervals around the bound have too many triggered activations, so that it does not
    matter to the loss in which of them it lies."""
    assert slope(FAR) == 0.0
    assert abs(slope(NEAR)) > 1e-3


def test_the_released_loop_moves_such_a_bound_by_rounding_alone():
    """Float32 centres leave seams between intervals; Adam makes whole steps of whatever slope that
    is. With the centres in float64 the same loop hardly moves it."""
    moved, steps = released_loop(FAR, torch.float32)
    assert abs(moved) > CONFIG.learning_rate and steps == 2
    moved, _ = released_loop(FAR, torch.float64)
    assert abs(moved) < 0.05 * CONFIG.learning_rate


def test_with_clean_activations_near_it_rounding_changes_nothing():
    one, other = (released_loop(NEAR, kind)[0] for kind in (torch.float32, torch.float64))
    assert abs(one) > CONFIG.learning_rate
    assert one == pytest.approx(other, rel=0.02)
