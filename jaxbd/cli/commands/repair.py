"""`jaxbd repair`: removes a backdoor with any repair method and writes the repaired model."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import tyro

from jaxbd import files, methods
from jaxbd.base import Batch, RepairData, Suspect, UserError
from jaxbd.cli import (
    case,
    common,
    erasing,
    from_case,
    holding,
    job,
    known,
    outcome,
    outputs,
    parse,
    show,
    triggers,
)
from jaxbd.cli.commands import scan as scanning
from jaxbd.data import load
from jaxbd.interop import load as models
from jaxbd.interop import preprocess
from jaxbd.pipelines import hold
from jaxbd.pipelines.repair import Repaired
from jaxbd.pipelines.scan import ScanConfig
from jaxbd.repairs import dhbe
from jaxbd.report import results
from jaxbd.training.run import Run

Settings = TypeVar("Settings")
Search = TypeVar("Search")
DEFAULT = holding.AUTO
JUDGED = 10_000
"""Default limit on the images for measuring, for methods that repair without images."""


@dataclasses.dataclass(frozen=True)
class NoSearch:
    """Search settings of a method that needs no trigger: no search, no flags."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Generic[Settings, Search]):
    """Removes a backdoor and writes the repaired model.

    A method that needs a trigger first recovers one with a scan, unless you give a trigger or the
    result of an earlier scan. `jaxbd methods` lists the methods and what each needs;
    for a method's flags, see `jaxbd repair --method NAME --help`: --with.… are its settings,
    and --search.… those of the scan. A method that guards writes a folder with the original model
    and its corrections; see `jaxbd guard`.

    During the repair, the folder OUT.run next to the output holds checkpoints, and losses go to
    OUT.metrics.jsonl as lines of JSON. Ctrl-C or SIGTERM stops it after the current steps, saves,
    and prints the command that resumes it; a second signal stops it at once. --resume continues
    from the last checkpoint, after a crash too. OUT.run is removed once the output is written.

    --search.memory-budget takes units: 500MB, 2GiB, or plain bytes.

    Attributes:
      model: a PyTorch file, .safetensors, .onnx, .pt2, or a jaxbd model folder; or a case, the
        folder written by `jaxbd scan --out`. A case needs no other flag: it provides model, data
        and triggers, and the repaired model, its figures and a new scan of it are written into the
        case.
      out: the repaired model: .pth or .safetensors with the source's keys and layout, .onnx, or a
        model folder. The figures go next to it as <name>.repair.json, or into the folder as
        repair.json.
      data: clean images with labels, see `jaxbd scan --help`. A quarter of them are held out to
        check the rounds of a repair and to measure it.
      test_data: images to measure the repair on instead. For methods that repair without images
        these are the only images, and they are read after the repaired model is written.
      report: write a self-contained HTML page here, with --method dhbe. It shows the generated
        images over time, the losses, and, with --test-data, the figures before and after; if the
        trigger is a patch, also for 4 and 9 copies on an image (see `jaxbd evaluate --help`).
        After --resume, earlier generated images are missing.
      method: repair method, a name from `jaxbd methods`. "auto" unlearns the triggers that the scan
        recovered and checks itself, see --rounds. After an inconclusive scan it does so for the
        classes with one sign, or uses `clip` if no trigger was recovered. Its --with.… flags are
        those of unlearn.
      rounds: most rounds of a repair that checks itself. After each round it measures images not
        used for the repair, searches for triggers again, and repairs those that work. It stops when
        no unusually small trigger works, the --max-drop budget is spent, or the rounds are used up.
        Default with auto: 4; other methods repair once unless this is given.
      max_drop: clean accuracy that the rounds may cost, as a share of images.
      preset: settings that the method's flags start from.
      steps: length of the repair, short for the method's num-steps.
      batch_size: images per step.
      evidence: which results of a scan by class to use. "mixture": all recovered distributions that
        reached their level, in equal shares; "entropy": the same, weighted by the exponential of
        their entropy; "level": only the one of --level.
      level: the level for --evidence level.
      scan: an earlier scan: either a case, whose triggers replace the search, or a scan.json, which
        limits the search to its attacked classes.
      rescan: whether to scan the repaired model of a case, into the case's rescan.json, or
        <name>.rescan.json beside an --out elsewhere.
      given: the trigger, if you have it; then no scan is run.
      settings: settings of the method.
      search: what is searched, and for how long.
      stopping: how the repair is stopped and resumed.
      reading: how the model and the data are read.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    out: pathlib.Path | None = None
    data: str | None = None
    test_data: str | None = None
    report: pathlib.Path | None = None
    method: str = DEFAULT
    rounds: int | None = None
    max_drop: float = 0.02
    preset: str | None = None
    steps: int | None = None
    batch_size: int = 64
    evidence: Literal["mixture", "entropy", "level"] = "mixture"
    level: float | None = None
    scan: pathlib.Path | None = None
    rescan: bool = True
    given: Annotated[triggers.Trigger, tyro.conf.arg(name="")] = triggers.Trigger()
    settings: Annotated[Settings, tyro.conf.arg(name="with")]
    search: Search
    stopping: Annotated[job.Flags, tyro.conf.arg(name="")] = job.Flags()
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading()

    def __post_init__(self):
        if (self.evidence == "level") != (self.level is not None):
            raise UserError("--evidence level and --level belong together; give both or neither")
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.given.trigger is None and (self.given.apply, self.given.place) != (None, None):
            raise UserError("--apply and --place describe a trigger; give it with --trigger")
        if self.given.trigger is not None and self.scan is not None:
            raise UserError("a given trigger needs no scan; leave out --trigger or --scan")


def choose(argv: Sequence[str]) -> tuple[Any, Any]:
    """The class of flags and the default values for `argv`.

    Raises: UserError on an unknown method or preset.
    """
    name, preset, search_method = parse.preview(argv, "--method", "--preset", "--search.method")
    name = name or DEFAULT
    method, preset = holding.find(name), holding.pick_preset(name, preset)
    if preset and preset not in method.presets:
        known_presets = ", ".join(method.presets) or "none"
        raise UserError(f"--preset is {preset!r}; {method.name} has {known_presets}")
    settings = method.preset(preset)
    search: Any = NoSearch()
    if "trigger" in method.needs:
        search = scanning.kind_of(search_method or method.search).default()
        if search_method is None:
            search = dataclasses.replace(search, method=method.search)
    reading = _usual_reading(method)
    defaults = Args(
        model=tyro.MISSING,
        settings=settings,
        search=search,
        method=name,
        preset=preset,
        reading=reading,
    )
    return Args[type(settings), type(search)], defaults


def _usual_reading(method: methods.Method) -> common.Reading:
    """The default reading settings."""
    # a method without images only measures on them, which is cheap, so the limit is higher
    return common.Reading() if "clean" in method.needs else common.Reading(limit=JUDGED)


class Opened(NamedTuple):
    """Everything a repair works on.

    Attributes:
      model: the suspect's file; opened: the same with its data, None without images.
      clean: images to repair with, None without images; judge: images to measure the repair on.
      material: input for searches; None without images.
    """

    model: models.Model
    opened: common.Opened | None
    clean: Batch | None
    judge: Batch | None
    material: common.Material | None


def run(args: Any) -> int:
    """Finds a trigger if the method needs one, repairs, measures and writes."""
    common.start()
    method = holding.find(args.method)
    args, past = from_case.fill_in(args, method, _usual_reading(method))
    scanned = past  # the case whose settings the repaired model is scanned with
    if past is None or not past.is_own or not args.rescan or method.guards:
        scanned = None
    if scanned is not None and from_case.is_repaired(args):
        from_case.rescan(args, scanned)
        return 0
    paths, settings = _check(args, method), with_steps(args.settings, args.steps)
    if scanned is not None:
        from_case.check_rescan(args, scanned)
    loaded = triggers.load_trigger(args.given)
    searches = "trigger" in method.needs and (past is None or past.searches)
    if searches:
        searched = dataclasses.replace(args.search, targets=known.classes_to_search(args))
        args = dataclasses.replace(args, search=searched)
    there = _open(args, method, searches=searches and loaded is None)
    suspect, watch = models.suspect_of(there.model), None
    recalled = None
    if past is not None:
        from_case.check(past, there.model, there.material)
    if past is not None and not past.searches:
        take_leads = args.method == DEFAULT
        recalled = from_case.recall(past, suspect, args.given.target, take_leads=take_leads)
    identity = _identify(args, method, there, loaded)
    with job.open_run(paths, args.stopping, identity, with_metrics=True) as going:
        found = _know(going, args, method, there, loaded, recalled)
        holding.say_doubt(args, found)
        if "trigger" in method.needs and not found.evidence:
            other = holding.pick_without_trigger(args, found)
            if other is None:
                return _stop_without_backdoor(found, there, args, paths)
            method, settings = other
        if method.name == "dhbe":
            settings = dhbe.adapt(settings, suspect, RepairData(), args.batch_size)
            pictures = args.report is not None
            watch = erasing.Watch(going, suspect, settings, args.reading.seed, pictures)
        repaired, held = _repair(going, method, suspect, there, found, settings, args)
    content = _as_record(args, method, settings, there, found, repaired)
    content["checked"] = None if held is None else holding.as_record(held)
    content |= {"resumed": job.describe_resumed(going, paths), "metrics": paths.metrics.name}
    if watch is not None:
        watch.check(repaired)
        content |= watch.facts | {"curves": erasing.curves(next(iter(repaired.infos.values())))}
    if there.judge is None:
        _finish_unmeasured(args, paths, there, repaired, loaded, watch, content)
    else:
        rows = _measure(suspect, repaired, found, there, args, loaded)
        content |= _describe_data(args, there, loaded) | outcome.describe_rows(rows)
        content = outcome.save(args.out, there.model, repaired, content)
        job.finish(paths)
        _say(args, content, rows, there)
        if held is not None:
            holding.say(held, args)
    beside = None if outputs.is_folder(args.out) else outcome.figures(args.out)
    show.written(args.out, beside, paths.metrics, args.report)
    if scanned is not None:
        from_case.rescan(args, scanned)
    return 0


def _identify(args: Any, method: methods.Method, there: Opened, loaded: Any) -> dict[str, Any]:
    """Everything the run depends on. A trigger used only for measuring may differ when the run is
    resumed."""
    if "trigger" not in method.needs:
        args, loaded = dataclasses.replace(args, given=triggers.Trigger()), None
    images = (there.clean, there.judge)
    record = common.model_record(there.model)
    return common.identity("repair", args, record, data=images, trigger=loaded)


def _finish_unmeasured(
    args: Any,
    paths: job.Paths,
    there: Opened,
    repaired: Repaired,
    loaded: Any,
    watch: erasing.Watch | None,
    content: dict[str, Any],
) -> None:
    """Writes a model that was repaired without images; then measures it if there is --test-data.

    Images are read only after the repaired model is written, so a bad image cannot lose it.
    """
    content = outcome.save(args.out, there.model, repaired, content)
    job.finish(paths)
    _write_page(args, watch, content)
    if args.test_data is None:
        _say(args, content, [], there)
        return
    try:
        show.note(f"reading {args.test_data} …")
        opened = common.open_both(args.model, args.test_data, args.reading, must_classify=False)
        there = there._replace(opened=opened, judge=load.as_batch(opened.dataset))
        suspect = models.suspect_of(there.model)
        rows = _measure(suspect, repaired, known.Known([]), there, args, loaded)
        more = _describe_data(args, there, loaded) | outcome.describe_rows(rows)
        if watch is not None and loaded is not None and args.report is not None:
            more["amplified"] = erasing.measure_copies(
                suspect, repaired, opened, args.given, loaded, args.reading.seed
            )
    except UserError as error:
        raise UserError(f"{args.out} is written, but could not be measured: {error}") from None
    show.preprocessing(opened.table)
    content = files.plain({**content, **more})
    files.write_json(outcome.figures(args.out), content)
    _write_page(args, watch, content)
    _say(args, content, rows, there)


def _write_page(args: Any, watch: erasing.Watch | None, content: dict[str, Any]) -> None:
    """Writes the page, if requested.

    Raises: UserError if it cannot be written; it says that the repaired model is written.
    """
    if watch is None or args.report is None:
        return
    try:
        watch.write_page(args.report, content)
    except UserError as error:
        raise UserError(f"{args.out} is written, but {error}") from None


def with_steps(settings: Any, steps: int | None) -> Any:
    """`settings` with the length from --steps, if given.

    Raises: UserError for a method without a length.
    """
    if steps is None:
        return settings
    if hasattr(settings, "correction"):
        correction = with_steps(settings.correction, steps)
        return dataclasses.replace(settings, correction=correction)
    if not hasattr(settings, "num_steps"):
        raise UserError("this method has no num-steps, so its length is fixed; leave --steps out")
    counted: dict[str, Any] = {"epochs": None} if hasattr(settings, "epochs") else {}
    return dataclasses.replace(settings, num_steps=steps, **counted)


def _length(settings: Any) -> int | None:
    """The number of steps in `settings`; None if they have none."""
    return getattr(getattr(settings, "correction", settings), "num_steps", None)


def _check(args: Any, method: methods.Method) -> job.Paths:
    """Checks that the flags fit the method and the outputs can be written, before anything is
    read."""
    in_folder = outputs.is_folder(args.out)
    if method.guards and not in_folder and args.out.suffix != ".onnx":
        raise UserError(
            "a guarded model is a folder or an ONNX file; give --out a name without "
            f"{args.out.suffix}"
        )
    if "clean" in method.needs and args.data is None:
        raise UserError(f"{method.name} needs clean images; give --data")
    if "clean" not in method.needs and args.data is not None:
        raise UserError(
            f"{method.name} takes no data; leave --data out, or give --test-data to measure the"
            " repaired model"
        )
    _check_given(args, method)
    holding.check(args, method)
    if args.steps is not None:
        usual = _length(method.preset(args.preset))
        if _length(args.settings) not in (args.steps, usual):
            raise UserError(
                "--steps and the method's num-steps are the same setting; give one of them"
            )
    if method.name == "dhbe" and args.settings.inner != method.preset(args.preset).inner:
        raise UserError("--with.inner follows from the device; leave it out")
    if args.report is not None and method.name != "dhbe":
        raise UserError("--report is for --method dhbe; scan the repaired model for a page")
    if isinstance(args.search, ScanConfig):
        _check_level(args)
    inputs = [args.model, args.data, args.scan, args.given.trigger]
    outputs.check_model_output(args.out, inputs, force=args.stopping.force)
    figures = outcome.figures(args.out)
    outputs.check_output(None if in_folder else figures)
    outputs.refuse_existing("--out", args.out, replace=args.stopping.replace)
    paths = job.prepare(args.out, args.stopping)
    assert paths is not None
    outputs.check_page(args.report, [args.model, args.out, figures, *paths])
    for flag, each in (("--out", figures), ("--report", args.report)):
        replace = job.may_replace(args.out, args.stopping)
        outputs.refuse_existing(flag, each, replace=replace)
    return paths


def _check_given(args: Any, method: methods.Method) -> None:
    """Raises UserError if the flags about a trigger do not fit the method."""
    given = args.given
    if "trigger" not in method.needs:
        if args.scan is not None:
            raise UserError(f"{method.name} needs no trigger, so no scan; leave --scan out")
        if given.trigger is None and given != triggers.Trigger():
            raise UserError(
                f"{method.name} repairs without a trigger; --target and related flags describe one"
                " for measuring, give it with --trigger"
            )
        if given.trigger is not None and args.data is None and args.test_data is None:
            raise UserError(
                f"{method.name} repairs without the trigger; to measure with it, also give images"
                " with --test-data"
            )
    elif (
        given.target is not None
        and given.trigger is None
        and scanning.kind_of(args.search.method) is not scanning.by_class
    ):
        raise UserError(
            f"a search by {args.search.method} finds the targets itself; give the trigger to"
            " class --target with --trigger, or leave --target out"
        )


def _check_level(args: Any) -> None:
    """Raises UserError if --evidence asks for something the scan does not model."""
    if args.level is not None and args.level not in args.search.levels:
        levels = ", ".join(map(str, args.search.levels))
        raise UserError(
            f"--level {args.level} is not searched; choose from {levels} or change --search.levels"
        )
    if args.evidence != "mixture" and args.search.method in ("pixel", "neural-cleanse"):
        raise UserError(
            f"scan method {args.search.method} models no levels; use --evidence mixture"
        )


def _open(args: Any, method: methods.Method, *, searches: bool) -> Opened:
    """Reads the model and the images for repairing and measuring."""
    if args.data is None:  # --test-data is read after the repaired model is written
        show.note(f"reading {args.model} …")
        return Opened(common.open_alone(args.model, args.reading), None, None, None, None)
    show.note(f"reading {args.model} and {args.data}, checking the preprocessing …")
    least = max(args.batch_size, args.search.batch_size) if searches else args.batch_size
    material = common.open_material(args.model, args.data, args.reading, least, "stored")
    opened, judge = material.opened, material.held_out
    show.preprocessing(opened.table)
    bgr = opened.table is not None and opened.table.used.channels == "bgr"
    if bgr and outputs.is_folder(args.out):
        raise UserError(
            "this model takes BGR images, which a model folder cannot record; write .pth or"
            " .safetensors"
        )
    if args.test_data is not None:
        other = common.open_both(args.model, args.test_data, args.reading, must_classify=False)
        judge = load.as_batch(other.dataset)
    return Opened(opened.model, opened, material.search, judge, material)


def _know(
    run: Run,
    args: Any,
    method: methods.Method,
    there: Opened,
    loaded: Any,
    recalled: known.Known | None,
) -> known.Known:
    """If the method needs a trigger: the given one, that of an earlier scan (`recalled`), or what a
    new scan recovers."""
    if "trigger" not in method.needs:
        return known.Known([])
    if loaded is not None and there.opened is not None:
        return known.take_given(there.opened, args.given, loaded, method.guards)
    if recalled is not None:
        return recalled
    assert there.material is not None
    named = args.search.targets if args.given.target is not None else ()
    kind = scanning.kind_of(args.search.method)
    take_leads = args.method == DEFAULT
    return known.search(run, kind, there.material, args, named, take_leads=take_leads)


def _stop_without_backdoor(found: known.Known, there: Opened, args: Any, paths: job.Paths) -> int:
    """Prints why nothing is repaired; returns the exit code."""
    job.finish(paths)
    if found.past is not None:
        show.say(
            f"The scan in {found.past.folder} says {found.past.verdict} and names no class: nothing"
            " to repair, nothing was written. (--target repairs a class anyway.)"
        )
        return 0
    assert there.opened is not None and found.kind is not None  # a scan ran on its images
    names = common.class_names(there.opened)
    show.say(
        "The scan found no backdoor: nothing to repair, nothing was written.",
        found.kind.explain_clean(found.scan, args.search, names),
    )
    return 0


def _repair(
    run: Run,
    method: methods.Method,
    suspect: Suspect,
    there: Opened,
    found: known.Known,
    settings: Any,
    args: Any,
) -> tuple[Repaired, hold.Held | None]:
    """Runs the method on the known triggers, in rounds if the repair checks itself."""
    more = {"search_again": found.search_again} if method.guards else {}
    key = erasing.repair_key(args.reading.seed)
    if holding.is_asked(args) and found.evidence:
        assert there.material is not None  # methods that need a trigger need clean images too
        images = (there.material.search, there.material.held_out)
        held = holding.repair(run, key, suspect, images, found, settings, args)
        return held.repaired, held
    driver = functools.partial(
        method.driver.repair, run, key, suspect, there.clean, found.evidence, method.name, settings
    )
    return driver(batch_size=args.batch_size, **more), None


def _measure(
    suspect: Suspect,
    repaired: Repaired,
    found: known.Known,
    there: Opened,
    args: Any,
    loaded: Any,
) -> list[outcome.Row]:
    """Figures on the images for measuring, under the known or given triggers."""
    assert there.judge is not None and there.opened is not None
    seed = args.reading.seed
    if found.evidence or loaded is None:
        return outcome.measure(suspect, repaired, found.evidence, there.judge, seed)
    config = triggers.settle(there.opened, args.given, loaded, all_to_all=True)
    attack = triggers.make_attack(there.opened, config, loaded)
    return [outcome.measure_attack(suspect, repaired, attack, there.judge, seed)]


def _describe_data(args: Any, there: Opened, loaded: Any) -> dict[str, Any]:
    """What repair.json says about the images, their preprocessing, and a given trigger."""
    assert there.judge is not None and there.opened is not None
    counts = {"held_out": len(there.judge.labels)}
    if there.clean is not None:
        counts["search"] = len(there.clean.labels)
    found = {
        "data": common.data_record(there.opened.dataset, args.reading, **counts),
        "preprocessing": preprocess.as_record(there.opened.table) if there.opened.table else None,
    }
    if loaded is not None:
        config = triggers.settle(there.opened, args.given, loaded, all_to_all=True)
        found["trigger"] = triggers.describe(args.given, config)
    return found


def _as_record(
    args: Any,
    method: methods.Method,
    settings: Any,
    there: Opened,
    found: known.Known,
    repaired: Repaired,
) -> dict[str, Any]:
    """The content of repair.json without the figures."""
    content = results.repair(
        method.name,
        settings,
        repaired.seconds,
        model=common.model_record(there.model),
        data=None,
        seed=args.reading.seed,
    )
    content |= {
        "inputs": {"model": case.place_of(args.model)},
        "preset": args.preset or (method.presets[0] if method.presets else None),
        "trigger": None,
        "evidence": None,
        "preprocessing": None,
        "before": None,
        "after": None,
        "amplified": None,
    }
    if found.past is not None:
        content |= {"trigger": "recovered", "evidence": "case"} if found.evidence else {}
        content["scan"] = from_case.summary(found.past)
        content["files"] = {found.past.record.name: found.past.sha256}
    elif found.scan is not None and found.evidence:
        content |= {"trigger": "recovered", "evidence": args.evidence}
    elif found.evidence:
        content["evidence"] = "given trigger"
    if found.kind is not None:
        content["scan"] = found.kind.summary(found.scan, args.search)
    return content


def _say(args: Any, content: dict[str, Any], rows: list[outcome.Row], there: Opened) -> None:
    """Prints the figures, the time, and the next step."""
    trigger_name = "the given trigger" if args.given.trigger else "the recovered triggers"
    if rows and there.opened is not None:
        outcome.say(rows, content, common.class_names(there.opened), trigger_name)
    times = show.seconds(content["seconds"])
    without = " without any data" if args.data is None else ""
    show.say(f"The repair{without} took {times}. Scan the repaired model before you use it.")
