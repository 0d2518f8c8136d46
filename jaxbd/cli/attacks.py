"""The attacks of `jaxbd attack`: their settings, recipes, and how each is planted in a net."""

import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbd import methods
from jaxbd.attacks import additive, badnets, blend, clean_label, given, steganography, trojan, wanet
from jaxbd.base import Attack, Batch, Key, Suspect, UserError, Variables
from jaxbd.data import draw
from jaxbd.images import image_shape_of
from jaxbd.interop import load as models
from jaxbd.interop import trigger
from jaxbd.pipelines import implant, plant
from jaxbd.training import supervised
from jaxbd.training.program import Seconds, total_seconds
from jaxbd.training.run import Run

DEFAULT = "badnets"
NEEDS_CLEAN = ("clean-label", "trojan")
"""Attacks that start from a clean net."""
POISON_RATE = 0.1
"""Default share of each batch that dynamic poisoning stamps."""
LAST_CLASS = -1
"""`--target` value that means the data's last class."""
RECIPES: dict[str, dict[str, Any]] = {
    "dhbe": dict(
        poison="static",
        poison_count=300,
        flip=True,
        batch_size=128,
        # Differs from paper: the rate falls at 60 % and 80 % of the steps, not at epochs 100 and
        # 150 of 200.
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
"""`--recipe` -> attack -> fields of its Config; the target is always the last class."""


def find(name: str) -> ModuleType:
    """The module of an attack that can be planted. Raises: UserError if there is none."""
    method = methods.find("attack", name)
    if not method.plantable:
        known = sorted(each.name for each in methods.all_methods("attack") if each.plantable)
        raise UserError(f"--attack {name} cannot be planted here; choose from {', '.join(known)}")
    return method.module


def is_all_to_all(settings: Any) -> bool:
    """Whether every class leads to the next; some attacks only support one target."""
    return getattr(settings, "all_to_all", False)


def configure(attack: str, settings: dict[str, Any]) -> Any:
    """The default settings of `attack`, overridden by `settings`."""
    rate = {} if attack in NEEDS_CLEAN else {"poison_rate": POISON_RATE}
    return find(attack).Config(**{**rate, **settings})


def make(name: str, settings: Any, spec: Any, picture: str | None) -> Attack:
    """The attack on a net of `spec`. Raises: UserError if it does not fit."""
    if name == "blend" and picture is not None:
        return blend.make(
            spec.image_shape, spec.classes, settings, *_picture(picture, spec.image_shape)
        )
    return find(name).make(spec.image_shape, spec.classes, settings)


def _picture(source: str, image_shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A picture's pixels [H, W, C] and opacity [H, W, 1], resized to the images; averaged to grey
    for grey images."""
    loaded = trigger.load(source)
    if loaded.pattern is None or loaded.mask is None or loaded.pattern.min() < 0:
        raise UserError(f"picture {source} is a warp or has negative values; give an image file")
    height, width, channels = image_shape
    pattern = (
        loaded.pattern
        if loaded.pattern.shape[2] == channels
        else loaded.pattern.mean(2, keepdims=True)
    )
    assert loaded.mask is not None  # only a warp has no mask
    sized = [
        jax.image.resize(part, (height, width, part.shape[2]), "linear")
        for part in (pattern, loaded.mask)
    ]
    pattern, cover = (np.clip(np.asarray(part), 0, 1) for part in sized)
    return np.broadcast_to(pattern, image_shape), cover


def open_clean(path: pathlib.Path | None) -> models.Model | None:
    """The clean model that an attack starts from. Raises: UserError if the folder has no usable
    one."""
    if path is None:
        return None
    model = models.open_model(path)
    if model.guard is not None or model.container is not None:
        raise UserError(
            f"--clean-model {path} is not a plain jaxbd model folder; `jaxbd convert` makes one"
            " from a file"
        )
    return model


class Planted(NamedTuple):
    """The victim's variables, its trigger, the infos of its training, the total time, and facts for
    the record."""

    variables: Variables
    trigger: Any
    infos: Any
    seconds: Seconds
    facts: dict[str, Any]

    def plus(self, seconds: Seconds | None) -> "Planted":
        """A copy with `seconds` added."""
        if seconds is None:
            return self
        return self._replace(seconds=total_seconds(self.seconds, seconds))


Train = Callable[[Key, Batch, str], plant.Trained]
"""(key, data, name of the stage) -> a fresh net trained without poisoning"""


def plant_in(
    run: Run,
    key: Key,
    settings: clean_label.Config | trojan.Config,
    clean: Suspect,
    data: Batch,
    train: Train,
    count: int | float | None,
    batching: draw.Batching,
) -> Planted:
    """Plants an attack that starts from a clean net.

    Args:
      count: number of images to poison statically; None for the share in `settings`.
      batching: how batches are drawn during fine-tuning.
    """
    if isinstance(settings, trojan.Config):
        return _plant_trojan(run, key, settings, clean, data, count, batching)
    attack = clean_label.make(image_shape_of(data.images), clean.classes, settings)
    planted = attack.init(jax.random.fold_in(key, 0))
    hidden = implant.hide(
        run,
        "perturb",
        jax.random.fold_in(key, 1),
        clean,
        (attack, planted),
        data,
        settings,
        count=count,
    )
    poisoned = Batch(*map(jax.numpy.asarray, hidden.data))
    trained = train(jax.random.fold_in(key, 2), poisoned, "train")
    facts = {"poisoned": len(hidden.rows), "recognised": hidden.recognised}
    return Planted(trained.variables, planted, trained.infos, trained.seconds, facts)


def _plant_trojan(
    run: Run,
    key: Key,
    settings: trojan.Config,
    clean: Suspect,
    data: Batch,
    count: int | float | None,
    batching: draw.Batching,
) -> Planted:
    clean = clean._replace(image_shape=image_shape_of(data.images))
    done = implant.plant_trojan(
        run,
        "trojan",
        jax.random.fold_in(key, 2),
        clean,
        data,
        settings,
        count=count,
        batching=batching,
    )
    facts = {
        "layer": trojan.layer(clean.net, clean.variables, clean.image_shape, settings),
        "neurons": done.neurons.tolist(),
        "excited": [float(done.search.clean[-1]), float(done.search.excited[-1])],
    }
    return Planted(done.variables, done.trigger, done.retraining, done.seconds, facts)


def as_given(settings: Any, planted: Any) -> given.Loaded:
    """A planted trigger in the form used to save and evaluate it."""
    target = trigger.ALL_TO_ALL if is_all_to_all(settings) else settings.target
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
        return given.Loaded(pattern, np.asarray(planted.mask), _corner(planted), target, apply)
    random = isinstance(settings, badnets.Config) and settings.place == "random"
    place = "random" if random else _corner(planted)
    return given.Loaded(pattern, mask, place, target, "overwrite")


def _corner(planted: Any) -> tuple[int, int]:
    """Row and column of a patch's top-left corner."""
    row, column = planted.place
    return int(row), int(column)
