"""`jaxbd calibrate`: scans clean models, so that other models can be compared with them."""

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
    """Scans models that you know to be clean, and writes their scores to a file.

    `jaxbd scan MODEL --data D --calibration null.json` then requires a class to stand out more than
    in clean models of the same architecture, and reports how often the rules raise a false alarm on
    those. The models must be of the same kind as the ones scanned later; with 19 or more of one
    architecture, that architecture gets its own null distribution.

    The file is written after every model; continue a stopped or killed calibration with --add.

    Attributes:
      models: files or folders of clean models.
      data: clean images with labels, see `jaxbd scan --help`; the same for all models.
      out: write the calibration here, as null.json.
      add: keep the models already in the output; models whose files are unchanged are not scanned
        again.
      preset: settings that the flags below start from.
      search: what is searched, and for how long.
      reading: how the models and the data are read.
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
                f"--method {self.search.method} has no statistics to calibrate; leave it out"
            )
        if self.search.targets:
            raise UserError("a calibration needs all classes; leave --targets out")


def choose(argv: Sequence[str]) -> tuple[type, Any]:
    """The class of flags and the default values."""
    (preset,) = parse.preview(argv, "--preset")
    settings = by_class.default(preset)
    missing: Any = tyro.MISSING
    return Args, Args(models=missing, data=missing, out=missing, search=settings)


def run(args: Args) -> int:
    """Scans every model, prints its alarms, and writes the calibration."""
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
    """The calibration already in the output, else an empty one. Raises: UserError if it exists but
    --add is not given, or it was made with other settings."""
    if not args.out.exists():
        return nulls.Calibration((), settings)
    if not args.add:
        raise UserError(f"{args.out} already exists; give --add to add to it")
    earlier = nulls.load(args.out)
    nulls.merge([earlier, nulls.Calibration((), settings)])
    return earlier


def _score(
    path: pathlib.Path, args: Args, config: ScanConfig, known: set[str]
) -> nulls.CleanModel | None:
    """The scores of one model; None if it is already in the calibration."""
    show.note(f"reading {path} and {args.data} …")
    material = common.open_material(path, args.data, args.reading, config.batch_size, "stored")
    model = material.opened.model
    name = f"{pathlib.Path(model.path).name} {model.sha256[:12]}"
    if name in known:
        show.note(f"{name} is already in {args.out}")
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
    """Prints how often each rule raises an alarm on the clean models."""
    rules = sorted({rule for model in calibration.models for rule in model.alarms})
    rows = []
    for rule in rules:
        rate = nulls.false_alarms(calibration, rule)
        between = f"{show.percent(rate.low)} to {show.percent(rate.high)}"
        rows.append((rule, f"{rate.alarms} of {rate.models}", show.percent(rate.rate), between))
    title = f"Alarms on {len(calibration.models)} clean models"
    show.table(("rule", "alarms", "rate", "95 % interval"), rows, title=title)
