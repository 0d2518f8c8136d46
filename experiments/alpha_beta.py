"""How alpha and beta shape the recovered distribution (Qiao et al. 2019, Fig. 3).

Claim of the paper: with alpha 0 the samples collapse to a few points, with alpha 10 they spread and lose ASR, 0.1 lies
between; a lower beta gives a wider distribution that covers that of a higher one.

    python -m experiments.alpha_beta --size digits      # about 3 minutes on 2 cores
    python -m experiments.alpha_beta --smoke

Spread is the mean standard deviation of a trigger pixel over 2,000 samples; the PCA maps lie beside the results.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from experiments import bench, units
from jaxbd import study
from jaxbd.attacks import badnets
from jaxbd.report import maps

NAME = "mesa/alpha-beta"
ALPHAS, FIXED_BETA = (0.0, 0.1, 10.0), 0.8
BETAS, FIXED_ALPHA = (0.5, 0.8, 0.9), 0.1
SAMPLES = 2000


def sub_model(setting: bench.Bench, key, case: study.Case, alpha: float, levels: tuple[float, ...], steps: int):
    """MESA with entropy weight `alpha` at `levels`: rows of the table and samples [L, 2000, h, w, C]."""
    mesa = dataclasses.replace(setting.size.scan.mesa, entropy_weight=alpha)
    config = dataclasses.replace(setting.size.scan, mesa=mesa, levels=levels, steps=steps)
    found = bench.sub_models(setting, key, case, config)
    rows, samples = [], []
    for index, level in enumerate(levels):
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


def one_trigger(setting: bench.Bench, pattern: int, seed: int, steps: int, out: pathlib.Path | None) -> dict:
    """Both sweeps of Fig. 3 for one planted trigger; PCA maps as JSON points when `out` is given."""
    key = jax.random.fold_in(jax.random.key(seed), pattern)
    case, _ = bench.victim(setting, key, badnets.Config(pattern=pattern, target=0))
    fit_key = jax.random.fold_in(key, 3)
    by_alpha = [sub_model(setting, fit_key, case, alpha, (FIXED_BETA,), steps) for alpha in ALPHAS]
    by_beta = sub_model(setting, fit_key, case, FIXED_ALPHA, BETAS, steps)
    if out is not None:
        draw_map(out / "alpha.png", {f"alpha {a:g}": s[0] for a, (_, s) in zip(ALPHAS, by_alpha, strict=True)}, case)
        draw_map(out / "beta.png", {f"beta {b:g}": s for b, s in zip(BETAS, by_beta[1], strict=True)}, case)
    return {"alpha_rows": [row for rows, _ in by_alpha for row in rows], "beta_rows": by_beta[0]}


def draw_map(path: pathlib.Path, samples: dict[str, np.ndarray], case: study.Case, points: int = 400) -> None:
    """One PCA for all distributions and the planted trigger, a colour each (Qiao et al. 2019, section 4.2)."""
    from matplotlib.figure import Figure

    flat = [drawn.reshape(len(drawn), -1) for drawn in samples.values()]
    original = np.asarray(case.trigger.pattern).reshape(1, -1)
    where = maps.pca(np.concatenate(flat), original)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes, start = figure.subplots(), 0
    for name, part in zip(samples, flat, strict=True):
        shown = where[start : start + points]
        axes.scatter(shown[:, 0], shown[:, 1], s=4, label=name)
        start += len(part)
    axes.scatter(*where[-1], marker="*", s=120, color="black", label="planted trigger")
    axes.set(xlabel="first component", ylabel="second component")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def run(size: bench.SizeName, data: str | None = None, seed: int = 0, pattern: int = 170, steps: int = 1500) -> dict:
    """Resumable; the maps lie beside the results."""
    setting = bench.make(size, data, seed)
    settings = [units.settings_of(setting.size), seed, pattern, steps]
    out = units.RESULTS / f"alpha_beta-{size}"
    found = units.unit(
        f"{NAME}-{size}", f"trigger{pattern}", settings, lambda: one_trigger(setting, pattern, seed, steps, out)
    )
    return {
        "size": size,
        "seed": seed,
        "settings": settings[0],
        "pattern": pattern,
        "steps": steps,
        "rows": found["alpha_rows"] + found["beta_rows"],
        **found,
    }


def main(
    size: bench.SizeName = "digits", data: str | None = None, seed: int = 0, steps: int = 1500, smoke: bool = False
) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    if smoke:
        found = one_trigger(bench.make("digits", seed=seed), 170, seed, 3, None)
        rows = found["alpha_rows"] + found["beta_rows"]
    else:
        rows = run(size, data, seed, steps=steps)["rows"]
    print(units.table(rows))


if __name__ == "__main__":
    units.cli(main)
