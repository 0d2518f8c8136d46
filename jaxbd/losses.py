"""Named losses and bounds of the papers, each next to its equation."""

import jax
import jax.numpy as jnp
import optax

from jaxbd.base import Array


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross-entropy of `logits` [B, K] against `labels` [B] int; scalar, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def target_confidence(logits: Array, target: Array) -> Array:
    """F(x) = softmax(P(Apply(m, x)))_c: softmax output [B] of `logits` [B, K] on class `target` []."""
    return jnp.take(jax.nn.softmax(logits, axis=-1), target, axis=-1)


def level_hinge(confidence: Array, level: Array) -> Array:
    """mean max(0, beta - F) over `confidence` [B] at `level` beta []; Qiao et al. 2019, eq. (4), first term.

    Its gradient equals that of the released code's -mean min(F, beta).
    """
    return jnp.maximum(level - confidence, 0).mean()


def donsker_varadhan(joint: Array, marginal: Array) -> Array:
    """I(X; Z) >= E_joint[T] - log E_marginal[exp T]; statistics [B] each; Qiao et al. 2019, eq. (3), in nats."""
    return joint.mean() - (jax.nn.logsumexp(marginal) - jnp.log(marginal.shape[0]))


def donsker_varadhan_debiased(joint: Array, marginal: Array, log_mean_exp: Array) -> Array:
    """A surrogate whose gradient is the bias-corrected gradient of `donsker_varadhan`.

    Belghazi et al. 2018, section 3.2: the gradient E[grad T e^T] / E[e^T] is biased on a mini-batch because the
    denominator is the batch's own mean; it is replaced by a moving average, here exp(`log_mean_exp`) [].

    Returns: scalar whose value is meaningless and whose gradient is that of E[T] - E[e^T] / moving average.
    """
    scaled = jnp.exp(marginal - jax.lax.stop_gradient(log_mean_exp))
    return joint.mean() - scaled.mean()
