"""`jaxbd demo`: plants backdoors, finds one knowing nothing of it, removes them, and shows the evidence."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import evaluate, loop, record, results, study, supervised, workflow
from jaxbd.attacks import badnets
from jaxbd.base import UserError
from jaxbd.cli import common, demo_bna, demo_dhbe
from jaxbd.cli.progress import Progress
from jaxbd.data import digits
from jaxbd.interop import folder, guarded
from jaxbd.inversion import mesa
from jaxbd.models import build
from jaxbd.repair import bna, unlearn
from jaxbd.report import page
from jaxbd.report.content import Content, Repaired, Triggers
from jaxbd.report.content import Scan as ScanPart

SHAPE = (16, 16, 1)
TRAIN, DEFENCE = 997, 400
BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Plant a backdoor in a small net on handwritten digits, find it, remove it in three ways, and write a report.

    One way trains the net to ignore the triggers that were found (MESA). Another changes no weight but moves its
    activations back to where they were (BNA), and flags images that seem to carry a trigger. The third uses no data and
    no scan (DHBE); it is shown on a second net.

    Needs no download and no GPU; about two minutes on two cores.

    Attributes:
      out: folder for the models and what became of them, scan.json, repair.json and report.html; made when missing.
      seed: of everything random; the attacked class is the seed modulo 10.
      levels: staircase levels of MESA.
      scan_steps: optimisation steps of the sweep.
      repair_steps: optimisation steps of each repair.
      bna_steps: optimisation steps of the correction of activations.
      dhbe_steps: iterations of the erasure without data.
      train_steps: optimisation steps of each model.
      baseline_runs: how many single reversed triggers to compare with.
    """

    out: pathlib.Path = pathlib.Path("jaxbd-demo")
    seed: int = 7
    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    scan_steps: int = 200
    repair_steps: int = 300
    bna_steps: int = bna.Config().num_steps
    dhbe_steps: int = demo_dhbe.CONFIG.num_steps
    train_steps: int = 800
    baseline_runs: int = 3

    def __post_init__(self):
        common.check_seed(self.seed)
        if min(self.repair_steps, self.bna_steps, self.dhbe_steps, self.train_steps, self.baseline_runs) < 1:
            raise UserError("demo: repair, bna, dhbe and train steps and baseline_runs must be at least 1")


def run(args: Args) -> int:
    """Runs the demo; 0 when both verdicts are right, 1 otherwise."""
    common.check_output(args.out / "report.html")
    for name in ("suspect", "twin", "repaired", "guarded", "second-suspect", "erased"):
        common.check_output(args.out / name, folder=True)
    common.start()
    started = time.perf_counter()
    spec = build.Spec(arch="cnn", classes=10, image_shape=SHAPE, class_names=tuple(str(k) for k in range(10)))
    parts = study.divide(digits.load(SHAPE[0]), TRAIN, DEFENCE, seed=args.seed)
    net, key, target = build.net(spec), jax.random.key(args.seed), args.seed % 10
    attack = badnets.make(SHAPE, 10, badnets.Config(target=target, poison_rate=0.1))
    trigger = attack.init(jax.random.fold_in(key, 1))
    config = workflow.ScanConfig(
        method="mesa",
        levels=args.levels,
        steps=args.scan_steps,
        mesa=mesa.Config(place="image", hidden=64, learning_rate=1e-3),
    )
    with Progress() as progress:
        models, curves = _train_both(key, net, parts, attack, trigger, args.train_steps, progress)
        case = study.Case(net, models["suspect"], SHAPE, attack, trigger, target, parts.defence, parts.test)
        before = {name: study.judge(case, variables) for name, variables in models.items()}
        scans = {
            name: workflow.scan(
                jax.random.fold_in(key, 4), net, variables, SHAPE, 10, parts.defence, parts.test, config,
                lambda label, done, total, name=name: progress(f"scan {name}: {label}", done, total),
            )
            for name, variables in models.items()
        }  # fmt: skip
        rows, repaired, guard = _repair(key, case, scans["suspect"], args, progress)
        train_steps = -(-args.train_steps // 2)
        erased = demo_dhbe.make(jax.random.fold_in(key, 7), case, parts, args.dhbe_steps, train_steps, progress)
    seconds = time.perf_counter() - started
    shas = _write_models(args, spec, models, repaired, guard, target)
    demo_dhbe.write(args.out, erased, args.seed)
    found = {
        name: results.scan(
            scan,
            config,
            model={"path": str(args.out / name), "sha256": shas[name], "arch": spec.arch},
            data={"source": "digits", "search": DEFENCE, "held_out": len(parts.test.labels)},
            class_names=spec.class_names,
            seed=args.seed,
        )
        for name, scan in scans.items()
    }
    record.write_json(args.out / "scan.json", found["suspect"])
    record.write_json(args.out / "scan-twin.json", found["twin"])
    record.write_json(args.out / "repair.json", _repair_json(args, case, before, rows, repaired, guard, shas))
    content = _content(args, found, case, scans, before, rows, curves, config)
    if guard is not None:
        after = {name: study.judge(case, one.variables) for name, one in repaired.items()}
        content = dataclasses.replace(
            content,
            repairs=[_with_sources(row, after, guard) for row in content.repairs],
            activations=demo_bna.activations(case, guard.corrected, models["twin"], _correction(args)),
        )
    page.write(args.out / "report.html", demo_dhbe.shown(content, erased))
    return _tell(args, found, before, rows, guard, erased, target, seconds)


def _train_both(key, net, parts, attack, trigger, steps, progress):
    """The suspect (poisoned) and its clean twin: variables by name, and the training curves."""
    config = supervised.Config(num_steps=steps, learning_rate=0.05)
    suspect, infos, _ = study.train(
        jax.random.fold_in(key, 2), net, parts.train, config,
        attack=attack, trigger=trigger, batch_size=BATCH, progress=progress, label="train a model with a backdoor",
    )  # fmt: skip
    twin, twin_infos, _ = study.train(
        jax.random.fold_in(key, 3), net, parts.train, config,
        batch_size=BATCH, progress=progress, label="train its clean twin",
    )  # fmt: skip
    curves = {
        "training loss": {
            "step": np.arange(steps),
            "values": {"suspect": infos.loss, "twin": twin_infos.loss},
        }
    }
    return {"suspect": suspect, "twin": twin}, curves


def _repair(key, case, scan, args, progress):
    """The repair table, the unlearned nets and the guarded one; nothing when the scan did not find the class."""
    if case.target not in scan.decision.targets:
        return [], {}, None
    config = unlearn.Config(stamp_rate=0.2, learning_rate=5e-3, num_steps=args.repair_steps)
    rows, repaired = study.repair_all(
        jax.random.fold_in(key, 5), case, scan, args.levels, config,
        baseline_runs=args.baseline_runs, batch_size=BATCH, progress=progress,
    )  # fmt: skip
    guard = demo_bna.make(jax.random.fold_in(key, 6), case, scan, _correction(args), BATCH, progress)
    return [*rows, study.row(demo_bna.ROW, [guard.rates], [guard.seconds])], repaired, guard


def _correction(args: Args) -> bna.Config:
    return bna.Config(num_steps=args.bna_steps)


def _write_models(
    args: Args, spec: build.Spec, models: dict, repaired: dict, guard: demo_bna.Guarded | None, target: int
) -> dict[str, str]:
    """Saves suspect, twin, the repaired net (mixture) and the guarded one; returns the SHA-256 of nets by name."""
    if guard is not None:
        guarded.save(args.out / "guarded", spec, guard.variables, [target])
    kept = dict(models)
    if "MESA mixture" in repaired:
        kept["repaired"] = repaired["MESA mixture"].variables
    for name, variables in kept.items():
        folder.save(args.out / name, spec, variables)
    return {name: folder.load(args.out / name)[2] for name in kept}


def _repair_json(args, case, before, rows, repaired, guard, shas) -> dict[str, Any]:
    """`repair.json` of the mixture, with the guarded net's figures and the whole table beside it."""
    if not rows:
        return {"schema": f"{results.SCHEMA}/repair", "method": None, "note": "the scan found nothing to repair"}
    mixture = repaired["MESA mixture"]
    after = study.judge(case, mixture.variables)
    config = unlearn.Config(stamp_rate=0.2, learning_rate=5e-3, num_steps=args.repair_steps)
    return {
        **results.repair(
            "unlearn: MESA mixture", before["suspect"], after, config, mixture.seconds,
            model={"path": str(args.out / "suspect"), "sha256": shas["suspect"], "arch": "cnn"},
            data={"source": "digits", "search": DEFENCE, "held_out": len(case.test.labels)}, seed=args.seed,
        ),
        "repaired_sha256": shas["repaired"],
        "guarded": {
            "method": "bna", "targets": [case.target], "after": results.rates(guard.rates),
            "detection": results.detection(guard.detection), "config": dataclasses.asdict(_correction(args)),
            "seconds": results.seconds(guard.seconds),
        },
        "table": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip


def _content(args, found, case, scans, before, rows, curves, config) -> Content:
    """The report's content: the triggers shown are those of the attacked class."""
    parts = [
        ScanPart(
            name={"suspect": "suspect", "twin": "clean twin"}[name],
            verdict=one["verdict"],
            targets=one["targets"],
            classes=one["classes"],
            threshold=config.detection.threshold,
            doubt=config.detection.doubt,
            sha256=one["model"]["sha256"],
            seconds=one["seconds"],
            n_images=before[name].n_clean,
            searched=f"{config.mesa.patch}x{config.mesa.patch} patches at random places",
        )
        for name, one in found.items()
    ]
    states = workflow.cells_of(scans["suspect"], case.target)
    inversion = scans["suspect"].inversion
    model = lambda index: jax.tree.map(lambda leaf: leaf[index], states)
    samples = {
        level: np.asarray(inversion.sample(jax.random.key(args.seed + index), model(index), 200))
        for index, level in enumerate(args.levels)
    }
    clean = jnp.asarray(case.test.images[:8]) / 255
    stamped = inversion.stamp(jax.random.key(args.seed), model(len(args.levels) - 1), clean)
    index = np.flatnonzero(np.asarray(scans["suspect"].cells.target) == case.target)
    infos = scans["suspect"].infos
    for title, field in (("attack success rate while searching", "attack_success_rate"), ("entropy bound", "entropy")):
        values = {f"level {level:g}": getattr(infos, field)[:, i] for i, level in zip(index, args.levels, strict=True)}
        curves = {**curves, title: {"step": np.arange(config.steps), "values": values}}
    return Content(
        title="jaxbd demo: a backdoored digit classifier",
        scans=parts,
        repairs=[_repair_part(row, rows[0], before["suspect"]) for row in rows[1:]],
        triggers=Triggers(
            samples=samples,
            original=np.asarray(case.trigger.pattern),
            clean=np.asarray(clean),
            stamped=np.asarray(stamped),
        ),
        curves=curves,
        settings={
            "scan": dataclasses.asdict(config),
            "demo": {k: v for k, v in dataclasses.asdict(args).items() if k != "out"},
        },
        seeds={"demo": args.seed},
    )


def _repair_part(row: study.Row, first: study.Row, before: evaluate.Rates) -> Repaired:
    notes = {
        "ideal (true trigger)": "knows the planted trigger: for reference only",
        "single reversed trigger": f"mean of {row.runs} runs; worst attack success rate {row.worst:.3f}",
        demo_bna.ROW: "no weight is changed; figures are those of the guarded net",
    }
    return Repaired(
        method=row.method,
        clean_accuracy=(first.clean_accuracy, row.clean_accuracy),
        attack_success_rate=(first.attack_success_rate, row.attack_success_rate),
        seconds=results.seconds(loop.Seconds(row.seconds_compile, row.seconds_run)),
        n_clean=before.n_clean,
        n_triggered=before.n_triggered,
        note=notes.get(row.method, ""),
    )


def _with_sources(row: Repaired, after: dict[str, evaluate.Rates], guard: demo_bna.Guarded) -> Repaired:
    """The row with what it makes of triggered images; that of several runs is not known."""
    if row.method != demo_bna.ROW:
        known = after.get(row.method)
        return dataclasses.replace(row, source_inference_accuracy=known and known.source_inference_accuracy)
    return dataclasses.replace(
        row,
        source_inference_accuracy=guard.rates.source_inference_accuracy,
        true_positive_rate=guard.detection.true_positive_rate,
        false_positive_rate=guard.detection.false_positive_rate,
    )


def _tell(args, found, before, rows, guard, erased, target, seconds) -> int:
    """Prints verdicts, the table and where things are; 0 when the verdicts are right."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    for name, one in found.items():
        rates = {row["class"]: row["attack_success_rate"] for row in one["classes"]}
        highest = max(rates, key=rates.get)
        text = f"backdoored, target class {', '.join(map(str, one['targets']))}" if one["targets"] else one["verdict"]
        times = one["seconds"]
        console.print(
            f"{name}: [bold]{text}[/bold] (highest rate of recovered triggers {rates[highest]:.3f}, class {highest}; "
            f"{one['cells']} cells x {one['steps']} steps in {times['run']:.1f} s + {times['compile']:.1f} s compiling)"
        )
    table = Table("net", "clean accuracy", "attack success", "seconds", "compiling", title="test images, true trigger")
    for row in [*rows, *demo_dhbe.rows(erased)]:
        worst = f" (worst of {row.runs}: {row.worst:.3f})" if row.runs > 1 else ""
        table.add_row(
            f"suspect, {row.method}" if row.method == "before" else row.method,
            f"{row.clean_accuracy:.3f}",
            f"{row.attack_success_rate:.3f}{worst}",
            f"{row.seconds_run:.1f}",
            f"{row.seconds_compile:.1f}",
        )
    twin = before["twin"]
    table.add_row("clean twin", f"{twin.clean_accuracy:.3f}", f"{twin.attack_success_rate:.3f}", "", "")
    console.print(table)
    console.print(f"over {twin.n_clean} clean and {twin.n_triggered} triggered test images (target class left out)")
    if guard is not None:
        told = guard.detection
        console.print(
            f"{demo_bna.ROW}: {guard.rates.source_inference_accuracy:.3f} of triggered images get their own class "
            f"(source inference accuracy); it flags {told.true_positive_rate:.3f} of triggered images and "
            f"{told.false_positive_rate:.3f} of clean ones of class {target} ({told.n_clean_target} images)"
        )
    for line in demo_dhbe.sentences(erased):
        console.print(line)
    kept = "suspect, twin, repaired, guarded, " if rows else "suspect, twin, "
    written = f"{kept}second-suspect, erased, scan.json, scan-twin.json, repair.json, report.html"
    console.print(f"written to {args.out}: {written}", markup=False)
    console.print(f"{seconds:.0f} s in all")
    right = found["suspect"]["targets"] == [target] and found["twin"]["verdict"] == "clean"
    if not right:
        console.print(f"[bold]the verdicts are not what was planted (class {target}; twin clean)[/bold]")
    return 0 if right else 1
