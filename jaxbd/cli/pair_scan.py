"""`jaxbd scan` over all ordered pairs of classes: which pairs are attacked, and whether all lead to one class."""

import dataclasses
import math
import pathlib
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxbd import pairs as pairwise
from jaxbd import record, results, stages
from jaxbd.base import Batch, UserError
from jaxbd.cli import common, long_job, show
from jaxbd.cli.progress import Progress
from jaxbd.interop import preprocess

METHODS = {"pairs": pairwise.METHODS, "neural-cleanse": ("neural-cleanse",), "pt-red": ("pt-red",)}
"""`--method` -> inversions that run."""
SAVE_EVERY = 100_000
"""Steps, of all pairs together, between two checkpoints where no flag says otherwise."""
LISTED = 12
"""Pairs that the table lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Looks for a backdoor between every two classes: a trigger is searched from each class to each other one.

    A trigger that is much smaller than those of the other pairs betrays a backdoor. K classes make K (K - 1) searches.

    It can be stopped and resumed where --out or --report is given, as `jaxbd scan --help` says; the steps of
    --save-every are those of all pairs together. --memory-budget takes units: 500MB, 2GiB, or plain bytes.

    Exit code: 0 clean, 1 backdoored, 3 inconclusive, 2 the scan could not run.

    Attributes:
      model: the model: a PyTorch file (.pth, .pt, .tar), .safetensors, or a jaxbd model folder. Nothing is executed.
      data: clean images of every class with labels, see `jaxbd scan --help`.
      method: "neural-cleanse" searches patches, "pt-red" faint patterns that are added to the whole image, "pairs"
        both: the right one when nothing is known of the trigger.
      pairs: search pairs; only neural-cleanse can be run by class too, and is without this flag.
      out: write the result here as JSON (scan.json).
      report: write one self-contained HTML page here.
      search: what is searched, and how long.
      compute_dtype: what the model computes in while triggers are searched, see `jaxbd scan --help`.
      job: how it may be stopped.
      reading: how model and data are read.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: str
    method: Literal["pairs", "neural-cleanse", "pt-red"] = "pairs"
    pairs: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    out: pathlib.Path | None = None
    report: pathlib.Path | None = None
    search: Annotated[pairwise.Config, tyro.conf.arg(name="")] = pairwise.Config()
    compute_dtype: common.ComputeDtype = "stored"
    job: Annotated[long_job.Flags, tyro.conf.arg(name="")] = long_job.Flags(save_every=SAVE_EVERY)
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading()


def run(args: Args) -> int:
    """Scans, says what was found, writes what was asked for."""
    common.start()
    common.check_output(args.out)
    common.check_output(args.report)
    config = chosen(args.search, args.method)
    files = long_job.prepare(args.out or args.report, args.job)
    show.note(f"reading {args.model} and {args.data}, checking the preprocessing …")
    opened = common.open_both(args.model, args.data, args.reading)
    search, held_out = common.search_and_held_out(opened.dataset, args.reading.seed, config.batch_size)
    show.preprocessing(opened.table)
    identity = common.identity("scan", args, common.model_record(opened.model), data=(search, held_out))
    with long_job.Job(files, args.job, identity) as job, Progress() as progress:
        found = scan(opened, search, held_out, config, args.reading.seed, progress, job.keep, args.compute_dtype)
    content = {**as_record(opened, found, search, held_out, config, args), "resumed": job.resumed}
    content["compute_dtype"] = args.compute_dtype
    say(content)
    if args.out is not None:
        record.write_json(args.out, content)
    if args.report is not None:
        from jaxbd.cli import report

        report.write_pairs(args.report, content, found, held_out, config, verdict(content))
    long_job.finish(files)
    show.written(args.out, args.report)
    return common.EXIT[found.verdict]


def chosen(search: pairwise.Config, method: str) -> pairwise.Config:
    """`search` with the inversions of `method`. Raises: UserError when both flags name methods."""
    if search.methods != pairwise.Config().methods:
        raise UserError("--method says which inversions run; leave --methods out")
    return dataclasses.replace(search, methods=METHODS[method])


def scan(
    opened: common.Opened,
    search: Batch,
    held_out: Batch,
    config: pairwise.Config,
    seed: int,
    progress: Progress,
    keep: stages.Keep = stages.through,
    compute_dtype: common.ComputeDtype = "stored",
) -> pairwise.PairScan:
    """`pairwise.scan` on an opened model."""
    model = opened.model
    net, variables = common.frozen(opened, compute_dtype)
    return pairwise.scan(
        jax.random.key(seed), net, variables, tuple(model.spec.image_shape), model.spec.classes,
        search, held_out, config, progress, keep,
    )  # fmt: skip


def as_record(
    opened: common.Opened, found: pairwise.PairScan, search: Batch, held_out: Batch, config: pairwise.Config, args: Any
) -> dict[str, Any]:
    """The content of scan.json; `args` has `reading` and `method`."""
    counts = {"search": len(search.labels), "held_out": len(held_out.labels)}
    content = results.pair_scan(
        found,
        config,
        method=args.method,
        model=common.model_record(opened.model),
        data=common.data_record(opened.dataset, args.reading, **counts),
        class_names=common.class_names(opened),
        seed=args.reading.seed,
    )
    content["preprocessing"] = preprocess.as_record(opened.table) if opened.table else None
    return record.plain(content)


def say(content: dict[str, Any]) -> None:
    """The pairs with the highest scores, the verdict, the triggers found, time."""
    names = tuple(row["name"] for row in content["classes"])
    for method in content["scores"]:
        rows = sorted(_searched(content, method), reverse=True)[:LISTED]
        body = [
            (common.class_label(s, names), common.class_label(t, names), f"{score:.2f}", f"{size:.3g}",
             "yes" if [s, t] in content["pairs"] else "")
            for score, s, t, size in rows
        ]  # fmt: skip
        title = f"{method}: the {len(body)} pairs with the highest scores"
        show.table(("source", "target", "score", "size of the trigger", "attacked"), body, title=title, left=2)
    show.say(verdict(content), f"Decided by {content['decided_by']}.")
    for target, trigger in content["triggers"].items():
        label, sources = common.class_label(int(target), names), ", ".join(map(str, trigger["sources"]))
        size = "unknown" if trigger["norm"] is None else f"{trigger['norm']:.3g}"
        show.say(
            f"Trigger to class {label}, by {trigger['method']} from sources {sources}: "
            f"size {size}, works on {show.percent(trigger['attack_success_rate'])} of held-out images."
        )
    show.say("Not ruled out: backdoors of any other kind. “Clean” means that nothing of the searched kind stands out.")
    steps = ", ".join(f"{count} steps of {method}" for method, count in content["steps"].items())
    show.say(f"{content['cells']} searches, {steps}, {show.seconds(content['seconds'])}, {content['device']}.")


def _searched(content: dict[str, Any], method: str) -> list[tuple[float, int, int, float]]:
    """(score, source, target, size of the trigger) of every pair that was searched; both may be infinite."""
    tables = content["scores"][method], content["statistics"][method]
    cells = [(s, t, *(table[s][t] for table in tables)) for s, row in enumerate(tables[0]) for t in range(len(row))]
    return [
        (math.inf if score is None else score, s, t, 1 / size if size else math.inf)
        for s, t, score, size in cells
        if size is not None
    ]


def verdict(content: dict[str, Any]) -> str:
    """The verdict of a scan over pairs in one sentence."""
    names = tuple(row["name"] for row in content["classes"])
    if content["verdict"] == "backdoored":
        targets = ", ".join(common.class_label(target, names) for target in content["targets"])
        kinds = {"all-to-one": "all lead to one class", "all-to-all": "every class leads to another"}
        kind = kinds.get(content["setting"], "of a mixed kind")
        count = len(content["pairs"])
        pairs = "1 pair of classes is attacked" if count == 1 else f"{count} pairs of classes are attacked"
        return f"BACKDOORED: {pairs} ({kind}); to class {targets}."
    if content["verdict"] == "clean":
        return "CLEAN: no pair of classes stands out."
    return "INCONCLUSIVE: the sizes of the triggers do not tell; try more images of every class, or more --steps."
