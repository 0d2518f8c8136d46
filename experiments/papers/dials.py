"""A repair with its dial: the automatic choice, and beside it what an oracle would have chosen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.papers.defence import method_of
from experiments.papers.judge import judge
from jaxbd.base import Batch, Key, Variables
from jaxbd.pipelines import compare
from jaxbd.pipelines import repair as repairs
from jaxbd.pipelines.repair import Repaired
from jaxbd.training.run import Run


class Along(NamedTuple):
    """A trained repair along its dial: values [n], and (value) -> variables."""

    values: np.ndarray
    extract: Callable[[Any], Variables]


def repair_along(
    run: Run, key: Key, case: compare.Case, name: str, config: Any, batch_size: int
) -> tuple[Repaired, Along | None]:
    """A repair that needs no trigger, as `pipelines.repair.repair` makes it with the same key, and
    its dial where it has one."""
    method, suspect = method_of(name), case.victim
    clean = case.defence if "clean" in method.needs else None
    data = repairs.select(suspect, clean, None)
    made = repairs.make(
        method, suspect.problem(None), repairs.adapt(method, config, suspect, data, batch_size)
    )
    state = repairs.start(made, jax.random.fold_in(key, 0), suspect.variables, data)
    state, infos, seconds = repairs.fit(run, key, made, data, state, batch_size, name)
    repaired = Repaired(made.extract(state), infos, seconds)
    if made.dial is None:
        return repaired, None
    return repaired, Along(np.asarray(made.dial), lambda value: made.extract(state, value))


def ask_oracle(
    case: compare.Case, along: Along, test: Batch, points: int, budget: float
) -> dict[str, Any]:
    """What the lowest ASR on `test` within the accuracy budget would have been, and the curve.

    This is no result of the repair: it needs triggered test images to choose.
    """
    before = judge(case, None, patch=False, test=test)["accuracy"]
    curve = []
    for value in thin(along.values, points):
        variables = along.extract(value)
        found = judge(case, _wrap(variables), patch=False, test=test)
        curve.append({"value": float(value), **{n: found[n] for n in ("accuracy", "asr", "sia")}})
    return {
        **pick(curve, before, budget),
        "budget": budget,
        "images": len(test.labels),
        "curve": curve,
    }


def thin(values: np.ndarray, points: int) -> np.ndarray:
    """At most `points` of the values, evenly spread, both ends among them."""
    rows = np.unique(np.linspace(0, len(values) - 1, min(points, len(values))).round().astype(int))
    return values[rows]


def pick(curve: list[dict[str, Any]], before: float, budget: float) -> dict[str, Any]:
    """The point of the lowest ASR among those within the budget; the first where there is none."""
    good = [each for each in curve if each["accuracy"] >= before - budget]
    return dict(min(good, key=lambda each: each["asr"])) if good else dict(curve[0])


def _wrap(variables: Variables) -> Repaired:
    return Repaired(variables, {}, repairs.Seconds(0.0, 0.0))
