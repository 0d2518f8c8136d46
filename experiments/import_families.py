"""Families of image classifiers, each exported in three ways, read as graphs, differentiated,
changed and written back."""

import contextlib
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Variables
from jaxbd.interop.onnx import open as graphs
from jaxbd.interop.onnx import write

FORMS = ("onnx TorchScript", "onnx dynamo", "pt2")
SIDE, IMAGES = 32, 3
PACKAGE = pathlib.Path(graphs.__file__).parent


def measure_families(
    families: Sequence[str] = (), forms: Sequence[str] = FORMS
) -> list[dict[str, Any]]:
    """One row for each family and form; all families by default.

    Returns: rows of `family`, `form`, `nodes`, `norms` (BatchNorms that the form kept), and largest
      differences as
      shares of the largest value: `logits` (from PyTorch, and from onnxruntime where the form is
        ONNX), `gradient` of
      one logit with respect to an image (from PyTorch), `round_trip` (other weights, moments and
      bounds written back: onnxruntime from jaxbd).
    """
    from experiments import torch_families

    wanted = families or list(torch_families.FAMILIES)
    return [measure(family, form) for family in wanted for form in forms]


def measure(family: str, form: str) -> dict[str, Any]:
    """A row of `measure_families`."""
    import torch

    from experiments import torch_families

    twin = torch_families.make(family)
    images = torch.rand(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    expected, slope = torch_answers(twin, images)
    x = images.permute(0, 2, 3, 1).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = export(
            twin, form, pathlib.Path(folder) / ("model.pt2" if form == "pt2" else "model.onnx")
        )
        found = graphs.open_graph(path)
        net, variables = graphs.to_net(found)
        outputs = net.outputs
        assert outputs is not None  # the net of a graph returns its layers
        (logits, shown), gradient = jax.jit(
            lambda v, x: (outputs(v, x), jax.grad(lambda x: net.apply(v, x)[0][0, 0])(x)[0])
        )(variables, x)
        off = relative(logits, expected)
        if form != "pt2":
            off = max(off, relative(logits, run_in_onnxruntime(path, images.numpy())))
        changed = disturbed(variables, shown)
        answer = jax.jit(lambda v, x: net.apply(v, x)[0])(changed, x)
        back = pathlib.Path(folder) / "back.onnx"
        write.write(back, found, changed)
        trip = relative(run_in_onnxruntime(back, images.numpy()), answer)
    return {
        "family": family,
        "form": form,
        "nodes": len(found.graph.nodes),
        "norms": len(variables["batch_stats"]),
        "logits": off,
        "gradient": relative(gradient, slope),
        "round_trip": trip,
    }


def lines() -> int:
    """Lines of the interpreter: the package, without what only writes."""
    names = {"write.py", "write_guarded.py", "trace.py", "primitives.py", "primitives_shape.py"}
    return sum(
        len(path.read_text().splitlines())
        for path in PACKAGE.glob("*.py")
        if path.name not in names
    )


def torch_answers(twin: Any, images: Any) -> tuple[np.ndarray, np.ndarray]:
    """(logits, gradient [H, W, C] of the first image's first logit)."""
    leaf = images[:1].clone().requires_grad_()
    twin(leaf)[0, 0].backward()
    return twin(images).detach().numpy(), leaf.grad[0].permute(1, 2, 0).numpy()


def export(twin: Any, form: str, path: pathlib.Path, batch: int = 1) -> pathlib.Path:
    """Writes `twin` in one of `FORMS`, with a number of images that is open."""
    import torch

    example = torch.rand(max(batch, 1), 3, SIDE, SIDE)
    with quiet():
        if form == "onnx TorchScript":
            torch.onnx.export(
                twin,
                (example,),
                path,
                dynamo=False,
                input_names=["x"],
                dynamic_axes={"x": {0: "batch"}},
            )
        elif form == "onnx dynamo":
            shapes = ({0: torch.export.Dim("batch")},)
            example = torch.rand(2, 3, SIDE, SIDE)  # a size of 1 would be taken for a constant
            torch.onnx.export(
                twin,
                (example,),
                path,
                dynamo=True,
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
        else:
            program = torch.export.export(
                twin,
                (torch.rand(2, 3, SIDE, SIDE),),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
            torch.export.save(program, path)
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of what is no concern here."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def run_in_onnxruntime(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """The first output for images [B, C, H, W]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def disturbed(variables: Variables, shown: dict[str, jax.Array]) -> Variables:
    """Other weights and moments, and on every layer bounds that clip a tenth of it on either
    side."""
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda a: a * jnp.asarray(rng.uniform(0.9, 1.1, a.shape), a.dtype), dict(variables)
    )
    bounds = {}
    for layer, values in shown.items():
        flat = np.asarray(values).reshape(-1, values.shape[-1])
        low, high = (np.quantile(flat, share, axis=0).astype(np.float32) for share in (0.1, 0.9))
        bounds[layer] = {"lower": low, "upper": high}
        if layer not in variables["batch_stats"]:
            bounds[layer] |= {
                "mean": 0.1 * low,
                "std": rng.uniform(0.9, 1.2, low.shape).astype(np.float32),
            }
    return {**moved, "bounds": bounds}


def relative(found: Any, expected: Any) -> float:
    """Largest difference as a share of the largest expected value."""
    return float(
        np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    )
