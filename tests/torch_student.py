"""The package's small CNN in float64, in JAX and in PyTorch, for tests that compare one update."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_dhbe
import toys

from jaxbd.base import Batch, Problem
from jaxbd.models import build

SHAPE, CLASSES, WIDTH = (8, 8, 3), 4, 3
NET = build.net(
    build.Spec(
        arch="cnn",
        classes=CLASSES,
        image_shape=SHAPE,
        options={"width": WIDTH, "stages": 2},
        dtype="float64",
    )
)
PROBLEM = Problem(NET, SHAPE, CLASSES)


def variables(seed: int = 0):
    """Weights and moments away from their usual start, float64; inside `jax.enable_x64`."""
    fresh = toys.widen(jax.jit(NET.init)(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    move = lambda leaf: leaf + jnp.asarray(rng.uniform(0.05, 0.4, leaf.shape))
    return jax.tree.map(move, fresh)


def batch(count: int, seed: int = 0) -> Batch:
    """Noise [count, 8, 8, 3] in [0, 1], float64, and labels."""
    rng = np.random.default_rng(seed)
    labels = jnp.asarray(rng.integers(0, CLASSES, count), jnp.int32)
    return Batch(jnp.asarray(rng.uniform(size=(count, *SHAPE))), labels)


def twin(ours) -> torch_dhbe.Student:
    """The PyTorch net with the same arrays, in training mode."""
    return torch_dhbe.load(torch_dhbe.Student(CLASSES, WIDTH, SHAPE[-1]), ours).train()


def as_torch(drawn: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(images [B, C, H, W], labels [B])."""
    images = torch.tensor(np.asarray(drawn.images)).permute(0, 3, 1, 2)
    return images, torch.tensor(np.asarray(drawn.labels)).long()


def assert_same(ours, theirs: torch.nn.Module, tolerance: float = 1e-9) -> None:
    """Every array of both nets, parameters and moments."""
    mine, other = twin(ours).state_dict(), theirs.state_dict()
    for name, tensor in other.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(
                mine[name].numpy(),
                tensor.detach().numpy(),
                rtol=tolerance,
                atol=tolerance,
                err_msg=name,
            )
