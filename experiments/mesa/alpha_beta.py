"""How alpha and beta shape the recovered distribution (Qiao et al. 2019, Fig. 3).

Claim of the paper: with alpha 0 the samples collapse to a few points, with alpha 10 they spread and
lose ASR, 0.1 lies between; a lower beta gives a wider distribution that covers that of a higher
one.

    python -m experiments.mesa.alpha_beta --size digits      # about 4 minutes on 2 cores
    python -m experiments.mesa.alpha_beta --smoke

Spread is the mean standard deviation of a trigger pixel over 2,000 samples. Every seed has a victim
and a search of its own, on one clean net; a row is the mean over seeds with its 95 % interval. What
is claimed is said of differences within a seed: whether spread and ASR rise with alpha and with
beta. The PCA maps of the first seed lie beside the results.

Alpha 0.1 at beta 0.8 stands in both sweeps. One search trains a single model, the other three
levels at once, so that the two rows differ in their random numbers alone.
"""

import dataclasses
import pathlib

import jax
import numpy as np
import scipy.stats

from experiments import units
from experiments.scale import bench
from jaxbd.attacks import badnets
from jaxbd.base import Key
from jaxbd.pipelines import compare
from jaxbd.report import maps

NAME = "mesa/alpha-beta"
ALPHAS, FIXED_BETA = (0.0, 0.1, 10.0), 0.8
BETAS, FIXED_ALPHA = (0.5, 0.8, 0.9), 0.1
SAMPLES, SEEDS = 2000, 5
FIGURES = ("ASR", "spread", "entropy bound")
PAIRS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "alpha_rows": (("alpha", 0.0, 0.1), ("alpha", 0.1, 10.0)),
    "beta_rows": (("beta", 0.5, 0.8), ("beta", 0.8, 0.9)),
}
"""Part of a unit's result -> what is raised there, from, to."""


def sub_model(
    key: Key, case: compare.Case, config: bench.ScanConfig, alpha: float
) -> tuple[list[dict], np.ndarray]:
    """MESA with entropy weight `alpha` at the levels of `config`: rows of the table, and samples
    [L, 2000, h, w, C]."""
    mesa = dataclasses.replace(config.mesa, entropy_weight=alpha)
    found = bench.sub_models(key, case, dataclasses.replace(config, mesa=mesa))
    rows, samples = [], []
    for index, level in enumerate(config.levels):
        state = jax.tree.map(lambda leaf, index=index: leaf[index], found.states)
        drawn = np.asarray(found.inversion.sample(jax.random.key(index), state, SAMPLES))
        samples.append(drawn)
        rows.append(
            {
                "alpha": alpha,
                "beta": level,
                "ASR": float(found.level_rates[case.target, index]),
                "spread": float(drawn.std(0).mean()),
                "entropy bound": float(found.infos.entropy[-20:, index].mean()),
            }
        )
    return rows, np.stack(samples)


def one_trigger(
    setting: bench.Bench, pattern: int, seed: int, steps: int, out: pathlib.Path | None
) -> dict:
    """Both sweeps of Fig. 3 for one planted trigger; PCA maps as JSON points when `out` is
    given."""
    key = jax.random.fold_in(jax.random.key(seed), pattern)
    case, _ = bench.victim(setting, key, badnets.Config(pattern=pattern, target=0))
    fit_key = jax.random.fold_in(key, 3)
    at = lambda levels: dataclasses.replace(setting.size.scan, levels=levels, steps=steps)
    by_alpha = [sub_model(fit_key, case, at((FIXED_BETA,)), alpha) for alpha in ALPHAS]
    by_beta = sub_model(fit_key, case, at(BETAS), FIXED_ALPHA)
    if out is not None:
        draw_map(
            out / "alpha.png",
            {f"alpha {a:g}": s[0] for a, (_, s) in zip(ALPHAS, by_alpha, strict=True)},
            case,
        )
        draw_map(
            out / "beta.png",
            {f"beta {b:g}": s for b, s in zip(BETAS, by_beta[1], strict=True)},
            case,
        )
    return {"alpha_rows": [row for rows, _ in by_alpha for row in rows], "beta_rows": by_beta[0]}


def draw_map(
    path: pathlib.Path, samples: dict[str, np.ndarray], case: compare.Case, points: int = 400
) -> None:
    """One PCA for all distributions and the planted trigger, a colour each (Qiao et al. 2019,
    section 4.2)."""
    from matplotlib.figure import Figure

    flat = [drawn.reshape(len(drawn), -1) for drawn in samples.values()]
    original = np.asarray(case.trigger.pattern).reshape(1, -1)
    where = maps.pca(np.concatenate(flat), original)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes, start = figure.subplots(), 0
    for name, part in zip(samples, flat, strict=True):
        some = where[start : start + points]
        axes.scatter(some[:, 0], some[:, 1], s=4, label=name)
        start += len(part)
    axes.scatter(*where[-1], marker="*", s=120, color="black", label="planted trigger")
    axes.set(xlabel="first component", ylabel="second component")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def interval(values: list[float]) -> str:
    """Mean of independent `values`, and half of its 95 % interval by Student's t; nan from one."""
    if len(values) < 2:
        return f"{values[0]:.3f} +- nan"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{np.mean(values):.3f} +- {half:.3f}"


def summary(results: list[dict]) -> list[dict]:
    """A row for each setting: its figures over all seeds' `results`, see `interval`."""
    rows = []
    for part in PAIRS:
        for same in zip(*(result[part] for result in results), strict=True):
            setting = {name: same[0][name] for name in ("alpha", "beta")}
            over = {name: interval([row[name] for row in same]) for name in FIGURES}
            rows.append({**setting, "seeds": len(same), **over})
    return rows


def differences(results: list[dict]) -> list[dict]:
    """A row for each step of a sweep: by how much each figure rises within a seed, see `interval`,
    and in how many seeds the spread does."""
    rows = []
    for part, pairs in PAIRS.items():
        for name, low, high in pairs:
            at = lambda value, part=part, name=name: [
                next(row for row in result[part] if row[name] == value) for result in results
            ]
            steps = list(zip(at(low), at(high), strict=True))
            rises = {f: [after[f] - before[f] for before, after in steps] for f in FIGURES}
            wider = sum(rise > 0 for rise in rises["spread"])
            rows.append(
                {
                    "raised": f"{name} {low:g} to {high:g}",
                    "seeds": len(steps),
                    **{f: interval(rise) for f, rise in rises.items()},
                    "seeds with a wider spread": wider,
                }
            )
    return rows


def run(
    size: bench.SizeName,
    data: str | None = None,
    seeds: int = SEEDS,
    pattern: int = 170,
    steps: int = 1500,
) -> dict:
    """A unit for each seed, resumable; the first one's maps lie beside the results."""
    setting = bench.make(size, data)
    settings = [units.settings_of(setting.size), pattern, steps]
    out = units.RESULTS / f"alpha_beta-{size}"
    results = [
        units.unit(
            f"{NAME}-{size}",
            f"trigger{pattern}-seed{seed}",
            [settings, seed],
            lambda seed=seed: one_trigger(setting, pattern, seed, steps, None if seed else out),
        )
        for seed in range(seeds)
    ]
    return {
        "size": size,
        "seeds": seeds,
        "settings": settings[0],
        "pattern": pattern,
        "steps": steps,
        "rows": summary(results),
        "differences": differences(results),
        "results": results,
    }


def main(
    size: bench.SizeName = "digits",
    data: str | None = None,
    seeds: int = SEEDS,
    steps: int = 1500,
    smoke: bool = False,
) -> None:
    """Runs the experiment and prints its tables."""
    units.use_cache()
    if smoke:
        results = [one_trigger(bench.make("digits"), 170, 0, 3, None)]
        rows, steps_up = summary(results), differences(results)
    else:
        found = run(size, data, seeds, steps=steps)
        rows, steps_up = found["rows"], found["differences"]
    print(units.table(rows), "\n")
    print(units.table(steps_up))


if __name__ == "__main__":
    units.cli(main)
