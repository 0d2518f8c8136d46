"""`jaxbd attack`: trains a victim on which to try the defences."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

import jax
import numpy as np
import tyro

from jaxbd import files
from jaxbd.attacks import paper_counts, poison
from jaxbd.base import Attack, Batch, Dataset, Key, Suspect, UserError
from jaxbd.cli import attacks, common, job, outputs, parse, show
from jaxbd.data import draw, labels, load, words
from jaxbd.images import image_shape_of
from jaxbd.interop import folder, trigger
from jaxbd.interop import load as models
from jaxbd.metrics import evaluate
from jaxbd.models import build
from jaxbd.models.norm import NORMALISATIONS
from jaxbd.pipelines import plant
from jaxbd.report import results
from jaxbd.training import supervised
from jaxbd.training.run import Run

Planting = TypeVar("Planting")
POISON_COUNT = 50
"""Default number of images that static poisoning stamps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Generic[Planting]):
    """Trains a backdoored classifier, or a clean one, and writes it as a model folder.

    Each attack has its own flags: `jaxbd attack --attack wanet --help` shows those of WaNet.

    During training, the folder OUT.run next to the output holds checkpoints. Ctrl-C or SIGTERM
    stops it after the current steps, saves, and prints the command that resumes it; a second signal
    stops it at once. --resume continues from the last checkpoint, after a crash too. OUT.run is
    removed once the output is written.

    Attributes:
      data: training images with labels: digits, a .npz or .parquet file, a folder of class
        sub-folders or parquet files, CIFAR batches, or tfds:NAME.
      out: model folder to write: the model, trigger.npz for `jaxbd evaluate --trigger`, and
        attack.json.
      test_data: images to test on; by default a quarter of the data, excluded from training.
      attack: backdoor to plant.
      no_attack: plant no backdoor; train the clean twin.
      recipe: "dhbe" makes the settings of the DHBE paper the defaults (Yan et al. 2023): the data's
        last class as target (also --target -1), 300 images poisoned statically, then crops by an
        eighth of the side and mirroring, batches of 128, learning rate 0.1 falling in steps. The
        number of training steps does not change.
      clean_model: model folder with the clean net that clean-label and trojan start from; without
        it, one is trained first, in the same way as the victim. A trojan is planted in that same
        net, so --arch and similar flags have no effect.
      picture: picture that the blend attack blends in, of any size; by default random pixels.
      poison: "dynamic" stamps different images in every batch; "static" stamps the same images
        once, before they are cropped or mirrored. Clean-label is always static.
      poison_count: how many images static poisoning stamps. Default: 50, or the number that
        comes with --paper-counts or --recipe; for clean-label, the share --poison-rate of the
        target class.
      per_class: apply --poison-count to each source class instead of to all images.
      paper_counts: poison as many images per class as the BNA paper does on that data set (Li et
        al. 2023), with its target and trigger size as defaults; needs --poison static.
      arch: architecture.
      width: channels of its first stage; by default the architecture's own.
      stem: first convolution of a ResNet, for small (cifar), large (imagenet) or 64-pixel images.
      normalisation: the model's first operation on pixels in [0, 1].
      image_shape: height, width, channels; by default the data's own.
      batch_size: images per training step.
      crop_padding: random crops after padding by this many pixels. Default: 0, or the value
        from --recipe.
      flip: random left-right mirroring.
      limit: use at most this many images of the data.
      classes: text file with the class names in the wanted order, one per line; by default the
        data's own order.
      download: let tfds:NAME fetch and prepare a data set; nothing else uses the network.
      seed: seed for all random choices.
      planting: settings of the attack.
      training: length and rule of the training.
      stopping: how the training is stopped and resumed.
    """

    data: str
    out: pathlib.Path
    test_data: str | None = None
    attack: str = attacks.DEFAULT
    no_attack: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    recipe: Literal["dhbe"] | None = None
    clean_model: pathlib.Path | None = None
    picture: str | None = None
    poison: Literal["dynamic", "static"] = "dynamic"
    poison_count: int | None = None
    per_class: bool = False
    paper_counts: Literal["cifar10", "cifar100", "gtsrb", "tinyimagenet", "imagenette"] | None = (
        None
    )
    arch: str = "cnn"
    width: int | None = None
    stem: Literal["cifar", "imagenet", "64px"] | None = None
    normalisation: Literal[*NORMALISATIONS] = "none"  # pyright: ignore[reportInvalidTypeForm]
    image_shape: tuple[int, int, int] | None = None
    batch_size: int = 64
    crop_padding: int | None = None
    flip: bool = False
    limit: int | None = None
    classes: pathlib.Path | None = None
    download: bool = False
    seed: int = 0
    planting: Annotated[Planting, tyro.conf.arg(name="")]
    training: Annotated[supervised.Config, tyro.conf.arg(name="")] = supervised.Config(
        num_steps=800
    )
    stopping: Annotated[job.Flags, tyro.conf.arg(name="")] = job.Flags()

    def __post_init__(self):
        common.check_seed(self.seed)
        common.check_image_shape(self.image_shape)
        if (self.poison_count or 1) < 1 or self.batch_size < 2 or (self.crop_padding or 0) < 0:
            raise UserError("attack: need poison_count >= 1, batch_size >= 2, crop_padding >= 0")
        if self.poison == "dynamic" and (self.poison_count is not None or self.per_class):
            raise UserError(
                "--poison-count and --per-class belong to static poisoning; give --poison static"
                " with them"
            )
        if self.attack == "clean-label" and (self.poison == "dynamic" or self.per_class):
            raise UserError(
                "clean-label poisons images of one class, always statically; leave out --poison and"
                " --per-class"
            )
        if self.attack == "trojan" and self.per_class:
            raise UserError("trojan has no --per-class; give only --poison-count")
        if self.paper_counts and (self.poison != "static" or self.no_attack):
            raise UserError(
                "--paper-counts says how many images static poisoning stamps; give --poison static"
                " with it"
            )
        if self.paper_counts and self.poison_count is not None:
            raise UserError(
                "--paper-counts and --poison-count both say how many images to poison; give one of"
                " them"
            )
        if self.clean_model is not None and (
            self.no_attack or self.attack not in attacks.NEEDS_CLEAN
        ):
            raise UserError(
                "--clean-model is what clean-label and trojan start from; give it with one of these"
                " attacks"
            )
        if self.picture is not None and (self.no_attack or self.attack != "blend"):
            raise UserError("--picture belongs to the blend attack; give --attack blend with it")
        if self.width is not None and self.width < 1:
            raise UserError(f"--width must be at least 1 channel, got {self.width}")


def choose(argv: Sequence[str]) -> tuple[Any, Any]:
    """The class of flags and the default values for `argv`, which depend on --attack,
    --paper-counts and --recipe."""
    flags = "--attack", "--paper-counts", "--recipe"
    attack, dataset, recipe = parse.preview(argv, *flags)
    name = attack or attacks.DEFAULT
    module, settings = attacks.find(name), {}
    if dataset in paper_counts.DATASETS:
        settings = paper_counts.settings(dataset, name)
    fields: dict[str, Any] = {"poison": "static"} if name == "clean-label" else {}
    if recipe in attacks.RECIPES:
        triggers = attacks.RECIPE_TRIGGERS[recipe].get(name, {})
        settings = {"target": attacks.LAST_CLASS, **triggers, **settings}
        fields = {**attacks.RECIPES[recipe], "recipe": recipe}
    planting = attacks.configure(name, settings)
    defaults = Args(data=tyro.MISSING, out=tyro.MISSING, attack=name, planting=planting, **fields)
    return Args[module.Config], defaults


def run(args: Args) -> int:
    """Trains the model, measures it, and writes the folder."""
    common.start()
    count = _poison_count(args)
    if outputs.ending(args.out):
        raise UserError(
            f"--out {args.out}: attack writes a model folder; give a name without an ending, then"
            " `jaxbd convert` writes other formats"
        )
    outputs.check_output(args.out, folder=True)
    outputs.refuse_existing("--out", args.out, replace=args.stopping.replace)
    paths = job.prepare(args.out, args.stopping)
    clean = attacks.open_clean(args.clean_model)
    show.note(f"reading {args.data} …")
    train, test = _data(args, clean)
    spec = _spec(args, train) if clean is None or args.attack != "trojan" else clean.spec
    args = _fill_in(args, spec)
    net, key = build.net(spec), jax.random.key(args.seed)
    attack = None
    if not args.no_attack:
        attack = attacks.make(args.attack, args.planting, spec, args.picture)
    if attack and clean is None and args.attack in attacks.NEEDS_CLEAN:
        show.note(
            f"{args.attack} starts from a clean net; no --clean-model is given, so one is trained"
            " first"
        )
    identity = common.identity(
        "attack",
        args,
        None if clean is None else common.model_record(clean),
        data=[(each.images, each.labels) for each in (train, test)],
        trigger=attack and attack.init(key),
    )
    with job.open_run(paths, args.stopping, identity) as going:
        planted = _plant(going, args, spec, attack, load.as_batch(train), clean, count)
    found = evaluate.rates(
        jax.random.fold_in(key, 3),
        net,
        planted.variables,
        load.as_batch(test),
        attack,
        planted.trigger,
    )
    content = {**_as_record(args, spec, train, test, found, planted), "resumed": going.resumed}
    outputs.write_folder(args.out, lambda path: _write(path, spec, planted, content, args))
    job.finish(paths)
    show.rates([("victim" if attack else "clean model", results.rates(found))])
    show.say(f"Trained in {show.seconds(results.seconds(planted.seconds))}.")
    show.written(args.out)
    return 0


def _plant(
    run: Run,
    args: Args,
    spec: build.Spec,
    attack: Attack | None,
    data: Batch,
    clean: models.Model | None,
    count: float | None,
) -> attacks.Planted:
    """The victim, or its clean twin."""
    key, net = jax.random.key(args.seed), build.net(spec)
    batching = draw.Batching(args.batch_size, args.crop_padding or 0, args.flip)

    def train(key: Key, data: Batch, name: str, poisoning: Any = None) -> plant.Trained:
        return plant.train(
            run, name, key, net, data, args.training, batching=batching, attack=poisoning
        )

    if attack and args.attack in attacks.NEEDS_CLEAN:
        count = count if args.poison == "static" else None
        start = None if clean is None else models.suspect_of(clean)
        shape, spent = image_shape_of(data.images), None
        if start is None:
            trained = train(jax.random.fold_in(key, 4), data, "clean model")
            start, spent = Suspect(net, trained.variables, shape, spec.classes), trained.seconds
        planted = attacks.plant_in(run, key, args.planting, start, data, train, count, batching)
        facts = {"clean_model": None if clean is None else str(clean.path)} | planted.facts
        return planted.plus(spent)._replace(facts=facts)
    poisoning, planted = None, attack.init(jax.random.fold_in(key, 0)) if attack else None
    if attack and args.poison == "static":
        assert count is not None  # static poisoning has one, see `_poison_count`
        per_class = args.per_class or args.paper_counts is not None
        rows = poison.static(
            jax.random.fold_in(key, 1), attack, planted, data, count, per_class=per_class
        )
        data = Batch(*map(jax.numpy.asarray, rows))
    elif attack:
        poisoning = (attack, planted)
    trained = train(jax.random.fold_in(key, 2), data, "train", poisoning)
    return attacks.Planted(trained.variables, planted, trained.infos, trained.seconds, {})


def _poison_count(args: Args) -> float | None:
    """Number of images that static poisoning stamps; a value below 1 is a share. Raises: UserError
    if the paper has no such attack."""
    if args.paper_counts is not None:
        return paper_counts.per_class(
            args.paper_counts, args.attack, attacks.is_all_to_all(args.planting)
        )
    by_default = None if args.attack == "clean-label" else POISON_COUNT
    return by_default if args.poison_count is None else args.poison_count


def _fill_in(args: Args, spec: build.Spec) -> Args:
    """Fills in what depends on the data: the last class as target, and a recipe's crop padding."""
    if args.planting.target == attacks.LAST_CLASS:
        args = dataclasses.replace(
            args, planting=dataclasses.replace(args.planting, target=spec.classes - 1)
        )
    if args.crop_padding is None:
        # 4 for images of 32 pixels, 8 for 64
        args = dataclasses.replace(
            args, crop_padding=spec.image_shape[1] // 8 if args.recipe else 0
        )
    return args


def _data(args: Args, clean: models.Model | None) -> tuple[Dataset, Dataset]:
    """Training and test images. Raises: UserError if there are too few or they do not fit
    together."""
    image_shape = args.image_shape if clean is None else clean.spec.image_shape
    settings: dict[str, Any] = dict(image_shape=image_shape, seed=args.seed, download=args.download)
    known = _classes(args.classes, clean)
    train = load.load(args.data, split="train", limit=args.limit, classes=known, **settings)
    if args.test_data is None:
        total = len(train.labels)
        train, test = load.split(train, total - max(1, total // 4), args.seed)
    else:
        settings["image_shape"] = image_shape_of(train.images)
        known = _classes_of(train)
        test = load.load(args.test_data, split="test", classes=known, **settings)
        load.check(test, settings["image_shape"], len(train.class_names))
    if clean is not None:
        load.check(train, clean.spec.image_shape, clean.spec.classes)
    if len(train.labels) < args.batch_size:
        raise UserError(
            f"data {train.name}: {len(train.labels)} images to train on, fewer than a batch of"
            f" {args.batch_size}; give more or lower --batch-size"
        )
    return train, test


def _classes(names: pathlib.Path | None, clean: models.Model | None) -> labels.Classes:
    """What --classes and the clean net say about the classes of the data."""
    count = None if clean is None else clean.spec.classes
    if names is not None:
        stated = labels.read_names(names, count)
        return labels.Classes(len(stated), stated, stated=True)
    return labels.Classes(count, () if clean is None else tuple(clean.spec.class_names))


def _classes_of(train: Dataset) -> labels.Classes:
    """The classes that test images must have: by the names of the training images, or by number if
    these are only numbered."""
    names = train.class_names
    only_numbered = words.are_decimal(names) and list(map(int, names)) == [*range(len(names))]
    return labels.Classes(len(names), names, stated=not only_numbered)


def _spec(args: Args, train: Dataset) -> build.Spec:
    """The net to build. Raises: UserError on an unknown architecture or option, or a normalisation
    that does not fit."""
    shape = image_shape_of(train.images)
    mean, std = NORMALISATIONS[args.normalisation]
    if len(mean) not in (0, 1, shape[2]):
        raise UserError(
            f"normalisation {args.normalisation} is for colour, the images are grey; use none or"
            " half"
        )
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


def _write(
    path: pathlib.Path, spec, planted: attacks.Planted, content: dict[str, Any], args: Args
) -> None:
    """Writes the model folder with its trigger and record."""
    folder.save(
        path,
        spec,
        planted.variables,
        {"made_by": "jaxbd attack", "attack": None if args.no_attack else args.attack},
    )
    files.write_json(path / "attack.json", content)
    if planted.trigger is not None:
        trigger.save(path / "trigger.npz", attacks.as_given(args.planting, planted.trigger))


def _as_record(args: Args, spec, train, test, found, planted: attacks.Planted) -> dict[str, Any]:
    """The content of attack.json."""
    settings = dataclasses.asdict(args)
    del settings["stopping"]
    nested = {args.attack: settings.pop("planting"), "training": settings.pop("training")}
    return {
        "schema": f"{results.SCHEMA}/attack",
        "method": None if args.no_attack else args.attack,
        **results.rates(found),
        "train_accuracy": float(np.mean(planted.infos.accuracy[-20:])),
        **({"planted": planted.facts} if planted.facts else {}),
        "config": {**nested, **settings},
        "model": dataclasses.asdict(spec),
        "data": {
            "source": train.name,
            "train": len(train.labels),
            "test": len(test.labels),
            "test_source": test.name,
        },
        "seconds": results.seconds(planted.seconds),
        **results.provenance(args.seed),
    }
