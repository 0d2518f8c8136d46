"""`jaxbd verify`: checks that files still match the hashes in a record."""

import dataclasses
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
      model: current path of the recorded model, if it was moved.
    """

    case: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="CASE_OR_RECORD")]
    model: pathlib.Path | None = None


def run(args: Args) -> int:
    """Compares and prints. Raises: UserError if no hash is recorded, or a record is damaged."""
    if not args.case.exists():
        raise UserError(f"{args.case}: no such file or folder")
    rows: list[tuple[str, str, str]] = []
    for name, model, stated in _list_records(args):
        try:
            found = manifest.of(model, named=stated)
        except UserError:
            found = {}
        words = manifest.differences(stated, found)
        rows += [
            (name, str(model.parent / each if model.is_file() else model / each), word)
            for each, word in words.items()
        ]
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
        with refusing(path):
            for place, stated in _manifests(files.read_json(path)):
                yield path.name, args.model or _find_model(place, path), manifest.parse(stated)


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
        rows += [(record, str(place / name), word) for name, word in words.items()]
    return rows


def _manifests(content: Any) -> Iterator[tuple[str, Any]]:
    """(path, manifest) of every model in a record."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("manifest"), dict) and isinstance(value.get("path"), str):
                yield value["path"], value["manifest"]
            waiting += reversed([entry for name, entry in value.items() if name != "manifest"])
        elif isinstance(value, list):
            waiting += reversed(value)


def _find_model(place: str, record: pathlib.Path) -> pathlib.Path:
    """Path of the record's model: as recorded, or beside the record. A record inside a model folder
    names it "."."""
    beside = record.parent / (place if place == "." else pathlib.Path(place).name)
    return beside if place == "." or not pathlib.Path(place).exists() else pathlib.Path(place)


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
