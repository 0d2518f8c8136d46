"""The two-class Gaussian model behind BNA: m*, v* undo the alteration, and inference falls with the
divergence.

Clean images of the two classes are N(-mu, sigma^2 I) and N(mu, sigma^2 I); triggered ones N(-mu +
eps, sigma_b^2 I). The net is one hidden layer of J nodes, BatchNorm with moments m, v and affine
parameters gamma, beta, and two linear outputs (Li et al. 2023, section 3).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd.repairs import gaussian

SIGMA, J, D = 1.0, 6, 10
ALPHAS = np.linspace(0, 1, 41)


class Model(NamedTuple):
    """mu, eps [D], weights [J, D], stored moments, gamma, beta [J], u = u_- - u_+ [J], sigma_b."""

    mu: np.ndarray
    eps: np.ndarray
    weights: np.ndarray
    stored: gaussian.Moments
    gamma: np.ndarray
    beta: np.ndarray
    u: np.ndarray
    sigma_b: float


def star(model: Model) -> gaussian.Moments:
    on_source, on_shift = model.weights @ model.mu, model.weights @ model.eps
    return gaussian.corrected_moments(model.stored, on_source, on_shift, SIGMA, model.sigma_b)


def output(
    model: Model, moments: gaussian.Moments, mean: np.ndarray, sigma: float
) -> tuple[float, float]:
    """Mean and standard deviation of f_- - f_+ on inputs N(mean, sigma^2 I), exactly: the net is
    linear."""
    slope = model.u * model.gamma / moments.std
    centre = slope @ (model.weights @ mean - moments.mean) + model.u @ model.beta
    return centre, sigma * np.linalg.norm(slope @ model.weights)


def probability_of_source(
    model: Model, moments: gaussian.Moments, mean: np.ndarray, sigma: float
) -> float:
    centre, spread = output(model, moments, mean, sigma)
    return math.erfc(-centre / spread / math.sqrt(2)) / 2


def draw(seed: int, sigma_b: float) -> Model:
    """Random weights; u by least squares so that both classes are told apart, eps so that the
    attack works."""
    rng = np.random.default_rng(seed)
    mu, weights = rng.normal(size=D), rng.normal(size=(J, D))
    stored = gaussian.Moments(rng.normal(size=J), rng.uniform(0.5, 2, J))
    gamma, beta = rng.uniform(0.5, 2, J), rng.normal(size=J)
    apart = gamma * (weights @ mu) / stored.std
    u = rng.normal(size=J)
    u -= apart * (u @ apart + 3) / (apart @ apart)
    # the least change of u that puts the boundary midway between the classes and leaves them as
    # far apart
    offset = gamma * -stored.mean / stored.std + beta
    across = offset - apart * (offset @ apart) / (apart @ apart)
    u -= across * (u @ offset) / (across @ offset)
    model = Model(mu, np.zeros(D), weights, stored, gamma, beta, u, sigma_b)
    direction = -((u * gamma / stored.std) @ weights)
    return model._replace(
        eps=direction * rng.uniform(2, 5) * 3 / (direction @ direction) + 0.2 * rng.normal(size=D)
    )


def assumptions_hold(model: Model) -> bool:
    """eta < 1/2 for both classes, psi > 1/2, sigma_b <= sigma."""
    on_source = probability_of_source(model, model.stored, -model.mu, SIGMA)
    on_target = probability_of_source(model, model.stored, model.mu, SIGMA)
    triggered = probability_of_source(model, model.stored, -model.mu + model.eps, model.sigma_b)
    return on_source > 0.5 and on_target < 0.5 and triggered < 0.5 and model.sigma_b <= SIGMA


CASES = [(seed, sigma_b) for seed in range(6) for sigma_b in (1.0, 0.8, 0.4)]
each_case = pytest.mark.parametrize("seed, sigma_b", CASES)


@each_case
def test_the_corrected_nodes_have_exactly_the_clean_mean_and_variance(seed, sigma_b):
    model = draw(seed, sigma_b)
    corrected, triggered = star(model), -model.mu + model.eps
    norms = np.linalg.norm(model.weights, axis=1)
    clean_mean = (model.weights @ -model.mu - model.stored.mean) / model.stored.std
    fixed_mean = (model.weights @ triggered - corrected.mean) / corrected.std
    np.testing.assert_allclose(fixed_mean, clean_mean, atol=1e-12)
    np.testing.assert_allclose(
        sigma_b * norms / corrected.std, SIGMA * norms / model.stored.std, rtol=1e-12
    )
    broken_mean = (model.weights @ triggered - model.stored.mean) / model.stored.std
    assert np.abs(broken_mean - clean_mean).max() > 0.1


def test_the_same_by_sampling():
    model, rng = draw(3, 0.5), np.random.default_rng(0)
    corrected = star(model)
    clean = -model.mu + SIGMA * rng.normal(size=(200_000, D))
    triggered = -model.mu + model.eps + model.sigma_b * rng.normal(size=(200_000, D))
    nodes = lambda x, moments: (
        (x @ model.weights.T - moments.mean) / moments.std * model.gamma + model.beta
    )
    wanted, got = nodes(clean, model.stored), nodes(triggered, corrected)
    spread = wanted.std(0)
    np.testing.assert_allclose(got.mean(0) / spread, wanted.mean(0) / spread, atol=0.02)
    np.testing.assert_allclose(got.std(0), spread, rtol=0.01)


@each_case
def test_source_inference_falls_monotonically_with_the_divergence(seed, sigma_b):
    """Theorem 3.1 on a grid of alpha, by the exact Gaussian distribution function."""
    model = draw(seed, sigma_b)
    assert assumptions_hold(model)
    corrected, triggered = star(model), -model.mu + model.eps
    rates = []
    for alpha in ALPHAS:
        between = gaussian.moments_between(model.stored, corrected, alpha)
        rates.append(probability_of_source(model, between, triggered, sigma_b))
    assert np.diff(rates).max() < 0
    np.testing.assert_allclose(
        rates[0], probability_of_source(model, model.stored, -model.mu, SIGMA), atol=1e-12
    )
    assert rates[0] > 0.5 > rates[-1]


def test_without_the_assumptions_it_need_not_fall():
    """A trigger that pushes away from the target: correcting it makes inference worse."""
    model = draw(0, 0.8)
    model = model._replace(eps=-model.eps)
    assert not assumptions_hold(model)
    triggered = -model.mu + model.eps
    ends = [
        probability_of_source(model, moments, triggered, 0.8)
        for moments in (star(model), model.stored)
    ]
    assert ends[1] > ends[0]


def test_the_closed_forms_work_on_jax_arrays():
    found = gaussian.corrected_moments(
        gaussian.Moments(jnp.ones(2), jnp.full(2, 2.0)), jnp.zeros(2), jnp.ones(2), 1.0, 0.5
    )
    np.testing.assert_allclose(found.mean, 1.5)
    np.testing.assert_allclose(found.std, 1.0)
