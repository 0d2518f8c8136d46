"""STRIP: an image carries a trigger if its prediction hardly changes when other images are blended
in (Gao et al. 2019)."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Key, Net, UserError, Variables, check_choices
from jaxbd.images import to_float

PAPER = "https://arxiv.org/abs/1902.06531"


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise UserError(f"strip: false_positive_rate {rate} is not in (0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of STRIP.

    Attributes:
      overlays: N, number of clean images blended into each image, drawn with replacement (100 in
        the released code).
      blend: "sum" for image + overlay, which exceeds [0, 1] (the released code does not clip);
        "half" for their mean.
      false_positive_rate: share of clean images that may be flagged; sets the threshold. 0.15 as in
        Li et al. 2023, section 5.3.
    """

    overlays: int = 100
    blend: Literal["sum", "half"] = "sum"
    # Differs from released code: 0.01 there, as quantile of a normal distribution fitted to the
    # clean entropies.
    false_positive_rate: float = 0.15

    def __post_init__(self):
        check_choices("strip", self)
        if self.overlays < 1:
            raise UserError(f"strip: overlays is {self.overlays}; give at least 1")
        _check_rate(self.false_positive_rate)


def entropy(net: Net, config: Config = Config()) -> Callable[[Key, Variables, Array, Array], Array]:
    """Makes a pure function (key, variables, images [B, H, W, C], overlays [M, H, W, C]) -> mean
    entropy [B] in bits.

    H(x) = -1/N sum_n sum_k p_k(x + o_n) log2 p_k(x + o_n), over N overlays o_n drawn independently
    for each image from the M clean images (uint8 or float in [0, 1], like `images`). A low value
    indicates a trigger. Overlays are processed one after another, so the memory is that of the net
    on B images.
    """

    def mean_entropy(key: Key, variables: Variables, images: Array, overlays: Array) -> Array:
        images, overlays, count = to_float(images), jnp.asarray(overlays), images.shape[0]

        def add(total: Array, number: Array) -> tuple[Array, None]:
            rows = jax.random.randint(
                jax.random.fold_in(key, number), (count,), 0, overlays.shape[0]
            )
            blended = images + to_float(overlays[rows])
            logits, _ = net.apply(
                variables, blended / 2 if config.blend == "half" else blended, train=False
            )
            log_p = jax.nn.log_softmax(logits)
            return total - (jnp.exp(log_p) * log_p).sum(-1) / jnp.log(2.0).astype(log_p.dtype), None

        start = jnp.zeros((count,), jax.eval_shape(net.apply, variables, images)[0].dtype)
        total, _ = jax.lax.scan(add, start, jnp.arange(config.overlays))
        return total / config.overlays

    return mean_entropy


def threshold(entropies: np.ndarray, false_positive_rate: float) -> float:
    """The entropy below which an image is flagged: the `false_positive_rate` quantile of clean
    images' `entropies` [N] in bits.

    Raises: UserError without entropies, with non-finite ones, or for a rate outside (0, 1).
    """
    _check_rate(false_positive_rate)
    entropies = np.asarray(entropies, float)
    if not entropies.size or not np.isfinite(entropies).all():
        raise UserError("strip: the threshold needs finite entropies of at least one clean image")
    return float(np.quantile(entropies, false_positive_rate))


def flag(net: Net, config: Config = Config()) -> Callable[..., Array]:
    """Makes a pure function (key, (variables, overlays, threshold []), images) -> flagged [B] bool:
    entropy < threshold."""
    measure = entropy(net, config)

    def flagged(key: Key, known: tuple[Variables, Array, Array], images: Array) -> Array:
        variables, overlays, limit = known
        return measure(key, variables, images, overlays) < limit

    return flagged
