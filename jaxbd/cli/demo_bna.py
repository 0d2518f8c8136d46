"""The demo's correction: a guarded net from the recovered triggers, its figures, and a neuron to look at."""

from typing import NamedTuple

import jax
import numpy as np

from jaxbd import correct, evaluate, loop, study, workflow
from jaxbd.base import Batch, Key, Variables
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
    others = _sources(case, case.defence)
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


def _sources(case: study.Case, data: Batch) -> list[int]:
    """The classes of `data` that an all-to-one attack leads to the target."""
    return sorted({*np.asarray(data.labels).tolist()} - {case.target})


def activations(case: study.Case, corrected: Variables, twin: Variables, config: bna.Config) -> Activations:
    """The penultimate neuron that the planted trigger moves most in the victim: before, after; and one of the twin."""
    layer = list(correct.layers(case.net, case.variables, case.test))[-1]
    data = correct.of_classes(case.test, _sources(case, case.test))

    def show(variables: Variables, triggered: bool) -> np.ndarray:
        planted = {"stamp": case.attack.stamp, "model": case.trigger} if triggered else {}
        return correct.activations(case.net, variables, data, layer=layer, **planted)

    suspect, planted = show(case.variables, False), show(case.variables, True)
    after, of_twin, twin_planted = show(corrected, True), show(twin, False), show(twin, True)
    moved, left, in_twin = (
        correct.total_variations(clean, triggered, config.width, config.bins)
        for clean, triggered in ((suspect, planted), (suspect, after), (of_twin, twin_planted))
    )

    def panel(net: str, channel: int, clean: np.ndarray, triggered: np.ndarray, far: np.ndarray, note: str) -> Panel:
        values = dict(clean=clean[:, channel], triggered=triggered[:, channel], total_variation=float(far[channel]))
        return Panel(net=net, channel=channel, note=note, **values)

    most, twins = int(moved.argmax()), int(in_twin.argmax())
    return Activations(
        layer=layer,
        suspect=panel("suspect", most, suspect, planted, moved, "Of this layer, the planted trigger moves it most."),
        corrected=panel("corrected net", most, suspect, after, left, "Clean images: as in the suspect."),
        others=[panel("clean twin", twins, of_twin, twin_planted, in_twin, "The one that moves most in this net.")],
    )
