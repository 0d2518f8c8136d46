"""Shared by the verbs: the flags about model and data, opening both, splitting the images, and the
parts of a record that describe them."""

import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxbd import files
from jaxbd.base import ArrayTree, Batch, Dataset, Suspect, UserError, check_targets
from jaxbd.cli import show
from jaxbd.data import load
from jaxbd.interop import forms, graph_model, manifest, matching, one_output, preprocess
from jaxbd.interop import load as models
from jaxbd.interop.layouts.convert import few
from jaxbd.metrics import evaluate
from jaxbd.models.norm import NORMALISATIONS

FIXED_SIZE = ("vgg", "chain")
"""Architectures whose weights fit only one image size."""
EXIT = {"clean": 0, "backdoored": 1, "inconclusive": 3}
"""Verdict -> exit code of a scan."""
PLACES = (
    "model",
    "data",
    "test_data",
    "clean_model",
    "scan",
    "out",
    "report",
    "sarif",
    "mlbom",
    "rescan",
    "stopping",
)
"""Flags that name paths or control how a job is stopped. They may differ when it is resumed."""
ComputeDtype = Literal["stored", "float32", "bfloat16"]
"""Compute type during a search: the one stated in the model file, or one of these."""
SEARCH_SHARE = 0.75
"""Share of the given images used to search triggers and repair nets; the rest are held out."""
MOST_SIDE, MOST_CHANNELS, MOST_VALUES = 4096, 4, 1 << 22
"""Limits of --image-shape: pixels per side, channels, and values per image (H x W x C)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How the model and the data are read.

    Attributes:
      arch: architecture of a foreign model file; by default recognised from its tensors.
        Use "package.module:make" to name your own code: `make` is imported and called; see the
        documentation of `jaxbd.interop.own`.
      key: name of the net in a file that holds several, for example "netC" or "student", or of
        an ONNX file's output with the logits.
      form: choice that neither the weights nor the images determine, NAME=VALUE.
      image_shape: height, width and channels of the model's images, for a foreign file whose
        weights do not determine them.
      normalisation: input normalisation the model expects, applied to pixels in [0, 1]. "auto"
        uses the one stated in the model folder, or tries all of them on your images and takes the
        best.
      mean: per-channel mean of a custom normalisation.
      std: per-channel standard deviation of a custom normalisation.
      split: part of the data to use, if the source has parts.
      limit: use at most this many images, drawn at random.
      classes: text file with the class names in the model's order, one per line, for data whose
        folders or labels use other names.
      download: let tfds:NAME fetch and prepare a data set; nothing else uses the network.
      accept_accuracy: continue even if the accuracy on your images, and the moments in the model's
        first normalisation layer, suggest that this is not the model's preprocessing.
      seed: seed for all random choices.
    """

    arch: str | None = None
    key: str | None = None
    form: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    normalisation: Literal["auto", *NORMALISATIONS] = "auto"  # pyright: ignore[reportInvalidTypeForm]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    split: str = "test"
    limit: int = 2000
    classes: pathlib.Path | None = None
    download: bool = False
    accept_accuracy: bool = False
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        check_image_shape(self.image_shape)

    def constants(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """`constants` of the flags."""
        stated = None if self.normalisation == "auto" else self.normalisation
        return constants(stated, self.mean, self.std)


class Opened(NamedTuple):
    """A model with its preprocessing determined, a dataset that fits it, and the table of the
    preprocessing check (None if none was needed)."""

    model: models.Model
    dataset: Dataset
    table: preprocess.Table | None


class Material(NamedTuple):
    """Everything a scan works on.

    Attributes:
      opened: the model and data as read.
      suspect: the model as searched: frozen, in the requested compute type.
      search: images used to search for triggers; held_out: disjoint images used to measure them.
    """

    opened: Opened
    suspect: Suspect
    search: Batch
    held_out: Batch


def check_seed(seed: int) -> None:
    """Raises: UserError unless both NumPy and JAX accept `seed`."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed} is out of range; give 0..{2**32 - 1}")


def check_image_shape(shape: tuple[int, int, int] | None) -> None:
    """Raises: UserError unless images [H, W, C] may have this shape; None is not checked."""
    if shape is None:
        return
    most = (MOST_SIDE, MOST_SIDE, MOST_CHANNELS)
    # a record may come from anyone, so its shape may be of another form
    is_one = len(shape) == 3 and all(isinstance(size, int) for size in shape)
    if (
        not is_one
        or not all(1 <= size <= limit for size, limit in zip(shape, most, strict=True))
        or math.prod(shape) > MOST_VALUES
    ):
        raise UserError(
            f"--image-shape {' '.join(map(str, shape))} is out of range; give sides of"
            f" 1..{MOST_SIDE} pixels and 1..{MOST_CHANNELS} channels, at most {MOST_VALUES:,}"
            " values together"
        )


def constants(
    normalisation: str | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The (mean, std) given by the flags; None if none are. Raises: UserError on contradictory
    flags or impossible numbers."""
    if bool(mean) != bool(std):
        raise UserError("--mean and --std belong together; give both")
    if not mean:
        return None if normalisation is None else NORMALISATIONS[normalisation]
    if normalisation is not None:
        raise UserError("give --normalisation or --mean and --std, not both")
    if len(mean) != len(std) or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise UserError(
            "--mean and --std need one finite number per channel each, and --std must be > 0"
        )
    return mean, std


def start() -> None:
    """Turns on the persistent compile cache, or runs without it if its folder cannot be made."""
    # JAX adds its settings to the class at import
    current = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if current is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(home) / "jaxbd" / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def open_model(path: pathlib.Path, **how: Any) -> models.Model:
    """`interop.load.open_model`; prints a note if a second file changes the model's answers, or if
    one of several outputs was chosen, or weights in the file are not the net's."""
    model = models.open_model(path, **how)
    if model.graph is not None and (remark := graph_model.remark(model.graph)):
        show.note(f"note: {remark}")
    if model.container is not None and (unused := model.container.unused):
        show.note(
            f"note: {len(unused)} weights beside the net are left out ({few(list(unused))}); if the"
            " model uses them, export it as ONNX"
        )
    if model.container is not None and models.is_for_bytes(model.container):
        show.note(
            "note: the file states its normalisation for pixels from 0 to 255; it is divided by 255"
        )
    if model.bounds is not None:
        show.note(
            f"applying the activation bounds in {model.bounds}, which lies beside the model and was"
            " made for it"
        )
    return model


def open_both(
    model_path: pathlib.Path,
    data: str,
    reading: Reading,
    *,
    must_classify: bool = True,
    guarded: bool = False,
    targets: Sequence[int] = (),
) -> Opened:
    """Opens a model and images that fit it, and determines the preprocessing.

    Args:
      must_classify: refuse a model whose accuracy on the images is near chance even if its
        preprocessing is stated.
      guarded: whether the caller accepts a guarded model; no trigger can be searched through one.
      targets: classes the model must have; checked before any image is read.
    Raises: UserError if either cannot be used, or they do not fit together.
    """
    given = reading.constants()
    model = open_model(
        model_path,
        arch=reading.arch,
        image_shape=reading.image_shape,
        key=reading.key,
        **stated(reading),
    )
    if not guarded:
        refuse_guarded(model, model_path)
    check_targets(targets, model.spec.classes)
    of = model.graph or (model.layout and model.layout.spec)
    if of is not None and of.classes == 1:
        show.note(f"note: {one_output.NOTE}")
    trusted = (model.spec.mean, model.spec.std) if model.states_normalisation() else None
    fixed_size = bool(reading.image_shape or is_ours(model) or has_fixed_size(model))
    if trusted and not given and not must_classify:
        model = forms.stated(model, reading.form) if reading.form else model
        shape = model.spec.image_shape
        dataset = matching.read(source(data, reading), model, shape, reading.limit)
        show.notes((*dataset.notes, *_describe_classes(dataset, model)))
        check_answers(model)
        return Opened(model, dataset, None)
    count = min(reading.limit or preprocess.SAMPLE, preprocess.SAMPLE)
    model, dataset, table = forms.choose(
        model,
        lambda candidate, constants: matching.match(
            candidate,
            source(data, reading),
            given=constants or given or trusted,
            trusted=constants is not None or (given is None and trusted is not None),
            fixed_size=fixed_size,
            accept=reading.accept_accuracy,
        ),
        lambda shape: Batch(*matching.read(source(data, reading), model, shape, count)[:2]),
        reading.form,
    )
    show.notes((*dataset.notes, *_describe_classes(dataset, model)))
    return Opened(model if table is None else preprocess.adopt(model, table), dataset, table)


def _describe_classes(dataset: Dataset, model: models.Model) -> tuple[str, ...]:
    """One line naming the model's classes that have no image; empty if every class has one."""
    classes = model.spec.classes
    missing = sorted({*range(classes)} - {*np.unique(dataset.labels).tolist()})
    if not missing:
        return ()
    listed = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
    return (
        f"the model has {classes} classes, the images show {classes - len(missing)} of them (none"
        f" of {listed})",
    )


def check_answers(model: models.Model) -> None:
    """Raises UserError if even a black image gives logits that are not finite.

    No trigger works in such a model, so a scan would call it clean.
    """
    black = np.zeros((1, *model.spec.image_shape), np.float32)
    logits = evaluate.logits(model.net, model.variables, Batch(black, np.zeros(1, np.int32)))
    if not np.isfinite(logits).all():
        raise UserError(
            f"{model.path}: its logits are not finite, even for a black image; ask for the file"
            " again"
        )


def source(data: str, reading: Reading) -> matching.Source:
    """The image source that `data` names, with the reading flags applied."""
    return matching.Source(
        spec=data,
        split=reading.split,
        limit=reading.limit,
        seed=reading.seed,
        class_names=reading.classes,
        download=reading.download,
    )


def freeze(opened: Opened, compute_dtype: ComputeDtype = "stored") -> Suspect:
    """The suspect for searches, which train no weights: in the requested compute type, with
    BatchNorm folded."""
    model, spec = opened.model, opened.model.spec
    if compute_dtype not in ("stored", spec.dtype):
        spec = dataclasses.replace(spec, dtype=compute_dtype)
        model = model._replace(spec=spec, net=models.net_of(model, spec))
        model = preprocess.adopt(model, opened.table) if opened.table else model
    return models.suspect_of(model).freeze()


def open_material(
    model: pathlib.Path,
    data: str,
    reading: Reading,
    batch_size: int,
    compute_dtype: ComputeDtype,
    *,
    targets: Sequence[int] = (),
) -> Material:
    """Opens model and data and splits the images; see `open_both`. The model must have the classes
    `targets`."""
    opened = open_both(model, data, reading, targets=targets)
    search, held_out = search_and_held_out(opened.dataset, reading.seed, batch_size)
    return Material(opened, freeze(opened, compute_dtype), search, held_out)


def describe(material: Material, reading: Reading) -> dict[str, Any]:
    """What every scan record says about model and data, as arguments for `report.results`."""
    opened = material.opened
    counts = {"search": len(material.search.labels), "held_out": len(material.held_out.labels)}
    return {
        "model": model_record(opened.model),
        "data": data_record(opened.dataset, reading, **counts),
        "class_names": class_names(opened),
        "seed": reading.seed,
    }


def refuse_guarded(model: models.Model, path: pathlib.Path) -> None:
    """Raises UserError for a guarded model; no trigger can be searched through one."""
    if model.guard is not None:
        raise UserError(
            f"{path} is a guarded model, several nets in one; give the model that it was made from"
        )


def open_alone(path: pathlib.Path, reading: Reading) -> models.Model:
    """Opens a model without images; file and flags must state what images would otherwise tell.

    Raises: UserError if they leave the normalisation or the image size open, or if the net has no
      form that agrees with --form.
    """
    given = stated(reading)
    model = open_model(
        path, arch=reading.arch, image_shape=reading.image_shape, key=reading.key, **given
    )
    refuse_guarded(model, path)
    model = assume_form(model, reading)
    if is_ours(model):
        return model
    if not given:
        raise UserError(
            "the file does not say which normalisation its net expects; give --normalisation"
        )
    if reading.image_shape is None and not has_fixed_size(model):
        side, _, channels = model.spec.image_shape
        example = f"--image-shape {side} {side} {channels}"
        raise UserError(
            f"the file does not say how large its net's images are; give the size, e.g. {example}"
        )
    return model


def assume_form(model: models.Model, reading: Reading) -> models.Model:
    """The model in the form that --form states; without images, prints a note if this leaves
    several. Raises: UserError if the net has no such form."""
    if reading.form:
        model = forms.stated(model, reading.form)
    if len(left := forms.keep(model.forms, reading.form)) > 1:
        assumed = " ".join(forms.parts(model.spec, left))
        show.note(
            f"note: the file does not say which form its net has; assuming {assumed} (set it with"
            " --form NAME=VALUE, or give --data to find it)"
        )
    return model


def stated(reading: Reading) -> dict[str, Any]:
    """The normalisation given by the flags, as arguments for `open_model`."""
    given = reading.constants()
    return {} if given is None else {"mean": given[0], "std": given[1]}


def has_fixed_size(model: models.Model) -> bool:
    """Whether the net takes images of only one size, and that size is known."""
    return model.graph is not None or model.spec.arch in FIXED_SIZE


def is_ours(model: models.Model) -> bool:
    """Whether the model is a jaxbd folder, which states its normalisation."""
    return model.container is None


def search_and_held_out(dataset: Dataset, seed: int, batch_size: int) -> tuple[Batch, Batch]:
    """Splits the images at random into a search part (`SEARCH_SHARE`) and a held-out part.

    Raises: UserError if the search part has fewer images than a batch.
    """
    total = len(dataset.labels)
    count = int(total * SEARCH_SHARE)
    if count < batch_size or count == total:
        raise UserError(
            f"data {dataset.name} has {total} images, of which {count} are for the search: fewer"
            f" than a batch of {batch_size}; give more images or lower --batch-size"
        )
    search, held_out = load.split(dataset, count, seed)
    return load.as_batch(search), load.as_batch(held_out)


def model_record(model: models.Model) -> dict[str, Any]:
    """What a record says about the model."""
    spec = model.spec
    return {
        "path": str(model.path),
        "sha256": model.sha256,
        "arch": spec.arch,
        "classes": spec.classes,
        "image_shape": list(spec.image_shape),
        "normalisation": {"mean": list(spec.mean), "std": list(spec.std)},
        "bounds": model.bounds,
        "manifest": manifest.statement(pathlib.Path(model.path).absolute().name, model.files),
    }


def without_place(record: dict[str, Any]) -> dict[str, Any]:
    """A `model_record` that does not depend on where the files are or what they are called."""
    return {**record, "path": None, "manifest": record["manifest"]["subject"][0]["digest"]}


def output_record(written: pathlib.Path, path: pathlib.Path) -> dict[str, str | dict[str, Any]]:
    """What a record says about the model `written` that will be moved to `path`: its path relative
    to the record, and its hashes."""
    place = "." if written.is_dir() else path.name
    return {"path": place, "manifest": manifest.statement(path.name, manifest.of(written))}


def data_record(dataset: Dataset, reading: Reading, **counts: int) -> dict[str, Any]:
    """What a record says about the images; `counts` are the numbers of images per use."""
    return {
        "source": dataset.name,
        "split": reading.split,
        "images": len(dataset.labels),
        "notes": list(dataset.notes),
        **counts,
    }


def identity(
    verb: str, args: Any, model: dict[str, Any] | None, **read: ArrayTree
) -> dict[str, Any]:
    """Everything a job's checkpoints depend on: flags, `model_record`, hashes of the arrays read,
    versions."""
    given = {name: value for name, value in dataclasses.asdict(args).items() if name not in PLACES}
    contents = {name: digest(arrays) for name, arrays in read.items()}
    known = None if model is None else without_place(model)
    return {
        "verb": verb,
        "flags": given,
        "model": known,
        "read": contents,
        "versions": files.versions(),
    }


def digest(arrays: ArrayTree) -> str:
    """SHA-256 of the arrays' types, shapes and values; text is hashed as its `str`."""
    made = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(arrays)):
        made.update(f"{leaf.dtype} {leaf.shape} ".encode())
        made.update(
            str(leaf).encode() if leaf.dtype.kind == "U" else np.ascontiguousarray(leaf).tobytes()
        )
    return made.hexdigest()


def class_names(opened: Opened) -> tuple[str, ...]:
    """The K class names: the model's own, else the data's, else the class numbers."""
    spec, names = opened.model.spec, opened.dataset.class_names
    known = spec.class_names or (names if len(names) == spec.classes else ())
    return tuple(known) or tuple(str(k) for k in range(spec.classes))


def class_label(number: int, names: tuple[str, ...]) -> str:
    """A class for display: `8 (ship)`, or only the number if the name is the number."""
    return str(number) if names[number] == str(number) else f"{number} ({names[number]})"
