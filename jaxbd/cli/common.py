"""What the verbs share: flags about model and data, opening both, splitting images, and checking outputs early."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxbd import devices, record, workflow
from jaxbd.base import ArrayTree, Batch, Dataset, Net, UserError, Variables
from jaxbd.cli import flags
from jaxbd.data import load
from jaxbd.interop import load as models
from jaxbd.interop import preprocess
from jaxbd.models import build
from jaxbd.models.norm import NORMALISATIONS

ANY_SIZE_SOURCES = ("digits", ".npz")
"""Sources whose images have a size that is not changed on reading; a net that takes any size takes theirs."""
FIXED_SIZE = ("vgg",)
"""Architectures whose weights fit one image size only."""
EXIT = {"clean": 0, "backdoored": 1, "inconclusive": 3}
"""Verdict -> exit code of a scan."""
MODEL_SUFFIXES = (*models.TORCH_SUFFIXES, ".safetensors")
COMPANIONS = {
    models.folder.WEIGHTS,
    models.folder.CONFIG,
    models.folder.GUARD,
    "trigger.npz",
    "attack.json",
    "repair.json",
}
"""What the verbs write into a model folder; a folder with anything else in it is not replaced."""
PLACES = ("model", "data", "test_data", "clean_model", "scan", "out", "report", "job")
"""Flags that say where things are or how a job may be stopped: they may change between its parts."""
ComputeDtype = Literal["stored", "float32", "bfloat16"]
"""What a model computes in while it is searched: as its file says, or one of these."""
SEARCH_SHARE = 0.75
"""Share of the given images on which triggers are searched and nets repaired; the others judge."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How model and data are read.

    Attributes:
      arch: architecture of a foreign model file; by default recognised from its tensors.
      image_shape: height, width, channels of the model's images, for a foreign file whose weights do not tell.
      normalisation: what the model expects of pixels in [0, 1]. "auto" uses what the model folder states, or tries all
        on your images and takes the best.
      mean: per-channel mean of a normalisation of your own.
      std: per-channel standard deviation to go with it.
      split: part of the data to use, where the source has parts.
      limit: at most so many images, drawn at random.
      seed: of everything random.
    """

    arch: str | None = None
    image_shape: tuple[int, int, int] | None = None
    normalisation: Literal["auto", *NORMALISATIONS] = "auto"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    split: str = "test"
    limit: int = 2000
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)

    def constants(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The (mean, std) that the flags state; None for "auto". Raises: UserError on contradictory flags."""
        if bool(self.mean) != bool(self.std):
            raise UserError("--mean and --std belong together; give both")
        if self.mean and self.normalisation != "auto":
            raise UserError("give --normalisation or --mean and --std, not both")
        if self.mean:
            if len(self.mean) != len(self.std) or min(self.std) <= 0:
                raise UserError("--mean and --std need one number per channel each, and --std must be > 0")
            return self.mean, self.std
        return None if self.normalisation == "auto" else NORMALISATIONS[self.normalisation]


class Opened(NamedTuple):
    """model, ready to use (preprocessing settled); dataset that fits it; table of the preprocessing check."""

    model: models.Model
    dataset: Dataset
    table: preprocess.Table | None


def check_seed(seed: int) -> None:
    """Raises: UserError unless both NumPy and JAX take `seed`."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed} is out of range; give 0..{2**32 - 1}")


def preset(argv: list[str]) -> workflow.ScanConfig:
    """The settings that `--preset` in `argv` names; the usual ones when there is none, or none of that name."""
    return workflow.PRESETS[flags.named(argv, "--preset", workflow.PRESETS, "quick")]


def start() -> None:
    """Switches the persistent compile cache on; a folder that cannot be made is no reason to stop."""
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(home) / "jaxbd" / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def check_output(path: pathlib.Path | None, *, folder: bool = False) -> None:
    """Finds out before any long work whether `path` can be written; leaves nothing behind.

    Args:
      folder: whether a folder is to be written there, which may replace a model folder but nothing else.
    Raises: UserError naming the path.
    """
    if path is None:
        return
    path = path.expanduser().absolute()
    if folder and path.exists():
        held = {entry.name for entry in path.iterdir()} if path.is_dir() else {"a file of that name"}
        if held and not (models.folder.is_model(path) and held <= COMPANIONS):
            other = ", ".join(sorted(held - COMPANIONS)[:3]) or "half a model"
            raise UserError(f"output {path} is not overwritten, there is {other}; choose another --out")
    if not folder and path.is_dir():
        raise UserError(f"output {path} is a folder; give the name of a file")
    if path.suffix in MODEL_SUFFIXES:
        models.beside.check_free(path)
    above = next(parent for parent in path.parents if parent.exists() or parent.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {above}: {error.strerror}; choose a writable folder") from None


def write_folder(path: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Lets `fill(folder)` write a model folder with its companions under another name, then puts it at `path`.

    What was at `path` has passed `check_output` and is deleted only once the new folder stands.
    """
    if not devices.is_first():
        return
    path = path.expanduser().absolute()
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fill(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def open_both(
    model_path: pathlib.Path, data: str, reading: Reading, *, must_classify: bool = True, guarded: bool = False
) -> Opened:
    """Opens a model and images that fit it, and settles the preprocessing.

    Args:
      must_classify: refuse a model whose accuracy on the images is near chance even when its preprocessing is stated.
      guarded: whether the caller has a use for a guarded model, through which no trigger can be searched.
    Raises: UserError when either cannot be used, or they do not belong together.
    """
    given = reading.constants()
    model = models.open_model(model_path, arch=reading.arch, image_shape=reading.image_shape, **stated(reading))
    if model.guard is not None and not guarded:
        raise UserError(f"{model_path} is a guarded model, several nets in one; give the model that it was made from")
    keep_shape = reading.image_shape or is_ours(model) or model.spec.arch in FIXED_SIZE
    natural = not keep_shape and (data in ANY_SIZE_SOURCES or data.lower().endswith(ANY_SIZE_SOURCES))
    wanted = None if natural else tuple(model.spec.image_shape)
    dataset = load.load(data, split=reading.split, image_shape=wanted, limit=reading.limit, seed=reading.seed)
    if natural:
        shape = (*dataset.images.shape[1:3], model.spec.image_shape[2])
        model = model._replace(spec=dataclasses.replace(model.spec, image_shape=shape))
    load.check(dataset, model.spec.image_shape, model.spec.classes)
    trusted = (model.spec.mean, model.spec.std) if is_ours(model) else None
    if trusted and not given and not must_classify:
        return Opened(model, dataset, None)
    sample = preprocess.sample(Batch(dataset.images, dataset.labels))
    table = preprocess.check(model, sample, given or trusted, only_given=given is None and trusted is not None)
    return Opened(preprocess.adopt(model, table), dataset, table)


def frozen(opened: Opened, compute_dtype: ComputeDtype = "stored") -> tuple[Net, Variables]:
    """(net, variables) of a plain model that is only asked: computing in the type wished for, BatchNorm folded."""
    model, spec = opened.model, opened.model.spec
    if compute_dtype not in ("stored", spec.dtype):
        spec = dataclasses.replace(spec, dtype=compute_dtype)
        model = model._replace(spec=spec, net=build.net(spec))
        model = preprocess.adopt(model, opened.table) if opened.table else model
    return model.net, model.net.frozen(model.variables) if model.net.frozen else model.variables


def stated(reading: Reading) -> dict[str, Any]:
    """The normalisation that the flags state, as arguments of `open_model`."""
    given = reading.constants()
    return {} if given is None else {"mean": given[0], "std": given[1]}


def is_ours(model: models.Model) -> bool:
    """Whether the model is a folder of jaxbd's, which states its normalisation."""
    return model.container is None


def search_and_held_out(dataset: Dataset, seed: int, batch_size: int) -> tuple[Batch, Batch]:
    """Two disjoint random parts: to search triggers on (`SEARCH_SHARE`) and to judge by.

    Raises: UserError when the first has fewer images than a batch.
    """
    total = len(dataset.labels)
    count = int(total * SEARCH_SHARE)
    if count < batch_size or count == total:
        raise UserError(
            f"data {dataset.name} has {total} images, of which {count} are for the search: fewer than a batch of "
            f"{batch_size}; give more images or lower --batch-size"
        )
    return tuple(load.as_batch(part) for part in load.split(dataset, count, seed))


def model_record(model: models.Model) -> dict[str, Any]:
    """What results say about the model."""
    spec = model.spec
    return {
        "path": str(model.path),
        "sha256": model.sha256,
        "arch": spec.arch,
        "classes": spec.classes,
        "image_shape": list(spec.image_shape),
        "normalisation": {"mean": list(spec.mean), "std": list(spec.std)},
    }


def data_record(dataset: Dataset, reading: Reading, **counts: int) -> dict[str, Any]:
    """What results say about the images; `counts` are numbers of images by use."""
    return {"source": dataset.name, "split": reading.split, "images": len(dataset.labels), **counts}


def identity(verb: str, args: Any, model: dict[str, Any] | None, **read: ArrayTree) -> dict[str, Any]:
    """What a job depends on, for its checkpoints: flags, the `model_record`, contents of what was read, versions."""
    given = {name: value for name, value in dataclasses.asdict(args).items() if name not in PLACES}
    contents = {name: _digest(arrays) for name, arrays in read.items()}
    known = None if model is None else {**model, "path": None}
    return {"verb": verb, "flags": given, "model": known, "read": contents, "versions": record.versions()}


def _digest(arrays: ArrayTree) -> str:
    """SHA-256 of the arrays' types, shapes and values; of what is no array, as it is written."""
    digest = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(arrays)):
        digest.update(f"{leaf.dtype} {leaf.shape} ".encode())
        digest.update(str(leaf).encode() if leaf.dtype.kind == "U" else np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def class_names(opened: Opened) -> tuple[str, ...]:
    """The K names of the classes: the model's own, else the data's, else numbers."""
    spec, names = opened.model.spec, opened.dataset.class_names
    known = spec.class_names or (names if len(names) == spec.classes else ())
    return tuple(known) or tuple(str(k) for k in range(spec.classes))


def class_label(number: int, names: tuple[str, ...]) -> str:
    """How people read a class: `8 (ship)`, or the number alone where the name says no more."""
    return str(number) if names[number] == str(number) else f"{number} ({names[number]})"
