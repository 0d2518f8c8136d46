"""`jaxbd scan`: clean, backdoored or inconclusive, and which class a backdoor leads to."""

import dataclasses
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxbd import files
from jaxbd.base import UserError
from jaxbd.cli import by_class, by_pair, case, common, findings, first_answer, job, parse, show
from jaxbd.detection import calibration as nulls
from jaxbd.interop import preprocess
from jaxbd.pipelines import calibrate
from jaxbd.pipelines.pair_rules import SEARCHES
from jaxbd.pipelines.pair_scan import Config as PairConfig
from jaxbd.pipelines.scan import ScanConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every scan.

    Attributes:
      model: the model: a PyTorch file (.pth, .pt, .tar), .safetensors, or a jaxbd model folder.
        Nothing is executed.
      data: a few hundred or more clean images with labels: digits, a .npz or .parquet file, a
        folder of class sub-folders or parquet files, CIFAR batches, or tfds:NAME. Without any, a
        first answer from the model alone.
      out: write the result here: NAME.json, or with no ending a case, the folder that `jaxbd repair
        CASE` starts from, with the result, the page, and every recovered trigger.
      report: write one self-contained HTML page here.
      sarif: write the result here as SARIF 2.1.0, for code scanning.
      mlbom: write the model here as an entry of a CycloneDX bill of materials, with the verdict.
      compute_dtype: what the model computes in while triggers are searched: "stored" as its file
        says; "bfloat16" is faster on GPUs and TPUs; sums and losses are float32 all the same.
      reading: how model and data are read.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: str | None = None
    out: pathlib.Path | None = None
    report: pathlib.Path | None = None
    sarif: pathlib.Path | None = None
    mlbom: pathlib.Path | None = None
    compute_dtype: common.ComputeDtype = "stored"
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByClass(Common):
    """Looks for a backdoor in a model of which nothing is known but its weights.

    By pair of classes instead of by class: --method pt-red (faint patterns all over the image),
    --method neural-cleanse-pairs (patches), or --method pairs (both); they have flags of their own,
    see `jaxbd scan --method pairs --help`.

    A scan that takes long can be stopped and resumed where --out or --report is given. The folder
    OUT.run beside that file (beside --out, where both are) holds checkpoints. Ctrl-C or SIGTERM
    ends the scan after the current steps, saves, and prints the command to go on with; a second one
    ends it at once. After a crash too, --resume goes on from the last checkpoint. The steps of
    --save-every are those of all cells (class x level) together.

    --memory-budget takes units: 500MB, 2GiB, or plain bytes.

    Exit code: 0 clean, 1 backdoored, 3 inconclusive, 2 the scan could not run, 130 and 143 it was
    stopped.

    Attributes:
      calibration: null.json of `jaxbd calibrate`: clean models that a class has to stand out of.
      preset: settings that the flags below start from: "quick", or MESA as in the "released" code
        or the "paper" (every class at random places; hours on a CPU).
      search: what is searched, and how long.
      stopping: how it may be stopped.
    """

    calibration: pathlib.Path | None = None
    preset: Literal["quick", "released", "paper"] = "quick"
    search: Annotated[ScanConfig, tyro.conf.arg(name="")] = ScanConfig()
    stopping: Annotated[job.Flags, tyro.conf.arg(name="")] = job.Flags(
        save_every=by_class.SAVE_EVERY
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByPair(Common):
    """Looks for a backdoor between every two classes: a trigger is searched from each class to each
    other one.

    A trigger that is much smaller than those of the other pairs betrays a backdoor. K classes make
    K (K - 1) searches. The steps of --save-every are those of all pairs together; else see `jaxbd
    scan --help`.

    Attributes:
      search: what is searched, and how long.
      stopping: how it may be stopped.
    """

    search: Annotated[PairConfig, tyro.conf.arg(name="")] = PairConfig()
    stopping: Annotated[job.Flags, tyro.conf.arg(name="")] = job.Flags(
        save_every=by_pair.SAVE_EVERY
    )


def kind_of(method: str | None) -> ModuleType:
    """The module that runs a search method: `by_class` or `by_pair`."""
    return by_pair if method in SEARCHES else by_class


def choose(argv: Sequence[str]) -> tuple[type, Any]:
    """The class of flags for these words, and the values where there is no flag."""
    method, preset = parse.preview(argv, "--method", "--preset")
    kind = kind_of(method)
    if kind is by_pair:
        return ByPair, ByPair(model=tyro.MISSING)
    settings = by_class.default(preset)
    return ByClass, ByClass(model=tyro.MISSING, search=settings)


def run(args: Any) -> int:
    """Scans, says what was found, writes what was asked for."""
    common.start()
    findings.check(args)
    if args.data is None:
        return _answer_without_data(args)
    kind, config = kind_of(args.search.method), args.search
    paths = job.prepare(args.out or args.report, args.stopping)
    show.note(f"reading {args.model} and {args.data}, checking the preprocessing …")
    material = common.open_material(
        args.model,
        args.data,
        args.reading,
        config.batch_size,
        args.compute_dtype,
        targets=config.targets,
    )
    opened = material.opened
    show.preprocessing(opened.table)
    record = common.model_record(opened.model)
    identity = common.identity("scan", args, record, data=(material.search, material.held_out))
    config, clean_models = _calibrate(args, config, opened.model.spec.arch)
    with job.open_run(paths, args.stopping, identity) as going:
        found = kind.search(going, jax.random.key(args.reading.seed), material, config)
    content = {
        **kind.as_record(found, material, config, args.reading),
        **case.describe_inputs(args, (material.search, material.held_out)),
        "resumed": going.resumed,
        "compute_dtype": args.compute_dtype,
        "preprocessing": preprocess.as_record(opened.table) if opened.table else None,
    }
    if clean_models is not None:
        content["calibration"] = describe_calibration(args, clean_models, found, opened)
    content = files.plain(content)
    kind.say(content, config)
    findings.write(args, content, findings.Found(kind, found, material))
    job.finish(paths)
    show.written(*findings.paths(args))
    return common.EXIT[kind.verdict_of(found)]


def _answer_without_data(args: Any) -> int:
    """The margins of a model alone: a first answer, never a verdict."""
    if args.search.method != "auto":
        raise UserError(f"--method {args.search.method} searches with images; give --data")
    if args.report is not None:
        raise UserError("--report shows triggers on images; give --data, or leave it out")
    if not args.search.with_margin:
        raise UserError("without --data margins are all there is; leave --no-with-margin out")
    config = args.search.margin
    paths = job.prepare(args.out, args.stopping)
    show.note(f"reading {args.model}; without --data margins alone are searched …")
    model = first_answer.open_suspect(args.model, args.reading)
    identity = common.identity("scan", args, common.model_record(model))
    with job.open_run(paths, args.stopping, identity) as going:
        content = first_answer.search(going, model, args.reading, config)
    content = files.plain({**content, **case.describe_inputs(args)})
    first_answer.say(content)
    findings.write(args, content, None)
    job.finish(paths)
    show.written(*findings.paths(args))
    return common.EXIT["inconclusive"]


def _calibrate(args: Any, config: Any, architecture: str) -> tuple[Any, nulls.Calibration | None]:
    """(settings with the thresholds that clean models call for, those models); the settings as they
    are and None without --calibration. Raises: UserError when the file is none."""
    if getattr(args, "calibration", None) is None:
        return config, None
    if config.method != "auto":
        raise UserError(f"--calibration is for --method auto, not {config.method}; leave it out")
    clean_models = nulls.load(args.calibration)
    if not clean_models.models:
        raise UserError(f"{args.calibration} holds no model; run `jaxbd calibrate`")
    return calibrate.apply(config, clean_models, architecture), clean_models


def describe_calibration(
    args: Any, clean_models: nulls.Calibration, found: Any, opened: common.Opened
) -> dict[str, Any]:
    """What scan.json says of the comparison with clean models."""
    described = calibrate.describe(clean_models, found, opened.model.spec.arch)
    return {"path": str(args.calibration), **described}
