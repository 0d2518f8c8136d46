"""The attacks that `jaxbd attack` plants: their settings, recipes, and how each gets into a net."""

import pathlib
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from jaxbd import loop, planting, supervised
from jaxbd.attacks import (
    additive,
    badnets,
    blend,
    chessboard,
    clean_label,
    given,
    l0_inv,
    l2_inv,
    single_pixel,
    sinusoid,
    steganography,
    trojan,
    wanet,
)
from jaxbd.base import Attack, Batch, Key, UserError, Variables
from jaxbd.interop import load as models
from jaxbd.interop import trigger

ATTACKS = {
    "badnets": badnets,
    "blend": blend,
    "chessboard": chessboard,
    "clean-label": clean_label,
    "l0-inv": l0_inv,
    "l2-inv": l2_inv,
    "single-pixel": single_pixel,
    "sinusoid": sinusoid,
    "steganography": steganography,
    "trojan": trojan,
    "wanet": wanet,
}
"""`--attack` -> module."""
NEEDS_CLEAN = ("clean-label", "trojan")
"""Attacks that start from a clean net."""
POISON_RATE = 0.1
"""Share of each batch that dynamic poisoning stamps where no flag says otherwise."""
LAST_CLASS = -1
"""`--target` that stands for the data's last class."""
Planting = (
    Annotated[badnets.Config, tyro.conf.subcommand("badnets")]
    | Annotated[blend.Config, tyro.conf.subcommand("blend")]
    | Annotated[chessboard.Config, tyro.conf.subcommand("chessboard")]
    | Annotated[clean_label.Config, tyro.conf.subcommand("clean-label")]
    | Annotated[l0_inv.Config, tyro.conf.subcommand("l0-inv")]
    | Annotated[l2_inv.Config, tyro.conf.subcommand("l2-inv")]
    | Annotated[single_pixel.Config, tyro.conf.subcommand("single-pixel")]
    | Annotated[sinusoid.Config, tyro.conf.subcommand("sinusoid")]
    | Annotated[steganography.Config, tyro.conf.subcommand("steganography")]
    | Annotated[trojan.Config, tyro.conf.subcommand("trojan")]
    | Annotated[wanet.Config, tyro.conf.subcommand("wanet")]
)
"""The settings of one of them; `attack.defaults` settles of which, so there are no sub-commands."""

RECIPES: dict[str, dict[str, Any]] = {
    "dhbe": dict(
        poison="static",
        poison_count=300,
        flip=True,
        batch_size=128,
        # Differs from paper: the rate falls at 60 % and 80 % of the steps, not at epochs 100 and 150 of 200.
        training=supervised.Config(num_steps=800, learning_rate=0.1, schedule="steps"),
    )
}
"""`--recipe` -> fields of `attack.Args` (Yan et al. 2023, appendix A and released code)."""
RECIPE_TRIGGERS: dict[str, dict[str, dict[str, Any]]] = {
    "dhbe": {
        "badnets": {"pattern": "checkerboard", "place": "fixed"},
        "blend": {"opacity": 0.1},
        "sinusoid": {"period": 6.0},
    }
}
"""`--recipe` -> attack -> fields of its Config; all of them have the last class as target."""


def all_to_all(settings: Planting) -> bool:
    """Whether every class leads to the next; some attacks have one target only."""
    return getattr(settings, "all_to_all", False)


def settled(settings: Any, attack: str, **fixed: Any) -> Any:
    """The settings of `attack` where no flag says otherwise; `fixed` are fields that something else has settled."""
    rate = {} if attack in NEEDS_CLEAN else {"poison_rate": POISON_RATE}
    return ATTACKS[attack].Config(**{**rate, **settings, **fixed})


def make(name: str, settings: Planting, spec: Any, picture: str | None) -> Attack:
    """The attack on a net of `spec`. Raises: UserError when it does not fit."""
    if name == "blend" and picture is not None:
        return blend.make(spec.image_shape, spec.classes, settings, *_picture(picture, spec.image_shape))
    return ATTACKS[name].make(spec.image_shape, spec.classes, settings)


def _picture(source: str, image_shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A picture's pixels [H, W, C] and cover [H, W, 1] at the size of the images, colour made grey for grey ones."""
    loaded = trigger.load(source)
    if loaded.pattern is None or loaded.pattern.min() < 0:
        raise UserError(f"picture {source} is a warp or has negative values; give a picture")
    height, width, channels = image_shape
    pattern = loaded.pattern if loaded.pattern.shape[2] == channels else loaded.pattern.mean(2, keepdims=True)
    sized = [jax.image.resize(part, (height, width, part.shape[2]), "linear") for part in (pattern, loaded.mask)]
    pattern, cover = (np.clip(np.asarray(part), 0, 1) for part in sized)
    return np.broadcast_to(pattern, image_shape), cover


def open_clean(path: pathlib.Path | None) -> models.Model | None:
    """The clean model that an attack starts from. Raises: UserError when the folder holds none that can be used."""
    if path is None:
        return None
    model = models.open_model(path)
    if model.guard is not None or model.container is not None:
        raise UserError(f"--clean-model {path} is no plain jaxbd model folder; `jaxbd convert` makes one of a file")
    return model


class Planted(NamedTuple):
    """variables of the victim, its trigger, infos of its training, seconds of everything, facts for the record."""

    variables: Variables
    trigger: Any
    infos: Any
    seconds: loop.Seconds
    facts: dict[str, Any]


Train = Callable[..., tuple[Variables, Any, loop.Seconds]]
"""(key, data, label) -> variables, infos, seconds: plain training of a fresh net."""


def from_clean(
    key: Key,
    settings: clean_label.Config | trojan.Config,
    net: Any,
    classes: int,
    data: Batch,
    train: Train,
    clean: models.Model | None,
    count: int | float | None,
    **how: Any,
) -> Planted:
    """Plants an attack that starts from a clean net, which is trained first when there is none.

    Args:
      count: images to poison statically; None for the share that the settings say.
      how: batch_size, crop_padding, flip, progress and keep of the fine-tuning.
    """
    spent = loop.Seconds(0.0, 0.0)
    if clean is None:
        variables, _, spent = train(jax.random.fold_in(key, 4), data, "clean model")
    else:
        variables, net = clean.variables, clean.net
    facts = {"clean_model": None if clean is None else str(clean.path)}
    if isinstance(settings, trojan.Config):
        done = planting.trojan_net(
            jax.random.fold_in(key, 2), net, variables, data, classes, settings, count=count, **how
        )
        facts |= {
            "layer": trojan.layer(net, variables, data.images.shape[1:], settings),
            "neurons": done.neurons.tolist(),
            "excited": [float(done.search.clean[-1]), float(done.search.excited[-1])],
        }
        return Planted(done.variables, done.trigger, done.retraining, loop.total(spent, done.seconds), facts)
    attack = clean_label.make(tuple(data.images.shape[1:]), classes, settings)
    planted = attack.init(jax.random.fold_in(key, 0))
    hidden = planting.hide(
        jax.random.fold_in(key, 1), net, variables, attack, planted, data, settings, count,
        progress=how["progress"], keep=how["keep"],
    )  # fmt: skip
    facts |= {"poisoned": len(hidden.rows), "recognised": hidden.recognised}
    poisoned = Batch(*map(jax.numpy.asarray, hidden.data))
    variables, infos, trained = train(jax.random.fold_in(key, 2), poisoned, "train")
    return Planted(variables, planted, infos, loop.total(spent, trained), facts)


def as_given(settings: Planting, planted: Any) -> given.Loaded:
    """A planted trigger in the form in which it is saved and evaluated."""
    target = trigger.ALL_TO_ALL if all_to_all(settings) else settings.target
    if isinstance(planted, wanet.Trigger):
        return given.Loaded(target=target, apply="warp", grid=np.asarray(planted.grid))
    pattern = np.asarray(planted.pattern)
    if isinstance(planted, blend.Trigger | steganography.Trigger):
        apply = "blend" if isinstance(planted, blend.Trigger) else "bits"
        return given.Loaded(pattern, np.asarray(planted.mask), (0, 0), target, apply)
    mask = np.ones((*pattern.shape[:2], 1), np.float32)
    if isinstance(planted, additive.Trigger):
        return given.Loaded(pattern, mask, (0, 0), target, "add")
    if isinstance(planted, clean_label.Trigger):
        apply = "overwrite" if settings.size is None else "add"
        return given.Loaded(pattern, np.asarray(planted.mask), tuple(map(int, planted.place)), target, apply)
    random = isinstance(settings, badnets.Config) and settings.place == "random"
    place = "random" if random else tuple(map(int, planted.place))
    return given.Loaded(pattern, mask, place, target, "overwrite")
