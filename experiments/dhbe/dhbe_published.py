"""DHBE on a published backdoored model, without data: clean accuracy and attack success rate before
and after.

    python -m experiments.dhbe.dhbe_published             # minutes on 2 cores
    python -m experiments.dhbe.dhbe_published --smoke     # few steps; checks that it runs

Needs the models and CIFAR-10 images in `shared/` beside the repository; 2,000 test images judge.
"""

from typing import Any

import jax

from experiments import units
from experiments.bna import bna_published
from experiments.dhbe import dhbe_cases, dhbe_rows
from experiments.dhbe.dhbe_cases import TABLE_SEEDS, Planting
from jaxbd.pipelines import erase
from jaxbd.repairs import dhbe

NAME, MODEL = "dhbe/published", "badnets_8_02"
ERASURE = dhbe.quick(num_steps=24)
"""A short run, of minutes."""


def one_model(config: dhbe.Config) -> dict[str, Any]:
    """The model before and after, as JSON."""
    case = bna_published.case(MODEL)
    variables, spent = dhbe_rows.erase(case, config)
    before, after = (dhbe_rows.judge(case, each, ()) for each in (case.victim.variables, variables))
    return {"name": MODEL, "target": case.target, "before": before, "after": after, **spent}


def unit() -> dict[str, Any]:
    """`one_model`, kept under `runs/`."""
    return units.unit(NAME, MODEL, units.settings_of(ERASURE), lambda: one_model(ERASURE))


def ask_untrained() -> list[dict[str, Any]]:
    """How alike nets find images of untrained generators: digit victims, the narrow one, the
    published models."""
    plantings = [*(Planting(seed=seed) for seed in TABLE_SEEDS), Planting(size="narrow")]
    cases = [(planted.name, dhbe_cases.victim(planted)) for planted in plantings]
    cases += [(name, bna_published.case(name)) for name in bna_published.MODELS]
    rows = []
    for name, case in cases:
        config = erase.adapt(dhbe.quick(), case.victim)
        answers = erase.ask_untrained(jax.random.key(0), case.victim, config)
        label, share = erase.most_frequent(answers)
        rows.append({"net": name, "target": case.target, "oftenest": label, "share": share})
    return rows


def main(smoke: bool = False) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    found = one_model(dhbe_rows.SMOKE) if smoke else unit()
    print(units.table([dhbe_rows.row(found, model=MODEL)]))
    if not smoke:
        print(units.table(ask_untrained()))


if __name__ == "__main__":
    units.cli(main)
