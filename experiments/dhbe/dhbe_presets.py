"""DHBE by its presets on one digit victim: `quick`, `paper` and `released`, cut to a stated length.

The paper's schedule has 15,000 iterations of 384 fake images for the student alone, the released
one of 1,280: days on two cores. A row says how many of them were made; learning rates fall at the
same shares of a shorter run. Full length is for an accelerator:

    python -m experiments.dhbe.dhbe_presets                       # 5 to 10 minutes each, 2 cores
    python -m experiments.dhbe.dhbe_presets --steps 15000
    python -m experiments.dhbe.dhbe_presets --smoke
"""

from typing import Any

from experiments import units
from experiments.dhbe import dhbe_rows
from experiments.dhbe.dhbe_cases import SWEEP_SEED, Planting
from jaxbd.repairs import dhbe

STEPS = 60
"""As many as `quick` makes."""
PRESETS = {"quick": dhbe.quick, "paper": dhbe.paper, "released": dhbe.released}


def settings(steps: int = STEPS) -> dict[str, dhbe.Config]:
    """Every preset with nothing changed but its length."""
    return {name: preset(num_steps=steps) for name, preset in PRESETS.items()}


def row(name: str, config: dhbe.Config, result: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    whole = PRESETS[name]().num_steps
    return dhbe_rows.row(result, preset=name, iterations=f"{config.num_steps} of {whole}")


def run(steps: int = STEPS) -> list[dict[str, Any]]:
    """The table; resumable, a unit for each preset."""
    planted = Planting(seed=SWEEP_SEED)
    return [
        row(name, config, dhbe_rows.unit(planted, config, f"preset-{name}-steps{steps}"))
        for name, config in settings(steps).items()
    ]


def main(steps: int = STEPS, smoke: bool = False) -> None:
    """Runs the experiment and prints its table.

    Args:
      steps: iterations of every preset.
      smoke: two small ones of the released preset: checks that it runs.
    """
    units.use_cache()
    if smoke:
        small = dhbe.released(num_steps=2, inner_steps=1, batch_size=4, width=2, trigger_size=3)
        found = dhbe_rows.one_victim(Planting(seed=SWEEP_SEED), small)
        print(units.table([row("released", small, found)]))
        return
    print(units.table(run(steps)))


if __name__ == "__main__":
    units.cli(main)
