"""What `bench_scale.py` compares: a task, a net and its sizes; and the data both sides read."""

import dataclasses
from typing import Any, Literal

import numpy as np
from bench_dhbe import MEAN, STD

from jaxbd.base import Cell
from jaxbd.inversion import margin, mesa
from jaxbd.models import build
from jaxbd.training import supervised, sweep

TaskName = Literal["mesa", "cleanse", "margin", "training"]
Arch = Literal["wrn16-1", "vgg", "resnet18"]
DType = Literal["float32", "bfloat16"]
CLASSES, IMAGES = 10, 512
WIDTHS = {"wrn16-1": 16, "vgg": 32, "resnet18": 64}
TRAINING = supervised.Config(schedule="constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one comparison.

    Attributes:
      task: what is timed.
      arch: of the net.
      width: channels of its first stage.
      side: of the square colour images, in pixels.
      batch: images of a cell in a step; of the margins, starts of each class.
      classes: of the MESA grid and of the margins; of Neural Cleanse, all ordered pairs of these.
      levels: of the MESA grid.
      hidden: width of MESA's generator and statistics network.
      dtype: what the net computes in; everything else is float32.
    """

    task: TaskName
    arch: Arch
    width: int
    side: int = 32
    batch: int = 32
    classes: int = 10
    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    hidden: int = 512
    dtype: DType = "float32"

    @property
    def cells(self) -> Cell | None:
        """The grid; None for training."""
        if self.task == "training":
            return None
        if self.task == "mesa":
            return sweep.grid(range(self.classes), self.levels)
        if self.task == "margin":
            return margin.cells(CLASSES, self.batch, range(self.classes))
        return sweep.grid(range(self.classes), source=range(self.classes))

    @property
    def images(self) -> int:
        """Images that pass the net with a gradient in one step of all cells."""
        if self.task == "margin":  # a start is one image
            return self.batch * self.classes
        return self.batch * (1 if self.cells is None else sweep.size(self.cells))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.side, self.side, 3)


USUAL_CLASSES = {"mesa": 10, "cleanse": 6, "margin": 10, "training": 10}
"""30 cells of the first two."""
QUICK = {"width": 4, "side": 8, "batch": 4, "classes": 2, "levels": (0.8,), "hidden": 8}


def net_of(case: Case) -> Any:
    """The net of a case."""
    return build.net(
        build.Spec(
            arch=case.arch,
            classes=CLASSES,
            image_shape=case.shape,
            mean=(MEAN,),
            std=(STD,),
            options={"width": case.width},
            dtype=case.dtype,
        )
    )


def pixels(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images uint8 [N, side, side, 3] and labels [N] of all classes; speed does not depend
    on what they show."""
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *case.shape), np.uint8)
    return images, (np.arange(IMAGES) % CLASSES).astype(np.int32)


def mesa_config(case: Case) -> mesa.Config:
    """The released settings."""
    return mesa.Config(hidden=case.hidden)


def case_of(task: TaskName, arch: Arch, **changes: Any) -> Case:
    """The usual case of a task and a net, with changes."""
    usual = {"width": WIDTHS[arch], "classes": USUAL_CLASSES[task]}
    return Case(task=task, arch=arch, **{**usual, **changes})


def label(case: dict[str, Any]) -> str:
    """A case in few words."""
    wide = "" if case["dtype"] == "float32" else f" {case['dtype']}"
    cells = {
        "mesa": f" {case['classes']}x{len(case['levels'])}",
        "cleanse": f" {case['classes']} classes",
        "margin": f" {case['classes']} classes",
    }
    grid = cells.get(case["task"], "")
    return (
        f"{case['task']}{grid}, {case['arch']}-{case['width']} {case['side']}"
        f" b{case['batch']}{wide}"
    )
