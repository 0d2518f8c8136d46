"""Sinusoid (SIG): adds a faint wave along the rows to the whole image (Barni et al. 2019)."""

import dataclasses
import math

import jax.numpy as jnp

from jaxbd.attacks import additive, poison
from jaxbd.base import Array, Attack, Key, UserError

PAPER = "https://arxiv.org/abs/1902.11237"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the sinusoid attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      size: delta, amplitude of the wave in steps of 1/255 (40 in BackdoorBench, 20 in NAD).
      frequency: f, number of waves across the width of the image.
      period: wavelength in pixels, instead of `frequency` (6 in the released DHBE code).
      poison_rate: share of a batch's images to stamp and relabel.
    """

    # Differs from paper: triggered images are relabelled; Barni et al. only stamp images of the
    # target class.
    target: int = 0
    all_to_all: bool = False
    size: int = 40
    frequency: float = 6.0
    period: float | None = None
    poison_rate: float = 0.01

    def __post_init__(self):
        poison.check_rate("sinusoid", self.poison_rate)
        additive.check_size("sinusoid", self.size)
        for name in ("frequency", "period"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"sinusoid: {name} {value} is not a number above 0")


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`; triggers are
    `additive.Trigger`s.

    Raises: UserError when the target is out of range, or when the wave rounds to 0 at every pixel.
    """
    relabel = poison.relabelling("sinusoid", classes, config.target, config.all_to_all)
    width = image_shape[1]
    waves = config.frequency / width if config.period is None else 1 / config.period
    # on the host, so that a wave that rounds to zero is refused at once
    steps = [round(config.size * math.sin(2 * math.pi * column * waves)) for column in range(width)]
    if not any(steps):
        raise UserError(
            f"sinusoid: a wave of {waves:g} per pixel is 0 at every pixel; give another frequency"
            " or size"
        )

    def draw(key: Key) -> Array:
        """v(i, j) = delta sin(2 pi j f / W) (Barni et al. 2019, section 3), rounded to 1/255;
        deterministic."""
        del key
        return jnp.broadcast_to(jnp.array(steps, jnp.float32)[None, :, None] / 255, image_shape)

    return additive.attack(draw, relabel, config.poison_rate)
