"""The tables of Li et al. 2023 (BNA): 1, 2, 3, 5 and 11.

The bodies of these tables are not in the paper's text. Published numbers are those of its prose:
clean accuracies without attack, ASR below 1.3 % on the other data sets, STRIP's best TPR on
all-to-all attacks.
"""

import dataclasses

from experiments.papers import grid
from experiments.papers.attacks import BNA_KINDS
from experiments.papers.sizes import SIZES, SizeName
from experiments.papers.tables import Line, Spread, Table
from experiments.papers.victim import Victim

SHOWN = ("ACC", "ASR", "SIA")
BODY = "the table's body is not in the paper's text"
OTHERS = {
    "gtsrb": ("mobilenet", 0.9567, ("badnets", "l2-inv", "chessboard", "l0-inv", "wanet")),
    "cifar100": (None, 0.6926, ("badnets", "chessboard", "l0-inv", "l2-inv")),
    "imagenette": ("resnet34", 0.8726, ("badnets",)),
    "tinyimagenet": ("resnet34", 0.5224, ("badnets",)),
}
"""Data set of Table 3 -> architecture, clean accuracy without attack, triggers."""


def build(size: SizeName) -> list[Table | Spread]:
    """The tables at a size."""
    everything = {"none": None, **{name: name for name in grid.usual()}}
    varied, seeds = _vary(size), SIZES[size].seeds
    few = {"none": None, "bna": "bna", "bna, known trigger": "bna-known"}
    return [
        Table(
            "bna-1",
            "BNA Table 1: six triggers, all-to-one and all-to-all",
            everything,
            SHOWN,
            _attacks(size),
            f"{BODY}; in its prose ACC and SIA of tuning drop by 3 to 15 points",
            seeds,
        ),
        Table(
            "bna-2",
            "BNA Table 2: poisoned images and size of the perturbation",
            few,
            SHOWN,
            varied,
            f"{BODY}; half and twice the usual numbers here",
        ),
        Table(
            "bna-3",
            "BNA Table 3: other data sets",
            few,
            SHOWN,
            _datasets(size),
            f"{BODY}; ASR of BNA is below 0.013 in all cases",
        ),
        Table(
            "bna-5",
            "BNA Table 5: triggered images told apart at test time",
            {"STRIP": "strip", "bna": "bna"},
            ("TPR", "FPR"),
            _attacks(size),
            f"{BODY}; STRIP, set to 15 % FPR, has a TPR of at best .5272 on all-to-all attacks",
            seeds,
        ),
        Table("bna-11", "BNA Table 11: Table 2 for all methods", everything, SHOWN, varied, BODY),
    ]


def _attacks(size: SizeName) -> list[Line]:
    return [
        Line({"attack": kind, "setting": setting}, Victim(attack=f"bna-{kind}{ending}", size=size))
        for setting, ending in (("all-to-one", ""), ("all-to-all", "-a2a"))
        for kind in BNA_KINDS
    ]


def _vary(size: SizeName) -> list[Line]:
    """Half and twice as many poisoned images, and as strong a chessboard."""
    found, usual = [], Victim(attack="bna-chessboard", size=size)
    count, strength = usual.plan.count, usual.plan.config.size
    assert count is not None
    for name, own in (("count", count), ("size", strength)):
        for value in (max(1, int(own) // 2), int(own), 2 * int(own)):
            changes = () if value == own else ((name, value),)
            labels = {"attack": "chessboard", "varied": name, "value": str(value)}
            found.append(Line(labels, dataclasses.replace(usual, changes=changes)))
    return found


def _datasets(size: SizeName) -> list[Line]:
    found = []
    for dataset, (arch, accuracy, kinds) in OTHERS.items():
        clean = Victim(attack="clean", size=size, dataset=dataset, arch=arch)
        published = {"none": {"ACC": accuracy}}
        found.append(Line({"data": dataset, "attack": "none"}, clean, published))
        found += [
            Line(
                {"data": dataset, "attack": kind}, dataclasses.replace(clean, attack=f"bna-{kind}")
            )
            for kind in kinds
        ]
    return found
