"""`jaxbd scan`: decides clean, backdoored or inconclusive, and names the attacked classes."""

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
      model: a PyTorch file (.pth, .pt, .tar), .safetensors, .onnx, .pt2, or a jaxbd model folder.
        Nothing in it is executed.
      data: a few hundred or more clean images with labels: digits, a .npz or .parquet file, a
        folder of class sub-folders or parquet files, CIFAR batches, or tfds:NAME. Without --data,
        the scan gives only a first answer from the model itself.
      out: write the result here. NAME.json is only the result; a name without an ending is a case,
        a folder with the result, the page and every recovered trigger, for `jaxbd repair CASE`.
      report: write a self-contained HTML page here.
      sarif: write the result here as SARIF 2.1.0, for code scanning.
      mlbom: write a CycloneDX bill of materials here, with the model and the verdict.
      compute_dtype: compute type of the model during the search: "stored" is the one in its
        file; "bfloat16" is faster on GPUs and TPUs; sums and losses are always float32.
      reading: how the model and the data are read.
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
    """Scans a model for a backdoor, given only its weights and clean images.

    To search pairs of classes instead of classes: --method pt-red (faint patterns over the whole
    image), --method neural-cleanse-pairs (patches), or --method pairs (both). They have their own
    flags, see `jaxbd scan --method pairs --help`.

    With --out or --report, a long scan can be stopped and resumed. The folder OUT.run next to that
    file (next to --out, if both are given) holds checkpoints. Ctrl-C or SIGTERM stops the scan
    after the current steps, saves, and prints the command that resumes it; a second signal stops it
    at once. --resume continues from the last checkpoint, after a crash too. --save-every counts the
    steps of all cells (class x level) together.

    --memory-budget takes units: 500MB, 2GiB, or plain bytes.

    Exit codes: 0 clean, 1 backdoored, 3 inconclusive, 2 the scan could not run, 130 and 143 it was
    stopped.

    Attributes:
      calibration: null.json from `jaxbd calibrate`; a class must stand out from these clean models.
        `small-nets`: small clean nets on digits and CIFAR-10 images that come with jaxbd.
      preset: settings that the flags below start from: "quick", or MESA as in the "released" code
        or the "paper" (every class at random places; hours on a CPU).
      search: what is searched, and for how long.
      stopping: how the scan is stopped and resumed.
    """

    calibration: pathlib.Path | None = None
    preset: Literal["quick", "released", "paper"] = "quick"
    search: Annotated[ScanConfig, tyro.conf.arg(name="")] = ScanConfig()
    stopping: Annotated[job.Flags, tyro.conf.arg(name="")] = job.Flags(
        save_every=by_class.SAVE_EVERY
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByPair(Common):
    """Scans every ordered pair of classes for a trigger that turns one class into the other.

    A trigger much smaller than those of the other pairs reveals a backdoor. K classes take
    K (K - 1) searches. --save-every counts the steps of all pairs together; for the rest,
    see `jaxbd scan --help`.

    Attributes:
      search: what is searched, and for how long.
      stopping: how the scan is stopped and resumed.
    """

    search: Annotated[PairConfig, tyro.conf.arg(name="")] = PairConfig()
    stopping: Annotated[job.Flags, tyro.conf.arg(name="")] = job.Flags(
        save_every=by_pair.SAVE_EVERY
    )


def kind_of(method: str | None) -> ModuleType:
    """The module that runs a search method: `by_class` or `by_pair`."""
    return by_pair if method in SEARCHES else by_class


def choose(argv: Sequence[str]) -> tuple[type, Any]:
    """The class of flags and the default values for `argv`."""
    method, preset = parse.preview(argv, "--method", "--preset")
    kind = kind_of(method)
    if kind is by_pair:
        return ByPair, ByPair(model=tyro.MISSING)
    settings = by_class.default(preset)
    return ByClass, ByClass(model=tyro.MISSING, search=settings)


def run(args: Any) -> int:
    """Scans the model, prints the verdict, and writes the requested outputs."""
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
    """Searches only the model's margins: a first answer, never a verdict."""
    if args.search.method != "auto":
        raise UserError(f"--method {args.search.method} searches with images; give --data")
    if args.report is not None:
        raise UserError("--report shows triggers on images; give --data, or leave it out")
    if not args.search.with_margin:
        raise UserError("without --data only margins can be searched; leave --no-with-margin out")
    config = args.search.margin
    paths = job.prepare(args.out, args.stopping)
    show.note(f"reading {args.model}; without --data only margins are searched …")
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
    """(settings with thresholds from the clean models, those models); without --calibration, the
    settings unchanged and None. Raises: UserError if the file is not a calibration."""
    if getattr(args, "calibration", None) is None:
        return config, None
    if config.method != "auto":
        raise UserError(f"--calibration is for --method auto, not {config.method}; leave it out")
    clean_models = nulls.load(args.calibration)
    if not clean_models.models:
        raise UserError(f"{args.calibration} contains no models; run `jaxbd calibrate`")
    return calibrate.apply(config, clean_models, architecture), clean_models


def describe_calibration(
    args: Any, clean_models: nulls.Calibration, found: Any, opened: common.Opened
) -> dict[str, Any]:
    """What scan.json says about the comparison with clean models."""
    described = calibrate.describe(clean_models, found, opened.model.spec.arch)
    return {"path": str(args.calibration), **described}
