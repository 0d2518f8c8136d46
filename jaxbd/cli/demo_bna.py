"""The demo's correction: a guarded net from the recovered triggers, its figures, and a neuron to look at."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import correct, evaluate, histogram, loop, losses, study, workflow
from jaxbd.base import Key, Variables
from jaxbd.interop import guarded
from jaxbd.repair import bna, guard
from jaxbd.report.content import Activations, Panel

ROW = "BNA, guarded"
"""The guarded net's name in the tables."""


class Guarded(NamedTuple):
    """The guarded net of one target: its variables, and on test images its rates and what it flags.

    Attributes:
      corrected: the variables of the net that is asked, the victim's but for moments and bounds.
    """

    variables: Variables
    corrected: Variables
    rates: evaluate.Rates
    detection: evaluate.Detection
    seconds: loop.Seconds


def make(
    key: Key, case: study.Case, scan: workflow.Scan, config: bna.Config, batch_size: int, progress: workflow.Progress
) -> Guarded:
    """Corrects the victim for the triggers recovered at the highest level, and guards it with the result.

    The planted trigger serves the judge only.
    """
    levels = np.asarray(scan.cells.level)[np.asarray(scan.cells.target) == case.target]
    model = jax.tree.map(lambda leaf: leaf[int(levels.argmax())], workflow.cells_of(scan, case.target))
    others = sorted({*np.asarray(case.defence.labels).tolist()} - {case.target})
    sources, kept = (correct.of_classes(case.defence, classes) for classes in (others, (case.target,)))
    found = correct.trigger(
        key, case.net, case.variables, scan.inversion.stamp, model, sources, config,
        kept=kept, batch_size=batch_size, progress=progress, label="correct: BNA",
    )  # fmt: skip
    variables, targets = guard.pack(case.variables, [found.variables]), (case.target,)
    judged = study.judge(case._replace(net=guarded.make(case.net, targets)), variables)
    flag = guarded.flag(case.net, targets)
    told = evaluate.detection(jax.random.key(0), flag, variables, case.test, case.attack, case.trigger)
    return Guarded(variables, found.variables, judged, told, found.seconds)


def activations(case: study.Case, corrected: Variables, twin: Variables, config: bna.Config) -> Activations:
    """The penultimate neuron that the planted trigger moves most in the victim: before, after; and one of the twin."""
    show = _shower(case)
    suspect, planted = show(case.variables, False), show(case.variables, True)
    after, of_twin, twin_planted = show(corrected, True), show(twin, False), show(twin, True)
    moved, left, in_twin = (
        total_variations(clean, triggered, config)
        for clean, triggered in ((suspect, planted), (suspect, after), (of_twin, twin_planted))
    )

    def panel(net: str, channel: int, clean: np.ndarray, triggered: np.ndarray, far: np.ndarray, note: str) -> Panel:
        values = dict(clean=clean[:, channel], triggered=triggered[:, channel], total_variation=float(far[channel]))
        return Panel(net=net, channel=channel, note=note, **values)

    most, twins = int(moved.argmax()), int(in_twin.argmax())
    return Activations(
        layer=list(correct.layers(case.net, case.variables, case.test))[-1],
        suspect=panel("suspect", most, suspect, planted, moved, "Of this layer, the planted trigger moves it most."),
        corrected=panel("corrected net", most, suspect, after, left, "Clean images: as in the suspect."),
        others=[panel("clean twin", twins, of_twin, twin_planted, in_twin, "The one that moves most in this net.")],
    )


def _shower(case: study.Case) -> Callable[[Variables, bool], np.ndarray]:
    """(variables, whether triggered) -> activations [N x positions, C] of the last layer, on test images of sources."""
    layer = list(correct.layers(case.net, case.variables, case.test))[-1]
    measure = lambda key, variables, images: case.net.outputs(variables, images)[1][layer]
    others = sorted({*np.asarray(case.test.labels).tolist()} - {case.target})
    data = correct.of_classes(case.test, others)

    def show(variables: Variables, triggered: bool) -> np.ndarray:
        planted: tuple[Any, ...] = (case.attack.stamp, case.trigger) if triggered else ()
        values = evaluate.per_image(jax.random.key(0), measure, variables, data, *planted)
        return values.reshape(-1, values.shape[-1])

    return show


def total_variations(clean: np.ndarray, triggered: np.ndarray, config: bna.Config) -> np.ndarray:
    """Total variation [C] between activations [N, C] and [M, C], by the intervals that BNA corrects with."""
    grid = histogram.grid(jnp.asarray(clean.min(0)), jnp.asarray(clean.max(0)), config.width, config.bins)
    p, q = (histogram.hard(jnp.asarray(values), grid, config.bins) / len(values) for values in (clean, triggered))
    return np.asarray(losses.total_variation(p, q))
