"""The figures of Qiao et al. 2019 (MESA): Fig. 4 and appendix B.

Only the prose has numbers: ranges and means over the 51 binary triggers.
"""

from experiments.papers.sizes import SIZES, SizeName
from experiments.papers.tables import Published, Spread
from experiments.papers.victim import Victim
from jaxbd.attacks import badnets

LEVELS: list[tuple[str, str | None, str | None, Published]] = [
    ("before", "mesa-levels", "before", {"mean": 0.987, "lowest": 0.923, "highest": 0.998}),
    ("level 0.5", "mesa-levels", "MESA level 0.5", {"highest": 0.091}),
    ("level 0.8", "mesa-levels", "MESA level 0.8", {"highest": 0.091}),
    (
        "level 0.9",
        "mesa-levels",
        "MESA level 0.9",
        {"mean": 0.034, "lowest": 0.012, "highest": 0.059},
    ),
    ("ensemble", "mesa-levels", "MESA mixture", {"highest": 0.091}),
    (
        "single reversed trigger",
        "mesa-levels",
        "single reversed trigger",
        {"lowest": 0.024, "highest": 0.514},
    ),
    ("true trigger", "mesa-levels", "ideal (true trigger)", {"mean": 0.024}),
]
COLOURS = 10
"""Random colours of appendix B."""


def build(size: SizeName) -> list[Spread]:
    """The figures at a size."""
    step = -(-51 // SIZES[size].triggers)
    binary = [
        Victim(attack=f"mesa-{number}", size=size, target=0)
        for number in badnets.binary_patterns()[::step]
    ]
    blank = [(title, defence, level, {}) for title, defence, level, _ in LEVELS]
    colours = range(min(COLOURS, SIZES[size].triggers))
    note = "values of the figure are not in the paper's text"
    ways = {
        "random colours": [Victim(attack=f"mesa-color-{n}", size=size, target=0) for n in colours],
        "random targets": [
            Victim(attack=f"mesa-{number}", size=size, target=(7 * index + 3) % 10)
            for index, number in enumerate(badnets.binary_patterns()[::step])
        ],
        "CIFAR-100": [
            Victim(attack=f"mesa-{number}", size=size, target=0, dataset="cifar100")
            for number in badnets.binary_patterns()[::step]
        ],
    }
    return [
        Spread(
            "mesa-fig-4", "MESA Fig. 4: binary 3x3 triggers", binary, LEVELS, "numbers of the prose"
        ),
        *(
            Spread(f"mesa-b-{number}", f"MESA appendix B: {title}", found, blank, note)
            for number, (title, found) in enumerate(ways.items(), start=1)
        ),
    ]
