"""The published backdoored models with their attackers' triggers, and images to repair and to judge
them with. The triggers are for judging alone."""

import functools
from typing import Any

import jax

from experiments import units
from experiments.margin_published import MODELS
from jaxbd.attacks import amplified, given
from jaxbd.base import Attack, Batch, Suspect, Variables
from jaxbd.data import load as data
from jaxbd.interop import load
from jaxbd.interop import trigger as triggers
from jaxbd.metrics import evaluate

LIMIT, JUDGED, SEED = 2000, 4000, 0
TRIGGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "badnets_8_02": ("white:4x4", {"row": 27, "column": 27}),
    "l2_inv_0_02": ("ibau/l2_inv.png", {"apply": "add"}),
    "trojan_sq_2_02": ("ibau/trojan_sq.png", {"apply": "add"}),
    "gtsrb badnets_8_02": ("white:4x4", {"row": 27, "column": 27}),
    "nad WRN-16-1-S": ("nad/grid.png", {"row": 29, "column": 29}),
}
"""Model -> the attacker's trigger and how it is applied."""


@functools.cache
def suspect_of(name: str) -> Suspect:
    """A published model."""
    return load.suspect_of(load.open_model(units.SHARED / "models" / MODELS[name][0]))


@functools.cache
def images_of(name: str) -> tuple[Batch, Batch]:
    """(the defender's images, others that judge)."""
    if name.startswith("gtsrb"):
        folder = units.SHARED / "data" / "gtsrb"
        parts = [data.load(str(folder / f"{part}.npz")) for part in ("defender", "judge")]
    else:
        folder = str(units.SHARED / "data" / "cifar10")
        parts = [
            data.load(folder, split=split, limit=limit, seed=SEED)
            for split, limit in (("train", LIMIT), ("test", JUDGED))
        ]
    defender, judge = (data.as_batch(part) for part in parts)
    return defender, judge


def true_trigger(name: str) -> list[tuple[int, Attack, Any]]:
    """(copies, attack, trigger): the attacker's, and where it is a patch four and nine of it."""
    source, applied = TRIGGERS[name]
    suspect, target = suspect_of(name), MODELS[name][1]
    where = source if ":" in source else str(units.SHARED / "models" / source)
    loaded = triggers.load(where)
    assert target is not None and loaded.pattern is not None
    config = given.Config(target=target, **applied)
    rows = [(1, *given.make(suspect.image_shape, suspect.classes, config, loaded))]
    for copies in (4, 9) if config.apply == "overwrite" else ():
        several = amplified.Config(
            target=target, copies=copies, row=config.row, column=config.column
        )
        attack = amplified.make(
            suspect.image_shape, suspect.classes, several, loaded.pattern, loaded.mask
        )
        rows.append((copies, attack, attack.init(jax.random.key(0))))
    return rows


def judge(name: str, variables: Variables) -> dict[str, Any]:
    """Figures under the attacker's trigger."""
    suspect, (_, images) = suspect_of(name), images_of(name)
    row = {}
    for copies, attack, trigger in true_trigger(name):
        key = jax.random.key(SEED)
        found = evaluate.rates(key, suspect.net, variables, images, attack, trigger)
        if copies == 1:
            row = {
                "accuracy": found.clean_accuracy,
                "asr": found.attack_success_rate,
                "sia": found.source_inference_accuracy,
            }
        else:
            row[f"asr x{copies}"] = found.attack_success_rate
    return row
