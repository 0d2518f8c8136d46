"""`repair` from a case: takes flags and triggers from the case instead of a search, and rescans the
repaired model."""

import dataclasses
import pathlib
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxbd import devices
from jaxbd.base import Suspect, UserError, check_targets
from jaxbd.cli import case, common, job, known, outcome, outputs, show
from jaxbd.cli.case import Case
from jaxbd.cli.commands import scan as scanning
from jaxbd.cli.rebuild import rebuild
from jaxbd.interop import hub
from jaxbd.interop import load as models
from jaxbd.limits import quote
from jaxbd.methods import Method
from jaxbd.pipelines.pair_rules import Config as PairConfig
from jaxbd.pipelines.scan import ScanConfig


class Past(NamedTuple):
    """An earlier scan that a repair starts from.

    Attributes:
      case: the scan, with its triggers.
      is_own: whether the repair was called on this case, so that all outputs go into it.
      stated: whether the images are the ones named in the case; if so, their hash is checked.
      searches: whether --target names a class for which the scan saved no trigger, so that the
        repair searches for one.
    """

    case: Case
    is_own: bool = False
    stated: bool = False
    searches: bool = False


def fill_in(args: Any, method: Method, usual: common.Reading) -> tuple[Any, Past | None]:
    """For `repair CASE`, the flags completed from the case, and the case; otherwise `args`
    unchanged, and the case in --scan if it has triggers. A first answer without data has none, so
    the repair searches for them.

    Args:
      usual: default reading settings; a value that differs from them was given by the user.
    Raises: UserError if the case lacks something, or --out is missing.
    """
    if not case.is_case(args.model):
        if args.out is None:
            raise UserError("missing: --out; see jaxbd repair --help")
        if args.scan is None:
            return args, None
        earlier = case.read(args.scan)
        stated = earlier.content["targets"] or "data" not in earlier.content
        if not stated and not earlier.has_searched:
            show.note(f"note: {earlier.record} is a first answer without data: searching anew")
            return dataclasses.replace(args, scan=None), None
        if not case.has_triggers(earlier):
            return args, None
        return args, Past(earlier, searches=_lacks_trigger(earlier, args))
    if args.scan is not None:
        raise UserError("a case already is a scan; leave --scan out")
    found = case.read(args.model)
    model = _find_model(found)
    changes: dict[str, Any] = {
        "model": model,
        "out": args.out or found.folder / _name_output(model, method),
        "reading": _fill_reading(found, args.reading, usual),
    }
    # a method that repairs without images is measured on the scan's images
    flag = "data" if "clean" in method.needs else "test_data"
    stated = getattr(args, flag) is None and found.content.get("data") is not None
    if stated:
        changes[flag] = _find_data(found)
    if "clean" not in method.needs:
        changes["reading"] = _state_preprocessing(found, changes["reading"])
    args = dataclasses.replace(args, **changes)
    if not found.has_searched:
        return args, None
    searches = _lacks_trigger(found, args)
    return args, Past(found, is_own=True, stated=stated and flag == "data", searches=searches)


def _lacks_trigger(found: Case, args: Any) -> bool:
    target = args.given.target
    return target is not None and not case.has_trigger_for(found, target)


def _find_model(found: Case) -> pathlib.Path:
    """Finds the model: at its absolute path, at the path as given, or beside the case."""
    given = pathlib.Path(found.get("inputs", "model", "given", kind=str))
    full = found.get("inputs", "model", "absolute", kind=(str, type(None)))
    places = [*([pathlib.Path(full)] if full else []), given, found.folder.parent / given.name]
    for place in places:
        if place.exists():
            return place
    raise UserError(
        f"{found.record}: its model {given} cannot be found; put it beside the case, or use"
        f" `jaxbd repair MODEL --scan {found.folder}`"
    )


def _find_data(found: Case) -> str:
    given = found.get("inputs", "data", "given", kind=str)
    full = found.get("inputs", "data", "absolute", kind=(str, type(None)))
    return full if full and pathlib.Path(full).exists() else given


def _name_output(model: pathlib.Path, method: Method) -> str:
    """A name for the repaired model, with the ending of the suspect's own format."""
    if model.is_dir():
        return case.REPAIRED if hub.weights_of(model) is None else f"{case.REPAIRED}.safetensors"
    if method.guards and model.suffix != ".onnx":
        return case.REPAIRED  # a guarded model holds several nets, so it is a folder
    if model.suffix == ".pt2":
        return f"{case.REPAIRED}.onnx"  # a graph stays a graph
    ending = model.suffix if model.suffix in outputs.MODEL_SUFFIXES else ".pth"
    return case.REPAIRED + ending


def _fill_reading(found: Case, given: common.Reading, usual: common.Reading) -> common.Reading:
    """The scan's reading settings, overridden by the flags given now."""
    recorded = rebuild(
        common.Reading, found.get("inputs", "reading", kind=dict), f"{found.record}: reading"
    )
    names = [field.name for field in dataclasses.fields(common.Reading)]
    stated = {name for name in names if getattr(given, name) != getattr(usual, name)}
    if recorded.arch and ":" in recorded.arch and "arch" not in stated:
        # a record may come from anyone: code it names must not be imported without the user's word
        raise UserError(
            f"{found.record} names your own architecture {recorded.arch}; give it again with --arch"
        )
    return dataclasses.replace(recorded, **{name: getattr(given, name) for name in stated})


def _state_preprocessing(found: Case, reading: common.Reading) -> common.Reading:
    """Adds the normalisation and image size the scan found, for what cannot tell them itself."""
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
    """Raises UserError unless model and images are the ones the scan worked on."""
    case.check_model(past.case, model)
    if not past.stated or material is None:
        return
    stated = past.case.get("inputs", "data", "sha256", kind=str)
    if common.digest((material.search, material.held_out)) != stated:
        raise UserError(
            f"{material.opened.dataset.name}: not the images of {past.case.record}; give other"
            " images with --data, or scan again"
        )


def recall(
    past: Past, suspect: Suspect, named: int | None, *, take_leads: bool = False
) -> known.Known:
    """The case's triggers for its attacked classes, or for the class `named`.

    Args:
      take_leads: if the scan was inconclusive and named no class, whether to take the triggers of
        the classes with one sign.
    Raises: UserError if it has no trigger for one of these classes.
    """
    found = past.case
    targets = found.get("targets", kind=list) if named is None else [named]
    leads = []
    if take_leads and not targets and found.verdict == "inconclusive":
        leads = found.get("leads", kind=list)
    evidence = case.load_evidence(found, suspect, targets or leads)
    missing = sorted({*targets} - {each.target for each in evidence})
    if missing:
        raise UserError(
            f"{found.record}: it has no trigger for class {missing[0]}; give --target {missing[0]}"
            " to search for one"
        )
    return known.Known(evidence, past=found, norms=_list_norms(found, suspect.classes))


def summary(found: Case) -> dict[str, Any]:
    """What repair.json says about the scan it is based on."""
    names = ("verdict", "targets", "decided_by", "config", "steps", "seconds")
    return {
        **{name: found.content.get(name) for name in names},
        "record": {"name": found.record.name, "sha256": found.sha256},
    }


def _list_norms(found: Case, classes: int) -> np.ndarray | None:
    """Sizes [K] of the smallest masks, nan for a class without one; None if no class has one."""
    norms = np.full(classes, np.nan)
    for row in found.get("classes", kind=list):
        number, norm = (
            row.get(name) if isinstance(row, dict) else None for name in ("class", "mask_norm")
        )
        if type(number) is int and 0 <= number < classes and type(norm) in (int, float):
            norms[number] = norm
    return norms if np.isfinite(norms).any() else None


def place_rescan(out: pathlib.Path) -> pathlib.Path:
    """Where the rescan of a model repaired into `out` goes: into the case it is in, else beside
    it."""
    if case.is_case(out.parent):
        return out.parent / case.RESCAN
    name = out.name if outputs.is_folder(out) else out.stem
    return out.with_name(f"{name}.{case.RESCAN}")


def is_repaired(args: Any) -> bool:
    """Whether --resume finds the repair of a case finished, with only its rescan left to do."""
    if not args.stopping.resume:
        return False
    unfinished = args.out.with_name(f"{args.out.name}.run").exists()
    there = args.out.exists() and outcome.figures(args.out).exists()
    return there and not unfinished and not place_rescan(args.out).exists()


def check_rescan(args: Any, past: Past) -> None:
    """Raises UserError if the repaired model could not be scanned with the suspect's settings, or
    another model's scan is where the result belongs. Called before the repair."""
    try:
        flags = _configure_rescan(args, past)
    except UserError as error:
        raise UserError(f"{error}, or give --no-rescan") from None
    replace = job.may_replace(args.out, args.stopping)
    outputs.refuse_existing("the rescan", flags.out, replace=replace)
    job.prepare(flags.out, flags.stopping)


def rescan(args: Any, past: Past) -> None:
    """Scans the repaired model with the suspect's settings and writes the result into the case, or
    beside a repaired model that is elsewhere.

    Raises: UserError, which says that the repaired model is already written.
    """
    flags = _configure_rescan(args, past)
    if devices.is_first():
        flags.out.unlink(missing_ok=True)  # the scan of a model that was replaced
    show.say("", "Rescan of the repaired model, with the suspect's settings:")
    try:
        scanning.run(flags)
    except UserError as error:
        raise UserError(f"{args.out} is written, but was not scanned again: {error}") from None


def _configure_rescan(args: Any, past: Past) -> Any:
    """The flags of the rescan. Raises: UserError if the case states none that a scan takes."""
    found = past.case
    kind = scanning.kind_of(found.get("config", "method", kind=str))
    by_pair = kind is scanning.by_pair
    config: Any = rebuild(
        PairConfig if by_pair else ScanConfig,
        found.get("config", kind=dict),
        f"{found.record}: config",
    )
    check_targets(config.targets, len(found.get("classes", kind=list)))
    dtype: Any = found.content.get("compute_dtype") or "stored"
    if dtype not in get_args(common.ComputeDtype):
        raise UserError(f"{found.record}: compute_dtype is {quote(dtype)}; scan again")
    # the repair may have cost accuracy, but the images and the preprocessing are the same
    reading = dataclasses.replace(args.reading, accept_accuracy=True)
    if args.model.is_dir() and not outputs.is_folder(args.out) and args.out.suffix != ".onnx":
        # a folder states its preprocessing, and a file of weights cannot
        reading = _state_preprocessing(found, reading)
    out = place_rescan(args.out)
    begun = out.with_name(f"{out.name}.run").exists()
    stopping = job.Flags(
        resume=args.stopping.resume and begun, save_every=kind.SAVE_EVERY, force=True
    )
    return (scanning.ByPair if by_pair else scanning.ByClass)(
        model=args.out,
        data=args.data or args.test_data,
        out=out,
        search=config,
        stopping=stopping,
        compute_dtype=dtype,
        reading=reading,
    )
