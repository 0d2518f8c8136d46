"""`jaxbd demo`: plants a backdoor, finds it without prior knowledge, removes it, and shows the
evidence."""

import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbd import files
from jaxbd.attacks import badnets
from jaxbd.base import Batch, Net, Suspect, UserError
from jaxbd.cli import by_class, class_page, common, outputs, show
from jaxbd.cli import case as cases
from jaxbd.cli.progress import Progress
from jaxbd.data import digits, draw
from jaxbd.interop import folder
from jaxbd.inversion import mesa
from jaxbd.metrics import evaluate
from jaxbd.models import build
from jaxbd.pipelines import compare, evidence, plant, repair
from jaxbd.pipelines import scan as scanning
from jaxbd.repairs import unlearn
from jaxbd.report import page, results
from jaxbd.report.content import Content, Repaired, Triggers
from jaxbd.training import supervised
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run

SHAPE = (16, 16, 1)
TRAIN, DEFENCE = 997, 400
BATCH = 64
LEVELS = (0.5, 0.8, 0.9)
WRITTEN = ("suspect", "twin", "repaired")
TWIN = "scan-twin.json"
"""The twin's record, by which a later demo knows its own folder."""
OTHERS = (
    "This page shows one repair, unlearning. You can try the others on the models in this folder:"
    " `jaxbd repair suspect --data digits --method bna --out guarded` leaves the weights alone and"
    " flags triggered images (BNA, measured in docs/results.md)."
)
"""How to try the repairs that the demo leaves out."""
NOTES = {
    "ideal (true trigger)": "uses the planted trigger: for reference only",
    "MESA mixture": "uses only the recovered triggers",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Plants a backdoor in a small net on handwritten digits, finds it, removes it, and reports.

    The scan sees only the net's weights and a few clean images; a clean twin is scanned for
    comparison. The repair trains the net to ignore the triggers that the scan recovered. The demo
    needs no download and no GPU and takes about two minutes on two cores.

    You can try the other repairs on the models the demo writes, e.g. `jaxbd repair
    jaxbd-demo/suspect --data digits --method bna --out guarded`.

    Attributes:
      out: folder for the models, scan.json, repair.json and report.html; created if missing. Only
        the folder of an earlier demo is written over.
      seed: seed for all random choices; the attacked class is the seed modulo 10.
      scan_steps: optimisation steps of each part of the scan.
      repair_steps: optimisation steps of each repair.
      train_steps: training steps of each model.
    """

    out: pathlib.Path = pathlib.Path("jaxbd-demo")
    seed: int = 7
    scan_steps: int = 150
    repair_steps: int = 200
    train_steps: int = 500

    def __post_init__(self):
        common.check_seed(self.seed)
        for name in ("scan_steps", "repair_steps", "train_steps"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be at least 1, got {getattr(self, name)}")


class Found(NamedTuple):
    """What the demo found.

    Attributes:
      case: the suspect, its true trigger and the data; twin: the clean net's variables.
      scans: by name, "suspect" and "twin"; before: their rates under the true trigger.
      repaired: by method; after: their rates.
      curves: training curves.
    """

    case: compare.Case
    twin: Any
    scans: dict[str, scanning.Scan]
    before: dict[str, evaluate.Rates]
    repaired: dict[str, repair.Repaired]
    after: dict[str, evaluate.Rates]
    curves: dict[str, Any]


def run(args: Args) -> int:
    """Runs the demo; returns 0 if the suspect's class is named and the twin is not accused, 1
    otherwise."""
    check(args.out)
    common.start()
    started = time.perf_counter()
    config = _scan_config(args)
    with Progress() as progress:
        going = Run(progress=progress, notice=show.note)
        # the suspect first, so that its verdict appears before the slower rest
        case, losses = _plant(going, args)
        scans = {"suspect": _scan(going, case.victim, case, config, args)}
        waited = time.perf_counter() - started
        show.say(f"After {waited:.0f} s, the suspect: {_verdict(scans['suspect'])}.")
        repaired = _repair(going, case, scans["suspect"], args)
        twin, twin_losses = _train(going, args, case.victim.net, _parts(args).train, None)
        scans["twin"] = _scan(going, case.victim._replace(variables=twin), case, config, args)
    values = {"suspect": losses, "twin": twin_losses}
    curves = {"training loss": {"step": np.arange(args.train_steps), "values": values}}
    before = {
        "suspect": compare.judge(case, case.victim.variables),
        "twin": compare.judge(case, twin),
    }
    after = {name: compare.judge(case, one.variables) for name, one in repaired.items()}
    found = Found(case, twin, scans, before, repaired, after, curves)
    _write(args, config, found)
    return _say(args, found, time.perf_counter() - started)


def check(out: pathlib.Path) -> None:
    """Checks that the demo can be written to `out`, before any work.

    Raises: UserError for a folder that an earlier demo did not write.
    """
    held = sorted(each.name for each in out.iterdir()) if out.is_dir() else []
    own = (out / TWIN).is_file() and folder.is_model(out / "suspect")
    if held and (not own or cases.is_case(out)):
        what = ", ".join(held[:3])
        raise UserError(f"--out {out} is not overwritten: it contains {what}; choose another name")
    outputs.check_output(out / "report.html")
    for name in WRITTEN:
        outputs.check_output(out / name, folder=True)


def _scan_config(args: Args) -> scanning.ScanConfig:
    """The quick scan, with a smaller generator and the steps from the flags."""
    return dataclasses.replace(
        scanning.PRESETS["quick"],
        levels=LEVELS,
        steps=args.scan_steps,
        locate_steps=args.scan_steps,
        mesa=mesa.Config(place="image", hidden=64, learning_rate=1e-3),
    )


def _scan(
    run: Run, suspect: Suspect, case: compare.Case, config: scanning.ScanConfig, args: Args
) -> scanning.Scan:
    """A scan that sees only the weights and a few clean images."""
    key = jax.random.fold_in(jax.random.key(args.seed), 4)
    return scanning.scan(run, key, suspect, case.defence, case.test, config)


def _parts(args: Args) -> draw.Parts:
    return draw.divide(digits.load(SHAPE[0]), TRAIN, DEFENCE, seed=args.seed)


def _plant(run: Run, args: Args) -> tuple[compare.Case, np.ndarray]:
    """The suspect as a case, and the losses of its training."""
    parts, net, target = _parts(args), build.net(_spec()), args.seed % 10
    attack = badnets.make(SHAPE, 10, badnets.Config(target=target, poison_rate=0.1))
    trigger = attack.init(jax.random.fold_in(jax.random.key(args.seed), 1))
    variables, losses = _train(run, args, net, parts.train, (attack, trigger))
    suspect = Suspect(net, variables, SHAPE, 10)
    return compare.Case(suspect, attack, trigger, target, parts.defence, parts.test), losses


def _train(run: Run, args: Args, net: Net, images: Batch, attack: Any) -> tuple[Any, np.ndarray]:
    """Trains a net with a backdoor by `attack`, or a clean one for None. Returns its variables and
    losses."""
    words, number = ("its clean twin", 3) if attack is None else ("a model with a backdoor", 2)
    trained = plant.train(
        run,
        f"train {words}",
        jax.random.fold_in(jax.random.key(args.seed), number),
        net,
        images,
        supervised.Config(num_steps=args.train_steps, learning_rate=0.05),
        batching=draw.Batching(BATCH),
        attack=attack,
    )
    return trained.variables, trained.infos.loss


def _spec() -> build.Spec:
    names = tuple(str(k) for k in range(10))
    return build.Spec(arch="cnn", classes=10, image_shape=SHAPE, class_names=names)


def _repair(
    run: Run, case: compare.Case, scan: scanning.Scan, args: Args
) -> dict[str, repair.Repaired]:
    """Unlearns what the scan recovered, and, for reference, the true trigger; {} if the scan did
    not name the attacked class."""
    if case.target not in scan.decision.targets:
        return {}
    known = {
        "MESA mixture": evidence.mix_equally(scan, case.target),
        "ideal (true trigger)": compare.true_evidence(case),
    }
    config = unlearn.Config(stamp_rate=0.2, learning_rate=5e-3, num_steps=args.repair_steps)
    return {
        name: repair.repair(
            run,
            jax.random.fold_in(jax.random.key(args.seed), 5),
            case.victim,
            case.defence,
            [one],
            "unlearn",
            config,
            batch_size=BATCH,
            label=f"unlearn: {name}",
        )
        for name, one in known.items()
    }


def _write(args: Args, config: scanning.ScanConfig, found: Found) -> None:
    """Writes the models, their records and the page."""
    nets = {"suspect": found.case.victim.variables, "twin": found.twin}
    if found.repaired:
        nets["repaired"] = found.repaired["MESA mixture"].variables
    for name, variables in nets.items():
        folder.save(args.out / name, _spec(), variables)
    records = {name: _scan_record(args, config, found, name) for name in found.scans}
    files.write_json(args.out / "scan.json", records["suspect"])
    files.write_json(args.out / TWIN, records["twin"])
    files.write_json(args.out / "repair.json", _repair_record(args, found))
    page.write(args.out / "report.html", _content(args, config, found, records))


def _scan_record(
    args: Args, config: scanning.ScanConfig, found: Found, name: str
) -> dict[str, Any]:
    content = results.scan(
        found.scans[name],
        config,
        model=_model_record(args, name),
        data=_data_record(found),
        class_names=_spec().class_names,
        seed=args.seed,
    )
    return {**files.plain(content), "searched": by_class.searched(config)}


def _repair_record(args: Args, found: Found) -> dict[str, Any]:
    """`repair.json` for the mixture, with the ideal repair's rates under "ideal"."""
    if not found.repaired:
        note = "the scan did not name the attacked class: nothing was repaired"
        return {"schema": f"{results.SCHEMA}/repair", "method": None, "note": note}
    mixture = found.repaired["MESA mixture"]
    config = unlearn.Config(stamp_rate=0.2, learning_rate=5e-3, num_steps=args.repair_steps)
    content = results.repair(
        "unlearn",
        config,
        mixture.seconds,
        model=_model_record(args, "suspect"),
        data=_data_record(found),
        seed=args.seed,
    )
    rates = {name: results.rates(one) for name, one in found.after.items()}
    content |= {"before": results.rates(found.before["suspect"]), "after": rates["MESA mixture"]}
    return {**content, "ideal": rates["ideal (true trigger)"]}


def _model_record(args: Args, name: str) -> dict[str, Any]:
    path = args.out / name
    return {"path": str(path), "sha256": folder.load(path)[2], "arch": "cnn"}


def _data_record(found: Found) -> dict[str, Any]:
    return {"source": "digits", "search": DEFENCE, "held_out": len(found.case.test.labels)}


def _content(
    args: Args, config: scanning.ScanConfig, found: Found, records: dict[str, Any]
) -> Content:
    """The page's content; its triggers are those of the attacked class."""
    names = {"suspect": "suspect", "twin": "clean twin"}
    images = len(found.case.test.labels)
    parts = [class_page.describe(names[name], one, config, images) for name, one in records.items()]
    # paths relative to the demo's folder: a page that is passed on must not reveal local paths
    command = "`jaxbd repair suspect --data digits --scan scan.json --out repaired`"
    suspect, twin = (dataclasses.replace(part, repair=command) for part in parts)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    return Content(
        title="jaxbd demo: a backdoored digit classifier",
        scans=[suspect, twin],
        repairs=[_repair_part(name, found) for name in found.repaired],
        triggers=_triggers(config, found),
        curves=found.curves | class_page.curves(found.scans["suspect"]),
        settings={"scan": results.settings(config), "demo": settings},
        seeds={"demo": args.seed},
        notes=[OTHERS],
    )


def _triggers(config: scanning.ScanConfig, found: Found) -> Triggers:
    """The triggers recovered from the suspect, and the planted one."""
    case, names = found.case, _spec().class_names
    part = class_page.show_triggers(found.scans["suspect"], case.victim, case.test, names, config)
    return dataclasses.replace(part, original=np.asarray(case.trigger.pattern))


def _repair_part(name: str, found: Found) -> Repaired:
    before, after = found.before["suspect"], found.after[name]
    seconds: Seconds = found.repaired[name].seconds
    return Repaired(
        method=name,
        clean_accuracy=(before.clean_accuracy, after.clean_accuracy),
        attack_success_rate=(before.attack_success_rate, after.attack_success_rate),
        source_inference_accuracy=after.source_inference_accuracy,
        seconds=results.seconds(seconds),
        n_clean=before.n_clean,
        n_triggered=before.n_triggered,
        note=NOTES[name],
        file="repaired" if name == "MESA mixture" else "",
    )


def _verdict(scan: scanning.Scan) -> str:
    """A scan's verdict in a few words."""
    if scan.decision.targets:
        return f"backdoored, class {', '.join(map(str, scan.decision.targets))}"
    return scan.decision.verdict


def _say(args: Args, found: Found, seconds: float) -> int:
    """Prints the table and a few lines; returns the exit code, see `run`."""
    rates = {f"{name}, before": one for name, one in found.before.items()}
    rates |= found.after
    title = "test images, true trigger"
    show.rates([(name, results.rates(one)) for name, one in rates.items()], title=title)
    scans, target = found.scans, found.case.target
    twin = scans["twin"].decision
    right = scans["suspect"].decision.targets == [target] and twin.verdict != "backdoored"
    note = "" if right else f"; in fact class {target} was attacked and the twin is clean"
    judgement = scans["twin"].judgement
    if right and judgement is not None and judgement.leads:
        note = ", since it shows one sign of a backdoor, as some clean models do"
    show.say(
        f"Suspect: {_verdict(scans['suspect'])}. Clean twin: {_verdict(scans['twin'])}{note}"
        f" ({seconds:.0f} s in all)."
    )
    if found.after:
        before, after = found.before["suspect"], found.after["MESA mixture"]
        show.say(
            f"Repaired: attack success {show.percent(before.attack_success_rate)} ->"
            f" {show.percent(after.attack_success_rate)}, accuracy"
            f" {show.percent(before.clean_accuracy)} -> {show.percent(after.clean_accuracy)}."
        )
    else:
        show.say("Repaired: nothing, because the scan did not name the attacked class.")
    show.say(f"open {args.out / 'report.html'}")
    return 0 if right else 1
