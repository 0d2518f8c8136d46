"""BNA on the two published backdoored models: pairs found, corrected with the known and with the
estimated trigger.

Claim: the scan of all 90 class pairs names the attacked class and no other within 20 minutes on 2
cores; after the correction triggered images are given their own class again.

    python -m experiments.bna.bna_published             # half an hour or so on 2 cores
    python -m experiments.bna.bna_published --smoke     # few steps; checks that it runs

Needs the models and CIFAR-10 images in `shared/` beside the repository. The defender holds 1,000
clean test images; 2,000 others judge.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import units
from experiments.bna import bna_rows
from experiments.reproduce import Check
from jaxbd.attacks import given
from jaxbd.base import Batch
from jaxbd.data import load
from jaxbd.detection import strip
from jaxbd.interop import load as models
from jaxbd.interop import trigger
from jaxbd.pipelines import compare, pair_scan
from jaxbd.repairs import bna

NAME = "bna/published"
HELD, TESTED = 1000, 2000
SCAN = pair_scan.Config()


def folder() -> pathlib.Path:
    """Where the published models lie."""
    return units.SHARED / "models" / "ibau"


def available() -> bool:
    """Whether models and images are there."""
    return folder().is_dir() and (units.SHARED / "data" / "cifar10").is_dir()


MODELS: dict[str, dict[str, Any]] = {
    "badnets_8_02": {"target": 8, "trigger": "white:4x4", "config": {"row": 27, "column": 27}},
    "l2_inv_0_02": {"target": 0, "trigger": "l2_inv.png", "config": {"apply": "add"}},
}
"""The triggers that were published with the models."""


def case(name: str) -> compare.Case:
    """The model with its own trigger, the defender's and the judge's images."""
    stated = MODELS[name]
    model = models.open_model(folder() / f"{name}_ckpt.pth")
    source = stated["trigger"] if ":" in stated["trigger"] else folder() / stated["trigger"]
    attack, pixels = given.make(
        model.spec.image_shape,
        10,
        given.Config(target=stated["target"], **stated["config"]),
        trigger.load(str(source)),
    )
    data = load.load(str(units.SHARED / "data" / "cifar10"), split="test")
    order = np.random.default_rng(0).permutation(len(data.labels))
    parts = [order[:HELD], order[HELD : HELD + TESTED]]
    held, test = (
        Batch(jnp.asarray(data.images[rows]), jnp.asarray(data.labels[rows])) for rows in parts
    )
    suspect = models.suspect_of(model)
    return compare.Case(suspect, attack, pixels, stated["target"], held, test)


def one_model(name: str, settings: bna_rows.Settings) -> dict[str, Any]:
    """Everything about one model, as JSON."""
    planted = [(k, MODELS[name]["target"]) for k in range(10) if k != MODELS[name]["target"]]
    return bna_rows.examine(case(name), bna_rows.Subject(name, planted), settings)


def unit(name: str) -> dict[str, Any]:
    """`one_model`, kept under `runs/`."""
    settings = bna_rows.Settings(SCAN, bna.Config())
    wanted = [HELD, TESTED, *bna_rows.as_settings(settings)]
    return units.unit(NAME, name, wanted, lambda: one_model(name, settings))


KNOWN = {"badnets_8_02": (0.10, 0.60), "l2_inv_0_02": (0.05, 0.55)}
"""Largest ASR and smallest SIA after correction with the known trigger."""


def add(tables: dict, checks: list[Check], details: dict) -> None:
    """Tables and stated figures of this experiment."""
    found = {name: unit(name) for name in MODELS}
    every = list(found.values())
    tables["Published models: detection over 90 class pairs"] = [
        bna_rows.detection_row(r) for r in every
    ]
    tables["Published models: correction"] = [
        row for r in every for row in bna_rows.correction_rows(r)
    ]
    tables["Published models: triggered images told apart at test time"] = [
        bna_rows.strip_row(r) for r in every
    ]
    tables["Published models: mean divergence of penultimate activations"] = [
        row for r in every for row in bna_rows.divergence_rows(r)
    ]
    for name, result in found.items():
        checks += _checks(name, result)
    seconds = sum(found["badnets_8_02"]["scan"]["seconds"].values())
    checks.append(Check("badnets_8_02: seconds of the 90-pair scan", seconds, 1200.0, "at most"))
    details["published"] = found


def _checks(name: str, result: dict[str, Any]) -> list[Check]:
    """The stated figures of one model."""
    known, (highest, lowest) = result["known"], KNOWN[name]
    drop = result["before"]["clean_accuracy"] - known["clean_accuracy"]
    right = float(result["scan"]["targets"] == [MODELS[name]["target"]])
    estimated = result["estimated"]
    rate = 1.0 if estimated is None else estimated["attack_success_rate"]
    inferred = known["source_inference_accuracy"]
    return [
        Check(f"{name}, known trigger: ASR", known["attack_success_rate"], highest, "at most"),
        Check(f"{name}, known trigger: SIA", inferred, lowest, "at least"),
        Check(f"{name}, known trigger: drop of clean accuracy", drop, 0.015, "at most"),
        Check(f"{name}: target found, no other", right, 1.0, "exactly"),
        Check(f"{name}, estimated trigger: ASR", rate, 0.15, "at most"),
    ]


SMOKE = bna_rows.Settings(
    pair_scan.Config(steps=2), bna.Config(num_steps=1), strip.Config(overlays=2)
)


def main(smoke: bool = False) -> None:
    """Runs the experiment and prints its tables."""
    units.use_cache()
    results = [one_model("badnets_8_02", SMOKE)] if smoke else [unit(name) for name in MODELS]
    print(units.table([bna_rows.detection_row(r) for r in results]), "\n")
    print(units.table([row for r in results for row in bna_rows.correction_rows(r)]))


if __name__ == "__main__":
    units.cli(main)
