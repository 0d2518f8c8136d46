"""`repair` from a case: what its flags would have said, its triggers in place of a search, and the
scan of what was repaired."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jaxbd.base import Suspect, UserError
from jaxbd.cli import case, common, job, known, outputs, show
from jaxbd.cli.case import Case
from jaxbd.cli.commands import scan as scanning
from jaxbd.cli.rebuild import rebuild
from jaxbd.interop import hub
from jaxbd.interop import load as models
from jaxbd.methods import Method
from jaxbd.pipelines.pair_rules import Config as PairConfig
from jaxbd.pipelines.scan import ScanConfig


class Past(NamedTuple):
    """An earlier scan that a repair starts from.

    Attributes:
      case: the scan, with its triggers.
      is_own: whether the case is what is repaired, so that everything goes into it.
      stated: whether the images are those that the case names, which are checked then.
    """

    case: Case
    is_own: bool = False
    stated: bool = False


def fill_in(args: Any, method: Method, usual: common.Reading) -> tuple[Any, Past | None]:
    """The flags of `repair CASE`, or `args` as they are, and the earlier scan, if any keeps
    triggers.

    Args:
      usual: how model and data are read where no flag says otherwise; other values are the user's.
    Raises: UserError where the case does not say enough, or --out is missing.
    """
    if not case.is_case(args.model):
        if args.out is None:
            raise UserError("missing: --out; see jaxbd repair --help")
        earlier = None if args.scan is None else case.read(args.scan)
        return args, Past(earlier) if earlier and case.has_triggers(earlier) else None
    if args.scan is not None:
        raise UserError("a case is its own scan; leave --scan out")
    found = case.read(args.model)
    model = _find_model(found)
    changes: dict[str, Any] = {
        "model": model,
        "out": args.out or found.folder / _name_output(model, method),
        "reading": _fill_reading(found, args.reading, usual),
    }
    # what repairs without images is measured on those of the scan
    flag = "data" if "clean" in method.needs else "test_data"
    stated = getattr(args, flag) is None and found.content.get("data") is not None
    if stated:
        changes[flag] = _find_data(found)
    if "clean" not in method.needs:
        changes["reading"] = _state_preprocessing(found, changes["reading"])
    past = Past(found, is_own=True, stated=stated and flag == "data")
    # a first answer without data has searched for no trigger, so the repair does
    return dataclasses.replace(args, **changes), past if found.has_searched else None


def _find_model(found: Case) -> pathlib.Path:
    """Where the model lies: as recorded in full, as it was named, or beside the case."""
    given = pathlib.Path(found.get("inputs", "model", "given", kind=str))
    full = found.get("inputs", "model", "absolute", kind=(str, type(None)))
    places = [*([pathlib.Path(full)] if full else []), given, found.folder.parent / given.name]
    for place in places:
        if place.exists():
            return place
    raise UserError(
        f"{found.record}: its model {given} is nowhere to be found; put it beside the case, or use"
        f" `jaxbd repair MODEL --scan {found.folder}`"
    )


def _find_data(found: Case) -> str:
    given = found.get("inputs", "data", "given", kind=str)
    full = found.get("inputs", "data", "absolute", kind=(str, type(None)))
    return full if full and pathlib.Path(full).exists() else given


def _name_output(model: pathlib.Path, method: Method) -> str:
    """A name whose ending asks for the suspect's own form."""
    if model.is_dir():
        return case.REPAIRED if hub.weights_of(model) is None else f"{case.REPAIRED}.safetensors"
    if method.guards and model.suffix != ".onnx":
        return case.REPAIRED  # several nets in one make a folder
    if model.suffix == ".pt2":
        return f"{case.REPAIRED}.onnx"  # a graph stays a graph
    ending = model.suffix if model.suffix in outputs.MODEL_SUFFIXES else ".pth"
    return case.REPAIRED + ending


def _fill_reading(found: Case, given: common.Reading, usual: common.Reading) -> common.Reading:
    """How model and data were read by the scan, except for what flags say now."""
    recorded = rebuild(
        common.Reading, found.get("inputs", "reading", kind=dict), f"{found.record}: reading"
    )
    names = [field.name for field in dataclasses.fields(common.Reading)]
    stated = {name for name in names if getattr(given, name) != getattr(usual, name)}
    if recorded.arch and ":" in recorded.arch and "arch" not in stated:
        # its code would be imported because a file says so
        raise UserError(
            f"{found.record} names {recorded.arch}, an architecture of your own; give it again with"
            " --arch"
        )
    return dataclasses.replace(recorded, **{name: getattr(given, name) for name in stated})


def _state_preprocessing(found: Case, reading: common.Reading) -> common.Reading:
    """What the scan found out with images, for methods that read the model without any."""
    if reading.constants() is None:
        norm = {
            name: tuple(found.get("model", "normalisation", name, kind=list))
            for name in ("mean", "std")
        }
        if norm["mean"] and norm["std"]:
            reading = dataclasses.replace(reading, **norm)
    if reading.image_shape is None:
        shape = tuple(found.get("model", "image_shape", kind=list))
        reading = dataclasses.replace(reading, image_shape=shape)
    return reading


def check(past: Past, model: models.Model, material: common.Material | None) -> None:
    """Raises UserError unless model and images are those that the scan worked on."""
    case.check_model(past.case, model)
    if not past.stated or material is None:
        return
    stated = past.case.get("inputs", "data", "sha256", kind=str)
    if common.digest((material.search, material.held_out)) != stated:
        raise UserError(
            f"{material.opened.dataset.name}: not the images of {past.case.record}; give others"
            " with --data, or scan again"
        )


def recall(past: Past, suspect: Suspect, named: int | None) -> known.Known:
    """What the case knows of triggers, for the classes it calls attacked or for `named`.

    Raises: UserError where it has no trigger of a named class.
    """
    found = past.case
    targets = found.get("targets", kind=list) if named is None else [named]
    evidence = case.load_evidence(found, suspect, targets)
    missing = sorted({*targets} - {each.target for each in evidence})
    if missing:
        raise UserError(
            f"{found.record}: it keeps no trigger of class {missing[0]}; repair the model itself,"
            " which searches for it"
        )
    return known.Known(evidence, past=found, norms=_list_norms(found, suspect.classes))


def summary(found: Case) -> dict[str, Any]:
    """What repair.json holds of the scan behind it."""
    names = ("verdict", "targets", "decided_by", "config", "steps", "seconds")
    return {
        **{name: found.content.get(name) for name in names},
        "record": {"name": found.record.name, "sha256": found.sha256},
    }


def _list_norms(found: Case, classes: int) -> np.ndarray | None:
    """Sizes [K] of the smallest masks; nan where none was found, None where none was sought."""
    norms = np.full(classes, np.nan)
    for row in found.get("classes", kind=list):
        number, norm = (
            row.get(name) if isinstance(row, dict) else None for name in ("class", "mask_norm")
        )
        if type(number) is int and 0 <= number < classes and type(norm) in (int, float):
            norms[number] = norm
    return norms if np.isfinite(norms).any() else None


def is_repaired(args: Any, past: Past | None) -> bool:
    """Whether --resume finds the repair of a case done, and its rescan begun or to be begun."""
    if past is None or not past.is_own or not args.stopping.resume:
        return False
    unfinished = args.out.with_name(f"{args.out.name}.run").exists()
    there = args.out.exists() and (past.case.folder / case.REPAIR).exists()
    return there and not unfinished and not (past.case.folder / case.RESCAN).exists()


def rescan(args: Any, past: Past) -> None:
    """Scans the repaired model as the suspect was scanned, into the case.

    Raises: UserError saying that the repaired model stands.
    """
    found = past.case
    method = found.get("config", "method", kind=str)
    kind = scanning.kind_of(method)
    by_pair = kind is scanning.by_pair
    config: Any = rebuild(
        PairConfig if by_pair else ScanConfig,
        found.get("config", kind=dict),
        f"{found.record}: config",
    )
    out = found.folder / case.RESCAN
    begun = out.with_name(f"{out.name}.run").exists()
    stopping = job.Flags(
        resume=args.stopping.resume and begun, save_every=kind.SAVE_EVERY, force=True
    )
    flags = (scanning.ByPair if by_pair else scanning.ByClass)(
        model=args.out,
        data=args.data or args.test_data,
        out=out,
        search=config,
        stopping=stopping,
        compute_dtype=found.content.get("compute_dtype") or "stored",
        # what a repair cost in accuracy is in repair.json; it does not make the images others
        reading=dataclasses.replace(args.reading, accept_accuracy=True),
    )
    show.say("", "The repaired model, scanned as the suspect was:")
    try:
        scanning.run(flags)
    except UserError as error:
        raise UserError(f"{args.out} is written, but was not scanned again: {error}") from None
