"""`jaxbd repair --method bna`: corrects activation distributions, and writes a guarded model."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxbd import correct, evaluate, loop, pairs, record, results, stages
from jaxbd.base import Array, Attack, Batch, UserError, Variables
from jaxbd.cli import common, convert, flags, long_job, pair_scan, show
from jaxbd.cli import evaluate as measuring
from jaxbd.cli.progress import Progress
from jaxbd.interop import guarded, preprocess, trigger
from jaxbd.repair import bna, guard

PRESETS = {"quick": bna.Config(), "paper": bna.paper(), "released": bna.released()}
"""`--preset` -> settings that the --correction flags start from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Removes a backdoor without touching a weight, and writes a guarded model that also flags triggered images.

    The trigger is yours, or what a scan over pairs of classes finds. For each class to which it leads, the model's
    activations on triggered images are moved back to where they lie on clean ones. The result is a folder: the model
    as it was, and its corrections. See `jaxbd guard` for what it says of each image; `jaxbd evaluate` measures it.

    It can be stopped and resumed, as `jaxbd repair --help` says; of the scan, the steps of --save-every are those of
    all pairs together. --memory-budget, short for --search.memory-budget, takes units: 500MB, 2GiB, or plain bytes.

    Attributes:
      model: a PyTorch file, .safetensors, or a jaxbd model folder.
      data: clean images with labels, see `jaxbd scan --help`.
      out: the guarded model, a folder; the figures go into it as repair.json.
      method: how to repair.
      batch_size: images per step of the correction.
      given: the trigger, where you have it: no scan is run then.
      preset: settings that the --correction flags start from: this project's, or those of the paper or of the
        released code.
      correction: length and rule of the correction.
      rounds: how often a trigger is searched in the corrected net too and the correction made anew for all found so
        far, since an estimate is not the attacker's trigger; not with --trigger.
      false_alarms: a correction made anew that takes more than this share of the clean images of the class for
        another class is undone.
      scan_method: what the scan searches, see `jaxbd scan --method pairs --help`.
      search: how the scan searches.
      job: how it may be stopped.
      reading: how model and data are read.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: str
    out: pathlib.Path
    method: Annotated[Literal["bna"], tyro.conf.arg(name="method")] = "bna"
    batch_size: int = 64
    given: Annotated[measuring.Trigger, tyro.conf.arg(name="")] = measuring.Trigger()
    preset: Literal["quick", "paper", "released"] = "quick"
    correction: bna.Config = PRESETS["quick"]
    rounds: int = 2
    false_alarms: float = 0.15
    scan_method: Literal["pairs", "neural-cleanse", "pt-red"] = "pairs"
    search: pairs.Config = pairs.Config()
    job: Annotated[long_job.Flags, tyro.conf.arg(name="")] = long_job.Flags(save_every=pair_scan.SAVE_EVERY)
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading()

    def __post_init__(self):
        if self.given.trigger is None and self.given != measuring.Trigger():
            raise UserError("--apply, --place and --target describe a trigger; give it with --trigger")
        if self.batch_size < 1:
            raise UserError(f"batch size of the repair is {self.batch_size}; give at least 1")
        if self.rounds < 0:
            raise UserError(f"--rounds is {self.rounds}; give 0 or more")
        if not 0 <= self.false_alarms <= 1:
            raise UserError(f"--false-alarms is {self.false_alarms}; give a share from 0 to 1")


def defaults(argv: list[str]) -> Args:
    """The values where there is no flag."""
    preset = PRESETS[flags.named(argv, "--preset", PRESETS, "quick")]
    return Args(model=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING, correction=preset)


class Known(NamedTuple):
    """A trigger: `stamp(key, model, images)` leads images of the classes `sources` to `target`."""

    target: int
    sources: tuple[int, ...]
    stamp: Callable[..., Array]
    model: Any


class Row(NamedTuple):
    """A trigger's figures on held-out images: of the suspect, of the guarded net, and of the guard as a detector."""

    known: Known
    before: evaluate.Rates
    after: evaluate.Rates
    detection: evaluate.Detection


def run(args: Args) -> int:
    """Finds, corrects, measures before and after on held-out images, writes."""
    common.start()
    if not convert.is_folder(args.out):
        raise UserError(f"a guarded model is a folder, not a file; give --out a name without {args.out.suffix}")
    common.check_output(args.out, folder=True)
    files = long_job.prepare(args.out, args.job)
    loaded = None if args.given.trigger is None else trigger.load(args.given.trigger)
    config = pair_scan.chosen(args.search, args.scan_method)
    show.note(f"reading {args.model} and {args.data}, checking the preprocessing …")
    opened = common.open_both(args.model, args.data, args.reading)
    if opened.table and opened.table.used.channels == "bgr":
        raise UserError("this model takes BGR images, which a model folder cannot say; use --method unlearn")
    least = args.batch_size if loaded is not None else max(args.batch_size, config.batch_size)
    search, held_out = common.search_and_held_out(opened.dataset, args.reading.seed, least)
    show.preprocessing(opened.table)
    identity = common.identity(
        "repair", args, common.model_record(opened.model), data=(search, held_out), trigger=loaded
    )
    with long_job.Job(files, args.job, identity) as job, Progress() as progress:
        found, known = None, []
        if loaded is not None:
            known = _given(opened, args.given, loaded)
        else:
            found = pair_scan.scan(opened, search, held_out, config, args.reading.seed, progress, job.keep)
            known = [Known(t, e.sources, e.stamp, e.model) for t, e in sorted(found.triggers.items())]
        if not known:
            long_job.finish(files)
            show.say("The scan found no backdoor: nothing to repair, nothing is written.")
            show.say(f"(Verdict {found.verdict}, decided by {found.decided_by}; --trigger repairs a trigger you have.)")
            return 0
        variables, seconds = _correct(opened, known, found, search, args, config, progress, job.keep)
    rows = _measure(opened, known, variables, held_out, args.reading.seed)
    counts = {"search": len(search.labels), "held_out": len(held_out.labels)}
    content = {**_as_record(opened, found, rows, seconds, counts, config, args), "resumed": job.resumed}
    _save(args.out, opened, variables, [each.target for each in known], content)
    long_job.finish(files)
    _show(opened, rows, content)
    show.written(args.out)
    return 0


def _given(opened: common.Opened, flags: measuring.Trigger, loaded: Any) -> list[Known]:
    """A trigger for each class to which the given one leads."""
    attack, model = measuring.make_attack(opened, measuring.settle(opened, flags, loaded, all_to_all=True), loaded)
    labels = np.arange(opened.model.spec.classes)
    wanted = np.asarray(attack.relabel(jnp.asarray(labels)))
    sources = {t: tuple(labels[(wanted == t) & (labels != t)].tolist()) for t in sorted({*wanted.tolist()})}
    return [Known(target, those, attack.stamp, model) for target, those in sources.items() if those]


def _correct(
    opened: common.Opened, known: list[Known], found: pairs.PairScan | None, search: Batch, args: Args,
    config: pairs.Config, progress: Progress, keep: stages.Keep,
) -> tuple[Variables, loop.Seconds]:  # fmt: skip
    """The guarded net's variables: a correction of the suspect for each target, on clean images of its sources."""
    model, corrected = opened.model, []
    suspect = correct.Suspect(model.net, model.variables, tuple(model.spec.image_shape), model.spec.classes)
    for number, (target, sources, stamp, state) in enumerate(known):
        key = jax.random.fold_in(jax.random.key(args.reading.seed), 10 + number)
        common_settings = {
            "batch_size": args.batch_size, "false_alarms": args.false_alarms, "progress": progress,
            "label": f"bna: class {target}", "keep": keep,
        }  # fmt: skip
        if found is None:
            clean, kept = (correct.of_classes(search, classes) for classes in (sources, (target,)))
            repaired = correct.trigger(
                key, model.net, model.variables, stamp, state, clean, args.correction, kept=kept, **common_settings
            )
        else:
            repaired = correct.detected(
                key, suspect, found, target, search, args.correction, config, rounds=args.rounds, **common_settings
            )
        corrected.append(repaired)
    seconds = loop.total(*(each.seconds for each in corrected))
    return guard.pack(model.variables, [each.variables for each in corrected]), seconds


def _measure(opened: common.Opened, known: list[Known], variables: Variables, held_out: Batch, seed: int) -> list[Row]:
    """Figures under each class's trigger, highest attack success rate first."""
    key, suspect, targets = jax.random.key(seed), opened.model, tuple(each.target for each in known)
    net, flag, rows = guarded.make(suspect.net, targets), guarded.flag(suspect.net, targets), []
    for each in known:
        attack = as_attack(each)
        before = evaluate.rates(key, suspect.net, suspect.variables, held_out, attack, each.model)
        after = evaluate.rates(key, net, variables, held_out, attack, each.model)
        rows.append(Row(each, before, after, evaluate.detection(key, flag, variables, held_out, attack, each.model)))
    return sorted(rows, key=lambda row: -(row.before.attack_success_rate or 0))


def as_attack(known: Known) -> Attack:
    """The trigger as an attack on images of its sources; all others count as clean."""
    sources = jnp.asarray(known.sources)
    relabel = lambda labels: jnp.where(jnp.isin(labels, sources), known.target, labels)
    return Attack(lambda key: known.model, known.stamp, lambda key, model, batch: batch, relabel)


def _save(
    path: pathlib.Path, opened: common.Opened, variables: Variables, targets: list[int], content: dict[str, Any]
) -> None:
    """The guarded model with its figures."""

    def fill(new: pathlib.Path) -> None:
        guarded.save(new, opened.model.spec, variables, targets, {"source_sha256": opened.model.sha256})
        record.write_json(new / "repair.json", content)

    common.write_folder(path, fill)


def _as_record(
    opened: common.Opened, found: pairs.PairScan | None, rows: list[Row], seconds, counts, config, args: Args
) -> dict[str, Any]:
    """The content of repair.json; `before` and `after` are of the class whose trigger worked best."""
    best = rows[0]
    content = results.repair(
        args.method, best.before, best.after, args.correction, seconds,
        model=common.model_record(opened.model),
        data=common.data_record(opened.dataset, args.reading, **counts),
        seed=args.reading.seed,
    )  # fmt: skip
    content["target"] = best.known.target
    content["targets"] = sorted(row.known.target for row in rows)
    content["detection"] = results.detection(best.detection)
    content["trigger"] = "recovered" if found else dataclasses.asdict(args.given)
    content["classes"] = [
        {
            "class": row.known.target, "sources": list(row.known.sources), "before": results.rates(row.before),
            "after": results.rates(row.after), "detection": results.detection(row.detection),
        }
        for row in rows
    ]  # fmt: skip
    content["preprocessing"] = preprocess.as_record(opened.table) if opened.table else None
    if found is not None:
        content["scan"] = {
            "verdict": found.verdict, "targets": found.targets, "pairs": [list(pair) for pair in found.pairs],
            "setting": found.setting, "decided_by": found.decided_by,
            "triggers": results.estimates(found),
            "config": dataclasses.asdict(config), "steps": found.steps, "seconds": results.seconds(found.seconds),
        }  # fmt: skip
    return record.plain(content)


def _show(opened: common.Opened, rows: list[Row], content: dict[str, Any]) -> None:
    """Before and after, what is flagged, and what the figures are figures of."""
    names, table, flags = common.class_names(opened), [], []
    for known, before, after, found in rows:
        label = common.class_label(known.target, names)
        table += [(f"class {label}, before", results.rates(before)), (f"class {label}, after", results.rates(after))]
        numbers = (found.true_positive_rate, found.false_positive_rate, found.false_positive_rate_all)
        flags.append((f"class {label}", *map(show.percent, numbers)))
    show.rates(table)
    columns = ("flagged", "triggered images", "clean images of the class", "all clean images")
    show.table(columns, flags)
    whose = "the given trigger" if content["trigger"] != "recovered" else "the recovered triggers"
    show.say(f"Attack success and flags are those of {whose}, on {content['data']['held_out']} held-out images.")
    show.say(
        f"The correction took {show.seconds(content['seconds'])}. `jaxbd guard` says what it thinks of each image."
    )
