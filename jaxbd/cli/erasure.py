"""What the demo and `jaxbd repair --method dhbe` tell of an erasure without data, for results and for a page."""

from collections.abc import Iterable, Mapping

import numpy as np

from jaxbd import erase
from jaxbd.evaluate import Rates
from jaxbd.repair import dhbe
from jaxbd.report.content import Moment

COPIES = (1, 4, 9)
"""How often the trigger stands on an image where a backdoor's remains are looked for, see `attacks.amplified`."""
CURVE = 200
"""Most points of a curve; `repair --method dhbe` has all of them in its file of metrics."""


def amplified(before: Mapping[int, Rates], after: Mapping[int, Rates]) -> dict[int, tuple[float, float]]:
    """{copies of the trigger on an image: attack success rate in [0, 1] (before, after)}."""
    return {copies: (before[copies].attack_success_rate, after[copies].attack_success_rate) for copies in before}


def moments(pictures: Iterable[erase.Picture]) -> list[Moment]:
    """An album's pictures as a page takes them."""
    return [Moment(**picture._asdict()) for picture in pictures]


def curves(infos: dhbe.Info) -> dict[str, list[float]]:
    """Every field of infos [steps], averaged over at most `CURVE` parts that end at the iterations `step`."""
    steps = np.arange(1, len(infos.discrepancy) + 1)
    parts = np.array_split(steps, min(CURVE, len(steps)))
    means = {name: [float(values[part - 1].mean()) for part in parts] for name, values in infos._asdict().items()}
    return {"step": [int(part[-1]) for part in parts], **means}
