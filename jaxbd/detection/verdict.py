"""Combines the signs of two independent families of searches into a verdict. NumPy; pure.

A class can show three signs. *Small*: a trigger that works on held-out images is unusually small
compared with those of the other classes. *Patch*: a distribution of small patches works on held-out
images. *Margin*: the class's largest margin, searched without any data, stands out. The first two
come from trigger inversion, the third does not. A backdoor's target shows at least two. A clean
model shows one now and then, since similar classes lie close together and some are easy to enter.
"""

from typing import NamedTuple

import numpy as np

from jaxbd.detection.detect import Verdict

LEAST_STEPS = 100
"""Minimum steps for a search without a working trigger to be evidence that there is no small one. A
large enough mask leads any net to any class, so a class without one was searched too briefly."""
COMPARABLE = 3
"""Minimum number of classes for one to stand out from the others."""
LEAST_SHARE = 0.5
"""Minimum share of searched classes with a working trigger, so that sizes can be compared."""
ONE_FAMILY = "margins say nothing here, so one family of searches decides alone"
"""Objection to the verdict "clean" if margins were not searched or could not be tested."""


class Signs(NamedTuple):
    """Signs of each class; all [K] bool.

    Attributes:
      small: a working trigger is unusually small.
      patch: the success rate of recovered patches, beyond the baseline, reaches the threshold.
      margin: the largest margin stands out.
    """

    small: np.ndarray
    patch: np.ndarray
    margin: np.ndarray

    @property
    def count(self) -> np.ndarray:
        """[K] number of signs."""
        return np.sum([self.small, self.patch, self.margin], axis=0)


SIGNS = Signs._fields
"""Names of the signs that a class can show."""


class Power(NamedTuple):
    """How able the searches were to find a backdoor.

    Attributes:
      searched: [K] bool, classes for which triggers were searched.
      worked: [K] bool, classes for which a trigger reached its success rate.
      steps: optimisation steps of each search.
      accuracy: the suspect's accuracy on clean images.
      chance: share of the most frequent class among these images.
      has_margin: whether the margins could be tested.
    """

    searched: np.ndarray
    worked: np.ndarray
    steps: int
    accuracy: float
    chance: float
    has_margin: bool


class Judgement(NamedTuple):
    """A verdict and the reasons for it.

    Attributes:
      verdict: "backdoored" if a class shows two signs; "clean" if no class shows a small trigger or
        an unusual margin and the searches had enough power; else "inconclusive".
      targets: classes with two or three signs.
      leads: classes whose only sign is an alarm: a small trigger or an unusual margin.
      natural: classes whose only sign is that small patches lead to them. Clean models have such
        patches too, so nobody need have planted them.
      lacks: objections to "clean", in words; empty if the searches had enough power.
    """

    verdict: Verdict
    targets: list[int]
    leads: list[int]
    natural: list[int]
    lacks: list[str]


def judge(signs: Signs, power: Power) -> Judgement:
    """The verdict on one model."""
    count, alarm = signs.count, signs.small | signs.margin
    numbers = lambda which: [int(k) for k in np.flatnonzero(which)]
    # with two classes no size and no margin can stand out, so patches count twice
    if len(count) < COMPARABLE:
        count = count + signs.patch
    targets, leads = numbers(count >= 2), numbers(alarm & (count == 1))
    natural, lacks = numbers(signs.patch & (count == 1)), find_lacks(power)
    verdict: Verdict = "clean"
    if targets:
        verdict = "backdoored"
    elif leads or lacks:
        verdict = "inconclusive"
    return Judgement(verdict, targets, leads, natural, lacks)


def find_lacks(power: Power) -> list[str]:
    """Objections to calling a model clean, in words; empty if the searches had enough power."""
    lacks, classes = [], len(power.searched)
    missing = int((~power.searched).sum())
    if missing:
        lacks.append(f"{missing} of {classes} classes were not searched")
    failed = power.searched & ~power.worked
    if failed.any() and power.steps < LEAST_STEPS:
        lacks.append(
            f"{int(failed.sum())} classes have no working trigger after {power.steps} steps, which"
            f" is too few to tell ({LEAST_STEPS} or more would)"
        )
    elif (power.searched & power.worked).sum() < LEAST_SHARE * power.searched.sum():
        lacks.append(
            f"only {int(power.worked.sum())} of {int(power.searched.sum())} classes have a working"
            " trigger, too few to compare sizes"
        )
    if power.accuracy <= power.chance:
        lacks.append(
            f"clean accuracy is {power.accuracy:.1%}, no better than always naming the most"
            f" frequent class ({power.chance:.1%})"
        )
    if not power.has_margin:
        lacks.append(ONE_FAMILY)
    return lacks
