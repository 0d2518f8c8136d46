"""Poisoning in the BNA paper: images per source class, targets and trigger sizes of each attack and
data set.

Source: Li et al. 2023, section 5.1 and appendix B.3. Counts are per source class; the source
classes are all but the target (all-to-one) or all classes (all-to-all). A number below 1 is a share
of that class's training images.
"""

from typing import Any

from jaxbd.base import UserError

DATASETS = ("cifar10", "cifar100", "gtsrb", "tinyimagenet", "imagenette")
ALL_TO_ONE: dict[str, dict[str, float]] = {
    "cifar10": {
        "badnets": 100,
        "chessboard": 100,
        "single-pixel": 100,
        "l0-inv": 100,
        "l2-inv": 100,
        "wanet": 900,
    },
    "cifar100": {"badnets": 10, "chessboard": 10, "l0-inv": 10, "l2-inv": 10},
    "gtsrb": {"badnets": 0.02, "chessboard": 0.05, "l0-inv": 0.05, "l2-inv": 0.02, "wanet": 0.24},
    "tinyimagenet": {"badnets": 10},
    "imagenette": {"badnets": 0.05},
}
ALL_TO_ALL: dict[str, dict[str, float]] = {
    "cifar10": {
        "badnets": 300,
        "chessboard": 300,
        "single-pixel": 800,
        "l0-inv": 300,
        "l2-inv": 300,
        "wanet": 1500,
    },
}
TARGETS = {"cifar10": 9, "cifar100": 0, "gtsrb": 0, "tinyimagenet": 0, "imagenette": 9}
TRIGGERS: dict[str, dict[str, Any]] = {
    "badnets": {"patch": 3, "place": "drawn"},
    "chessboard": {"size": 2},
}
"""Settings of an attack's Config on all data sets; `SIZES` lists the exceptions."""
SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("cifar100", "chessboard"): {"size": 6},
    ("gtsrb", "chessboard"): {"size": 6},  # "the same triggers as CIFAR-100"
    ("tinyimagenet", "badnets"): {"patch": 6},
    ("imagenette", "badnets"): {"patch": 21},
}


def per_class(dataset: str, attack: str, all_to_all: bool) -> float:
    """Number of images to poison per source class, or their share if below 1.

    Raises: UserError when the paper does not use that attack on that data set.
    """
    table = ALL_TO_ALL if all_to_all else ALL_TO_ONE
    found = table.get(dataset, {}).get(attack)
    if found is None:
        kind = "all-to-all" if all_to_all else "all-to-one"
        known = ", ".join(table.get(dataset, {})) or "none"
        raise UserError(
            f"the paper poisons {dataset} with no {kind} {attack} (attacks it does use there:"
            f" {known}); give --poison-count"
        )
    return found


def settings(dataset: str, attack: str) -> dict[str, Any]:
    """The paper's target and trigger on one of `DATASETS`, as fields of the attack's Config."""
    return {
        "target": TARGETS[dataset],
        **TRIGGERS.get(attack, {}),
        **SIZES.get((dataset, attack), {}),
    }
