"""The case: a folder with what a scan found, its triggers and its page, and later the
repaired model and the scan of that.

`scan --out CASE` writes it whole or not at all; `repair CASE` starts from it. What is read back may
have been written by anyone, so every field is checked before it is used.
"""

import base64
import dataclasses
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
"""How a record names a trigger of its own case: nothing outside the folder."""
COMPANION = re.compile(r"triggers/[\w-]{1,80}\.(npz|png)|report\.html|scan\.json")
"""Files of a case that records name by their hashes."""
MOST_TRIGGERS = 1000


class Case(NamedTuple):
    """A case, read.

    Attributes:
      folder: where its triggers lie.
      record: scan.json; content: what it holds; sha256: of it.
    """

    folder: pathlib.Path
    record: pathlib.Path
    content: dict[str, Any]
    sha256: str

    def get(self, *names: str, kind: type | tuple[type, ...]) -> Any:
        """The value under `names`. Raises: UserError where it is not of `kind`."""
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
        """Whether images were searched with; the first answer without data has no triggers."""
        return self.content.get("data") is not None


def is_case(path: pathlib.Path) -> bool:
    """Whether `path` is a case of `jaxbd scan --out`."""
    return (path / RECORD).is_file() and (path / TRIGGERS).is_dir()


def is_folder(path: pathlib.Path | None) -> bool:
    """Whether `scan --out path` asks for a case, by its name."""
    return path is not None and not outputs.ending(path)


# Writing.


def check(path: pathlib.Path, stopping: job.Flags) -> None:
    """Whether a case can be written at `path`, before any work.

    Raises: UserError naming what is in the way. --force replaces a case, and nothing else.
    """
    place = path.expanduser()
    if place.exists():
        held = {each.name for each in place.iterdir()} if place.is_dir() else {"a file"}
        others = sorted(name for name in held if not _is_ours(name))
        if held and (others or not is_case(place)):
            what = ", ".join(others[:3]) or "half a case"
            raise UserError(f"--out {path} is not overwritten, there is {what}; choose another")
        outputs.refuse_existing("--out", path, replace=stopping.replace)
    outputs.check_writable(path)


def _is_ours(name: str) -> bool:
    return name in {RECORD, PAGE, TRIGGERS, REPAIR, RESCAN} or name.startswith(REPAIRED)


def write(
    path: pathlib.Path,
    content: dict[str, Any],
    found: Sequence[recovered.Recovered],
    image_shape: tuple[int, int, int],
    write_page: Callable[[pathlib.Path], object] | None,
) -> dict[str, Any]:
    """Writes the whole case or nothing; returns what its scan.json holds."""
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
    """One trigger as .npz and .png, under a name of its own; what the record says of it."""
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
    """A PNG of a trigger: samples of a distribution; otherwise the pixels on mid-grey, and beside
    them the mask."""
    from jaxbd.report import plots  # draws with matplotlib, which takes a while to import

    if saved.models is not None:
        shown, columns, side = list(evidence_file.draw(saved, image_shape)), 8, 64
    else:
        assert saved.pixels is not None and saved.pixels.pattern is not None
        pattern, mask = saved.pixels.pattern, saved.pixels.mask
        assert mask is not None
        if saved.kind == "additive":  # as large as contrast allows
            shown = [0.5 + pattern / (2 * max(np.abs(pattern).max(), 1e-12))]
        else:
            shown = [0.5 * (1 - mask) + mask * pattern]
            shown.append(np.broadcast_to(mask, pattern.shape))
        columns, side = 2, 256
    uri = plots.grid(shown, columns=columns, side=side)
    return base64.b64decode(uri.partition(",")[2])


def companions(folder: pathlib.Path) -> list[str]:
    """Names of the page and of everything in `triggers/`."""
    found = [each for each in (folder / TRIGGERS).iterdir() if each.is_file()]
    found += [folder / name for name in (PAGE,) if (folder / name).is_file()]
    return sorted(each.relative_to(folder).as_posix() for each in found)


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file of a case. Raises: UserError where it is no regular file."""
    with refusing(path), opened(path, Limits()) as (file, _):
        return sha256(file)


def describe_inputs(args: Any, read: Any = None) -> dict[str, Any]:
    """What scan.json holds so that `repair CASE` needs no flag: where model and data are, and how
    they are read.

    Args:
      read: the images as they were read, for their hash; None without any.
    """
    reading = dataclasses.asdict(args.reading)
    del reading["download"]  # a file shall not ask for the network
    if args.reading.classes is not None:
        reading["classes"] = str(args.reading.classes.expanduser().absolute())
    data = None
    if args.data is not None:
        data = {**_place(args.data), "sha256": common.digest(read)}
    return {"inputs": {"model": _place(args.model), "data": data, "reading": reading}}


def _place(source: str | pathlib.Path) -> dict[str, str | None]:
    path = pathlib.Path(source).expanduser()
    return {"given": str(source), "absolute": str(path.absolute()) if path.exists() else None}


# Reading.


def read(path: pathlib.Path) -> Case:
    """The case `path`, or the one whose scan.json it is. Raises: UserError when it is none."""
    record = path / RECORD if path.is_dir() else path
    content = files.read_json(record)
    if not isinstance(content, dict) or not isinstance(content.get("targets"), list):
        raise UserError(f"{record} is not the result of a scan; give what `jaxbd scan --out` wrote")
    return Case(record.parent, record, content, digest(record))


def has_triggers(case: Case) -> bool:
    """Whether the scan kept what it recovered."""
    return isinstance(case.content.get("trigger_files"), list)


def check_model(case: Case, model: models.Model) -> None:
    """Raises UserError unless the case was made from this very model, weights, settings and
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
        f"{model.path} is not the model that {case.record} speaks of: {name} {_say(word)}; scan it"
        " again"
    )


def _say(word: str) -> str:
    return {"differs": "was changed", "missing": "is missing", "new": "is new"}[word]


def load_evidence(case: Case, suspect: Suspect, targets: Sequence[int]) -> list[Evidence]:
    """The triggers that the case keeps for `targets`, as repairs take them.

    Raises: UserError naming a file that was changed since the scan or does not fit the suspect.
    """
    rows, hashes = case.get("trigger_files", kind=list), case.get("files", kind=dict)
    if len(rows) > MOST_TRIGGERS:
        raise UserError(f"{case.record} lists {len(rows)} triggers; at most {MOST_TRIGGERS}")
    found = []
    for row in rows:
        name = row.get("file") if isinstance(row, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"{case.record}: {quote(name)} is no trigger of the case; scan again")
        if type(row.get("class")) is not int or row["class"] not in targets:
            continue
        place = case.folder / name
        saved = evidence_file.load(place, suspect)
        if digest(place) != hashes.get(name) or saved.target != row["class"]:
            raise UserError(f"{place} was changed since the scan; scan again")
        found.append(evidence_file.to_evidence(saved, suspect))
    return sorted(found, key=lambda each: each.target)
