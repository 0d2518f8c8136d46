"""STRIP against its formula in NumPy, on a victim whose trigger is known, and what it may cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.base import Attack, Batch, UserError
from jaxbd.detection import strip
from jaxbd.images import paste
from jaxbd.metrics import evaluate
from jaxbd.models import build

LINEAR = build.from_apply(
    lambda variables, images: images.reshape(images.shape[0], -1) @ variables["params"]["w"]
)
WEIGHTS = {"params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)), jnp.float32)}}


def images(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 2, 2, 3)).astype(np.float32)


def bits(blended: np.ndarray) -> np.ndarray:
    """Entropy of the linear net's answers in bits, as one would write it."""
    logits = blended.reshape(len(blended), -1) @ np.asarray(WEIGHTS["params"]["w"])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -(p * np.log2(p)).sum(-1)


@pytest.mark.parametrize("blend, share", [("sum", 1.0), ("half", 0.5)])
def test_one_overlay_is_the_formula(blend, share):
    x, overlay = images(1, 6), images(2, 1)
    found = strip.entropy(LINEAR, strip.Config(overlays=3, blend=blend))(
        jax.random.key(0), WEIGHTS, x, overlay
    )
    np.testing.assert_allclose(found, bits(share * (x + overlay)), rtol=1e-4)


def test_sums_are_not_clipped():
    x, overlay = np.full((1, 2, 2, 3), 0.9, np.float32), images(2, 1)
    found = strip.entropy(LINEAR, strip.Config(overlays=1))(jax.random.key(0), WEIGHTS, x, overlay)
    assert not np.isclose(found[0], bits(np.clip(x + overlay, 0, 1))[0], rtol=1e-3)


def test_the_mean_is_over_overlays_drawn_for_each_image():
    """Two overlays: every image's value is k/N of one and (N - k)/N of the other, k binomial and
    its own."""
    x, overlays, count = np.repeat(images(1, 1), 40, 0), images(2, 2), 100
    ends = [bits(x[:1] + overlay)[0] for overlay in overlays]
    found = strip.entropy(LINEAR, strip.Config(overlays=count))(
        jax.random.key(0), WEIGHTS, x, overlays
    )
    k = (np.asarray(found) - ends[0]) / (ends[1] - ends[0]) * count
    np.testing.assert_allclose(k, np.round(k), atol=0.05)
    assert len(set(np.round(k))) > 5 and abs(k.mean() - 50) < 4 and 3 < k.std() < 7


def test_bytes_and_floats_give_the_same():
    pixels = np.random.default_rng(3).integers(0, 256, (7, 2, 2, 3), np.uint8)
    measure = strip.entropy(LINEAR, strip.Config(overlays=5))
    one = measure(jax.random.key(0), WEIGHTS, pixels[:3], pixels[3:])
    other = measure(jax.random.key(0), WEIGHTS, pixels[:3] / 255.0, pixels[3:] / 255.0)
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_certain_and_even_answers():
    sure = {"params": {"w": jnp.zeros((12, 5)).at[:, 2].set(1e4)}}
    even = {"params": {"w": jnp.zeros((12, 5))}}
    measure = strip.entropy(LINEAR, strip.Config(overlays=4))
    np.testing.assert_array_equal(measure(jax.random.key(0), sure, images(1, 3), images(2, 4)), 0)
    np.testing.assert_allclose(
        measure(jax.random.key(0), even, images(1, 3), images(2, 4)), np.log2(5), rtol=1e-6
    )


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.5])
def test_the_threshold_flags_the_stated_share_of_clean_images(rate):
    entropies = np.random.default_rng(0).normal(1.1, 0.3, 2000)
    assert abs((entropies < strip.threshold(entropies, rate)).mean() - rate) <= 1 / 2000


def test_it_tells_triggered_images_of_a_victim_from_clean_ones():
    """The pattern decides whatever lies over it; the quadrants of clean images do not."""
    victim, pattern = toys.victim(2, gain=60.0), jnp.asarray(toys.PATTERN)[..., None]
    stamp = lambda key, trigger, x: jax.vmap(paste, (0, None, None))(x, pattern, jnp.array([0, 0]))
    attack = Attack(lambda key: (), stamp, lambda *_: None, lambda labels: jnp.full_like(labels, 2))
    config, overlays = (
        strip.Config(overlays=20, blend="half"),
        jnp.asarray(toys.quadrants(5, 40).images),
    )
    clean = evaluate.per_image(
        jax.random.key(0),
        lambda k, known, x: strip.entropy(toys.NET, config)(k, *known[:1], x, known[1]),
        (victim, overlays),
        toys.quadrants(6, 200),
    )
    limit = jnp.float32(strip.threshold(clean, config.false_positive_rate))
    found = evaluate.detection(
        jax.random.key(1),
        strip.flag(toys.NET, config),
        (victim, overlays, limit),
        toys.quadrants(7, 200),
        attack,
        (),
    )
    assert found.true_positive_rate > 0.95 and abs(found.false_positive_rate_all - 0.15) < 0.08
    assert (found.n_triggered, found.n_clean) == (150, 200)


def test_memory_does_not_grow_with_the_overlays():
    """No array of the program holds more than the batch and the pool of overlays."""

    def largest(jaxpr):
        sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
        inner = [p for e in jaxpr.eqns for p in e.params.values() if hasattr(p, "jaxpr")]
        return max([*sizes, *(largest(p.jaxpr) for p in inner)], default=0)

    measure = strip.entropy(LINEAR, strip.Config(overlays=500))
    jaxpr = jax.make_jaxpr(measure)(jax.random.key(0), WEIGHTS, images(1, 64), images(2, 30))
    assert largest(jaxpr.jaxpr) <= 64 * 12


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda: strip.Config(overlays=0), "overlays is 0"),
        (lambda: strip.Config(blend="max"), "'max'"),
        (lambda: strip.Config(false_positive_rate=1.0), "not in"),
        (lambda: strip.threshold(np.array([]), 0.1), "at least one"),
        (lambda: strip.threshold(np.array([1.0, np.nan]), 0.1), "finite"),
    ],
)
def test_settings_that_make_no_sense(what, words):
    with pytest.raises(UserError, match=words):
        what()


def test_padding_never_enters_the_entropies():
    """The last batch is padded; its real rows come back, in order, and no others."""
    found = evaluate.per_image(
        jax.random.key(0),
        lambda key, known, x: x.sum((1, 2, 3)),
        (),
        Batch(images(1, 7), np.zeros(7, np.int32)),
        batch_size=3,
    )
    np.testing.assert_allclose(found, images(1, 7).sum((1, 2, 3)), rtol=1e-5)
