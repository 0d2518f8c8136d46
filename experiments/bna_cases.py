"""Victims of the BNA experiments: planted once as the paper does, kept under `runs/`, the same for every experiment.

Poisoned copies are added to the clean training images, so many of every source class (static poisoning; BNA, section
5.1 and appendix B.3). Sizes are those of `experiments.bench`: "digits" victims are trained from scratch, "narrow" ones
(CIFAR-10 images, ResNet-18 of width 8) are fine-tuned from the clean base net.
"""

import dataclasses
import json
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench, units
from jaxbd import record, study, supervised
from jaxbd.attacks import badnets, chessboard, l2_inv, poison, wanet
from jaxbd.base import Attack, Batch, Variables
from jaxbd.data import digits
from jaxbd.interop import folder
from jaxbd.models import build

AttackName = Literal["badnets", "chessboard", "l2-inv", "wanet"]
DIGITS = build.Spec(arch="vgg", classes=10, image_shape=(16, 16, 1), options={"width": 16})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planting:
    """One victim.

    Attributes:
      size: "digits" or "narrow".
      attack: name of the attack; None for the clean twin.
      all_to_all: every class c leads to c + 1 mod 10 instead of all to one.
      seed: of data division, trigger and training; the target of all-to-one is (9 - seed) mod 10.
      count: poisoned images of every source class; None for the size's own.
      strength: size of the chessboard in 1/255, or s of WaNet; None for the size's own.
    """

    size: Literal["digits", "narrow"] = "digits"
    attack: AttackName | None = "badnets"
    all_to_all: bool = False
    seed: int = 0
    count: int | None = None
    strength: float | None = None

    @property
    def target(self) -> int:
        """The class of an all-to-one attack."""
        return (9 - self.seed) % 10

    @property
    def name(self) -> str:
        """What the victim's folder and units are called."""
        kind = "clean" if self.attack is None else f"{self.attack}-{'a2a' if self.all_to_all else 'a2o'}"
        parts = [self.size, kind, f"seed{self.seed}"]
        parts += [f"count{self.count}"] if self.count is not None else []
        parts += [f"strength{self.strength:g}"] if self.strength is not None else []
        return "-".join(parts)


COUNTS = {"digits": {False: 10, True: 60}, "narrow": {False: 100, True: 300}}
"""Poisoned images of a source class by size and all_to_all; of about 100 and 5,000 training images of a class."""
OWN_COUNTS = {"digits": {"wanet": 30}, "narrow": {"wanet": 900, "chessboard": 300, "l2-inv": 300}}
"""Of attacks that need their own; a narrow net that is tuned for three epochs learns no faint pattern from 100."""
STRENGTHS = {"digits": {"chessboard": 8, "wanet": 1.0}, "narrow": {"chessboard": 8, "wanet": 1.0}}
TRAINING = {
    "digits": supervised.Config(num_steps=1000, learning_rate=0.05),
    "narrow": supervised.Config(num_steps=1170, learning_rate=0.05),
}


def settings(planting: Planting) -> dict[str, Any]:
    """Everything the victim depends on, for units and records."""
    return {
        "planting": dataclasses.asdict(planting),
        "net": dataclasses.asdict(DIGITS if planting.size == "digits" else bench.SIZES["narrow"].spec),
        "target": planting.target,
        "count": _count(planting),
        "strength": _strength(planting),
        "training": dataclasses.asdict(TRAINING[planting.size]),
    }


def _count(planting: Planting) -> int:
    if planting.count is not None:
        return planting.count
    return OWN_COUNTS[planting.size].get(planting.attack, COUNTS[planting.size][planting.all_to_all])


def _strength(planting: Planting) -> float | None:
    own = STRENGTHS[planting.size].get(planting.attack)
    return own if planting.strength is None else planting.strength


def attack(planting: Planting, image_shape: tuple[int, int, int]) -> Attack:
    """The attack of a planting (of a clean twin: the patch that its own net has never seen)."""
    common = {"target": planting.target, "all_to_all": planting.all_to_all}
    strength = _strength(planting)
    if planting.attack in ("badnets", None):
        return badnets.make(image_shape, 10, badnets.Config(place="drawn", **common))
    if planting.attack == "chessboard":
        return chessboard.make(image_shape, 10, chessboard.Config(size=int(strength), **common))
    if planting.attack == "l2-inv":
        return l2_inv.make(image_shape, 10, l2_inv.Config(**common))
    return wanet.make(image_shape, 10, wanet.Config(strength=strength, cross_ratio=0.0, **common))


def victim(planting: Planting, data: str | None = None) -> study.Case:
    """The victim with the data of attacker, defender and judge; trained when it is not yet under `runs/`."""
    base = None
    if planting.size == "digits":
        spec, parts = DIGITS, study.divide(digits.load(16), 997, 400, seed=2000 + planting.seed)
    else:
        setting = bench.make("narrow", data)
        spec, base = setting.size.spec, setting.base
        parts = study.Parts(setting.train, setting.defence, setting.test)
    net, key = build.net(spec), jax.random.fold_in(jax.random.key(2000 + planting.seed), 0)
    planted = attack(planting, tuple(spec.image_shape))
    trigger = planted.init(jax.random.fold_in(key, 1))
    path = units.RUNS / "bna" / "victims" / planting.name
    wanted = json.loads(json.dumps(record.plain(settings(planting))))
    if folder.is_model(path) and record.read_json(path / folder.CONFIG)["notes"] == wanted:
        variables = folder.load(path)[1]
    else:
        variables = _train(key, planting, net, parts, planted, trigger, base)
        folder.save(path, spec, variables, wanted)
    return study.Case(
        net, variables, tuple(spec.image_shape), planted, trigger, planting.target, parts.defence, parts.test
    )


def _train(key, planting: Planting, net, parts: study.Parts, planted: Attack, trigger, base) -> Variables:
    """From scratch, or from the base net; without augmentation, which would shift an additive trigger."""
    rows = parts.train
    if planting.attack is not None:
        clean = Batch(np.asarray(rows.images), np.asarray(rows.labels))
        all_rows = poison.static(jax.random.fold_in(key, 2), planted, trigger, clean, _count(planting), per_class=True)
        new = np.flatnonzero(all_rows.labels != clean.labels)
        rows = Batch(
            jnp.asarray(np.concatenate([clean.images, all_rows.images[new]])),
            jnp.asarray(np.concatenate([clean.labels, all_rows.labels[new]])),
        )
    elif base is not None:
        return base
    variables, _, _ = study.train(
        jax.random.fold_in(key, 3), net, rows, TRAINING[planting.size], variables=base,
        batch_size=128 if base is not None else 64, progress=units.progress("victim"),
    )  # fmt: skip
    return variables
