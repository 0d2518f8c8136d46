"""The case: a folder with a scan's result, triggers and page, and later the repaired model and its
rescan.

`scan --out CASE` writes the whole folder or nothing; `repair CASE` starts from it. A case may come
from anyone, so every field is checked before it is used.
"""

import base64
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbd import files
from jaxbd.base import Evidence, Suspect, UserError
from jaxbd.cli import common, job, outputs, recovered
from jaxbd.interop import evidence_file, manifest
from jaxbd.interop import load as models
from jaxbd.limits import Limits, opened, quote, refusing, sha256

RECORD, PAGE, TRIGGERS = "scan.json", "report.html", "triggers"
REPAIR, RESCAN, REPAIRED = "repair.json", "rescan.json", "repaired"
NAME = re.compile(r"triggers/[\w-]{1,80}\.npz")
"""Trigger names allowed in a record: only files inside the case."""
COMPANION = re.compile(r"triggers/[\w-]{1,80}\.(npz|png)|report\.html|scan\.json")
"""Files of a case that a record lists with their hashes."""
MOST_TRIGGERS = 1000


class Case(NamedTuple):
    """A case as read.

    Attributes:
      folder: the folder that holds `triggers/`.
      record: path of scan.json; content: its content; sha256: its hash.
    """

    folder: pathlib.Path
    record: pathlib.Path
    content: dict[str, Any]
    sha256: str

    def get(self, *names: str, kind: type | tuple[type, ...]) -> Any:
        """The value under the nested keys `names`. Raises: UserError if it is not a `kind`."""
        value: Any = self.content
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool) > (kind is bool):
            raise UserError(f"{self.record}: {'.'.join(names)} is {quote(value)}; scan again")
        return value

    @property
    def verdict(self) -> str:
        return self.get("verdict", kind=str)

    @property
    def has_searched(self) -> bool:
        """Whether the scan had images; the first answer without data has no triggers."""
        return self.content.get("data") is not None


def is_case(path: pathlib.Path) -> bool:
    """Whether `path` is a case written by `jaxbd scan --out`."""
    return (path / RECORD).is_file() and (path / TRIGGERS).is_dir()


def is_folder(path: pathlib.Path | None) -> bool:
    """Whether `scan --out path` asks for a case: a name without an ending."""
    return path is not None and not outputs.ending(path)


# Writing.


def check(path: pathlib.Path, stopping: job.Flags) -> None:
    """Checks before any work that a case can be written at `path`.

    Raises: UserError naming what is in the way. --force replaces a case and nothing else.
    """
    if path.exists():
        held = {each.name for each in path.iterdir()} if path.is_dir() else {"a file"}
        others = sorted(name for name in held if not _is_ours(name))
        if held and (others or not is_case(path)):
            what = ", ".join(others[:3]) or "half a case"
            raise UserError(
                f"--out {path} is not overwritten: it contains {what}; choose another name"
            )
        outputs.refuse_existing("--out", path, replace=stopping.replace)
    outputs.check_writable(path)


def _is_ours(name: str) -> bool:
    """Whether a file of that name in a case is the case's own, such as a broken-off rescan."""
    if name.startswith(".") and name.endswith(".lock"):  # left by a run that was killed
        name = name[1:-5]
    known = {RECORD, PAGE, TRIGGERS, REPAIR, RESCAN, f"{RESCAN}.run", f"{RESCAN}.metrics.jsonl"}
    return name in known or name.startswith(REPAIRED)


def write(
    path: pathlib.Path,
    content: dict[str, Any],
    found: Sequence[recovered.Recovered],
    image_shape: tuple[int, int, int],
    write_page: Callable[[pathlib.Path], object] | None,
) -> dict[str, Any]:
    """Writes the whole case or nothing; returns the content of its scan.json."""
    written = dict(content)

    def fill(new: pathlib.Path) -> None:
        (new / TRIGGERS).mkdir(parents=True)
        written["trigger_files"] = [_write_trigger(new, each, image_shape) for each in found]
        if write_page is not None:
            write_page(new / PAGE)
        written["files"] = {name: digest(new / name) for name in companions(new)}
        files.write_json(new / RECORD, written)

    outputs.write_folder(path, fill)
    return files.plain(written)


def _write_trigger(
    case: pathlib.Path, found: recovered.Recovered, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Writes one trigger as .npz and .png under a unique name; returns its entry in the record."""
    saved, stem = found.saved, f"class{found.saved.target}-{found.saved.kind}"
    count = len([*(case / TRIGGERS).glob(f"{stem}*.npz")])
    place = case / TRIGGERS / f"{stem}{f'-{count + 1}' if count else ''}.npz"
    evidence_file.save(place, saved, image_shape)
    place.with_suffix(".png").write_bytes(picture(saved, image_shape))
    return {
        "file": place.relative_to(case).as_posix(),
        "kind": saved.kind,
        "class": saved.target,
        "sources": list(saved.sources),
        "size": saved.size(),
        "rate": found.rate,
    }


def picture(saved: evidence_file.Saved, image_shape: tuple[int, int, int]) -> bytes:
    """A PNG of a trigger: samples of a distribution; otherwise the pixels on mid-grey with the mask
    next to them, or an additive pattern alone."""
    from jaxbd.report import plots  # draws with matplotlib, which takes a while to import

    if saved.models is not None:
        tiles, columns, side = list(evidence_file.draw(saved, image_shape)), 8, 64
    else:
        assert saved.pixels is not None and saved.pixels.pattern is not None
        pattern, mask = saved.pixels.pattern, saved.pixels.mask
        assert mask is not None
        if saved.kind == "additive":  # scaled to full contrast: most are too faint to see
            tiles = [0.5 + pattern / (2 * max(np.abs(pattern).max(), 1e-12))]
        else:
            tiles = [0.5 * (1 - mask) + mask * pattern]
            tiles.append(np.broadcast_to(mask, pattern.shape))
        columns, side = 2, 256
    uri = plots.grid(tiles, columns=columns, side=side)
    return base64.b64decode(uri.partition(",")[2])


def companions(folder: pathlib.Path) -> list[str]:
    """Names of the page and of all files in `triggers/`, relative to the case."""
    found = [each for each in (folder / TRIGGERS).iterdir() if each.is_file()]
    found += [folder / name for name in (PAGE,) if (folder / name).is_file()]
    return sorted(each.relative_to(folder).as_posix() for each in found)


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file in a case. Raises: UserError if it is not a regular file."""
    with refusing(path), opened(path, Limits()) as (file, _):
        return sha256(file)


def describe_inputs(args: Any, read: Any = None) -> dict[str, Any]:
    """What `repair CASE` needs instead of flags: where model and data are, and how they are read.

    Args:
      read: the images as read, for their hash; None without images.
    """
    reading = dataclasses.asdict(args.reading)
    del reading["download"]  # a record must not be able to turn on network access
    if args.reading.classes is not None:
        reading["classes"] = str(args.reading.classes.absolute())
    data = None
    if args.data is not None:
        data = {**place_of(args.data), "sha256": common.digest(read)}
    return {"inputs": {"model": place_of(args.model), "data": data, "reading": reading}}


def place_of(source: str | pathlib.Path) -> dict[str, str | None]:
    """What a record says about where an input is: the path as given, and its absolute path if there
    is one."""
    path = pathlib.Path(os.path.expanduser(source))
    return {"given": str(source), "absolute": str(path.absolute()) if path.exists() else None}


# Reading.


def read(path: pathlib.Path) -> Case:
    """Reads a case from its folder or its scan.json. Raises: UserError if `path` is neither, or
    what it says of verdict and classes was edited into something no scan says."""
    record = path / RECORD if path.is_dir() else path
    content = files.read_json(record)
    if not isinstance(content, dict) or not isinstance(content.get("targets"), list):
        raise UserError(f"{record} is not the result of a scan; give what `jaxbd scan --out` wrote")
    found = Case(record.parent, record, content, digest(record))
    _check_answer(found)
    return found


def _check_answer(case: Case) -> None:
    """Raises UserError unless targets and leads are classes, and the verdict, if there is one, is a
    scan's and fits the targets."""
    rows = case.content.get("classes")
    most = len(rows) if isinstance(rows, list) else math.inf
    for name in ("targets", "leads"):
        for number in case.get(name, kind=list) if name in case.content else ():
            if type(number) is not int or not 0 <= number < most:
                raise UserError(f"{case.record}: {name} has {quote(number)}, no class; scan again")
    verdict = case.content.get("verdict")
    if "verdict" in case.content and (type(verdict) is not str or verdict not in common.EXIT):
        raise UserError(f"{case.record}: verdict is {quote(verdict)}; scan again")
    if verdict == "backdoored" and not case.content["targets"]:
        raise UserError(f"{case.record}: verdict is 'backdoored', of no class; scan again")


def has_triggers(case: Case) -> bool:
    """Whether the scan saved the triggers it recovered."""
    return isinstance(case.content.get("trigger_files"), list)


def has_trigger_for(case: Case, target: int) -> bool:
    """Whether the scan saved a trigger to class `target`."""
    rows = case.get("trigger_files", kind=list)
    return any(isinstance(row, dict) and row.get("class") == target for row in rows)


def check_model(case: Case, model: models.Model) -> None:
    """Raises UserError unless the case was made from this exact model: weights, settings and
    bounds."""
    with refusing(case.record):
        stated = manifest.parse(case.get("model", "manifest", kind=dict))
    found = dict(model.files)
    words = manifest.differences(stated, found)
    # a copy under another name is the same model
    if manifest.root(stated) == manifest.root(found) or sorted(stated.values()) == sorted(
        found.values()
    ):
        return
    name, word = next((each, word) for each, word in words.items() if word != "same")
    raise UserError(
        f"{model.path} is not the model recorded in {case.record}: {name} {_describe(word)}; scan"
        " it again"
    )


def _describe(word: str) -> str:
    return {"differs": "was changed", "missing": "is missing", "new": "is new"}[word]


def load_evidence(case: Case, suspect: Suspect, targets: Sequence[int]) -> list[Evidence]:
    """The case's triggers for `targets`, as evidence for a repair.

    Raises: UserError naming a file that was changed since the scan or does not fit the suspect.
    """
    rows, hashes = case.get("trigger_files", kind=list), case.get("files", kind=dict)
    if len(rows) > MOST_TRIGGERS:
        raise UserError(f"{case.record} lists {len(rows)} triggers; at most {MOST_TRIGGERS}")
    found = []
    for row in rows:
        name = row.get("file") if isinstance(row, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{case.record}: {quote(name)} is not a trigger of the case; scan again"
            )
        if type(row.get("class")) is not int or row["class"] not in targets:
            continue
        place = case.folder / name
        saved = evidence_file.load(place, suspect)
        if digest(place) != hashes.get(name) or saved.target != row["class"]:
            raise UserError(f"{place} was changed since the scan; scan again")
        found.append(evidence_file.to_evidence(saved, suspect))
    return sorted(found, key=lambda each: each.target)
