"""Triggers given by the user: the flags that describe one, and the attack built from it."""

import dataclasses
from typing import Any, Literal

import jax

from jaxbd.attacks import amplified, given
from jaxbd.base import Attack, UserError
from jaxbd.cli import common
from jaxbd.interop import trigger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trigger:
    """A trigger you have.

    Attributes:
      trigger: a picture (its transparency is the mask), an .npz with `pattern` or, for a
        warp, `grid` (`jaxbd attack` writes both), or white:HxW.
      apply: overwrite the image's pixels, or add to them and clip. Default: from the .npz, else
        overwrite.
      place: ROW,COLUMN of the top-left corner, or "random". Default: from the .npz; 0,0 for a
        trigger as large as the images.
      target: class the trigger leads to; without a trigger, `repair` repairs this class whatever
        the scan says. Default: from the .npz.
      all_to_all: the trigger leads from every class c to c + 1. Default: from the .npz.
    """

    trigger: str | None = None
    apply: Literal["overwrite", "add"] | None = None
    place: str | None = None
    target: int | None = None
    all_to_all: bool = False

    def __post_init__(self):
        if self.all_to_all and (self.trigger is None or self.target is not None):
            raise UserError(
                "--all-to-all describes a trigger without a single target; give it with --trigger,"
                " not with --target"
            )


def load_trigger(flags: Trigger) -> given.Loaded | None:
    """The trigger named by the flags; None without one."""
    return None if flags.trigger is None else trigger.load(flags.trigger)


def settle(
    opened: common.Opened, flags: Trigger, loaded: given.Loaded, *, all_to_all: bool = False
) -> given.Config:
    """How a loaded trigger is applied; flags override the file.

    Args:
      all_to_all: whether the caller accepts triggers without a single target class.
    Raises: UserError if flags and file together are incomplete or contradictory.
    """
    spec = opened.model.spec
    target = loaded.target if flags.target is None else flags.target
    if flags.all_to_all or target == trigger.ALL_TO_ALL:
        if not all_to_all:
            raise UserError(
                "this trigger leads every class to the next, not to one target; give the class with"
                " --target"
            )
        target = trigger.ALL_TO_ALL
    if target is None:
        raise UserError("the trigger's target class is not known; give --target")
    aim: dict[str, Any] = (
        dict(all_to_all=True) if target == trigger.ALL_TO_ALL else dict(target=target)
    )
    if loaded.grid is not None:
        if flags.apply is not None or flags.place is not None:
            raise UserError("a warp takes neither --apply nor --place; leave them out")
        return given.Config(apply="warp", **aim)
    place = loaded.place if flags.place is None else parse_place(flags.place)
    if place is None:
        assert loaded.pattern is not None  # no warp
        if loaded.pattern.shape[:2] != tuple(spec.image_shape[:2]):
            raise UserError(
                "the trigger is not as large as the images; give --place ROW,COLUMN or --place"
                " random"
            )
        place = (0, 0)
    row, column = (0, 0) if place == "random" else place
    apply: Any = flags.apply or loaded.apply or "overwrite"
    return given.Config(
        **aim,
        apply=apply,
        place="random" if place == "random" else "fixed",
        row=row,
        column=column,
    )


def make_attack(
    opened: common.Opened, config: given.Config, loaded: given.Loaded
) -> tuple[Attack, given.Trigger | given.Warp]:
    """The attack of a loaded trigger on the images of the opened model."""
    return given.make(opened.model.spec.image_shape, opened.model.spec.classes, config, loaded)


def amplify(
    opened: common.Opened, config: given.Config, loaded: given.Loaded, copies: amplified.Copies
) -> tuple[Attack, amplified.Trigger]:
    """The attack with several copies of a loaded patch. Raises: UserError if it is not a patch, or
    the copies do not fit."""
    spec = opened.model.spec
    if config.apply != "overwrite":
        raise UserError(
            "--copies needs a patch that overwrites the image; this trigger is applied by"
            f" “{config.apply}”"
        )
    assert loaded.pattern is not None and loaded.mask is not None
    pattern, mask, (down, across) = amplified.crop_to_mask(loaded.pattern, loaded.mask)
    if pattern.shape[0] * 2 > spec.image_shape[0] or pattern.shape[1] * 2 > spec.image_shape[1]:
        raise UserError(
            f"--copies needs a small patch; this one covers {pattern.shape[0]}x{pattern.shape[1]}"
            f" of {spec.image_shape[0]}x{spec.image_shape[1]} pixels"
        )
    place = (
        {}
        if config.place == "random"
        else dict(row=config.row + down, column=config.column + across)
    )
    settings = amplified.Config(
        target=config.target, all_to_all=config.all_to_all, copies=copies, **place
    )
    attack = amplified.make(spec.image_shape, spec.classes, settings, pattern, mask)
    return attack, attack.init(jax.random.key(0))


def parse_place(text: str) -> tuple[int, int] | Literal["random"]:
    """ "27,27" -> (27, 27). Raises: UserError on anything else but "random"."""
    if text == "random":
        return text
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--place must be ROW,COLUMN, e.g. 27,27, or random; got {text!r}")
    return int(parts[0]), int(parts[1])


def describe(flags: Trigger, config: given.Config) -> dict[str, Any]:
    """What a record says about the trigger."""
    place = "random" if config.place == "random" else [config.row, config.column]
    target = trigger.ALL_TO_ALL if config.all_to_all else config.target
    return {"source": flags.trigger, "target": target, "apply": config.apply, "place": place}
