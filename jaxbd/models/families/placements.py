"""Where a plain net pools and pads: the placements that leave the positions its first linear layer
reads, the likeliest first."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

GREY_SIDES = (28, 32, 16, 8, 64)
COLOUR_SIDES = (32, 28, 64, 96, 224, 16, 8)
"""Usual sides of images in pixels, the likeliest first."""
MOST_SIDES = 4
MOST = 12
"""Maximum number of placements for one size of images."""
MOST_PADDED = 7
"""Largest side of a kernel that may be larger than the image it is padded on."""
HEAD = 7
"""Side of the positions that the heads of torchvision's VGG read, whatever the images' size."""


class Plan(NamedTuple):
    """What the names and shapes of a net determine.

    Attributes:
      kernels: side of each convolution's kernel.
      gaps: number of modules, other than norm and activation, between each convolution and the next
        in one `Sequential`; None if the names do not show it.
      rest: side of the square of positions that the first linear layer reads.
      channels: of the images.
    """

    kernels: tuple[int, ...]
    gaps: tuple[int, ...] | None
    rest: int
    channels: int


def place(plan: Plan, size: tuple[int, int] | None = None) -> list[tuple[float, dict[str, Any]]]:
    """(cost, form) of each placement for images of `size`, or of the usual sizes; the lower the
    cost, the likelier.

    A form has "pools", "padded", "side", and "strided": whether convolutions of stride 2 take the
    place of pooling.
    """
    if size is not None:
        return _place_at(plan, size)
    found: list[tuple[float, dict[str, Any]]] = []
    sides = 0
    for side in _sides(plan):
        here = _place_at(plan, (side, side))
        # a less usual size costs more than a less usual placement
        found += [(cost + 6 * sides, form) for cost, form in here]
        sides += bool(here)
        if sides == MOST_SIDES:
            break
    return found


def _sides(plan: Plan) -> list[int]:
    sides = list(GREY_SIDES if plan.channels == 1 else COLOUR_SIDES)
    if plan.gaps is not None and any(plan.gaps):
        # the side if every gap and the end pool, unless most gaps must be dropouts
        own = plan.rest * 2 ** (sum(map(bool, plan.gaps)) + 1)
        sides = [own, *sides] if own <= 512 else sides
    return list(dict.fromkeys(sides))


def _place_at(plan: Plan, size: tuple[int, int]) -> list[tuple[float, dict[str, Any]]]:
    found = []
    for padded, strided in itertools.product((True, False, "first"), (False, True)):
        if padded == "first" and len(plan.kernels) == 1:
            continue
        for pools in _pools(plan, strided):
            ends = [shrink(plan.kernels, side, pools, padded, strided) for side in set(size)]
            remaining = _cost_of_rest(plan, min(ends), max(ends), pools)
            if remaining is not None:
                cost = remaining + _cost_of_padding(plan, padded)
                if plan.gaps is None:
                    cost += _cost_by_pattern(pools) + 4 * strided
                else:
                    cost += _cost_by_gaps(plan.gaps, pools) + 4 * (strided and any(plan.gaps))
                form = {"pools": pools, "padded": padded, "side": size[0], "strided": strided}
                found.append((cost, form))
    return sorted(found, key=lambda each: each[0])[:MOST]


def _pools(plan: Plan, strided: bool) -> list[str]:
    """All placements of pooling that the names allow; without pooling there is nothing strided."""
    count = len(plan.kernels)
    open_ends = [True] * count
    if plan.gaps is not None and not strided:
        open_ends = [*(gap > 0 for gap in plan.gaps), True]
    if plan.gaps is not None and sum(open_ends) > 8:
        # too many to try all: the largest gaps pool
        usual = "".join("1" if gap == max(plan.gaps) else "0" for gap in plan.gaps)
        return [f"{usual}1", f"{usual}0"]
    choices = itertools.product(*("10" if each else "0" for each in open_ends))
    return [pools for each in choices if "1" in (pools := "".join(each)) or not strided]


def shrink(kernels: Sequence[int], side: int, pools: str, padded: bool | str, strided: bool) -> int:
    """Side of the last convolution's output after its pooling; 0 if nothing remains."""
    for index, (kernel, pool) in enumerate(zip(kernels, pools, strict=True)):
        if kernel > max(side, MOST_PADDED):
            return 0
        padding = kernel // 2 if is_padded(padded, index) else 0
        step = 2 if strided and pool == "1" else 1
        side = (side + 2 * padding - kernel) // step + 1
        side = side // 2 if pool == "1" and not strided else side
        if side < 1:
            return 0
    return side


def is_padded(padded: bool | str, index: int) -> bool:
    """Whether convolution `index` pads, if "padded" says all (True), none or "first"."""
    return padded is True or (padded == "first" and index == 0)


def _cost_of_rest(plan: Plan, least: int, most: int, pools: str) -> float | None:
    """Cost of an output of `least` to `most` positions along its sides; None if it cannot be."""
    rest = plan.rest
    if least == most == rest:
        return 0
    if least < rest:
        # torchvision's adaptive pooling repeats positions when there are too few
        return 4 if least > 0 and rest == HEAD and len(plan.kernels) >= 8 else None
    if rest == 1:
        return float(pools[-1])  # the mean over all positions, in place of the last pooling
    return 4 if least % rest == most % rest == 0 else None  # adaptive pooling


def _cost_of_padding(plan: Plan, padded: bool | str) -> float:
    large = plan.kernels[0] >= 5
    return {True: float(large), False: float(not large), "first": 1.0 if large else 3.0}[padded]


def _cost_by_gaps(gaps: Sequence[int], pools: str) -> float:
    """A gap can also be a dropout; the larger one is then the pooling."""
    cost = float(pools[-1] == "0")
    for gap, pool in zip(gaps, pools, strict=False):
        cost += (gap > 0 and pool == "0") + (0 < gap < max(gaps) and pool == "1")
    return cost


def _cost_by_pattern(pools: str) -> float:
    count, ones = len(pools), pools.count("1")
    every_second = "".join("1" if index % 2 else "0" for index in range(count))
    usual = (
        ("1" * count, 0.0),
        (every_second, 1.0),
        ("1" * (count - 1) + "0", 2.0),
        ("0" + "1" * (count - 1), 2.5),
        ("0" * (count - 1) + "1", 2.5),
        ("0" * count, 4.0),
        ("1" * ones + "0" * (count - ones), 3.0),
        ("0" * (count - ones) + "1" * ones, 3.5),
    )
    return next((cost for pattern, cost in usual if pattern == pools), 5.0)


def multiply_adds(
    shapes: Sequence[tuple[int, ...]], form: dict[str, Any], size: tuple[int, int]
) -> int:
    """Multiplications that the convolutions of `shapes` [O, I, h, w] need for one image."""
    total, area = 0, size[0] * size[1]
    for shape, pool in zip(shapes, form["pools"], strict=True):
        total += area * math.prod(shape)
        area //= 4 if pool == "1" else 1
    return total
