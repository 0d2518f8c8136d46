"""The PyTorch side of `bench_scale.py`: the same task op by op, in each form PyTorch offers."""

from collections.abc import Callable
from typing import Any

import bench_dhbe
import numpy as np
from bench_dhbe import MEAN, STD, Form, Side
from scale_cases import CLASSES, TRAINING, Case, mesa_config, pixels

from jaxbd.base import Cell
from jaxbd.inversion import margin, neural_cleanse


def in_torch(case: Case, threads: int, form: Form = "eager") -> Side:
    """The plain PyTorch form, on the same kind of device."""
    (nets, *sides), torch = bench_dhbe.pytorch(
        "training_in_torch", "mesa_in_torch", "cleanse_in_torch", "margin_in_torch"
    )
    device = bench_dhbe.torch_device(torch, threads)
    autocast = torch.bfloat16 if "bfloat16" in (case.dtype, form) else None
    is_last = form in ("channels-last", "bfloat16")
    layout = torch.channels_last if is_last else torch.contiguous_format
    plain = nets.CLASSIFIERS[case.arch](3, case.side, CLASSES, case.width)
    net = nets.Normalised(plain, MEAN, STD).to(device, memory_format=layout)
    count = sum(parameter.numel() for parameter in net.parameters())
    net = torch.compile(net) if form == "compiled" else net
    images, labels = pixels(case)
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
    labels = torch.from_numpy(labels).long().to(device)
    every = nets.Images(images, labels, case.batch, layout)
    turns = _turns(case, net, every, (nets, *sides), device, autocast)

    def run(steps: int) -> None:
        for _ in range(steps):
            for turn in turns:
                turn()
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = bench_dhbe.time_once(lambda: run(1)) if form == "compiled" else 0.0
    return Side(run, (count,), seconds, None)


def _turns(case, net, every, modules, device, autocast) -> list[Callable[[], Any]]:
    """What makes one step of all cells, or the one training step."""
    nets, mesas, cleanses, margins = modules
    if case.task == "training":
        rates = TRAINING.learning_rate, TRAINING.momentum, TRAINING.weight_decay
        trainer = nets.Training(net, *rates, autocast)
        return [lambda: trainer.step(*every.draw())]
    net.eval().requires_grad_(False)
    if case.task == "margin":  # all starts of a class are one batch
        rate, shape = margin.Config().learning_rate, (case.batch, 3, case.side, case.side)
        make = lambda target: margins.Search(net, shape, target, rate, device, autocast)
        return [make(target).step for target in range(case.classes)]
    return [
        _cell(case, cell, net, every, (mesas, cleanses), device, autocast)
        for cell in _each(case.cells)
    ]


def _each(cells: Cell | None) -> list[tuple[int, int, float]]:
    """(target, source, level) of every cell."""
    return list(zip(*(np.asarray(leaf).tolist() for leaf in cells or ()), strict=True))


def _cell(case, cell, net, every, sides, device, autocast) -> Callable[[], Any]:
    """One step of one cell in PyTorch."""
    (target, source, level), (mesas, cleanses) = cell, sides
    if case.task == "mesa":
        model = mesas.SubModel(
            net, 3, target, level, settings_of(mesas, mesa_config(case), autocast), device
        )
        return lambda: model.step(every.draw()[0])
    rows = every.labels == source
    own = type(every)(every.images[rows], every.labels[rows], case.batch, every.layout)
    config = settings_of(cleanses, neural_cleanse.for_pairs(), autocast)
    search = cleanses.Search(net, (3, case.side, case.side), target, config, device)
    return lambda: search.step(own.draw()[0])


def settings_of(module: Any, config: Any, autocast: Any = None) -> Any:
    """The `Settings` of a PyTorch file with the numbers of our `config`."""
    names = [name for name in module.Settings._fields if name != "autocast"]
    return module.Settings(**{name: getattr(config, name) for name in names}, autocast=autocast)
