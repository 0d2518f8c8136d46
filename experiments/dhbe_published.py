"""DHBE on a published backdoored model, without data: clean accuracy and attack success rate before and after.

    python -m experiments.dhbe_published             # minutes on 2 cores
    python -m experiments.dhbe_published --smoke     # few steps; checks that it runs

Needs the models and CIFAR-10 images in `shared/` beside the repository; 2,000 test images judge.
"""

from typing import Any

import jax

from experiments import bna_published, dhbe_cases, dhbe_rows, units
from experiments.dhbe_cases import SEEDS, Planting
from jaxbd import erase
from jaxbd.interop import load as models
from jaxbd.models import build
from jaxbd.repair import dhbe

NAME, MODEL = "dhbe/published", "badnets_8_02"
ERASURE = dhbe.quick(num_steps=24)
"""A short run, of minutes."""


def _spec(name: str) -> build.Spec:
    """What the file of a published model says of its net."""
    return models.open_model(bna_published.folder() / f"{name}_ckpt.pth").spec


def one_model(config: dhbe.Config) -> dict[str, Any]:
    """The model before and after, as JSON."""
    case = bna_published.case(MODEL)
    variables, spent = dhbe_rows.erased(case, _spec(MODEL), config)
    before, after = (dhbe_rows.judged(case, each, ()) for each in (case.variables, variables))
    return {"name": MODEL, "target": case.target, "before": before, "after": after, **spent}


def unit() -> dict[str, Any]:
    """`one_model`, kept under `runs/`."""
    return units.unit(NAME, MODEL, units.settings_of(ERASURE), lambda: one_model(ERASURE))


def answers() -> list[dict[str, Any]]:
    """How alike nets find images of untrained generators: digit victims, the narrow one, the published models."""
    plantings = [*(Planting(seed=seed) for seed in range(SEEDS)), Planting(size="narrow")]
    nets = [(planted.name, dhbe_cases.victim(planted), planted.spec) for planted in plantings]
    nets += [(name, bna_published.case(name), _spec(name)) for name in bna_published.MODELS]
    rows = []
    for name, case, spec in nets:
        config = erase.settled(dhbe.quick(), tuple(spec.mean), tuple(spec.std))
        answered = erase.answers(jax.random.key(0), case.net, case.image_shape, case.variables, config)
        label, share = erase.oftenest(answered)
        rows.append({"net": name, "target": case.target, "oftenest": label, "share": share})
    return rows


def main(smoke: bool = False) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    found = one_model(dhbe_rows.SMOKE) if smoke else unit()
    print(units.table([dhbe_rows.row(found, model=MODEL)]))
    if not smoke:
        print(units.table(answers()))


if __name__ == "__main__":
    units.cli(main)
