"""Twenty digit models, ten of them with a backdoor, scanned like a stranger's.

    python -m experiments.verdict.digits_models            # about 12 minutes on 2 cores
    python -m experiments.verdict.digits_models --smoke    # two models, few steps; no claim

Seeds 400 to 419 serve nothing else; no setting was chosen on them. Of seeds 300 to 303, tried
before, a clean net was called backdoored by a search that ended early at a lower threshold.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import units
from experiments.scale import bench
from jaxbd.attacks import badnets, blend, l2_inv, sinusoid
from jaxbd.data import digits, draw
from jaxbd.metrics import evaluate
from jaxbd.models import build
from jaxbd.pipelines import plant, scan
from jaxbd.training import supervised

NAME = "verdict/digits"
SHAPE = (16, 16, 1)
TRAINING = supervised.Config(num_steps=800, learning_rate=0.05)
FIRST, COUNT = 400, 20
ATTACKS: tuple[tuple[str, Any, Any], ...] = (
    ("patch in the corner", badnets, badnets.Config(pattern="white", place="fixed")),
    ("patch anywhere", badnets, badnets.Config(pattern="checkerboard")),
    ("blended picture", blend, blend.Config(opacity=0.3)),
    ("sinusoid", sinusoid, sinusoid.Config(size=80)),
    ("l2", l2_inv, l2_inv.Config(norm=2.0)),
)
"""Name, module, settings; each is planted in two models."""
WIDTHS = (8, 12)


def one(seed: int, steps: int | None = None) -> dict[str, Any]:
    """Trains the model of a seed and scans it; odd seeds are clean."""
    spec = build.Spec(
        arch="cnn", classes=10, image_shape=SHAPE, options={"width": WIDTHS[seed // 2 % 2]}
    )
    parts = draw.divide(digits.load(SHAPE[0]), 997, 400, seed=seed)
    key, run = jax.random.key(seed), units.start_run(NAME)
    name, target, planted = "none", None, None
    if seed % 2 == 0:
        name, module, config = ATTACKS[(seed - FIRST) // 2 % len(ATTACKS)]
        target = seed // 2 % 10
        config = dataclasses.replace(config, target=target, poison_rate=0.1)
        attack = module.make(SHAPE, 10, config)
        planted = attack, attack.init(jax.random.fold_in(key, 1))
    training = TRAINING if steps is None else dataclasses.replace(TRAINING, num_steps=steps)
    net = build.net(spec)
    trained = plant.train(
        run, "train", jax.random.fold_in(key, 2), net, parts.train, training, attack=planted
    )
    suspect = bench.suspect_of(spec, trained.variables)
    rates = evaluate.rates(key, net, trained.variables, parts.test, *(planted or (None, None)))
    settings = scan.PRESETS["quick"]
    if steps is not None:
        settings = dataclasses.replace(settings, steps=2, locate_steps=2, look=0)
    found = scan.scan(run, jax.random.key(0), suspect.freeze(), parts.defence, parts.test, settings)
    judgement, expected = found.judgement, [] if target is None else [target]
    assert judgement is not None
    return {
        "seed": seed,
        "attack": name,
        "target": "none" if target is None else target,
        "accuracy": rates.clean_accuracy,
        "attack success": rates.attack_success_rate,
        "verdict": judgement.verdict,
        "named": judgement.targets,
        "one sign": judgement.leads,
        "right": judgement.targets == expected,
        "margin p": None if found.margin is None else found.margin.outliers.p_value,
        "anomaly": float(np.max(found.located.scores)) if found.located else None,
        "image-steps": found.image_steps,
        "run s": found.seconds.run,
    }


def rows(seeds: Sequence[int] = range(FIRST, FIRST + COUNT)) -> list[dict[str, Any]]:
    """A row per model; trained and scanned once, then kept."""
    settings = {
        "scan": units.settings_of(scan.PRESETS["quick"]),
        "training": units.settings_of(TRAINING),
    }
    return [
        units.unit(NAME, str(seed), {**settings, "seed": seed}, lambda seed=seed: one(seed))
        for seed in seeds
    ]


def main(smoke: bool = False) -> None:
    """Prints the table."""
    found = [one(seed, steps=20) for seed in (FIRST, FIRST + 1)] if smoke else rows()
    print(units.table(found))


if __name__ == "__main__":
    units.cli(main)
