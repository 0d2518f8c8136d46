"""Where on an image a planted trigger works: at its place, two pixels off, anywhere.

DHBE adds generated triggers at random places, so it erases quickly what works at all of them. A net
that was trained with images cut out of padded ones has seen the trigger at many places; on digits,
whose corners are always black, it learns the trigger for one corner.

    python -m experiments.dhbe.dhbe_places
    python -m experiments.dhbe.dhbe_places --smoke
"""

from typing import Any

import jax
import jax.numpy as jnp

from experiments import units
from experiments.dhbe import dhbe_cases
from experiments.dhbe.dhbe_cases import TABLE_SEEDS, Planting
from jaxbd.attacks import badnets
from jaxbd.metrics import evaluate

OFF = 2
"""Pixels, in both directions."""


def row(planted: Planting, source: str | None = None) -> dict[str, Any]:
    """Attack success rates of a BadNets victim by the trigger's place."""
    case = dhbe_cases.victim(planted, source)
    config = badnets.Config(target=planted.target, patch=planted.side, place="random")
    anywhere = badnets.make(planted.spec.image_shape, planted.spec.classes, config)
    shifted = case.trigger._replace(place=jnp.asarray(case.trigger.place) - OFF)
    ways = {
        "as planted": (case.attack, case.trigger),
        f"{OFF} pixels off": (case.attack, shifted),
        "anywhere": (anywhere, case.trigger),
    }
    found: dict[str, Any] = {"victim": planted.name}
    for name, (attack, trigger) in ways.items():
        victim, key = case.victim, jax.random.key(0)
        rates = evaluate.rates(key, victim.net, victim.variables, case.test, attack, trigger)
        found[f"ASR {name}"] = rates.attack_success_rate
    return found


def main(smoke: bool = False) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    seeds = TABLE_SEEDS[: 1 if smoke else None]
    print(units.table([row(Planting(seed=seed)) for seed in seeds]))


if __name__ == "__main__":
    units.cli(main)
