"""Input normalisation, the project's only BatchNorm, and a `Correction` for layers without
BatchNorm."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbd.base import Array, UserError

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar10-b": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "svhn": ((0.43768454, 0.44376847, 0.4728039), (0.19803019, 0.20101567, 0.19703582)),
    "mini-imagenet": ((0.47276672, 0.4485651, 0.40345553), (0.26598931, 0.25850098, 0.27272259)),
    "vggface2": ((0.54452884, 0.43393408, 0.37677036), (0.28070204, 0.25066751, 0.24151797)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "centred": ((0.5,), (1.0,)),
    "0-255": ((0.0,), (1 / 255,)),
    "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3),
    "per-image": ((), ()),
}
"""Mean and standard deviation of pixels in [0, 1], per channel or one number for all; without
numbers ("per-image"), each image's own. "centred" maps pixels to -0.5..0.5, "half" to -1..1;
"caffe" is for BGR images."""


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(images - mean) / std on [..., H, W, C] with per-channel (or single) constants.

    Without constants each image is standardised by its own mean and standard deviation over all
    pixels and channels, the latter at least 1 / sqrt(H W C) (TensorFlow's
    `per_image_standardization`).
    """
    if not mean:
        axes, count = (-3, -2, -1), math.prod(images.shape[-3:])
        centred = images - images.mean(axes, keepdims=True)
        spread = jnp.sqrt(jnp.square(centred).mean(axes, keepdims=True))
        return centred / jnp.maximum(spread, 1 / math.sqrt(count))
    return (images - _along_channels(mean, images)) / _along_channels(std, images)


def _along_channels(values: Array | tuple[float, ...], x: Array) -> Array:
    """Reshapes `values` [C] or [1] to [1, …, 1, C] in the type of `x` [..., C], so that JAX does
    not promote ranks implicitly."""
    return jnp.asarray(values, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


EPSILON = 1e-5
"""Added to every variance, as PyTorch does."""


class BatchNorm(nn.Module):
    """Batch normalisation over all axes except the last, in PyTorch's conventions.

    new running = momentum * running + (1 - momentum) * batch. Normalises with the biased batch
    variance and stores the unbiased one, as PyTorch's `BatchNorm2d` does; Flax's own BatchNorm
    stores the biased variance. Statistics and affine parameters are float32 for any compute dtype.

    Two hooks let defences work without changing the net: the output is sown as
    `intermediates/<path>/output`, and an optional collection `bounds` with arrays `lower`, `upper`
    [C] clips it (BNA's upsilon and omega). If the collection `folded` has an array `shift` [C],
    this layer only adds the shift: the rest is folded into the previous convolution
    (`models.fold`), and nothing can be trained.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = EPSILON
    dtype: Any = jnp.float32
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        if self.has_variable("folded", "shift"):
            if not self.use_running_average:
                raise UserError(
                    "BatchNorm folded into a convolution cannot be trained; use the variables as"
                    " they were"
                )
            return self._sow_output(x + _along_channels(self.get_variable("folded", "shift"), x))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        if self.use_running_average:
            mu, variance = mean.value, var.value
        else:
            axes, count = tuple(range(x.ndim - 1)), x.size // channels
            # sums in float32 also for bfloat16
            x32 = x.astype(jnp.promote_types(jnp.float32, x.dtype))
            mu = x32.mean(axes)
            # two passes, since E[x^2] - E[x]^2 cancels in float32
            variance = jnp.square(x32 - _along_channels(mu, x32)).mean(axes)
            # initialisation must not move the running moments
            if not self.is_initializing():
                keep = self.momentum
                unbiased = variance * (count / max(count - 1, 1))
                mean.value = keep * mean.value + (1 - keep) * mu
                var.value = keep * var.value + (1 - keep) * unbiased
        # folded into one factor and one shift per channel
        factor = jax.lax.rsqrt(variance + self.epsilon)
        shift = -mu * factor
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
            factor, shift = factor * scale, shift * scale + bias
        return self._sow_output(x * _along_channels(factor, x) + _along_channels(shift, x))

    def _sow_output(self, out: Array) -> Array:
        """Clips `out` [..., C] to its bounds and sows it."""
        out = _clip_to_bounds(self, out)
        self.sow("intermediates", "output", out)
        return out


class Correction(nn.Module):
    """h(z) = max(min((z - mu) / sigma, omega), upsilon) per channel of [..., C], for layers without
    BatchNorm.

    Li et al. 2023, section 4.2. Has no parameters and is the identity unless its arrays `mean`,
    `std`, `lower` and `upper` [C] are in the collection `bounds`. Sows its output as
    `intermediates/<path>/output`, as BatchNorm does.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.has_variable("bounds", "mean"):
            mean, std = self.get_variable("bounds", "mean"), self.get_variable("bounds", "std")
            x = ((x - _along_channels(mean, x)) / _along_channels(std, x)).astype(x.dtype)
        x = _clip_to_bounds(self, x)
        self.sow("intermediates", "output", x)
        return x


def _clip_to_bounds(module: nn.Module, x: Array) -> Array:
    """Clips `x` [..., C] to the module's `lower` and `upper` [C] in the collection `bounds`, if
    any."""
    if not module.has_variable("bounds", "upper"):
        return x
    lower, upper = module.get_variable("bounds", "lower"), module.get_variable("bounds", "upper")
    return jnp.clip(x, _along_channels(lower, x), _along_channels(upper, x))
