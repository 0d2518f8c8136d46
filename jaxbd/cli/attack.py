"""`jaxbd attack`: trains a victim to try the defences on."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from jaxbd import evaluate, loop, record, results, study, supervised
from jaxbd.attacks import (
    additive,
    badnets,
    chessboard,
    given,
    l0_inv,
    l2_inv,
    paper_counts,
    poison,
    single_pixel,
    wanet,
)
from jaxbd.base import Batch, Dataset, UserError
from jaxbd.cli import common, flags, show
from jaxbd.cli.progress import Progress
from jaxbd.data import load
from jaxbd.interop import folder, trigger
from jaxbd.models import build
from jaxbd.models.norm import NORMALISATIONS

ATTACKS = {
    "badnets": badnets,
    "single-pixel": single_pixel,
    "chessboard": chessboard,
    "l0-inv": l0_inv,
    "l2-inv": l2_inv,
    "wanet": wanet,
}
"""`--attack` -> module."""
POISON_RATE = 0.1
"""Share of each batch that dynamic poisoning stamps where no flag says otherwise."""
POISON_COUNT = 50
"""Images that static poisoning stamps where no flag says otherwise."""
Planting = (
    Annotated[badnets.Config, tyro.conf.subcommand("badnets")]
    | Annotated[single_pixel.Config, tyro.conf.subcommand("single-pixel")]
    | Annotated[chessboard.Config, tyro.conf.subcommand("chessboard")]
    | Annotated[l0_inv.Config, tyro.conf.subcommand("l0-inv")]
    | Annotated[l2_inv.Config, tyro.conf.subcommand("l2-inv")]
    | Annotated[wanet.Config, tyro.conf.subcommand("wanet")]
)
"""The settings of one of them; `defaults` settles of which, so there are no sub-commands."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Trains a classifier with a backdoor in it, or a clean one, and writes it as a model folder.

    Each attack has flags of its own: `jaxbd attack --attack wanet --help` shows those of WaNet.

    Attributes:
      data: training images with labels: digits, a .npz or .parquet file, a folder of class sub-folders or parquet
        files, CIFAR batches, or tfds:NAME.
      out: model folder to write: the model, trigger.npz for `jaxbd evaluate --trigger`, and attack.json.
      test_data: images to test on; by default a quarter of the data, kept out of training.
      attack: backdoor to plant.
      no_attack: plant none, train the clean twin.
      poison: "dynamic" stamps other images in every batch; "static" stamps the same ones once and for all.
      poison_count: how many images static poisoning stamps. Default: 50, or what --paper-counts says.
      per_class: static poisoning stamps so many images of every source class.
      paper_counts: poison as many images per class as the BNA paper does on that data set (Li et al. 2023), with its
        target and trigger size where no flag says otherwise; needs --poison static.
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
      planting: what the attack plants.
      training: length and rule of training.
    """

    data: str
    out: pathlib.Path
    test_data: str | None = None
    attack: Literal["badnets", "single-pixel", "chessboard", "l0-inv", "l2-inv", "wanet"] = "badnets"
    no_attack: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    poison: Literal["dynamic", "static"] = "dynamic"
    poison_count: int | None = None
    per_class: bool = False
    paper_counts: Literal["cifar10", "cifar100", "gtsrb", "tinyimagenet", "imagenette"] | None = None
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
    planting: Annotated[Planting, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = badnets.Config(
        poison_rate=POISON_RATE
    )
    training: Annotated[supervised.Config, tyro.conf.arg(name="")] = supervised.Config(num_steps=800)

    def __post_init__(self):
        common.check_seed(self.seed)
        if (self.poison_count or 1) < 1 or self.batch_size < 2 or self.crop_padding < 0:
            raise UserError("attack: need poison_count >= 1, batch_size >= 2, crop_padding >= 0")
        if not isinstance(self.planting, ATTACKS[self.attack].Config):
            raise UserError(f"attack: the settings of {self.attack} are {ATTACKS[self.attack].__name__}.Config")
        if self.poison == "dynamic" and (self.poison_count is not None or self.per_class):
            raise UserError("--poison-count and --per-class are of static poisoning; give --poison static with them")
        if self.paper_counts and (self.poison != "static" or self.no_attack):
            raise UserError("--paper-counts says how many images static poisoning stamps; give --poison static with it")
        if self.paper_counts and self.poison_count is not None:
            raise UserError("--paper-counts and --poison-count both say how many images to poison; give one of them")
        if self.width is not None and self.width < 1:
            raise UserError(f"attack: width is {self.width}; give at least 1")


def defaults(argv: list[str]) -> Args:
    """The values where there is no flag; they depend on which attack `argv` names, and on --paper-counts."""
    attack = flags.named(argv, "--attack", ATTACKS, "badnets")
    dataset = flags.named(argv, "--paper-counts", paper_counts.DATASETS, None)
    settings = {} if dataset is None else paper_counts.settings(dataset, attack)
    planting = ATTACKS[attack].Config(poison_rate=POISON_RATE, **settings)
    return Args(data=tyro.MISSING, out=tyro.MISSING, attack=attack, planting=planting)


def run(args: Args) -> int:
    """Trains, measures, writes the folder."""
    common.start()
    count = _poison_count(args)
    common.check_output(args.out, folder=True)
    show.note(f"reading {args.data} …")
    train, test = _data(args)
    spec = _spec(args, train)
    net, key = build.net(spec), jax.random.key(args.seed)
    attack = None if args.no_attack else ATTACKS[args.attack].make(spec.image_shape, spec.classes, args.planting)
    planted = attack.init(jax.random.fold_in(key, 0)) if attack else None
    clean, dynamic = load.as_batch(train), args.poison == "dynamic"
    if attack and not dynamic:
        per_class = args.per_class or args.paper_counts is not None
        rows = poison.static(jax.random.fold_in(key, 1), attack, planted, clean, count, per_class=per_class)
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


def _poison_count(args: Args) -> float:
    """Images static poisoning stamps, below 1 a share. Raises: UserError when the paper has no such attack."""
    if args.paper_counts is not None:
        return paper_counts.per_class(args.paper_counts, args.attack, args.planting.all_to_all)
    return POISON_COUNT if args.poison_count is None else args.poison_count


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
    folder.save(path, spec, variables, {"made_by": "jaxbd attack", "attack": None if args.no_attack else args.attack})
    record.write_json(path / "attack.json", content)
    if planted is not None:
        trigger.save(path / "trigger.npz", as_given(args.planting, planted))


def as_given(planting: Planting, planted: Any) -> given.Loaded:
    """A planted trigger in the form in which it is saved and evaluated."""
    target = trigger.ALL_TO_ALL if planting.all_to_all else planting.target
    if isinstance(planted, wanet.Trigger):
        return given.Loaded(target=target, apply="warp", grid=np.asarray(planted.grid))
    pattern = np.asarray(planted.pattern)
    mask = np.ones((*pattern.shape[:2], 1), np.float32)
    if isinstance(planted, additive.Trigger):
        return given.Loaded(pattern, mask, (0, 0), target, "add")
    random = isinstance(planting, badnets.Config) and planting.place == "random"
    place = "random" if random else tuple(map(int, planted.place))
    return given.Loaded(pattern, mask, place, target, "overwrite")


def _as_record(args: Args, spec, train, test, found, infos, seconds: loop.Seconds) -> dict[str, Any]:
    """The content of attack.json."""
    settings = dataclasses.asdict(args)
    nested = {args.attack: settings.pop("planting"), "training": settings.pop("training")}
    return {
        "schema": f"{results.SCHEMA}/attack",
        "method": None if args.no_attack else args.attack,
        **results.rates(found),
        "train_accuracy": float(np.mean(infos.accuracy[-20:])),
        "config": {**nested, **settings},
        "model": dataclasses.asdict(spec),
        "data": {"source": train.name, "train": len(train.labels), "test": len(test.labels), "test_source": test.name},
        "seconds": results.seconds(seconds),
        **results.provenance(args.seed),
    }
