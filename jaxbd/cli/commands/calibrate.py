"""`jaxbd calibrate`: what scans say of clean models, so that others can be compared with them."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxbd.base import UserError
from jaxbd.cli import by_class, common, outputs, parse, show
from jaxbd.cli.progress import Progress
from jaxbd.detection import calibration as nulls
from jaxbd.pipelines import calibrate
from jaxbd.pipelines import scan as scanning
from jaxbd.pipelines.scan import ScanConfig
from jaxbd.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Scans models that you know to be clean, and writes how they score.

    `jaxbd scan MODEL --data D --calibration null.json` then asks a class to stand out more than in
    clean models of the same architecture, and says how often the rules alarm on those. The models
    have to be of the kind that is judged later; 19 or more of an architecture make its own null.

    The file is written after every model, so that a stopped or killed calibration goes on with
    --add.

    Attributes:
      models: files or folders of clean models.
      data: clean images with labels, see `jaxbd scan --help`; the same for all models.
      out: write the calibration here, as null.json.
      add: keep the models that the output holds already; those whose files are the same are not
        scanned again.
      preset: settings that the flags below start from.
      search: what is searched, and how long.
      reading: how models and data are read.
    """

    models: Annotated[
        tuple[pathlib.Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")
    ]
    data: str
    out: pathlib.Path
    add: bool = False
    preset: Literal["quick", "released", "paper"] = "quick"
    search: Annotated[ScanConfig, tyro.conf.arg(name="")] = ScanConfig()
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading()

    def __post_init__(self):
        if not self.models:
            raise UserError("missing: MODEL; give one clean model or more")
        if self.search.method != "auto":
            raise UserError(
                f"--method {self.search.method} makes no statistics of clean models; leave it out"
            )
        if self.search.targets:
            raise UserError("a calibration needs all classes; leave --targets out")


def choose(argv: Sequence[str]) -> tuple[type, Any]:
    """The class of flags, and the values where there is no flag."""
    (preset,) = parse.preview(argv, "--preset")
    settings = by_class.default(preset)
    missing: Any = tyro.MISSING
    return Args, Args(models=missing, data=missing, out=missing, search=settings)


def run(args: Args) -> int:
    """Scans every model, says how they score, writes the calibration."""
    common.start()
    outputs.check_output(args.out)
    config = calibrate.for_calibration(args.search)
    settings = calibrate.settings_of(config)
    known = _read_earlier(args, settings)
    for path in args.models:
        scored = _score(path, args, config, {model.name for model in known.models})
        if scored is not None:
            known = nulls.merge([known, nulls.Calibration((scored,), settings)])
            nulls.save(args.out, known)
    say(known)
    show.written(args.out)
    return 0


def _read_earlier(args: Args, settings: dict[str, Any]) -> nulls.Calibration:
    """What the output holds. Raises: UserError where it is there without --add, or was made with
    other settings."""
    if not args.out.exists():
        return nulls.Calibration((), settings)
    if not args.add:
        raise UserError(f"{args.out} is there already; give --add to go on with it")
    earlier = nulls.load(args.out)
    nulls.merge([earlier, nulls.Calibration((), settings)])
    return earlier


def _score(
    path: pathlib.Path, args: Args, config: ScanConfig, known: set[str]
) -> nulls.CleanModel | None:
    """How one model scores; None where it is known already."""
    show.note(f"reading {path} and {args.data} …")
    material = common.open_material(path, args.data, args.reading, config.batch_size, "stored")
    model = material.opened.model
    name = f"{pathlib.Path(model.path).name} {model.sha256[:12]}"
    if name in known:
        show.note(f"{name} is in {args.out} already")
        return None
    key = jax.random.key(args.reading.seed)
    with Progress() as progress:
        found = scanning.scan(
            Run(progress=progress, notice=show.note),
            key,
            material.suspect,
            material.search,
            material.held_out,
            config,
        )
    scored = calibrate.score(name, model.spec.arch, found)
    said = ", ".join(rule for rule, alarm in scored.alarms.items() if alarm) or "none"
    show.say(f"{name}: alarms: {said}")
    return scored


def say(calibration: nulls.Calibration) -> None:
    """How often each rule alarms on the clean models."""
    rules = sorted({rule for model in calibration.models for rule in model.alarms})
    rows = []
    for rule in rules:
        rate = nulls.false_alarms(calibration, rule)
        between = f"{show.percent(rate.low)} to {show.percent(rate.high)}"
        rows.append((rule, f"{rate.alarms} of {rate.models}", show.percent(rate.rate), between))
    title = f"Alarms on {len(calibration.models)} clean models"
    show.table(("rule", "alarms", "rate", "95 % interval"), rows, title=title)
