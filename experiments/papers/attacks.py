"""The papers' attacks by name, with the papers' settings; `sizes` says what smaller sizes change.

- bna-KIND and bna-KIND-a2a: the six triggers of Li et al. 2023, all-to-one and all-to-all. Copies
  are added to the images, so many of every source class.
- dhbe-KIND-SIDE: badnets, clean-label and trojan of Yan et al. 2023, squares of 1 to 7 pixels in
  the bottom-right corner; dhbe-many-NUMBER: binary 3x3 squares there (Figs. 6 and 9).
- mesa-NUMBER: the 51 binary 3x3 triggers of Qiao et al. 2019, by number; mesa-color-NUMBER: random
  colours (appendix B). A clean net is tuned to batches that are poisoned anew, at random places.
- clean: no attack.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxbd import methods
from jaxbd.attacks import badnets, paper_counts
from jaxbd.base import Attack, UserError

Way = Literal["none", "added", "replaced", "clean-label", "trojan", "tuned"]
"""How the backdoor comes into the net: poisoned copies added, poisoned in place, …"""
BNA_KINDS = ("badnets", "chessboard", "single-pixel", "l0-inv", "l2-inv", "wanet")
DHBE_KINDS, SIDES = ("badnets", "clean-label", "trojan"), (1, 2, 3, 5, 7)
STILL = ("chessboard", "l0-inv", "l2-inv", "single-pixel", "wanet")
"""Triggers that cover the image or have one place, which augmentation would move."""


class Plan(NamedTuple):
    """How a victim of an attack is made.

    Attributes:
      kind: attack of `jaxbd methods`; None for a clean net.
      way: how the backdoor comes into the net.
      recipe: of the training, key of `sizes.Size.recipes`.
      config: settings of the attack; None for a clean net.
      count: poisoned images: of each source class ("added"), or in all.
      is_patch: whether the trigger is one fixed square, which can be repeated.
    """

    kind: str | None
    way: Way
    recipe: str
    config: Any = None
    count: float | None = None
    is_patch: bool = False


@functools.cache
def names() -> list[str]:
    """Every attack of the papers."""
    both = [f"bna-{kind}{ending}" for ending in ("", "-a2a") for kind in BNA_KINDS]
    dhbe = [f"dhbe-{kind}-{side}" for kind in DHBE_KINDS for side in SIDES]
    many = [f"dhbe-many-{number}" for number in badnets.binary_patterns()]
    mesa = [f"mesa-{number}" for number in badnets.binary_patterns()]
    return ["clean", *both, *dhbe, *many, *mesa, *(f"mesa-color-{n}" for n in range(10))]


def plan(name: str, target: int, dataset: str, changes: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan of an attack.

    Args:
      target: class of all-to-one attacks.
      changes: by attack or the beginning of its name, what differs from the paper's settings;
        "count" is that of poisoned images. The longest name that fits counts.
    Raises: UserError when there is no such attack.
    """
    if name == "clean":
        return Plan(None, "none", "dhbe")
    if name not in names():
        raise UserError(
            f"unknown attack {name!r}; choose from clean, bna-badnets, dhbe-badnets-3, "
            "mesa-170 and others, see experiments/papers/attacks.py"
        )
    fitting = [each for each in changes if name == each or name.startswith(f"{each}-")]
    change = dict(changes[max(fitting, key=len)]) if fitting else {}
    found = _PAPERS[name.partition("-")[0]](name, target, dataset)
    count = change.pop("count", found.count)
    return found._replace(config=dataclasses.replace(found.config, **change), count=count)


def make(found: Plan, image_shape: tuple[int, int, int], classes: int) -> Attack:
    """The attack of a plan; of a clean net the 3x3 patch that it has never seen."""
    if found.kind is None:
        config = badnets.Config(target=classes - 1, pattern="checkerboard", place="fixed")
        return badnets.make(image_shape, classes, config)
    return module(found.kind).make(image_shape, classes, found.config)


@functools.cache
def module(kind: str) -> Any:
    """The module of an attack, by its name in `jaxbd methods`."""
    return methods.find("attack", kind).module


def _plan_bna(name: str, target: int, dataset: str) -> Plan:
    kind, all_to_all = name.removeprefix("bna-").removesuffix("-a2a"), name.endswith("-a2a")
    known = dataset if dataset in paper_counts.DATASETS else "cifar10"
    stated = {**paper_counts.settings(known, kind), "target": target, "all_to_all": all_to_all}
    if kind == "wanet":
        stated["cross_ratio"] = 0.0  # the paper says nothing of a noise mode
    config = module(kind).Config(**stated)
    count = paper_counts.per_class(known, kind, all_to_all)
    return Plan(kind, "added", "still" if kind in STILL else "bna", config, count)


def _plan_dhbe(name: str, target: int, dataset: str) -> Plan:
    del dataset
    kind, _, number = name.removeprefix("dhbe-").rpartition("-")
    if kind == "many":
        config = badnets.Config(target=target, pattern=int(number), place="fixed")
        return Plan("badnets", "replaced", "dhbe", config, 300, True)
    common: dict[str, Any] = {"target": target, "patch": int(number)}
    if kind == "badnets":
        config = badnets.Config(pattern="checkerboard", place="fixed", **common)
        return Plan("badnets", "replaced", "dhbe", config, 300, True)
    way: Way = "clean-label" if kind == "clean-label" else "trojan"
    # the text lacks the Trojan's count; 2,500 is 5 % of the training images
    count = 300 if kind == "clean-label" else 2500
    return Plan(kind, way, "dhbe", module(kind).Config(**common), count, True)


def _plan_mesa(name: str, target: int, dataset: str) -> Plan:
    del dataset
    number = name.rpartition("-")[2]
    pattern: Any = "color" if name.startswith("mesa-color-") else int(number)
    config = badnets.Config(target=target, pattern=pattern, place="random", poison_rate=0.01)
    return Plan("badnets", "tuned", "tuned", config)


_PAPERS = {"bna": _plan_bna, "dhbe": _plan_dhbe, "mesa": _plan_mesa}
