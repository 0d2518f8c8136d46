"""MESA by the released code's own settings, from the search to the retraining, on digits.

The other experiments on digits search with a smaller generator, larger steps and one place per
image, and stamp more images; here nothing is changed: `mesa.Config()` for 620 steps of 128 images,
one place per batch, then `unlearn.released()`, which stamps one image in a hundred and changes the
level every 62 steps. The victim and the images are those of Fig. 4 on digits.

    python -m experiments.mesa.released             # about 3 minutes on 2 cores
    python -m experiments.mesa.released --smoke
"""

import dataclasses
from typing import Any

import jax

from experiments import units
from experiments.scale import bench
from jaxbd.attacks import badnets
from jaxbd.inversion import mesa
from jaxbd.pipelines import compare
from jaxbd.repairs import unlearn

NAME = "mesa/released"
SEARCH = bench.ScanConfig(method="mesa", steps=620, batch_size=128, mesa=mesa.Config())
SETTINGS = {
    "released": (SEARCH, unlearn.released()),
    "digits": (bench.SIZES["digits"].scan, bench.SIZES["digits"].repair),
}
"""Name -> the search and the unlearning; those of the other digit tables beside the released."""


def measure(
    setting: bench.Bench, pattern: int, search: bench.ScanConfig, repair: unlearn.Config
) -> dict[str, Any]:
    """Plants one pattern with target 0, models its triggers at all levels, unlearns them."""
    key = jax.random.fold_in(jax.random.key(0), pattern)
    case, _ = bench.victim(setting, key, badnets.Config(pattern=pattern, target=0))
    found = bench.sub_models(jax.random.fold_in(key, 3), case, search)
    comparison = compare.Comparison(
        unlearning=repair, levels=search.levels, runs=1, batch_size=search.batch_size
    )
    rows, _ = compare.repair_all(
        units.start_run(NAME), jax.random.fold_in(key, 4), case, found, comparison
    )
    return {
        "rates": {
            f"{b:g}": float(r) for b, r in zip(search.levels, found.level_rates[0], strict=True)
        },
        "repairs": [dataclasses.asdict(row) for row in rows],
    }


def rows(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the table: the victim before, and after each repair."""
    rates = {f"MESA level {level}": rate for level, rate in result["rates"].items()}
    return [
        {
            "settings": name,
            "repair": one["method"],
            "ASR recovered": rates.get(one["method"], ""),
            "clean accuracy": one["clean_accuracy"],
            "ASR": one["attack_success_rate"],
        }
        for one in result["repairs"]
    ]


def run(pattern: int = 170) -> list[dict[str, Any]]:
    """The table; resumable, a unit for each of `SETTINGS`."""
    setting, found = bench.make("digits"), []
    for name, (search, repair) in SETTINGS.items():
        wanted = [units.settings_of(part) for part in (setting.size, search, repair)]
        work = lambda search=search, repair=repair: measure(setting, pattern, search, repair)
        unit = units.unit(NAME, f"{name}-trigger{pattern}", [wanted, pattern], work)
        found += rows(name, unit)
    return found


def main(smoke: bool = False) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    if smoke:
        short = dataclasses.replace(SEARCH, steps=2, levels=(0.9,))
        found = measure(bench.make("digits"), 170, short, unlearn.released(num_steps=2))
        print(units.table(rows("released", found)))
        return
    print(units.table(run()))


if __name__ == "__main__":
    units.cli(main)
