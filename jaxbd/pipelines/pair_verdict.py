"""The verdict of a scan over pairs: trigger sizes and a second sign. Pure.

A trigger that is small compared with those of other pairs is not evidence by itself: every net,
clean ones too, has patterns that send most images to some class, and one of them is the smallest. A
class is therefore called a target only if its largest margin, found without any image, stands out
too. An attack with many targets raises the margins of all classes alike, so none stands out. Its
second sign is that one trigger sends classes it was not made for to targets of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxbd.detection.detect import Verdict
from jaxbd.detection.null import Outliers
from jaxbd.detection.verdict import ONE_FAMILY


class Sized(NamedTuple):
    """Result of comparing trigger sizes.

    Attributes:
      targets: classes that `pair_rules` names.
      generalises: whether rule 3 applied: one trigger sends classes to targets of their own.
      rule: what decided, in words.
      doubts: further reasons to leave the verdict open, in words.
      classes: K.
      searched: classes searched as targets.
    """

    targets: Sequence[int]
    generalises: bool
    rule: str
    doubts: Sequence[str]
    classes: int
    searched: Sequence[int]


class Weighed(NamedTuple):
    """A verdict.

    Attributes:
      verdict: "backdoored" if a class has both signs; "clean" if no class has any and all classes
        were searched; else "inconclusive".
      targets: classes with both signs.
      leads: classes with one sign.
      words: what decided, in words.
    """

    verdict: Verdict
    targets: list[int]
    leads: list[int]
    words: str


def weigh(sized: Sized, margins: Outliers | None) -> Weighed:
    """The verdict from trigger sizes and `margins` (None if they were not searched)."""
    known = margins is not None and bool(np.isfinite(margins.p_value))
    alarmed = {*margins.classes} & {*sized.searched} if margins is not None and known else set()
    named = sorted(sized.targets)
    targets = named if sized.generalises else [k for k in named if k in alarmed]
    # an attack with many targets raises all margins, so they say nothing about other classes
    alone = [] if sized.generalises else sorted(alarmed - {*named})
    missing = sorted({*named} - {*targets})
    p_value = f"p = {margins.p_value:.2g}" if margins is not None and known else ""
    notes = [_describe_missing(missing, p_value)] if missing else []
    notes += [_describe_alone(alone, p_value)] if alone else []
    if targets:
        second = "" if sized.generalises else f", and a margin that stands out, {p_value}"
        return Weighed(
            "backdoored",
            targets,
            sorted({*missing, *alone}),
            "; ".join([sized.rule + second, *notes]),
        )
    notes += [] if named else sized.doubts
    if not notes and not known:
        notes = [ONE_FAMILY]
    if not notes and len(sized.searched) < sized.classes:
        notes = [f"only {len(sized.searched)} of {sized.classes} classes were searched as targets"]
    if notes:
        rule = [sized.rule] if named else []
        return Weighed("inconclusive", [], sorted({*missing, *alone}), "; ".join(rule + notes))
    return Weighed("clean", [], [], f"{sized.rule}, and no margin stands out, {p_value}")


def _describe_missing(classes: Sequence[int], p_value: str) -> str:
    """Describes classes with small triggers but no unusual margin."""
    why = f"does not stand out ({p_value})" if p_value else "could not be tested"
    return (
        f"class {_join(classes)} shows small triggers only, as clean models do for some class:"
        f" its largest margin {why}"
    )


def _describe_alone(classes: Sequence[int], p_value: str) -> str:
    """Describes classes with an unusual margin but no small trigger."""
    return (
        f"the largest margin of class {_join(classes)} stands out ({p_value}), while no trigger"
        " to it is unusually small"
    )


def _join(classes: Sequence[int]) -> str:
    return ", ".join(map(str, classes))
