"""`jaxbd scan`: clean, backdoored or inconclusive, and which class a backdoor leads to."""

import dataclasses
import pathlib
import time
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxbd import loop, record, results, stages, workflow
from jaxbd.base import Batch
from jaxbd.cli import common, long_job, show
from jaxbd.cli.progress import Progress
from jaxbd.interop import preprocess

SAVE_EVERY = 15_000
"""Steps, of all cells together, between two checkpoints where no flag says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Looks for a backdoor in a model of which nothing is known but its weights.

    By pair of classes instead of by class: --method pt-red (faint patterns all over the image), --method
    neural-cleanse --pairs (patches), or --method pairs (both); they have flags of their own, see
    `jaxbd scan --method pairs --help`.

    A scan that takes long can be stopped and resumed where --out or --report is given: meanwhile the folder OUT.run
    beside that file (beside --out, where both are) holds checkpoints. Ctrl-C or SIGTERM ends it after the current
    steps, saves, and prints the command to go on with; a second one ends it at once. After a crash too, --resume goes
    on from the last checkpoint. The steps of --save-every are those of all cells (class x level) together.

    --memory-budget takes units: 500MB, 2GiB, or plain bytes.

    Exit code: 0 clean, 1 backdoored, 3 inconclusive, 2 the scan could not run, 130 and 143 it was stopped.

    Attributes:
      model: the model: a PyTorch file (.pth, .pt, .tar), .safetensors, or a jaxbd model folder. Nothing is executed.
      data: a few hundred or more clean images with labels: digits, a .npz or .parquet file, a folder of class
        sub-folders or parquet files, CIFAR batches, or tfds:NAME.
      out: write the result here as JSON (scan.json).
      report: write one self-contained HTML page here.
      preset: settings that the flags below start from: "quick", or MESA as in the "released" code or the "paper"
        (every class at random places; hours on a CPU).
      search: what is searched, and how long.
      compute_dtype: what the model computes in while triggers are searched: "stored" as its file says; "bfloat16" is
        faster on GPUs and TPUs; sums and losses are float32 all the same.
      job: how it may be stopped.
      reading: how model and data are read.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: str
    out: pathlib.Path | None = None
    report: pathlib.Path | None = None
    preset: Literal["quick", "released", "paper"] = "quick"
    search: Annotated[workflow.ScanConfig, tyro.conf.arg(name="")] = workflow.ScanConfig()
    compute_dtype: common.ComputeDtype = "stored"
    job: Annotated[long_job.Flags, tyro.conf.arg(name="")] = long_job.Flags(save_every=SAVE_EVERY)
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading()


def defaults(argv: list[str]) -> Args:
    """The values where there is no flag."""
    return Args(model=tyro.MISSING, data=tyro.MISSING, search=common.preset(argv))


def run(args: Args) -> int:
    """Scans, says what was found, writes what was asked for."""
    common.start()
    common.check_output(args.out)
    common.check_output(args.report)
    files = long_job.prepare(args.out or args.report, args.job)
    show.note(f"reading {args.model} and {args.data}, checking the preprocessing …")
    opened = common.open_both(args.model, args.data, args.reading)
    search, held_out = common.search_and_held_out(opened.dataset, args.reading.seed, args.search.batch_size)
    show.preprocessing(opened.table)
    identity = common.identity("scan", args, common.model_record(opened.model), data=(search, held_out))
    with long_job.Job(files, args.job, identity) as job, Progress() as progress:
        found = scan(opened, search, held_out, args.search, args.reading.seed, progress, job.keep, args.compute_dtype)
    content = {**as_record(opened, found, search, held_out, args), "resumed": job.resumed}
    content["compute_dtype"] = args.compute_dtype
    show.scan(content, args.search)
    if args.out is not None:
        record.write_json(args.out, content)
    if args.report is not None:
        from jaxbd.cli import report

        report.write(args.report, content, found, opened, held_out, args.search)
    long_job.finish(files)
    show.written(args.out, args.report)
    return common.EXIT[found.decision.verdict]


def scan(
    opened: common.Opened,
    search: Batch,
    held_out: Batch,
    config: workflow.ScanConfig,
    seed: int,
    progress: workflow.Progress,
    keep: stages.Keep = stages.through,
    compute_dtype: common.ComputeDtype = "stored",
) -> workflow.Scan:
    """`workflow.scan` on an opened model; the seconds are those one waits, with starting up and judging."""
    model, started = opened.model, time.perf_counter()
    net, variables = common.frozen(opened, compute_dtype)
    found = workflow.scan(
        jax.random.key(seed), net, variables, tuple(model.spec.image_shape), model.spec.classes,
        search, held_out, config, progress, keep,
    )  # fmt: skip
    waited = time.perf_counter() - started
    return found._replace(seconds=loop.Seconds(found.seconds.compile, waited - found.seconds.compile))


def as_record(opened: common.Opened, found: workflow.Scan, search: Batch, held_out: Batch, args: Any) -> dict[str, Any]:
    """The content of scan.json; `args` has `search` and `reading`."""
    counts = {"search": len(search.labels), "held_out": len(held_out.labels)}
    content = results.scan(
        found,
        args.search,
        model=common.model_record(opened.model),
        data=common.data_record(opened.dataset, args.reading, **counts),
        class_names=common.class_names(opened),
        seed=args.reading.seed,
    )
    content["searched"] = show.searched(args.search)
    content["preprocessing"] = preprocess.as_record(opened.table) if opened.table else None
    return record.plain(content)
