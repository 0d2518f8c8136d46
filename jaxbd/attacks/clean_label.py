"""Clean-label: makes images of the target class hard to recognise, stamps a patch on them and keeps
their labels (Turner et al. 2019).

`harder` makes the images hard to recognise. It needs a clean net.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxbd import images as image_ops
from jaxbd.attacks import additive, patch, pgd, poison
from jaxbd.attacks.patch import Kind
from jaxbd.base import Array, Attack, Batch, Key, Net, UserError, Variables, check_choices

PAPER = "https://arxiv.org/abs/1912.02771"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the clean-label attack.

    Attributes:
      target: class of the images to poison, and class that every triggered image should become.
      patch: side of the square patch, in pixels.
      pattern: as in `badnets.Config.pattern`; 85 with `patch` 3 is the pattern released with Turner
        et al. 2019.
      corners: "one": the patch is at the bottom right (Yan et al. 2023, appendix A); "all": in all
        four corners, mirrored along both axes (Turner et al. 2019, section 5.3).
      size: add the patch instead of overwriting the image, with black and white as -size and +size
        steps of 1/255. By default the patch overwrites.
      norm: ball of the perturbation, "linf" or "l2"; for this and the next four see `pgd.Config`.
      epsilon: radius of the ball in steps of 1/255.
      steps: number of ascent steps.
      step_size: length of a step.
      random_start: whether to start at a random point in the ball.
      poison_rate: share of the target class's images to poison (1.0 in Turner et al.'s code, 0.25
        in BackdoorBox; Yan et al. 2023 poison 300 images).
    """

    target: int = 0
    patch: int = 3
    pattern: Kind | int = "checkerboard"
    corners: Literal["one", "all"] = "one"
    size: int | None = None
    norm: Literal["linf", "l2"] = "linf"
    epsilon: float | None = None
    steps: int = 40
    step_size: float | None = None
    random_start: bool = True
    poison_rate: float = 0.5

    def __post_init__(self):
        check_choices("clean-label", self)
        poison.check_rate("clean-label", self.poison_rate)
        patch.check("clean-label", self.patch, self.pattern)
        if self.size is not None:
            additive.check_size("clean-label", self.size)
        ascent(self)


class Trigger(NamedTuple):
    """The patch to put on an image.

    Attributes:
      pattern: [h, w, C] in [0, 1], or in [-1, 1] for a patch that is added.
      mask: [h, w, 1] of 0 and 1; 1 where the pattern applies.
      place: [2] int32, row and column of the top-left corner.
    """

    pattern: Array
    mask: Array
    place: Array


def ascent(config: Config) -> pgd.Config:
    """The settings of the perturbation. Raises: UserError when they are invalid."""
    return pgd.Config(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(pgd.Config)}
    )


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`.

    `stamp` only applies the patch, as at test time. `poison` stamps images of the target class and
    keeps all labels. To make images harder to recognise as well, apply `harder` to them first.

    Raises: UserError when the target is out of range or the patch does not fit, or patches in all
      corners overlap.
    """
    relabel = poison.relabelling("clean-label", classes, config.target, False)
    row, column = patch.fixed("clean-label", image_shape, config.patch, -1, -1)
    if config.corners == "all" and 2 * config.patch > min(image_shape[:2]):
        raise UserError(
            f"clean-label: patches of side {config.patch} in all corners overlap; make them smaller"
        )

    def init(key: Key) -> Trigger:
        pattern = patch.draw(key, config.pattern, config.patch, image_shape[2])
        pattern = pattern if config.size is None else (2 * pattern - 1) * (config.size / 255)
        mask = jnp.ones((*pattern.shape[:2], 1))
        if config.corners == "one":
            return Trigger(pattern, mask, jnp.array([row, column], jnp.int32))
        return Trigger(
            _mirror_to_corners(pattern, image_shape),
            _mirror_to_corners(mask, image_shape),
            jnp.zeros(2, jnp.int32),
        )

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Puts the patch on each of `images` [B, H, W, C]; pixels outside it are unchanged, bit for
        bit."""
        del key
        pattern = image_ops.paste(
            jnp.zeros(image_shape, images.dtype), trigger.pattern, trigger.place
        )[None]
        mask = image_ops.paste(
            jnp.zeros((*image_shape[:2], 1), images.dtype), trigger.mask, trigger.place
        )[None]
        if config.size is not None:
            return image_ops.add_on_grid(images, pattern * mask)
        return image_ops.blend(images, pattern, mask)

    def poison_batch(key: Key, trigger: Trigger, batch: Batch) -> Batch:
        """Stamps a share of the rows of the target class; labels do not change."""
        choose_key, stamp_key = jax.random.split(key)
        drawn = jax.random.uniform(choose_key, batch.labels.shape) < config.poison_rate
        chosen = (drawn & (batch.labels == config.target))[:, None, None, None]
        return Batch(
            jnp.where(chosen, stamp(stamp_key, trigger, batch.images), batch.images), batch.labels
        )

    return Attack(init, stamp, poison_batch, relabel)


def harder(net: Net, config: Config) -> Callable[[Key, Variables, Array], Array]:
    """(key, variables, images [B, H, W, C] of the target class) -> perturbed images that raise the
    clean net's loss on that class.

    Changes are rounded to multiples of 1/255 towards zero, so that they stay in the ball.
    """
    settings = ascent(config)

    def make_harder(key: Key, variables: Variables, images: Array) -> Array:
        labels = jnp.full(images.shape[0], config.target, jnp.int32)
        change = (pgd.perturb(key, net, variables, images, labels, settings) - images) * 255
        # the 1e-3 saves whole steps that rounding errors left just below an integer
        whole = jnp.trunc(change + 1e-3 * jnp.sign(change)) / 255
        return image_ops.add_on_grid(images, whole)

    return make_harder


def _mirror_to_corners(pattern: Array, image_shape: tuple[int, int, int]) -> Array:
    """Puts `pattern` [h, w, C] in the bottom-right corner and mirrors it into the others: [H, W,
    C], zero elsewhere."""
    height, width = image_shape[:2]
    side = pattern.shape[0]
    one = (
        jnp.zeros((height, width, pattern.shape[2]))
        .at[height - side :, width - side :]
        .set(pattern)
    )
    return one + one[::-1] + one[:, ::-1] + one[::-1, ::-1]
