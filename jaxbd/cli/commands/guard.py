"""`jaxbd guard`: a guarded model's answer for each image, and which images it flags as
triggered."""

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxbd import files
from jaxbd.base import Batch, Dataset, UserError
from jaxbd.cli import common, outputs, show
from jaxbd.cli.progress import Progress
from jaxbd.data import labels, load, unlabelled
from jaxbd.detection import strip as stripping
from jaxbd.interop import guarded
from jaxbd.interop import load as models
from jaxbd.metrics import evaluate
from jaxbd.models import build


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Classifies each image, and says whether it carries the trigger of a backdoor found earlier.

    A guarded model runs the attacked net first. If the answer is a class that a backdoor leads to,
    it also runs a net corrected for that class; the corrected answer counts, and if the two differ
    the image is flagged. Every image becomes a line of JSON with the fields `index` (among the
    images read), `file` if known, `label` (the answer), `suspect_label` (the attacked net's
    answer), `asked` (whether a corrected net was run), `flagged`, and `true_label` if known.

    Attributes:
      model: guarded model: a folder written by `jaxbd repair --method bna`.
      data: the images: a picture, a folder of pictures or a .npz with only images, or any source
        with labels, see `jaxbd scan --help`.
      out: write the lines here; otherwise they go to stdout, and the summary to stderr.
      strip: clean images (a source with labels) for a second opinion from STRIP, which
        adds `strip_entropy` in bits and `strip_flagged` to each line. Takes a hundred passes per
        image.
      comparing: settings of STRIP.
      batch_size: images per pass.
      force: replace an existing output.
      reading: how the model and the data are read.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: str
    out: pathlib.Path | None = None
    strip: str | None = None
    comparing: Annotated[stripping.Config, tyro.conf.arg(name="")] = stripping.Config()
    batch_size: int = 256
    force: bool = False
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading(limit=10_000)

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1 image, got {self.batch_size}")
        if self.strip is None and self.comparing != stripping.Config():
            raise UserError(
                "--overlays, --blend and --false-positive-rate belong to STRIP; give it clean"
                " images with --strip"
            )


class Opened(NamedTuple):
    """The model and the images.

    Attributes:
      model: the model.
      images: uint8 [N, H, W, C]; labels: their true classes [N], if known; files: their names, if
        known.
      source: the name of the source.
      total: the number of images in the source, if known.
    """

    model: models.Model
    images: np.ndarray
    labels: np.ndarray | None
    files: tuple[str, ...] | None
    source: str
    total: int | None


def run(args: Args) -> int:
    """Runs the guard on every image, writes a line for each, and prints a summary."""
    common.start()
    outputs.check_output(args.out)
    outputs.refuse_existing("--out", args.out, replace=args.force)
    show.note(f"reading {args.model} and {args.data} …")
    opened = _open(args)
    clean = None if args.strip is None else _clean(opened.model, args)
    with Progress() as progress:
        found = {
            field: np.asarray(value)
            for field, value in _judge(opened, args, progress)._asdict().items()
        }
        if clean is not None:
            found |= _compare(opened, *clean, args, progress)
    lines = _lines(opened, found)
    if args.out is not None:
        files.write_text(args.out, lines)
    else:
        sys.stdout.write(lines)
        sys.stdout.flush()
    for line in (*_summary(opened, found), *_describe_limit(opened, args.reading.limit)):
        (show.note if args.out is None else show.say)(line)
    show.written(args.out)
    return 0


def _open(args: Args) -> Opened:
    """Opens model and images. Raises: UserError if the model has no guard, or the images do not
    fit."""
    # sub-folders may be classes or not; that depends on the model
    if unlabelled.is_unlabelled(args.data, lambda: _read_classes(args)):
        opened = _open_unlabelled(args)
    else:
        both = common.open_both(
            args.model, args.data, args.reading, must_classify=False, guarded=True
        )
        opened = Opened(
            both.model, both.dataset.images, both.dataset.labels, None, both.dataset.name, None
        )
    if opened.model.guard is None:
        raise UserError(
            f"{args.model} is not a guarded model; `jaxbd repair --method bna --out FOLDER`"
            " writes one"
        )
    return opened


def _read_classes(args: Args) -> labels.Classes:
    """What the model's file and --classes say about the classes."""
    reading = args.reading
    model = models.open_model(
        args.model, arch=reading.arch, image_shape=reading.image_shape, key=reading.key
    )
    return _classes(model, reading)


def _classes(model: models.Model, reading: common.Reading) -> labels.Classes:
    """What the model and --classes say about the classes."""
    spec = model.spec
    if reading.classes is None:
        return labels.Classes(spec.classes, spec.class_names)
    return labels.Classes(
        spec.classes, labels.read_names(reading.classes, spec.classes), stated=True
    )


def _open_unlabelled(args: Args) -> Opened:
    """Opens the model and images without labels. Raises: UserError for flags about labels."""
    reading = args.reading
    if reading.classes is not None:
        raise UserError(f"--classes is about labels, and {args.data} has none; leave it out")
    model = common.open_model(
        args.model,
        arch=reading.arch,
        image_shape=reading.image_shape,
        key=reading.key,
        **common.stated(reading),
    )
    model = common.assume_form(model, reading)
    shape = model.spec.image_shape
    found = unlabelled.load(args.data, shape, limit=reading.limit, seed=reading.seed)
    show.notes(found.notes)
    return Opened(model, found.images, None, found.files, found.name, found.total)


def _judge(opened: Opened, args: Args, progress: Progress):
    """`guard.Verdicts` for all images, as NumPy arrays."""
    model = opened.model
    assert model.guard is not None  # checked when it was opened
    judge = guarded.judge(build.net(model.spec), model.guard.targets)
    measure = lambda key, variables, images: judge(variables, images)
    return _per_image(measure, model.variables, opened.images, args, progress, "guard")


def _clean(model: models.Model, args: Args) -> tuple[Dataset, Dataset]:
    """STRIP's clean images: one half is overlaid on the images, the other sets the threshold."""
    shape, reading = model.spec.image_shape, args.reading
    assert args.strip is not None
    clean = load.load(
        args.strip,
        split=reading.split,
        image_shape=shape,
        limit=reading.limit,
        seed=reading.seed,
        classes=labels.Classes() if reading.classes is None else _classes(model, reading),
        download=reading.download,
    )
    return load.split(clean, len(clean.labels) // 2, reading.seed)


def _compare(
    opened: Opened, overlays: Dataset, measured: Dataset, args: Args, progress: Progress
) -> dict[str, np.ndarray]:
    """STRIP's entropies and flags, computed with the suspect net."""
    model = opened.model
    entropy = stripping.entropy(build.net(model.spec), args.comparing)
    measure = lambda key, known, images: entropy(key, known[0], images, known[1])
    known = model.variables["suspect"], jnp.asarray(overlays.images)
    of = lambda images, label: _per_image(measure, known, images, args, progress, label)
    limit = stripping.threshold(
        of(measured.images, "strip: clean images"), args.comparing.false_positive_rate
    )
    entropies = of(opened.images, "strip")
    return {"strip_entropy": entropies, "strip_flagged": entropies < limit}


def _per_image(measure, known: Any, images: np.ndarray, args: Args, progress: Progress, label: str):
    """`evaluate.per_image` with progress that appears before the first compile."""
    data = Batch(images, np.zeros(len(images), np.int32))
    progress(label, 0, len(images))
    return evaluate.per_image(
        jax.random.key(args.reading.seed),
        measure,
        known,
        data,
        batch_size=min(args.batch_size, len(images)),
        progress=lambda done, total: progress(label, done, total),
    )


def _lines(opened: Opened, found: dict[str, np.ndarray]) -> str:
    """One line of JSON per image."""
    lines = []
    for index in range(len(opened.images)):
        row: dict[str, Any] = {"index": index}
        if opened.files is not None:
            row["file"] = opened.files[index]
        row |= {field: values[index].item() for field, values in found.items()}
        if opened.labels is not None:
            row["true_label"] = int(opened.labels[index])
        lines.append(json.dumps(files.plain(row)) + "\n")
    return "".join(lines)


def _describe_limit(opened: Opened, limit: int) -> list[str]:
    """A line on the images that --limit left out, if any."""
    count = len(opened.images)
    if opened.total is not None and opened.total > count:
        return [f"--limit left out {opened.total - count:,} of {opened.total:,} images."]
    if opened.total is None and count == limit:
        return [f"These are the {limit:,} images that --limit allows; raise it to judge more."]
    return []


def _summary(opened: Opened, found: dict[str, np.ndarray]) -> list[str]:
    """Counts and shares, and how often the answers are right if the labels are known."""
    count, asked, flagged = len(opened.images), found["asked"], found["flagged"]
    of = lambda target: found["suspect_label"] == target
    assert opened.model.guard is not None
    per_target = [
        f"{(flagged & of(t)).sum()} of {of(t).sum()} answers {t}"
        for t in opened.model.guard.targets
    ]
    lines = [
        f"{count} images of {opened.source}: {asked.sum()} checked by a corrected net,"
        f" {flagged.sum()} flagged ({show.percent(float(flagged.mean()))}):"
        f" {', '.join(per_target)}."
    ]
    if "strip_flagged" in found:
        both = int((flagged & found["strip_flagged"]).sum())
        share = show.percent(float(found["strip_flagged"].mean()))
        lines.append(
            f"STRIP flags {int(found['strip_flagged'].sum())} ({share}), {both} of them in common."
        )
    if opened.labels is not None:
        right = {
            field: float((found[field] == opened.labels).mean())
            for field in ("suspect_label", "label")
        }
        lines.append(
            f"Correct by the true labels: {show.percent(right['label'])} of the answers, "
            f"{show.percent(right['suspect_label'])} of the suspect's."
        )
    return lines
