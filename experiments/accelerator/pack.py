"""Puts what a machine without a network lacks into one folder: images, models, wheels.

The images' tables are written anew with Zstandard: the same rows in a third of the bytes, since the
headers of all JPEG files are alike.
"""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments import units
from jaxbd import files

FOLDER, LIMIT = ".device", 60 << 20
"""Of the repository, ignored by git; bytes of everything that travels, the sources included."""
PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014"))
WHEELS = (
    *("tyro", "docstring-parser", "typeguard"),
    *("tensorflow-datasets", "immutabledict", "promise", "simple-parsing", "tensorflow-metadata"),
    *("toml", "termcolor", "importlib-resources", "dm-tree", "array-record"),
    "googleapis-common-protos",
)
"""What jaxbd and its tests import and a machine that is made for JAX and PyTorch lacks."""
TABLES = ("data/cifar10/train.parquet", "data/cifar10/test.parquet")
COPIES = (
    *("models/ibau/*", "models/nad/*", "models/clean/*"),
    "data/gtsrb/*",
)
"""Under the folder of shared data, the most useful first."""


class Piece(NamedTuple):
    """A file of the pack: where it goes, and what puts it there."""

    name: str
    write: Callable[[pathlib.Path], Any]


def compress(source: pathlib.Path) -> Callable[[pathlib.Path], None]:
    """Writes a parquet table's rows, order and metadata again, in fewer bytes."""

    def write(path: pathlib.Path) -> None:
        import pyarrow.parquet as parquet

        parquet.write_table(
            parquet.read_table(source),
            path,
            compression="zstd",
            compression_level=12,
            use_dictionary=False,
            data_page_size=16 << 20,
            write_statistics=False,
        )

    return write


def pieces(shared: pathlib.Path, parts: pathlib.Path, wheels: pathlib.Path) -> Iterator[Piece]:
    """What could go into the pack, the most useful first: needed wheels, images, models, parts of
    units, then the rest."""
    made = sorted(wheels.glob("*.whl"))
    needed = [path for path in made if re.match("tyro|docstring|typeguard", path.name)]
    rest = [path for path in made if path not in needed]
    copy = lambda source: lambda path: shutil.copyfile(source, path)
    yield from (Piece(f"wheels/{path.name}", copy(path)) for path in needed)
    tables = [name for name in TABLES if (shared / name).is_file()]
    yield from (Piece(f"shared/{name}", compress(shared / name)) for name in tables)
    sources = [path for pattern in COPIES for path in sorted(shared.glob(pattern))]
    for source in sources:
        yield Piece(f"shared/{source.relative_to(shared)}", copy(source))
    if parts.is_dir():
        yield from (Piece(f"parts/{path.name}", copy(path)) for path in sorted(parts.glob("*.gz")))
    yield from (Piece(f"wheels/{path.name}", copy(path)) for path in rest)


def fill(folder: pathlib.Path, every: Iterator[Piece], room: int) -> dict[str, Any]:
    """Writes one piece after another while there is room: {"in": {name: bytes}, "left out": {name:
    why}}."""
    inside: dict[str, int] = {}
    outside: dict[str, str] = {}
    for piece in every:
        path = folder / piece.name
        path.parent.mkdir(parents=True, exist_ok=True)
        piece.write(path)
        size = path.stat().st_size
        if sum(inside.values()) + size > room:
            path.unlink()
            outside[piece.name] = f"{size:,} bytes are more than what is left of {room:,}"
        else:
            inside[piece.name] = size
    return {"in": inside, "left out": outside}


def tree_bytes(root: pathlib.Path = units.ROOT) -> int:
    """Bytes of the sources that travel too: what git tracks, and what it does not ignore."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=root, check=True, capture_output=True).stdout.split(b"\0")
    paths = [root / name.decode() for name in set(names) if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def download(folder: pathlib.Path, names: tuple[str, ...] = WHEELS) -> dict[str, str]:
    """Fetches wheels for `PYTHON` on Linux, of the versions that `constraints.txt` names. Returns
    what could not be had, with pip's word on it."""
    pinned = constraints()
    common = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    kind = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    kind += [word for platform in PLATFORMS for word in ("--platform", platform)]
    failed = {}
    for name in names:
        exact = f"{name}=={pinned[name]}" if name in pinned else name
        words = [*common, "download", "--no-deps", *kind, "--dest", str(folder), exact]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:  # no wheel is offered: one of pure Python can be made here
            failed |= _build(common, folder, name, exact)
    return failed


def _build(common: list[str], folder: pathlib.Path, name: str, exact: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as made:
        words = [*common, "wheel", "--no-deps", "--wheel-dir", made, exact]
        done = subprocess.run(words, capture_output=True, text=True)
        pure = list(pathlib.Path(made).glob("*-none-any.whl"))
        if done.returncode or not pure:
            return {name: (done.stderr.strip().splitlines() or ["no wheel for any Python 3"])[-1]}
        shutil.copy(pure[0], folder / pure[0].name)
    return {}


def constraints() -> dict[str, str]:
    """Name (small letters, dashes) -> version, of scripts/constraints.txt."""
    lines = (units.SCRIPTS / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {re.sub(r"[-_.]+", "-", name).lower(): version.strip() for name, version in pairs}


def make(
    shared: pathlib.Path, parts: pathlib.Path, folder: pathlib.Path, limit: int = LIMIT
) -> dict[str, Any]:
    """Makes the pack anew. Returns what is in it and what was left out and why, which is also in
    its `pack.json`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tree = tree_bytes()
    with tempfile.TemporaryDirectory() as wheels:
        failed = download(pathlib.Path(wheels))
        found = fill(folder, pieces(shared, parts, pathlib.Path(wheels)), limit - tree - (1 << 16))
    for name in TABLES:
        if not (shared / name).is_file():
            found["left out"][f"shared/{name}"] = "there is no such file"
    found["left out"] |= {f"wheels/{name}": why for name, why in failed.items()}
    found |= {"bytes": sum(found["in"].values()), "sources": tree, "limit": limit}
    files.write_json(folder / "pack.json", found)
    return found


def install(folder: pathlib.Path, site: pathlib.Path) -> list[str]:
    """Installs those wheels of a pack that this interpreter lacks into `site`. Returns their names;
    none is fetched."""
    wheels = [path for path in sorted(folder.glob("wheels/*.whl")) if not _is_installed(path)]
    if wheels:
        words = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
        words = [sys.executable, "-m", "pip", "install", *words, *map(str, wheels)]
        subprocess.run(words, check=True, stdout=sys.stderr)
    return [path.name for path in wheels]


def _is_installed(wheel: pathlib.Path) -> bool:
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
