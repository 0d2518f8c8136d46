"""`jaxbd attack`: trains a victim to try the defences on."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from jaxbd import evaluate, loop, record, results, study, supervised
from jaxbd.attacks import badnets, poison
from jaxbd.base import Batch, Dataset, UserError
from jaxbd.cli import common, show
from jaxbd.cli.progress import Progress
from jaxbd.data import load
from jaxbd.interop import folder, trigger
from jaxbd.models import build
from jaxbd.models.norm import NORMALISATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Trains a classifier with a backdoor in it, or a clean one, and writes it as a model folder.

    Attributes:
      data: training images with labels: digits, a .npz or .parquet file, a folder of class sub-folders or parquet
        files, CIFAR batches, or tfds:NAME.
      out: model folder to write: the model, trigger.npz for `jaxbd evaluate --trigger`, and attack.json.
      test_data: images to test on; by default a quarter of the data, kept out of training.
      attack: plant a backdoor; --no-attack trains the clean twin.
      poison: "dynamic" stamps other images in every batch; "static" stamps the same ones once and for all.
      poison_count: how many images static poisoning stamps.
      arch: architecture.
      width: channels of its first stage; by default the architecture's own.
      stem: first convolution of a ResNet, for small (cifar) or large (imagenet) images.
      normalisation: the model's first operation on pixels in [0, 1].
      image_shape: height, width, channels; by default the data's own.
      batch_size: images per training step.
      crop_padding: random crops after padding by so many pixels.
      flip: random mirroring left to right.
      limit: use at most so many images of the data.
      seed: of everything random.
      planting: the patch attack.
      training: length and rule of training.
    """

    data: str
    out: pathlib.Path
    test_data: str | None = None
    attack: bool = True
    poison: Literal["dynamic", "static"] = "dynamic"
    poison_count: int = 50
    arch: str = "cnn"
    width: int | None = None
    stem: Literal["cifar", "imagenet"] | None = None
    normalisation: Literal["none", "half", "cifar10", "cifar10-b", "cifar100", "imagenet"] = "none"
    image_shape: tuple[int, int, int] | None = None
    batch_size: int = 64
    crop_padding: int = 0
    flip: bool = False
    limit: int | None = None
    seed: int = 0
    planting: Annotated[badnets.Config, tyro.conf.arg(name="")] = badnets.Config(poison_rate=0.1)
    training: Annotated[supervised.Config, tyro.conf.arg(name="")] = supervised.Config(num_steps=800)

    def __post_init__(self):
        common.check_seed(self.seed)
        if self.poison_count < 1 or self.batch_size < 2 or self.crop_padding < 0:
            raise UserError("attack: need poison_count >= 1, batch_size >= 2, crop_padding >= 0")
        if self.width is not None and self.width < 1:
            raise UserError(f"attack: width is {self.width}; give at least 1")


def run(args: Args) -> int:
    """Trains, measures, writes the folder."""
    common.start()
    common.check_output(args.out, folder=True)
    show.note(f"reading {args.data} …")
    train, test = _data(args)
    spec = _spec(args, train)
    net, key = build.net(spec), jax.random.key(args.seed)
    attack = badnets.make(spec.image_shape, spec.classes, args.planting) if args.attack else None
    planted = attack.init(jax.random.fold_in(key, 0)) if attack else None
    clean, dynamic = load.as_batch(train), args.poison == "dynamic"
    if attack and not dynamic:
        rows = poison.static(jax.random.fold_in(key, 1), attack, planted, clean, args.poison_count)
        clean = Batch(*map(jax.numpy.asarray, rows))
    with Progress() as progress:
        progress("train", 0, args.training.num_steps)
        variables, infos, seconds = study.train(
            jax.random.fold_in(key, 2), net, clean, args.training,
            attack=attack if dynamic else None, trigger=planted if dynamic else None,
            batch_size=args.batch_size, crop_padding=args.crop_padding, flip=args.flip, progress=progress,
        )  # fmt: skip
    found = evaluate.rates(jax.random.fold_in(key, 3), net, variables, load.as_batch(test), attack, planted)
    content = _as_record(args, spec, train, test, found, infos, seconds)
    common.write_folder(args.out, lambda path: _write(path, spec, variables, planted, content, args))
    show.rates([("victim" if attack else "clean model", results.rates(found))])
    show.say(f"Trained in {show.seconds(results.seconds(seconds))}.")
    show.written(args.out)
    return 0


def _data(args: Args) -> tuple[Dataset, Dataset]:
    """Training and test images. Raises: UserError where they do not suffice or do not belong together."""
    settings = dict(image_shape=args.image_shape, seed=args.seed)
    train = load.load(args.data, split="train", limit=args.limit, **settings)
    if args.test_data is None:
        total = len(train.labels)
        train, test = load.split(train, total - max(1, total // 4), args.seed)
    else:
        settings["image_shape"] = tuple(train.images.shape[1:])
        test = load.load(args.test_data, split="test", **settings)
        load.check(test, settings["image_shape"], len(train.class_names))
    if len(train.labels) < args.batch_size:
        raise UserError(
            f"data {train.name}: {len(train.labels)} images to train on, fewer than a batch of {args.batch_size}; "
            "give more or lower --batch-size"
        )
    return train, test


def _spec(args: Args, train: Dataset) -> build.Spec:
    """What to build. Raises: UserError on an unknown architecture, option, or a normalisation that does not fit."""
    shape = tuple(int(side) for side in train.images.shape[1:])
    mean, std = NORMALISATIONS[args.normalisation]
    if len(mean) not in (1, shape[2]):
        raise UserError(f"normalisation {args.normalisation} is for colour, the images are grey; use none or half")
    options = {"width": args.width, "stem": args.stem}
    spec = build.Spec(
        arch=args.arch,
        classes=len(train.class_names),
        image_shape=shape,
        mean=mean,
        std=std,
        options={name: value for name, value in options.items() if value is not None},
        class_names=tuple(train.class_names),
    )
    build.module(spec)
    return spec


def _write(path: pathlib.Path, spec, variables, planted, content: dict[str, Any], args: Args) -> None:
    """The model folder with its companions."""
    folder.save(path, spec, variables, {"made_by": "jaxbd attack", "attack": args.attack})
    record.write_json(path / "attack.json", content)
    if planted is not None:
        place = tuple(map(int, planted.place)) if args.planting.place == "fixed" else None
        target = None if args.planting.all_to_all else args.planting.target
        trigger.save(path / "trigger.npz", planted.pattern, place, target, "overwrite")


def _as_record(args: Args, spec, train, test, found, infos, seconds: loop.Seconds) -> dict[str, Any]:
    """The content of attack.json."""
    settings = dataclasses.asdict(args)
    nested = {"badnets": settings.pop("planting"), "training": settings.pop("training")}
    return {
        "schema": f"{results.SCHEMA}/attack",
        "method": "badnets" if args.attack else None,
        **results.rates(found),
        "train_accuracy": float(np.mean(infos.accuracy[-20:])),
        "config": {**nested, **settings},
        "model": dataclasses.asdict(spec),
        "data": {"source": train.name, "train": len(train.labels), "test": len(test.labels), "test_source": test.name},
        "seconds": results.seconds(seconds),
        **results.provenance(args.seed),
    }
