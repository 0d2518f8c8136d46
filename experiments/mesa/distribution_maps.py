"""What the valid trigger distribution looks like: t-SNE maps with thumbnails (Qiao et al. 2019,
Figs. 1b and 5).

Claim of the paper: the distribution is continuous and wide, the planted trigger lies in or near it,
and many recovered triggers attack better than the planted one.

    python -m experiments.mesa.distribution_maps --size digits     # about 2 minutes on 2 cores
    python -m experiments.mesa.distribution_maps --smoke

Prints, per planted pattern, the share of recovered triggers whose own ASR exceeds the planted
trigger's, and writes a page with the maps to `runs/`.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments import units
from experiments.scale import bench
from jaxbd.attacks import badnets
from jaxbd.metrics import evaluate
from jaxbd.pipelines import compare
from jaxbd.report.content import Content, Triggers

NAME = "mesa/distribution-maps"


def own_rates(case: compare.Case, triggers: np.ndarray, images: int) -> np.ndarray:
    """ASR [n] of each trigger [n, h, w, C] alone, on the first `images` test images."""
    some = type(case.test)(case.test.images[:images], case.test.labels[:images])
    rates = [
        evaluate.rates(
            jax.random.key(0),
            case.victim.net,
            case.victim.variables,
            some,
            case.attack,
            case.trigger._replace(pattern=jnp.asarray(trigger)),
        ).attack_success_rate
        for trigger in triggers
    ]
    return np.asarray(rates)


def one_trigger(
    setting: bench.Bench, pattern: int, seed: int, steps: int, out: pathlib.Path | None
) -> dict:
    """Plants one pattern, models its distribution at alpha 0.1, beta 0.9, and measures samples one
    by one."""
    key = jax.random.fold_in(jax.random.key(seed), pattern)
    case, _ = bench.victim(setting, key, badnets.Config(pattern=pattern, target=0))
    config = dataclasses.replace(setting.size.scan, levels=(0.9,), steps=steps)
    found = bench.sub_models(jax.random.fold_in(key, 3), case, config)
    state = jax.tree.map(lambda leaf: leaf[0], found.states)
    samples = np.asarray(found.inversion.sample(jax.random.key(seed), state, 200))
    planted = np.asarray(case.trigger.pattern)
    rates = own_rates(case, samples[:40], 400)
    original = own_rates(case, planted[None], 400)[0]
    if out is not None:
        write_map(out, pattern, samples, planted)
    distance = np.sqrt(((samples - planted) ** 2).mean((1, 2, 3)))
    return {
        "pattern": pattern,
        "planted ASR": float(original),
        "recovered ASR": float(rates.mean()),
        "share above planted": float((rates > original).mean()),
        "share at least planted": float((rates >= original).mean()),
        "nearest RMS distance": float(distance.min()),
        "spread": float(samples.std(0).mean()),
    }


def write_map(out: pathlib.Path, pattern: int, samples: np.ndarray, planted: np.ndarray) -> None:
    """A report page with the panel and both maps."""
    from jaxbd.report import page

    content = Content(
        title=f"Trigger distribution of pattern {pattern}",
        triggers=Triggers(samples={0.9: samples}, original=planted),
    )
    page.write(out / f"pattern{pattern}.html", content)


def run(
    size: bench.SizeName,
    data: str | None = None,
    seed: int = 0,
    patterns: tuple[int, ...] = (170, 16, 94),
    steps: int = 800,
) -> dict:
    """Resumable; the maps go to the runs folder."""
    setting = bench.make(size, data, seed)
    settings = [units.settings_of(setting.size), seed, steps]
    out = units.RUNS / f"{NAME}-{size}"
    rows = [
        units.unit(
            f"{NAME}-{size}",
            f"trigger{pattern}",
            [settings, pattern],
            lambda pattern=pattern: one_trigger(setting, pattern, seed, steps, out),
        )
        for pattern in patterns
    ]
    return {"size": size, "seed": seed, "settings": settings[0], "steps": steps, "rows": rows}


def main(
    size: bench.SizeName = "digits", data: str | None = None, seed: int = 0, smoke: bool = False
) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    if smoke:
        rows = [one_trigger(bench.make("digits", seed=seed), 170, seed, 3, None)]
    else:
        rows = run(size, data, seed)["rows"]
    print(units.table(rows))


if __name__ == "__main__":
    units.cli(main)
