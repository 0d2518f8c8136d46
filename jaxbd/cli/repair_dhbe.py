"""`jaxbd repair --method dhbe`: erases backdoors without any data, and writes the repaired model."""

import contextlib
import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxbd import erase, evaluate, loop, record, results
from jaxbd.attacks import given
from jaxbd.base import Attack, UserError, Variables
from jaxbd.cli import common, convert, erasure, flags, long_job, show
from jaxbd.cli import evaluate as measuring
from jaxbd.cli import repair as repairing
from jaxbd.cli.progress import Progress
from jaxbd.data import load
from jaxbd.interop import load as models
from jaxbd.interop import preprocess, trigger
from jaxbd.repair import dhbe
from jaxbd.report import erased, page

PRESETS = {"released": dhbe.released(), "paper": dhbe.paper(), "quick": dhbe.quick()}
"""`--preset` -> settings that the --erasure flags start from."""
CHUNK = {"host": 1, "scan": 20}
"""Way over time -> iterations between two looks at signals and two lines of metrics. One iteration of a large net takes
minutes on a CPU."""
ONE_ANSWER = 0.85
"""Share of untrained generators' images with one and the same answer from which on a person is warned: between nets
that were erased and a published one that was not (docs/results.md)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Removes backdoors, of whatever trigger and class, without any data, and writes the repaired model.

    A student begins as a copy of the model and is taught by it on images that a generator makes, while a second
    generator searches for small triggers that change the student's answers. No image is read. Accuracy is measured on
    --test-data, if given, once the repaired model is written.

    This may take hours. Meanwhile the folder OUT.run beside the output holds checkpoints, and losses go to
    OUT.metrics.jsonl as lines of JSON. Ctrl-C or SIGTERM ends it after the current iterations, saves, and prints the
    command to go on with; a second one ends it at once. After a crash too, --resume goes on from the last checkpoint.
    OUT.run is removed once the output is written.

    Attributes:
      model: a PyTorch file, .safetensors, or a jaxbd model folder.
      out: the repaired model: .pth or .safetensors in the source's own keys and layout, or a model folder. The
        figures go beside it, as <name>.repair.json, or into the folder as repair.json.
      report: write one self-contained HTML page here: what was generated over time, the losses, and figures before and
        after where there is --test-data, with a patch as --trigger also of 4 and 9 copies on an image (see `jaxbd
        evaluate --help`). After --resume, what was generated before is not on it.
      method: how to repair.
      preset: settings that the --erasure flags start from: those of the released code, of the paper, or of a run of 60
        iterations for a CPU and small nets.
      steps: iterations, short for --erasure.num-steps; the rates drop at --erasure.milestones, shares of them.
      erasure: length and rule of the erasure.
      job: how it may be stopped.
      test_data: images with labels to measure accuracy on, see `jaxbd scan --help`; not read before the repair is done.
      given: a trigger to measure the attack success rate with, on --test-data.
      reading: how the model is read. A file that is no model folder needs --normalisation, and --image-shape unless
        its weights tell. --split and --limit are about --test-data.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    out: pathlib.Path
    report: pathlib.Path | None = None
    method: Annotated[Literal["dhbe"], tyro.conf.arg(name="method")] = "dhbe"
    preset: Literal["released", "paper", "quick"] = "released"
    steps: int | None = None
    erasure: dhbe.Config = PRESETS["released"]
    job: Annotated[long_job.Flags, tyro.conf.arg(name="")] = long_job.Flags()
    test_data: str | None = None
    given: Annotated[measuring.Trigger, tyro.conf.arg(name="")] = measuring.Trigger()
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading(limit=10_000)

    def __post_init__(self):
        if self.steps is not None and self.erasure.num_steps not in (self.steps, PRESETS[self.preset].num_steps):
            raise UserError("--steps and --erasure.num-steps are the same setting; give one of them")
        if self.erasure.inner != dhbe.Config().inner:
            raise UserError("--erasure.inner follows from the device; leave it out")
        if self.given.trigger is None and self.given != measuring.Trigger():
            raise UserError("--apply, --place and --target describe a trigger; give it with --trigger")
        if self.given.trigger is not None and self.test_data is None:
            raise UserError("dhbe repairs without the trigger; to measure with it, give images with --test-data too")

    def config(self) -> dhbe.Config:
        """The settings that the flags state."""
        return self.erasure if self.steps is None else dataclasses.replace(self.erasure, num_steps=self.steps)


def defaults(argv: list[str]) -> Args:
    """The values where there is no flag. Raises: UserError on --data, which the other methods take."""
    if any(word.split("=", 1)[0] == "--data" for word in argv):
        raise UserError("dhbe takes no data; leave --data out, or give --test-data to measure the repaired model on")
    preset = flags.named(argv, "--preset", PRESETS, "released")
    return Args(model=tyro.MISSING, out=tyro.MISSING, preset=preset, erasure=PRESETS[preset])


def run(args: Args) -> int:
    """Erases, writes, then measures where there is something to measure on."""
    common.start()
    in_folder, figures = convert.is_folder(args.out), repairing.figures(args.out)
    common.check_output(args.out, folder=in_folder)
    common.check_output(None if in_folder else figures)
    files = long_job.prepare(args.out, args.job)
    _check_report(args, [args.model, args.out, figures, *files])
    show.note(f"reading {args.model} …")
    model = _open(args)
    config = erase.settled(args.config(), model.spec.mean, model.spec.std)
    alike = _warned(model, config, args)
    with Progress() as progress:
        ran, pictures = _erase(model, config, files, args, progress)
    content = {**_as_record(model, config, ran, files, args), "one_answer": alike}
    repairing.save(args.out, model, ran.result, content)
    long_job.finish(files)
    _show(content)
    _write_page(content, pictures, args)  # what goes wrong from here on shall not cost it
    if args.test_data is not None:
        content = _measure(ran.result, content, args)
        record.write_json(figures, content)
        show.rates([(name, content[name]) for name in ("before", "after")])
        _write_page(content, pictures, args)
    show.written(args.out, None if in_folder else figures, files.metrics, args.report)
    return 0


def _check_report(args: Args, others: list[pathlib.Path]) -> None:
    """Raises: UserError when the page cannot be written, or would take the place of one of `others` or lie in it."""
    if args.report is None:
        return
    common.check_output(args.report)
    place = args.report.expanduser().resolve()
    taken = {other.expanduser().resolve() for other in others}
    if taken & {place, *place.parents}:
        raise UserError(f"--report {args.report} is the place of model, output or checkpoints; choose another name")


def _open(args: Args) -> models.Model:
    """The model, of which all is known that data would otherwise tell.

    Raises: UserError where a file leaves open what its net's images are, and the flags do too.
    """
    reading = args.reading
    stated = common.stated(reading)
    model = models.open_model(args.model, arch=reading.arch, image_shape=reading.image_shape, **stated)
    if model.guard is not None:
        raise UserError(f"{args.model} is a guarded model, several nets in one; give the model that it was made from")
    if not common.is_ours(model):
        if not stated:
            raise UserError("the file does not say what normalisation its net expects; give --normalisation")
        if reading.image_shape is None and model.spec.arch not in common.FIXED_SIZE:
            side, _, channels = model.spec.image_shape
            example = f"--image-shape {side} {side} {channels}"
            raise UserError(f"the file does not say how large its net's images are; give it, such as {example}")
    return model


def _warned(model: models.Model, config: dhbe.Config, args: Args) -> dict[str, Any]:
    """The answer that generated images get oftenest and its share, with a warning where that is nearly all of them."""
    key, shape = jax.random.fold_in(jax.random.key(args.reading.seed), 3), tuple(model.spec.image_shape)
    label, share = erase.oftenest(erase.answers(key, model.net, shape, model.variables, config))
    if share >= ONE_ANSWER:
        show.note(
            f"warning: the model answers {share:.0%} of untrained generators' images with class {label}; such "
            "images tell little about it, and erasing without data is likely to fail"
        )
    return {"class": label, "share": share}


def _erase(
    model: models.Model, config: dhbe.Config, files: long_job.Files, args: Args, progress: Progress
) -> tuple[long_job.Ran, list[erase.Picture]]:
    """The run, from its beginning or from where it was stopped, and for a page what was generated from there on."""
    key, shape = jax.random.key(args.reading.seed), tuple(model.spec.image_shape)
    chunk, album = CHUNK[loop.default_time()], erase.Album(jax.random.fold_in(key, 2), shape, config)
    look = (lambda *_: None) if args.report is None else album.on_chunk

    def fit(state, left, on_chunk):
        before = config.num_steps - left
        look(before, state)

        def after_chunk(done, now, infos):
            on_chunk(done - before, now, infos)
            look(done, now)

        return erase.run(
            key, model.net, shape, model.variables, config, mean=model.spec.mean, std=model.spec.std, state=state,
            chunk=chunk, progress=progress, on_chunk=after_chunk, label="dhbe",
        )  # fmt: skip

    identity = {
        "method": "dhbe", "config": dataclasses.asdict(config), "chunk": chunk, "seed": args.reading.seed,
        "model": {**common.model_record(model), "path": None}, "versions": record.versions(),
    }  # fmt: skip
    state = erase.start(key, model.net, shape, model.variables, config)
    ran = long_job.run(files, args.job, identity, state, fit, info=dhbe.Info, num_steps=config.num_steps)
    return ran, album.pictures


def _as_record(
    model: models.Model, config: dhbe.Config, ran: long_job.Ran, files: long_job.Files, args: Args
) -> dict[str, Any]:
    """The content of repair.json before anything is measured."""
    content = results.repair(
        args.method, None, None, config, ran.seconds, model=common.model_record(model), data=None,
        seed=args.reading.seed,
    )  # fmt: skip
    content["preset"] = args.preset
    content["resumed"] = ran.resumed
    content["curves"] = erasure.curves(ran.infos)
    content["metrics"] = files.metrics.name
    content["trigger"] = content["amplified"] = content["preprocessing"] = None
    return record.plain(content)


def _measure(variables: Variables, content: dict[str, Any], args: Args) -> dict[str, Any]:
    """`content` with figures before and after on the test images.

    Raises: UserError when they cannot be had, saying that the repaired model stands.
    """
    try:
        show.note(f"reading {args.test_data} …")
        opened = common.open_both(args.model, args.test_data, args.reading, must_classify=False)
        config, attacks = None, {1: (None, None)}
        if args.given.trigger is not None:
            loaded = trigger.load(args.given.trigger)
            config = measuring.settle(opened, args.given, loaded, all_to_all=True)
            attacks = _attacks(opened, config, loaded, erasure.COPIES if args.report else (1,))
    except UserError as error:
        raise UserError(f"{args.out} is written, but could not be measured: {error}") from None
    show.preprocessing(opened.table)
    key, data = jax.random.key(args.reading.seed), load.as_batch(opened.dataset)
    before, after = (
        {copies: evaluate.rates(key, opened.model.net, each, data, *attack) for copies, attack in attacks.items()}
        for each in (opened.model.variables, variables)
    )
    return {
        **content,
        "before": results.rates(before[1]), "after": results.rates(after[1]),
        "amplified": erasure.amplified(before, after) if len(attacks) > 1 else None,
        "data": common.data_record(opened.dataset, args.reading),
        "trigger": None if config is None else measuring.describe(args.given, config),
        "preprocessing": preprocess.as_record(opened.table) if opened.table else None,
    }  # fmt: skip


def _attacks(
    opened: common.Opened, config: given.Config, loaded: given.Loaded, numbers: tuple[int, ...]
) -> dict[int, tuple[Attack, Any]]:
    """The trigger as it is and, where it is a patch, as many of its `numbers` of copies as fit."""
    found: dict[int, tuple[Attack, Any]] = {1: measuring.make_attack(opened, config, loaded)}
    for copies in numbers[1:]:
        with contextlib.suppress(UserError):
            found[copies] = measuring.amplify(opened, config, loaded, copies)
    return found


def _write_page(content: dict[str, Any], pictures: list[erase.Picture], args: Args) -> None:
    """The page, where one was asked for; `content` is repair.json.

    Raises: UserError when it cannot be written, saying that the repaired model stands.
    """
    if args.report is None:
        return
    name, rates = pathlib.Path(content["model"]["path"]).name, content["amplified"]
    shown = erased.content(content, name=name, moments=erasure.moments(pictures), amplified=rates)
    try:
        page.write(args.report, shown)
    except UserError as error:
        raise UserError(f"{args.out} is written, but {error}") from None


def _show(content: dict[str, Any]) -> None:
    """What was done, and how long it took."""
    steps, resumed = content["config"]["num_steps"], content["resumed"]
    earlier = f", {resumed['step']} of them before it was resumed" if resumed else ""
    show.say(f"{steps} iterations without any data{earlier}; this run took {show.seconds(content['seconds'])}.")
    last = {name: values[-1] for name, values in content["curves"].items() if name != "step"}
    show.say(f"At the end: discrepancy {last['discrepancy']:.4g}, regulariser {last['regulariser']:.4g}.")
    show.say("Scan the repaired model, or measure it on images of yours, before you use it.")
