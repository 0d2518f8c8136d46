"""DHBE on a published backdoored model, without data: clean accuracy and attack success rate before and after.

    python -m experiments.dhbe_published             # about an hour on 2 cores
    python -m experiments.dhbe_published --smoke     # few steps; checks that it runs

Needs the models and CIFAR-10 images in `shared/` beside the repository; 2,000 test images judge.
"""

from typing import Any

from experiments import bna_published, dhbe_rows, units
from jaxbd.interop import load as models
from jaxbd.repair import dhbe

NAME, MODEL = "dhbe/published", "badnets_8_02"
ERASURE = dhbe.quick(num_steps=24)
"""As many iterations as two cores do in an hour."""


def one_model(config: dhbe.Config) -> dict[str, Any]:
    """The model before and after, as JSON."""
    case = bna_published.case(MODEL)
    spec = models.open_model(bna_published.folder() / f"{MODEL}_ckpt.pth").spec
    variables, spent = dhbe_rows.erased(case, spec, config)
    before, after = (dhbe_rows.judged(case, each, ()) for each in (case.variables, variables))
    return {"name": MODEL, "target": case.target, "before": before, "after": after, **spent}


def unit() -> dict[str, Any]:
    """`one_model`, kept under `runs/`."""
    return units.unit(NAME, MODEL, units.settings_of(ERASURE), lambda: one_model(ERASURE))


def main(smoke: bool = False) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    found = one_model(dhbe_rows.SMOKE) if smoke else unit()
    print(units.table([dhbe_rows.row(found, model=MODEL)]))


if __name__ == "__main__":
    units.cli(main)
