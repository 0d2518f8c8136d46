"""From the signs of two independent families of searches to a verdict. NumPy; pure.

A class can show three signs. *Small*: a trigger that works on held-out images is unusually small
beside those of the other classes. *Patch*: a distribution of small patches works on held-out
images. *Margin*: the largest margin over all images, found without any, stands out. The first two
come from inverting triggers, the third does not; a backdoor's target shows at least two. Clean
models show one now and then: similar classes are near each other, and some are entered easily.
"""

from typing import NamedTuple

import numpy as np

from jaxbd.detection.detect import Verdict

LEAST_STEPS = 100
"""Steps from which on a search without a working trigger says that there is no small one. A large
mask leads any net to any class sooner or later, so a class without one was searched too briefly."""
COMPARABLE = 3
"""Classes without which none can stand out of the others."""
LEAST_SHARE = 0.5
"""Share of the classes that need a working trigger, so that sizes can be compared."""
ONE_FAMILY = "margins say nothing here, so one family of searches decides alone"
"""What stands against "clean" where margins were not searched or could not be tested."""


class Signs(NamedTuple):
    """What the searches found per class; all [K] bool.

    Attributes:
      small: a working trigger is unusually small.
      patch: recovered patches reach the threshold, beyond what reaches the class anyway.
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
"""The signs that a class can show."""


class Power(NamedTuple):
    """Whether the searches could have found a backdoor.

    Attributes:
      searched: [K] bool, classes for which triggers were searched.
      worked: [K] bool, those for which a trigger reached its success rate.
      steps: that each search was given.
      accuracy, chance: of the suspect on clean images, and of its most frequent class there.
      has_margin: whether the margins could be tested.
    """

    searched: np.ndarray
    worked: np.ndarray
    steps: int
    accuracy: float
    chance: float
    has_margin: bool


class Judgement(NamedTuple):
    """A verdict and why.

    Attributes:
      verdict: "backdoored" where a class shows two signs; "clean" where none shows a small trigger
        or an unusual margin and the searches had power; else "inconclusive".
      targets: classes with two signs or three.
      leads: classes with one sign that is an alarm: a small trigger or an unusual margin.
      natural: other classes that small patches lead to, which nobody is known to have planted.
      lacks: what stands against "clean", in words; empty where the searches had power.
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
    if len(count) < COMPARABLE:  # no size and no margin stands out of two, so patches decide alone
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
    """What keeps the searches from calling a model clean, in words."""
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
