"""`jaxbd repair`: finds the trigger, unlearns it, writes the repaired model."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxbd import evaluate, record, results, workflow
from jaxbd.base import Array, Attack, Batch, UserError, Variables
from jaxbd.cli import common, convert, long_job, show
from jaxbd.cli import evaluate as measuring
from jaxbd.cli import scan as scanning
from jaxbd.cli.progress import Progress
from jaxbd.interop import preprocess, trigger
from jaxbd.interop.load import Model
from jaxbd.repair import unlearn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Removes a backdoor: recovers its triggers with a scan, unlearns them, and writes the repaired model.

    --method bna changes no weight and writes a guarded model, which also flags triggered images; it has flags of its
    own, see `jaxbd repair --method bna --help`. --method dhbe needs no data at all, see `jaxbd repair --method dhbe
    --help`.

    While it runs, the folder OUT.run beside the output holds checkpoints. Ctrl-C or SIGTERM ends it after the current
    steps, saves, and prints the command to go on with; a second one ends it at once. After a crash too, --resume goes
    on from the last checkpoint. OUT.run is removed once the output is written. Of a scan, the steps of --save-every are
    those of all cells (class x level) together.

    --memory-budget, short for --search.memory-budget, takes units: 500MB, 2GiB, or plain bytes.

    Attributes:
      model: a PyTorch file, .safetensors, or a jaxbd model folder.
      data: clean images with labels, see `jaxbd scan --help`.
      out: the repaired model: .pth or .safetensors in the source's own keys and layout, or a model folder. The
        figures go beside it, as <name>.repair.json, or into the folder as repair.json.
      method: how to repair.
      evidence: what is unlearned. "mixture": all recovered distributions that reached their level, in equal shares;
        "entropy": the same, weighted by the exponential of their entropy; "level": the one of --level; "pixel": a
        single reversed trigger.
      level: of --evidence level.
      scan: scan.json of an earlier scan, whose classes are then the only ones searched.
      batch_size: images per unlearning step.
      given: the trigger, where you have it: it is unlearned instead of what a scan recovers.
      unlearning: length and rule of unlearning.
      preset: settings that the --search flags start from, see `jaxbd scan --help`.
      search: what is searched, and how long.
      job: how it may be stopped.
      reading: how model and data are read.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: str
    out: pathlib.Path
    method: Annotated[Literal["unlearn", "bna", "dhbe"], tyro.conf.arg(name="method")] = "unlearn"
    evidence: Literal["mixture", "entropy", "level", "pixel"] = "mixture"
    level: float | None = None
    scan: pathlib.Path | None = None
    batch_size: int = 64
    given: Annotated[measuring.Trigger, tyro.conf.arg(name="")] = measuring.Trigger()
    unlearning: Annotated[unlearn.Config, tyro.conf.arg(name="")] = unlearn.Config(
        stamp_rate=0.2, learning_rate=5e-3, num_steps=300
    )
    preset: Literal["quick", "released", "paper"] = "quick"
    search: workflow.ScanConfig = workflow.ScanConfig()
    job: Annotated[long_job.Flags, tyro.conf.arg(name="")] = long_job.Flags(save_every=scanning.SAVE_EVERY)
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading()

    def __post_init__(self):
        if (self.evidence == "level") != (self.level is not None):
            raise UserError("--evidence level and --level belong together; give both or neither")
        if self.level is not None and self.level not in self.search.levels:
            known = ", ".join(map(str, self.search.levels))
            raise UserError(f"--level {self.level} is not searched; choose from {known} or change --search.levels")
        if self.evidence in ("level", "entropy") and self.search.method in ("pixel", "neural-cleanse"):
            raise UserError(f"scan method {self.search.method} models no levels; use --evidence mixture or pixel")
        if self.given.trigger is None and (self.given.apply, self.given.place) != (None, None):
            raise UserError("--apply and --place describe a trigger; give it with --trigger")
        if self.given.trigger is not None and self.scan is not None:
            raise UserError("a given trigger is unlearned without a scan; leave --trigger or --scan out")
        if self.batch_size < 1:
            raise UserError(f"batch size of the repair is {self.batch_size}; give at least 1")


def defaults(argv: list[str]) -> Args:
    """The values where there is no flag."""
    return Args(model=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING, search=common.preset(argv))


class Evidence(NamedTuple):
    """What is unlearned: `stamp(key, model, images)` with the mixture `evidence`, leading to `target`."""

    target: int
    stamp: Callable[..., Array]
    evidence: unlearn.Evidence


def run(args: Args) -> int:
    """Finds, unlearns, measures before and after on held-out images, writes."""
    common.start()
    in_folder = convert.is_folder(args.out)
    common.check_output(args.out, folder=in_folder)
    beside = figures(args.out)
    common.check_output(None if in_folder else beside)
    files = long_job.prepare(args.out, args.job)
    loaded = None if args.given.trigger is None else trigger.load(args.given.trigger)
    args = dataclasses.replace(args, search=dataclasses.replace(args.search, targets=_wanted(args)))
    show.note(f"reading {args.model} and {args.data}, checking the preprocessing …")
    opened = common.open_both(args.model, args.data, args.reading)
    if in_folder and opened.table and opened.table.used.channels == "bgr":
        raise UserError("this model takes BGR images, which a model folder cannot say; write .pth or .safetensors")
    least = max(args.batch_size, args.search.batch_size)
    search, held_out = common.search_and_held_out(opened.dataset, args.reading.seed, least)
    show.preprocessing(opened.table)
    identity = common.identity(
        "repair", args, common.model_record(opened.model), data=(search, held_out), trigger=loaded
    )
    with long_job.Job(files, args.job, identity) as job, Progress() as progress:
        if loaded is not None:
            known = measuring.settle(opened, args.given, loaded)
            attack, pixels = measuring.make_attack(opened, known, loaded)
            found, evidence = None, [Evidence(known.target, attack.stamp, unlearn.single(pixels))]
        else:
            found, evidence = _recover(opened, search, held_out, args, progress, job.keep)
        if not evidence:
            long_job.finish(files)
            show.say("The scan found no backdoor: nothing to repair, nothing is written.", _why(found, opened, args))
            return 0
        repaired, seconds = _unlearn_all(opened, evidence, search, args, progress, job.keep)
    rows = _measure(opened, evidence, repaired, held_out, args.reading.seed)
    content = _as_record(opened, found, evidence, rows, seconds, len(search.labels), len(held_out.labels), args)
    content["resumed"] = job.resumed
    save(args.out, opened.model, repaired.variables, content)
    long_job.finish(files)
    _show(opened, rows, content)
    show.written(args.out, beside)
    return 0


def _wanted(args: Args) -> tuple[int, ...]:
    """Classes to search: `--target`, or those of an earlier scan; none stands for all."""
    if args.given.target is not None:
        return (args.given.target,)
    if args.scan is None:
        return args.search.targets
    earlier = record.read_json(args.scan)
    targets = earlier.get("targets") if isinstance(earlier, dict) else None
    if not isinstance(targets, list) or not all(type(target) is int for target in targets):
        raise UserError(f"{args.scan} is not the result of a scan; give what `jaxbd scan --out` wrote")
    if not targets:
        raise UserError(f"{args.scan} names no target class, so there is nothing to repair; leave --scan out to search")
    return tuple(targets)


def _recover(opened: common.Opened, search: Batch, held_out: Batch, args: Args, progress, keep):
    """The scan, and the evidence for each class it calls attacked (or that was named)."""
    found = scanning.scan(opened, search, held_out, args.search, args.reading.seed, progress, keep)
    named = args.search.targets if args.given.target is not None else ()
    targets = sorted({*found.decision.targets, *named})
    if args.evidence == "pixel":
        reverse = lambda target: _reversed_pixels(opened, found, target, search, held_out, args, progress, keep)
        return found, [reverse(target) for target in targets]
    return found, [_distributions(found, target, args) for target in targets]


def _distributions(found: workflow.Scan, target: int, args: Args) -> Evidence:
    """The recovered distributions of one class: those that reached their level, or the one asked for."""
    if args.level is None:
        mixture = workflow.entropy_mixture if args.evidence == "entropy" else workflow.equal_mixture
        return Evidence(target, found.inversion.stamp, mixture(found, target))
    states = workflow.cells_of(found, target)
    chosen = args.search.levels.index(args.level)
    evidence = unlearn.single(jax.tree.map(lambda leaf: leaf[chosen], states))
    return Evidence(target, found.inversion.stamp, evidence)


def _reversed_pixels(
    opened, found: workflow.Scan, target: int, search, held_out, args: Args, progress, keep
) -> Evidence:
    """A single reversed trigger of one class, where the scan located one or as configured."""
    settings = args.search.pixel
    if found.located is not None:
        row, column = map(int, found.located.places[target])
        height, width, _ = opened.model.spec.image_shape
        row, column = min(row, height - settings.patch), min(column, width - settings.patch)
        settings = dataclasses.replace(settings, place="fixed", row=row, column=column)
    config = dataclasses.replace(args.search, method="pixel", targets=(target,), pixel=settings)
    single = scanning.scan(opened, search, held_out, config, args.reading.seed, progress, keep)
    return Evidence(target, single.inversion.stamp, unlearn.uniform(workflow.cells_of(single, target)))


def _unlearn_all(opened: common.Opened, evidence: list[Evidence], search: Batch, args: Args, progress, keep):
    """Unlearns one class after the other: (model with repaired variables, seconds)."""
    model, seconds = opened.model, []
    for number, (target, stamp, mixture) in enumerate(evidence):
        result = workflow.unlearn_trigger(
            jax.random.fold_in(jax.random.key(args.reading.seed), 10 + number), model.net, model.variables, stamp,
            mixture, search, args.unlearning, batch_size=args.batch_size, progress=progress,
            label=f"unlearn: class {target}", keep=keep,
        )  # fmt: skip
        model = model._replace(variables=result.variables)
        seconds.append(result.seconds)
    return model, type(seconds[0])(*map(sum, zip(*seconds, strict=True)))


def _measure(opened: common.Opened, evidence: list[Evidence], repaired, held_out: Batch, seed: int):
    """(target, rates before, rates after) on held-out images under each class's triggers, highest rate first."""
    key, rows = jax.random.key(seed), []
    for target, stamp, mixture in evidence:
        attack = _as_attack(target, stamp)
        rates = [
            evaluate.rates(key, opened.model.net, variables, held_out, attack, mixture)
            for variables in (opened.model.variables, repaired.variables)
        ]
        rows.append((target, *rates))
    return sorted(rows, key=lambda row: -(row[1].attack_success_rate or 0))


def _as_attack(target: int, stamp: Callable[..., Array]) -> Attack:
    """Every image stamped by a trigger model of its own, drawn from the mixture."""
    relabel = lambda labels: jnp.full_like(labels, target)
    return Attack(lambda key: (), unlearn.mixed(stamp), lambda key, trigger, batch: batch, relabel)


def figures(path: pathlib.Path) -> pathlib.Path:
    """Where the figures of a repaired model at `path` go: into a folder, beside a file."""
    return path / "repair.json" if convert.is_folder(path) else path.with_name(f"{path.stem}.repair.json")


def save(path: pathlib.Path, model: Model, variables: Variables, content: dict[str, Any]) -> None:
    """Writes `variables` in the form of `model`, then the figures; says what the file does not hold."""
    if convert.is_folder(path):

        def fill(new: pathlib.Path) -> None:
            convert.load.save_model(new, model, variables)
            record.write_json(new / "repair.json", content)

        common.write_folder(path, fill)
        return
    note = convert.write(path, model, variables)
    show.say(*convert.notes(path, model, note))
    record.write_json(figures(path), content)


def _as_record(
    opened: common.Opened, found: workflow.Scan | None, evidence: list[Evidence], rows, seconds, searched, judged, args
) -> dict[str, Any]:
    """The content of repair.json; `before` and `after` are of the class whose triggers worked best."""
    target, before, after = rows[0]
    content = results.repair(
        args.method, before, after, args.unlearning, seconds,
        model=common.model_record(opened.model),
        data=common.data_record(opened.dataset, args.reading, search=searched, held_out=judged),
        seed=args.reading.seed,
    )  # fmt: skip
    given = args.given.trigger
    content["target"] = target
    content["trigger"] = dataclasses.asdict(args.given) if given else "recovered"
    content["evidence"] = "given trigger" if given else args.evidence
    content["trigger_models"] = {row.target: len(row.evidence.weights) for row in evidence}
    content["classes"] = [
        {"class": each, "before": results.rates(was), "after": results.rates(now)} for each, was, now in rows
    ]
    content["preprocessing"] = preprocess.as_record(opened.table) if opened.table else None
    if found is not None:
        content["scan"] = {
            "verdict": found.decision.verdict, "targets": found.decision.targets, "decided_by": found.decided_by,
            "searched": show.searched(args.search), "config": dataclasses.asdict(args.search), "steps": found.steps,
            "seconds": results.seconds(found.seconds),
        }  # fmt: skip
    return record.plain(content)


def _show(opened: common.Opened, rows, content: dict[str, Any]) -> None:
    """Before and after, and what the figures are figures of."""
    names = common.class_names(opened)
    table = []
    for target, before, after in rows:
        label = common.class_label(target, names)
        table += [(f"class {label}, before", results.rates(before)), (f"class {label}, after", results.rates(after))]
    show.rates(table)
    whose = "the given trigger" if content["trigger"] != "recovered" else "the recovered triggers"
    show.say(f"Attack success rates are those of {whose}, on {content['data']['held_out']} held-out images.")
    show.say(f"Unlearning took {show.seconds(content['seconds'])}. Scan the repaired model before you use it.")


def _why(found: workflow.Scan, opened: common.Opened, args: Args) -> str:
    """What a clean or inconclusive scan means for a repair."""
    best = int(np.nanargmax(found.rates))
    label = common.class_label(best, common.class_names(opened))
    reach = (
        f"verdict {found.decision.verdict}, the strongest triggers lead {show.percent(found.rates[best])} to {label}"
    )
    return f"({reach}; --target {best} repairs that class all the same. Searched: {show.searched(args.search)}.)"
