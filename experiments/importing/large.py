"""A scan of a ResNet-50 on 224x224 images, read from ONNX: seconds per step and peak memory.

python -m experiments.importing.large --out FILE
"""

import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from experiments import import_families, units
from experiments.reproduce import Check
from experiments.scale import many_cells
from jaxbd import files
from jaxbd.base import Batch
from jaxbd.data import draw
from jaxbd.interop import load
from jaxbd.inversion import neural_cleanse
from jaxbd.training import sweep
from jaxbd.training.run import Run

TITLE = "ResNet-50 on 224x224 images, from ONNX: a step of a scan"
SIDE, BATCH, STEPS, BUDGET = 224, 4, 3, 3 << 30
RUNTIME_MB = 1500
"""For the runtime and the compiler, the file as it is read, and two copies of the weights."""
BLOCKS = (3, 4, 6, 3)
MEGA = 1e6


def run(quick: bool) -> tuple[dict[str, Any], list[Check]]:
    """(tables, checks)."""
    if quick:
        return {}, []
    settings = [SIDE, BATCH, STEPS, BUDGET, BLOCKS]
    found = units.kept_or_none("import", "large", settings, _apart)
    if not found:
        return {}, []
    limit = BUDGET / MEGA + RUNTIME_MB
    checks = [
        Check("ResNet-50 at 224x224: peak MB of the process", found["peak MB"], limit, "at most"),
        Check("ResNet-50 at 224x224: parameters", found["parameters"], 25e6, "at least"),
        Check("ResNet-50 at 224x224: all steps done", float(found["done"]), 1.0, "exactly"),
    ]
    return {TITLE: [found]}, checks


def _apart() -> dict[str, Any]:
    """In processes of their own: one exports, the other's peak is that of reading and searching."""
    with tempfile.TemporaryDirectory() as folder:
        model, out = (pathlib.Path(folder) / name for name in ("resnet50.onnx", "found.json"))
        for flags in (["--make"], ["--out", str(out)]):
            words = [sys.executable, "-m", "experiments.importing.large", str(model), *flags]
            subprocess.run(words, cwd=units.ROOT, check=True, stdout=sys.stderr)
        return files.read_json(out)


def resnet50() -> Any:
    """ResNet-50 (He et al. 2016, table 1) with random weights, in PyTorch."""
    import torch
    from torch import nn

    from experiments.torch_families import Residual, norm_conv

    torch.manual_seed(0)
    layers, inputs = [norm_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for stage, count in enumerate(BLOCKS):
        inner = 64 * 2**stage
        for index in range(count):
            stride = 2 if stage and index == 0 else 1
            body = [norm_conv(inputs, inner, 1), norm_conv(inner, inner, 3, stride)]
            body.append(norm_conv(inner, 4 * inner, 1, act=None))
            shortcut = norm_conv(inputs, 4 * inner, 1, stride, act=None) if index == 0 else None
            layers.append(Residual(nn.Sequential(*body), shortcut, nn.ReLU()))
            inputs = 4 * inner
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)
    ).eval()


def export(path: pathlib.Path) -> None:
    """Writes it as ONNX that takes any number of images."""
    import torch

    with import_families.quiet():
        torch.onnx.export(
            resnet50(),
            (torch.rand(1, 3, SIDE, SIDE),),
            path,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
        )


def search(path: pathlib.Path) -> dict[str, Any]:
    """The first search of a scan, for one class and a few steps."""
    suspect = load.suspect_of(load.open_model(path))
    net, victim = suspect.net, suspect.variables
    parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(victim["params"]))
    victim = victim if net.frozen is None else net.frozen(victim)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4 * BATCH, *suspect.image_shape), np.uint8)
    data = Batch(jax.numpy.asarray(images), jax.numpy.arange(4 * BATCH, dtype=jax.numpy.int32))
    inversion = neural_cleanse.make(net, suspect.image_shape, neural_cleanse.Config())
    before = many_cells.peak()
    found = sweep.search(
        Run(progress=units.progress("large")),
        "locate",
        jax.random.key(1),
        inversion,
        draw.uniform(BATCH),
        data,
        sweep.grid([0]),
        victim,
        num_steps=STEPS,
        slots=1,
        memory_budget=BUDGET,
        chunk=1,
    )
    return {
        "parameters": int(parameters),
        "image": f"{suspect.image_shape[0]}x{suspect.image_shape[1]}",
        "batch": BATCH,
        "steps": STEPS,
        "done": bool((found.steps == STEPS).all()),
        "seconds per step": found.seconds.run / STEPS,
        "seconds compiling": found.seconds.compile,
        "budget MB": round(BUDGET / MEGA),
        "MB once read": round(before / MEGA),
        "peak MB": round(many_cells.peak() / MEGA),
    }


def main(model: pathlib.Path, /, out: pathlib.Path | None = None, make: bool = False) -> None:
    """Searches the model in this process; `make` writes it instead."""
    if make:
        export(model)
    elif out:
        files.write_json(out, search(model))


if __name__ == "__main__":
    units.cli(main)
