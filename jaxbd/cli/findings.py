"""Writes a scan's result: a JSON file or a case, a page, SARIF, a bill of materials."""

import pathlib
from types import ModuleType
from typing import Any, NamedTuple

from jaxbd import files
from jaxbd.base import UserError
from jaxbd.cli import case, common, job, outputs, recovered
from jaxbd.report import mlbom, sarif

ENDINGS = {
    "out": (".json", ""),
    "report": (".html", ".htm"),
    "sarif": (".sarif", ".json"),
    "mlbom": (".json",),
}
"""Flag -> file endings it accepts; "" is a folder."""


class Found(NamedTuple):
    """A scan with images: the module that ran it (`by_class` or `by_pair`), its result, and what it
    worked on."""

    kind: ModuleType
    result: Any
    material: common.Material


def paths(args: Any) -> tuple[pathlib.Path | None, ...]:
    """All output paths; None for a flag that was not given."""
    return tuple(getattr(args, flag) for flag in ENDINGS)


def check(args: Any) -> None:
    """Checks that all outputs can be written, before anything is read.

    Raises: UserError naming the first output that cannot, or whose path is also another output or
      the model.
    """
    taken, own = [pathlib.Path(args.model)], args.out or args.report
    for flag, endings in ENDINGS.items():
        path = getattr(args, flag)
        if path is None:
            continue
        if flag == "out" and case.is_folder(path):
            case.check(path, args.stopping)
        else:
            outputs.check_output(path)
            outputs.check_ending(f"--{flag}", path, endings)
            stopping = args.stopping
            replace = stopping.replace if path == own else job.may_replace(own, stopping)
            outputs.refuse_existing(f"--{flag}", path, replace=replace)
        # even with --force: the second output would replace the first
        if path.resolve() in [other.resolve() for other in taken]:
            raise UserError(f"--{flag} {path} is also another input or output; choose a name")
        taken.append(path)


def write(args: Any, content: dict[str, Any], found: Found | None) -> None:
    """Writes the requested outputs; `found` is None for the answer without data, which has neither
    triggers nor a page."""
    if case.is_folder(args.out):
        _write_case(args, content, found)
    elif args.out is not None:
        files.write_json(args.out, content)
    if args.report is not None and found is not None:
        _write_page(args.report, args, content, found)
    if args.sarif is not None:
        files.write_json(args.sarif, sarif.describe(content))
    if args.mlbom is not None:
        files.write_json(args.mlbom, mlbom.describe(content))


def _write_case(args: Any, content: dict[str, Any], found: Found | None) -> None:
    if found is None:
        shape = tuple(content["model"]["image_shape"])
        case.write(args.out, content, [], shape, None)
        return
    shape = found.material.suspect.image_shape
    triggers = recovered.list_triggers(found.result, args.search, shape)
    page = lambda path: _write_page(path, args, content, found)
    case.write(args.out, content, triggers, shape, page)


def _write_page(path: pathlib.Path, args: Any, content: dict[str, Any], found: Found) -> None:
    found.kind.write_page(path, content, found.result, found.material, args.search)
