"""Measures ways to paste a patch at a place of its own on every image, with the gradient by the
patches, as a search at random places needs it.

"scatter": `images.paste` under `vmap`, which XLA turns into one scatter; what jaxbd does.
"one-hot": a product with one-hot matrices of rows and columns. "gather": every pixel looks up its
place in the patch. "scan": one `dynamic_update_slice` after another in a compiled loop. All give
the same images; the products are of the highest precision, or a GPU would round the patch to tf32.

    python scripts/bench_paste.py            # under a minute on 2 cores
    python scripts/bench_paste.py --quick    # checks that it runs, its figures mean nothing
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import bench_dhbe
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import files, images
from jaxbd.base import Array, UserError
from jaxbd.training.program import Program

RESULT = (
    pathlib.Path(__file__).resolve().parents[1] / "experiments" / "results" / "bench_paste.json"
)
TITLE = "Ways to paste a patch at a place of its own, with the gradient"
Way = Callable[[Array, Array, Array], Array]
"""(images [B, H, W, C], patches [B, h, w, C], places [B, 2]) -> images"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes: cells of a sweep, images of each, side of an image and of a patch, in pixels."""

    cells: int
    batch: int
    side: int = 32
    patch: int = 3


LAPTOP, ACCELERATOR = Case(cells=4, batch=32), Case(cells=30, batch=128)
QUICK = Case(cells=2, batch=3, side=8)


def one_hot(pictures: Array, patches: Array, places: Array) -> Array:
    """rows^T patch columns, [B, H, W, C], where the patch covers; the image elsewhere."""
    rows, columns = (
        jax.nn.one_hot(
            places[:, axis, None] + jnp.arange(patches.shape[1 + axis])[None],
            pictures.shape[1 + axis],
            dtype=pictures.dtype,
        )
        for axis in (0, 1)
    )
    highest = jax.lax.Precision.HIGHEST
    placed = jnp.einsum("bhH,bwW,bhwc->bHWc", rows, columns, patches, precision=highest)
    covered = rows.sum(1)[:, :, None] * columns.sum(1)[:, None]
    return jnp.where(covered[..., None] > 0, placed, pictures)


def gather(pictures: Array, patches: Array, places: Array) -> Array:
    """Every pixel reads the patch at its own place less the corner's."""

    def one(picture: Array, patch: Array, place: Array) -> Array:
        row, column = (jnp.arange(picture.shape[axis]) - place[axis] for axis in (0, 1))
        height, width = patch.shape[:2]
        inside = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[None]
        wide = patch[jnp.clip(row, 0, height - 1)][:, jnp.clip(column, 0, width - 1)]
        return jnp.where(inside[..., None], wide, picture)

    return jax.vmap(one)(pictures, patches, places)


def in_scan(pictures: Array, patches: Array, places: Array) -> Array:
    """One image after another."""
    return jax.lax.map(lambda each: images.paste(*each), (pictures, patches, places))


WAYS: dict[str, Way] = {
    "scatter": jax.vmap(images.paste),
    "one-hot": one_hot,
    "gather": gather,
    "scan": in_scan,
}


def data(case: Case) -> tuple[Array, Array, Array]:
    """Random images [cells, B, H, W, 3], patches and places."""
    shape, keys = (case.side, case.side, 3), jax.random.split(jax.random.key(0), 3)
    many = (case.cells, case.batch)
    pictures = jax.random.uniform(keys[0], (*many, *shape))
    patches = jax.random.uniform(keys[1], (*many, case.patch, case.patch, 3))
    count = case.cells * case.batch
    places = images.random_places(keys[2], count, shape, (case.patch, case.patch))
    return pictures, patches, places.reshape(*many, 2)


def programs(case: Case) -> dict[str, Program]:
    """(images, patches, places) -> (stamped images, gradient by the patches) of all cells."""

    def with_gradient(way: Way) -> Callable[..., Any]:
        def stamp(pictures, patches, places):
            # a smooth function of every pixel, as a net's loss is
            weigh = lambda patches: (jax.vmap(way)(pictures, patches, places) ** 2).sum()
            return jax.vmap(way)(pictures, patches, places), jax.grad(weigh)(patches)

        return stamp

    return {name: Program(with_gradient(way)) for name, way in WAYS.items()}


def bench(case: Case, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each way. Raises: UserError when two ways give other images or gradients."""
    given, made = data(case), programs(case)
    found = {name: program(*given) for name, program in made.items()}
    for name, results in found.items():
        for ours, theirs in zip(found["scatter"], results, strict=True):
            if not np.allclose(ours, theirs, rtol=1e-6, atol=1e-7):
                raise UserError(f"{name} pastes something else than scatter")

    def run(program: Program) -> Callable[[int], Any]:
        return lambda count: jax.block_until_ready([program(*given) for _ in range(count)])

    sides = {
        name: bench_dhbe.Side(run(program), (), program.compile_seconds, None)
        for name, program in made.items()
    }
    seconds = bench_dhbe.measure(sides, rounds, steps)
    usual = np.median(seconds["scatter"])
    return [
        {
            "way": name,
            "seconds_compile": made[name].compile_seconds,
            "seconds_step": bench_dhbe.spread(each),
            "images_per_second": case.cells * case.batch / float(np.median(each)),
            "times_scatter": float(np.median(each) / usual),
        }
        for name, each in seconds.items()
    ]


def describe(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the docs show it."""
    return {
        "way": row["way"],
        "images/s": round(row["images_per_second"]),
        "time over scatter's": f"{row['times_scatter']:.2f}",
        "seconds to compile": f"{row['seconds_compile']:.2f}",
    }


def main(
    rounds: int = 7, steps: int = 20, quick: bool = False, out: pathlib.Path | None = None
) -> None:
    """Runs the benchmark, prints its table and writes its JSON.

    Args:
      rounds: turns that each way gets; one more warms up.
      steps: in a turn.
      quick: smallest sizes instead; writes only where --out says.
      out: the JSON file; experiments/results/bench_paste.json by default.
    """
    case = LAPTOP if jax.default_backend() == "cpu" else ACCELERATOR
    if quick:
        case, rounds, steps = QUICK, 1, 1
    rows = bench(case, rounds, steps)
    print(f"{jax.default_backend()}: {files.device()}")
    shown = [describe(row) for row in rows]
    line = "{:<10} {:>12} {:>20} {:>18}".format
    print(line(*shown[0]))
    for row in shown:
        print(line(*row.values()))
    out = out or (None if quick else RESULT)
    if out:
        content = {
            "schema": "jaxbd/1/bench-paste",
            "command": "python scripts/bench_paste.py",
            "backend": jax.default_backend(),
            "device": files.device(),
            "versions": files.versions(),
            "quick": quick,
            "case": dataclasses.asdict(case),
            "rows": rows,
            "tables": {TITLE: shown},
        }
        files.write_json(out, content)


if __name__ == "__main__":
    bench_dhbe.launch(main, "bench_paste")
