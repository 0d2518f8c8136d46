"""Losses and bounds from the papers, each next to its equation."""

import functools
import operator

import jax
import jax.numpy as jnp
import optax

from jaxbd.base import Array, ArrayTree, Batch, Net, Variables


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross-entropy of `logits` [B, K] against `labels` [B] int; scalar, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def classification(
    params: ArrayTree, variables: Variables, net: Net, batch: Batch, train: bool = True
) -> tuple[Array, tuple[Array, ArrayTree]]:
    """Loss of `net` with `params` in place of those in `variables`: (cross-entropy [] in nats,
    (logits [B, K], batch_stats)). With `train=False` the net is in evaluation and `batch_stats` do
    not change."""
    logits, stats = net.apply({**variables, "params": params}, batch.images, train=train)
    return cross_entropy(logits, batch.labels), (logits, stats)


def descend(
    net: Net,
    rule: optax.GradientTransformation,
    variables: Variables,
    opt: optax.OptState,
    batch: Batch,
    *,
    train: bool = True,
) -> tuple[Variables, optax.OptState, Array, Array]:
    """One step of `rule` down the `classification` loss of `net` on `batch`.

    Returns: (variables, optimiser state, loss [] in nats, accuracy [] in [0, 1] before the step).
    """
    params = variables["params"]
    (loss, (logits, stats)), gradient = jax.value_and_grad(classification, has_aux=True)(
        params, variables, net, batch, train
    )
    updates, opt = rule.update(gradient, opt, params)
    variables = {
        **variables,
        "params": optax.apply_updates(params, updates),
        "batch_stats": stats,
    }
    return variables, opt, loss, (logits.argmax(-1) == batch.labels).mean()


def target_confidence(logits: Array, target: Array) -> Array:
    """F(x) = softmax(P(Apply(m, x)))_c: softmax output [B] of `logits` [B, K] for class `target`
    []."""
    return jnp.take(jax.nn.softmax(logits, axis=-1), target, axis=-1)


def level_hinge(confidence: Array, level: Array) -> Array:
    """mean max(0, beta - F) over `confidence` [B] at `level` beta []; Qiao et al. 2019, eq. (4),
    first term.

    Its gradient equals that of the released code's -mean min(F, beta).
    """
    return jnp.maximum(level - confidence, 0).mean()


def sliced_wasserstein(a: Array, b: Array, directions: Array) -> Array:
    """1-Wasserstein distance of two samples, averaged over projections; Doan et al. 2021, the
    latent term.

    W = mean over rows r of `directions` [m, d] of mean_i |sort(a r)_i - sort(b r)_i|, for samples
    `a`, `b` [N, d] of equal size. Directions are not normalised; the distance grows with their
    length. Returns: scalar.
    """
    one, other = (jnp.sort(sample @ directions.T, axis=0) for sample in (a, b))
    return jnp.abs(one - other).mean()


def donsker_varadhan(joint: Array, marginal: Array) -> Array:
    """I(X; Z) >= E_joint[T] - log E_marginal[exp T]; statistics [B] each; Qiao et al. 2019, eq.
    (3), in nats."""
    return joint.mean() - (jax.nn.logsumexp(marginal) - jnp.log(marginal.shape[0]))


def donsker_varadhan_debiased(joint: Array, marginal: Array, log_mean_exp: Array) -> Array:
    """A surrogate loss with the bias-corrected gradient of `donsker_varadhan`.

    Belghazi et al. 2018, section 3.2: the gradient E[grad T e^T] / E[e^T] is biased on a mini-batch
    because the denominator is the batch's own mean. Here a moving average, exp(`log_mean_exp`) [],
    replaces it.

    Returns: scalar. Its value has no meaning; its gradient is that of E[T] - E[e^T] / moving
      average.
    """
    scaled = jnp.exp(marginal - jax.lax.stop_gradient(log_mean_exp))
    return joint.mean() - scaled.mean()


def mean_absolute_difference(one: Array, other: Array) -> Array:
    """Mean of |one - other| over batch and classes of two logits [B, K]; scalar.

    DHBE uses it for the discrepancy between teacher and student (Yan et al. 2023, eq. 2) and for
    the student's change under a trigger (eq. 7).
    """
    return jnp.abs(one - other).mean()


def image_roughness(images: Array) -> Array:
    """Sum of the Frobenius norms of the differences between `images` [B, H, W, C] and four shifted
    copies; scalar.

    The shifts are to the right, down, and along both diagonals. Each norm is unsquared and taken
    over the whole batch (the image prior of the released DHBE code). Where all differences are zero
    its gradient is zero.
    """
    left, right = images[:, :, :-1], images[:, :, 1:]
    pairs = (
        (left, right),
        (images[:, :-1], images[:, 1:]),
        (left[:, 1:], right[:, :-1]),
        (left[:, :-1], right[:, 1:]),
    )
    return functools.reduce(operator.add, [_norm(one - other) for one, other in pairs])


def _norm(x: Array) -> Array:
    """Euclidean norm of all entries, with gradient zero at zero instead of NaN."""
    # both `where`s are needed: an unselected branch still passes NaN to the gradient
    square = jnp.square(x).sum()
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


SMALLEST = 1e-6
"""Added to every probability in `jensen_shannon` and `kullback_leibler`, so that empty intervals
give finite values and gradients. Equal distributions still have a divergence of exactly 0, and no
value is negative."""


def total_variation(p: Array, q: Array) -> Array:
    """E_q[k(p/q)] [...] of distributions [..., M] with k(r) = |r - 1| / 2; Li et al. 2023, section
    4.2. In [0, 1]."""
    return jnp.abs(p - q).sum(-1) / 2


def jensen_shannon(p: Array, q: Array) -> Array:
    """E_q[k(p/q)] [...] with k(r) = r log(2r / (r + 1)) + log(2 / (r + 1)); Li et al. 2023, section
    4.2, in nats.

    KL(p || m) + KL(q || m) for m = (p + q) / 2, which is twice the usual Jensen-Shannon divergence.
    In [0, 2 log 2].
    """
    p, q = p + SMALLEST, q + SMALLEST
    middle = (p + q) / 2
    return (p * jnp.log(p / middle) + q * jnp.log(q / middle)).sum(-1)


def kullback_leibler(p: Array, q: Array) -> Array:
    """E_q[k(p/q)] [...] with k(r) = r log r, that is KL(p || q); Li et al. 2023, section 4.2, in
    nats."""
    p, q = p + SMALLEST, q + SMALLEST
    return (p * jnp.log(p / q)).sum(-1)


def aims(labels: Array, target: Array) -> Array:
    """Target classes [B] int32 for images with `labels` [B]; `target` is one class [], or one per
    class [K]."""
    return jnp.broadcast_to(target, labels.shape) if target.ndim == 0 else target[labels]
