"""Victims of the BNA experiments: planted once as the paper does, kept under `runs/`, the same for
every experiment.

Poisoned copies are added to the clean training images, so many of every source class (static
poisoning; BNA, section 5.1 and appendix B.3). Sizes are those of `experiments.scale.bench`:
"digits" victims are trained from scratch, "narrow" and "short" ones (CIFAR-10 images, ResNet-18 of
width 8 and 64) are fine-tuned from the clean base net.
"""

import dataclasses
import json
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import units
from experiments.scale import bench
from jaxbd import files
from jaxbd.attacks import badnets, chessboard, l2_inv, poison, wanet
from jaxbd.base import Attack, Batch, Key, Variables
from jaxbd.data import digits, draw
from jaxbd.interop import folder
from jaxbd.models import build
from jaxbd.pipelines import compare, plant
from jaxbd.training import supervised

AttackName = Literal["badnets", "chessboard", "l2-inv", "wanet"]
DIGITS = build.Spec(arch="vgg", classes=10, image_shape=(16, 16, 1), options={"width": 16})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planting:
    """One victim.

    Attributes:
      size: "digits", "narrow" or "short".
      attack: name of the attack; None for the clean twin.
      all_to_all: every class c leads to c + 1 mod 10 instead of all to one.
      seed: of data division, trigger and training; the target of all-to-one is (9 - seed) mod 10.
      count: poisoned images of every source class; None for the size's own.
      strength: size of the chessboard in 1/255, or s of WaNet; None for the size's own.
    """

    size: Literal["digits", "narrow", "short"] = "digits"
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
        kind = (
            "clean"
            if self.attack is None
            else f"{self.attack}-{'a2a' if self.all_to_all else 'a2o'}"
        )
        parts = [self.size, kind, f"seed{self.seed}"]
        parts += [f"count{self.count}"] if self.count is not None else []
        parts += [f"strength{self.strength:g}"] if self.strength is not None else []
        return "-".join(parts)


COUNTS = {"digits": {False: 10, True: 60}, "narrow": {False: 100, True: 300}}
"""Poisoned images of a source class by size and all_to_all; of about 100 and 5,000 training images
of a class."""
OWN_COUNTS = {"digits": {"wanet": 30}, "narrow": {"wanet": 900, "chessboard": 300, "l2-inv": 300}}
"""Of attacks that need their own; a narrow net that is tuned for three epochs learns no faint
pattern from 100."""
STRENGTHS = {"digits": {"chessboard": 8, "wanet": 1.0}, "narrow": {"chessboard": 8, "wanet": 1.0}}
TRAINING = {
    "digits": supervised.Config(num_steps=1000, learning_rate=0.05),
    "narrow": supervised.Config(num_steps=1170, learning_rate=0.05),
}
_tables: Any = (COUNTS, OWN_COUNTS, STRENGTHS, TRAINING)
for _table in _tables:  # a wide net is attacked as a narrow one
    _table["short"] = _table["narrow"]


def settings(planting: Planting) -> dict[str, Any]:
    """Everything the victim depends on, for units and records."""
    return {
        "planting": dataclasses.asdict(planting),
        "net": dataclasses.asdict(
            DIGITS if planting.size == "digits" else bench.SIZES[planting.size].spec
        ),
        "target": planting.target,
        "count": _count(planting),
        "strength": _strength(planting),
        "training": dataclasses.asdict(TRAINING[planting.size]),
    }


def _count(planting: Planting) -> int:
    if planting.count is not None:
        return planting.count
    usual = COUNTS[planting.size][planting.all_to_all]
    return OWN_COUNTS[planting.size].get(planting.attack or "", usual)


def _strength(planting: Planting) -> float | None:
    own = STRENGTHS[planting.size].get(planting.attack or "")
    return own if planting.strength is None else planting.strength


def attack(planting: Planting, image_shape: tuple[int, int, int]) -> Attack:
    """The attack of a planting (of a clean twin: the patch that its own net has never seen)."""
    common: dict[str, Any] = {"target": planting.target, "all_to_all": planting.all_to_all}
    strength = _strength(planting) or 0.0
    if planting.attack in ("badnets", None):
        return badnets.make(image_shape, 10, badnets.Config(place="drawn", **common))
    if planting.attack == "chessboard":
        return chessboard.make(image_shape, 10, chessboard.Config(size=int(strength), **common))
    if planting.attack == "l2-inv":
        return l2_inv.make(image_shape, 10, l2_inv.Config(**common))
    return wanet.make(image_shape, 10, wanet.Config(strength=strength, cross_ratio=0.0, **common))


def victim(planting: Planting, data: str | None = None) -> compare.Case:
    """The victim with the data of attacker, defender and judge; trained when it is not yet under
    `runs/`."""
    base = None
    if planting.size == "digits":
        spec, parts = DIGITS, draw.divide(digits.load(16), 997, 400, seed=2000 + planting.seed)
    else:
        setting = bench.make(planting.size, data)
        spec, base = setting.size.spec, setting.base
        parts = draw.Parts(setting.train, setting.defence, setting.test)
    key = jax.random.fold_in(jax.random.key(2000 + planting.seed), 0)
    planted = attack(planting, spec.image_shape)
    trigger = planted.init(jax.random.fold_in(key, 1))
    path = units.RUNS / "bna" / "victims" / planting.name
    wanted = json.loads(json.dumps(files.plain(settings(planting))))
    if folder.is_model(path) and files.read_json(path / folder.CONFIG)["notes"] == wanted:
        variables = folder.load(path)[1]
    else:
        rows = parts.train
        if planting.attack is not None:
            rows = _add_poisoned(jax.random.fold_in(key, 2), planting, planted, trigger, rows)
        variables = _train(jax.random.fold_in(key, 3), planting, spec, rows, base)
        folder.save(path, spec, variables, wanted)
    suspect = bench.suspect_of(spec, variables)
    return compare.Case(suspect, planted, trigger, planting.target, parts.defence, parts.test)


def _add_poisoned(
    key: Key, planting: Planting, planted: Attack, trigger: Any, rows: Batch
) -> Batch:
    """The images, and poisoned copies of some of every source class."""
    clean = jax.tree.map(np.asarray, rows)
    poisoned = poison.static(key, planted, trigger, clean, _count(planting), per_class=True)
    new = np.flatnonzero(poisoned.labels != clean.labels)
    return Batch(
        jnp.asarray(np.concatenate([clean.images, poisoned.images[new]])),
        jnp.asarray(np.concatenate([clean.labels, poisoned.labels[new]])),
    )


def _train(
    key: Key, planting: Planting, spec: build.Spec, rows: Batch, base: Variables | None
) -> Variables:
    """From scratch, or from the base net, which is the clean twin itself; without augmentation,
    which would shift an additive trigger."""
    if base is not None and planting.attack is None:
        return base
    trained = plant.train(
        units.start_run("victim"),
        "train",
        key,
        build.net(spec),
        rows,
        TRAINING[planting.size],
        batching=draw.Batching(64 if base is None else 128),
        variables=base,
    )
    return trained.variables
