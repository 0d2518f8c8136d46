"""What the machine is, and the largest matrix products it reaches: float32, tf32, bfloat16.

python -m experiments.accelerator.device --out FILE
"""

import argparse
import importlib.metadata
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbd import files
from jaxbd.training import memory
from jaxbd.training.program import Program

OTHERS = (
    "torch",
    "triton",
    "orbax-checkpoint",
    "chex",
    "onnxruntime",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
)
SIZE, QUICK = 8192, 128


class Product(NamedTuple):
    """A matrix product: the type of its operands, and how the unit that computes it rounds them."""

    dtype: str
    precision: str


PRODUCTS = {
    "float32": Product("float32", "highest"),
    "tf32": Product("float32", "default"),
    "bfloat16": Product("bfloat16", "default"),
}
"""On a GPU, JAX multiplies float32 in tf32 unless the precision is "highest"."""


def measure(product: Product, size: int, rounds: int = 5, calls: int = 4) -> dict[str, float]:
    """Operations per second of the product of two random matrices [size, size], and how far off it
    is: the norm of its error over that of the float64 product of the same inputs."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), product.dtype) for seed in (0, 1))
    multiply = Program(lambda a, b: jnp.matmul(a, b, precision=product.precision)).compiled(a, b)
    result, seconds = jax.block_until_ready(multiply(a, b)), []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready([multiply(a, b) for _ in range(calls)])
        seconds.append((time.perf_counter() - started) / calls)
    return {
        "operations_per_second": 2 * size**3 / min(seconds),
        "median": 2 * size**3 / statistics.median(seconds),
        "relative_error": _error(a, b, result),
    }


def _error(a: jax.Array, b: jax.Array, result: jax.Array, rows: int = 16) -> float:
    """Of the first rows, against NumPy in float64."""
    import numpy as np

    left, right = np.asarray(a[:rows], np.float64), np.asarray(b, np.float64)
    wanted = left @ right
    found = np.asarray(result[:rows], np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def describe() -> dict[str, Any]:
    """Device, versions, memory."""
    device = jax.devices()[0]
    found = {}
    for name in OTHERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "backend": jax.default_backend(),
        "device": files.device(),
        "kind": device.device_kind,
        "platform_version": getattr(device.client, "platform_version", ""),
        "versions": {**files.versions(), **found},
        "memory": {key: value for key, value in (device.memory_stats() or {}).items()},
        "available": memory.available(),
    }


def main() -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    size = QUICK if given.quick else SIZE
    peaks = {name: measure(product, size) for name, product in PRODUCTS.items()}
    files.write_json(given.out, {**describe(), "matrix_size": size, "peaks": peaks})


if __name__ == "__main__":
    main()
