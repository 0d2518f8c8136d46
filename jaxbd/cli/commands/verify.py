"""`jaxbd verify`: checks that files still match the hashes in a record."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from jaxbd import files
from jaxbd.base import UserError
from jaxbd.cli import case, show
from jaxbd.interop import folder, guarded, manifest
from jaxbd.limits import Limits, parse_json, quote, read_bounded, refusing

DIFFERENT = 1
"""Exit code if a file does not match the record."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Recomputes the SHA-256 of every file named in a record (weights, settings, bounds, guard, the
    triggers and the page of a case) and lists the ones that differ.

    Exit codes: 0 all files match the record, 1 some differ, are missing or were added, 2 there is
    nothing to compare with.

    Attributes:
      case: a record (scan.json, repair.json, evaluate.json, …), a folder with records, or a model
        folder, whose config.json names its files.
      model: current path of the model that was scanned, repaired or measured, if it was moved.
    """

    case: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="CASE_OR_RECORD")]
    model: pathlib.Path | None = None


def run(args: Args) -> int:
    """Compares and prints. Raises: UserError if no hash is recorded, or a record is damaged."""
    if not args.case.exists():
        raise UserError(f"{args.case}: no such file or folder")
    rows: list[tuple[str, str, str]] = []
    listed = list(_list_records(args))
    if args.model is not None and all(model != args.model for _, model, _ in listed):
        raise UserError(f"no record in {args.case} names a model to look for; leave --model out")
    for name, model, stated in listed:
        try:
            found = manifest.of(model, named=stated)
        except UserError:
            found = {}
        words = manifest.differences(stated, found)
        # a model that is missing is a file if its record names it itself
        above = model.parent if model.is_file() or model.name in stated else model
        rows += [(name, str(above.absolute() / each), word) for each, word in words.items()]
    rows += _compare_companions(args.case if args.case.is_dir() else args.case.parent)
    if not rows:
        raise UserError(f"{args.case} contains no file hashes; give a record written by jaxbd")
    show.say(*(f"{word:<8} {path} ({name})" for name, path, word in rows))
    bad = sum(word != "same" for _, _, word in rows)
    show.say(f"{len(rows) - bad} of {len(rows)} files match the record.")
    return DIFFERENT if bad else 0


def _list_records(args: Args) -> Iterator[tuple[str, pathlib.Path, dict[str, str]]]:
    """(record, model, {file: SHA-256}) for every manifest in the case."""
    given = args.case
    if given.is_dir():
        if folder.is_model(given):
            yield from _list_companions(given)
        paths = sorted(path for path in given.glob("*.json") if path.name != folder.CONFIG)
    else:
        paths = [given]
    for path in paths:
        try:
            content = files.read_json(path)
        except UserError as error:
            if not given.is_dir() or _is_result(path.name):
                raise
            show.note(f"passed over {path.name}, which is no record: {error}")
            continue
        with refusing(path):
            for key, place, stated in _manifests(content):
                moved = args.model if key == "model" and not _is_rescan(path.name) else None
                model = moved or _find_model(key, place, path, content)
                yield path.name, model, manifest.parse(stated)


def _compare_companions(place: pathlib.Path) -> list[tuple[str, str, str]]:
    """(record, path, word) for the other files of a case: triggers, page, records.

    Raises: UserError if a record names a file outside the case.
    """
    if not case.is_case(place):
        return []
    rows = []
    for record in (case.RECORD, case.REPAIR):
        path = place / record
        content = files.read_json(path) if path.is_file() else {}
        stated = content.get("files") if isinstance(content, dict) else None
        if not isinstance(stated, dict):
            continue
        with refusing(path):
            for name, digest in stated.items():
                if not case.COMPANION.fullmatch(name) or not guarded.is_digest(digest):
                    raise UserError(f"{path}: {quote(name)} is not a file of the case")
        # look at the files that are there too, so that a trigger added later counts as new
        names = {*stated, *(case.companions(place) if record == case.RECORD else [])}
        there = {n: case.digest(place / n) for n in names if (place / n).is_file()}
        words = manifest.differences(stated, there)
        rows += [(record, str(place.absolute() / name), word) for name, word in words.items()]
    return rows


def _manifests(content: Any) -> Iterator[tuple[str, str, Any]]:
    """(key, path, manifest) of every model in a record."""
    waiting = [("", content)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("manifest"), dict) and isinstance(value.get("path"), str):
                yield key, value["path"], value["manifest"]
            waiting += reversed([each for each in value.items() if each[0] != "manifest"])
        elif isinstance(value, list):
            waiting += reversed([(key, each) for each in value])


def _find_model(key: str, place: str, record: pathlib.Path, content: Any) -> pathlib.Path:
    """The model under `key` of a record, which names it `place`; "." is the record's own folder.

    What a repair wrote is only in the record's folder: a file elsewhere would be another copy. Any
    other model is at its absolute path, else beside the record or its case, else in the working
    folder.
    """
    beside = record.parent / (place if place == "." else pathlib.Path(place).name)
    if key == "repaired":
        return beside
    inputs = content.get("inputs") if isinstance(content, dict) else None
    stated = inputs.get("model") if isinstance(inputs, dict) else None
    full = stated.get("absolute") if isinstance(stated, dict) else None
    places = [beside, pathlib.Path(place)]
    if case.is_case(record.parent):
        places.insert(1, record.parent.absolute().parent / beside.name)
    if isinstance(full, str) or os.path.isabs(full := place):
        # a rescan's model is one that a repair wrote, so a copy beside the record comes first
        places.insert(1 if _is_rescan(record.name) else 0, pathlib.Path(full))
    # not `Path.exists`, which raises for a folder that may not be entered
    return next((each for each in places if os.path.exists(each)), places[0])


def _is_rescan(name: str) -> bool:
    """Whether a record of that name is the scan of a repaired model beside it."""
    return f".{name}".endswith(f".{case.RESCAN}")


def _is_result(name: str) -> bool:
    """Whether the verbs give a record that name; such a file is damaged if it cannot be read."""
    return name == case.RECORD or _is_rescan(name) or f".{name}".endswith(f".{case.REPAIR}")


def _list_companions(place: pathlib.Path) -> Iterator[tuple[str, pathlib.Path, dict[str, str]]]:
    """The hashes that a model folder's `config.json` states for the files beside it."""
    with refusing(place):
        content = parse_json(
            read_bounded(place / folder.CONFIG, Limits(), Limits().header_bytes),
            folder.CONFIG,
        )
    stated = content.get("sha256") if isinstance(content, dict) else None
    if isinstance(content, dict) and isinstance(content.get("guard"), dict):
        stated = content["guard"].get("sha256")
    if stated is None:
        return
    if not isinstance(stated, dict) or not all(map(guarded.is_digest, stated.values())):
        raise UserError(f"{place}: {folder.CONFIG}: its hashes are {quote(stated)}")
    itself = manifest.of(place)[folder.CONFIG]
    yield folder.CONFIG, place, {**stated, folder.CONFIG: itself}
