"""`jaxbd inspect`: shows what is in a model file, without executing anything in it."""

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import tyro

from jaxbd import files
from jaxbd.base import UserError
from jaxbd.cli import show
from jaxbd.interop.inspect import describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Shows what is in a model file: architecture, tensors, parameters, values that are not finite,
    SHA-256.

    Nothing in the file is executed. A refused file gives exit code 2.

    Attributes:
      file: a PyTorch file, .safetensors, .onnx, .pt2, a jaxbd model folder or an Orbax folder.
      arch: compare the file with this architecture.
      key: name of the net in a file that holds several, or of an ONNX file's logits.
      json: print JSON instead of tables.
    """

    file: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    arch: str | None = None
    key: str | None = None
    json: bool = False


def run(args: Args) -> int:
    """Prints what `describe` finds. Raises: UserError if the file was refused or not recognised."""
    facts = describe(args.file, arch=args.arch, key=args.key)
    if args.json:
        print(json.dumps(files.plain(facts), indent=1))
    else:
        _print(facts)
    if facts["refused"]:
        raise UserError(f"refused: {facts['refused']}")
    if facts["not_recognised"]:
        raise UserError(f"{args.file.name}: {facts['not_recognised']}")
    return 0


def _print(facts: dict[str, Any]) -> None:
    """Prints the tensors first and the summary last, so that it stays on screen."""
    if facts["tensors"]:
        rows = [
            (name, "x".join(map(str, shape)) or "scalar", dtype)
            for name, shape, dtype in facts["tensors"]
        ]
        show.table(("tensor", "shape", "type"), rows)
    options = ", ".join(
        f"{name} {value}" for name, value in (facts["options"] or {}).items() if name != "layers"
    )
    unfit = ", ".join(f"{name} ({count})" for name, count in facts["nonfinite"].items())
    lines = {
        "file": facts["path"],
        "kind": facts["kind"],
        "bytes": facts["bytes"] and f"{facts['bytes']:,}",
        "sha256": facts["sha256"],
        "architecture": facts["architecture"] or facts["not_recognised"],
        "options": options,
        "open": _few(facts["forms"]),
        "parameters": f"{facts['parameters']:,}" if facts["tensors"] else None,
        "tensors": f"{len(facts['tensors']):,}" if facts["tensors"] else None,
        "not finite": unfit or ("none" if facts["tensors"] else None),
        "nesting": ".".join(facts["nesting"]),
        "prefix": facts["prefix"],
        "normalised": facts["normalisation"] and _normalisation(facts["normalisation"]),
        "merged": ", ".join(facts["merged"][:4]) + ("" if len(facts["merged"]) < 5 else ", …"),
        "left out": ", ".join(facts["ignored"]),
        "bounds": (
            facts["bounds"] and f"{facts['bounds']} beside it is applied whenever it is opened"
        ),
        "guard": facts["guard"] and _guard(facts["guard"]),
        "refused": facts["refused"],
    }
    for name, value in lines.items():
        if value:
            show.say(f"{name:<13} {value}")


def _few(forms: list[str]) -> str:
    """The first forms; those that differ only in the images' size are left out."""
    named = [form for form in dict.fromkeys(forms) if form]
    more = f"; and {len(named) - 6} more" if len(named) > 6 else ""
    return "; ".join(named[:6]) + more


def _normalisation(constants: dict[str, Any]) -> str:
    """The normalisation constants stated in the file."""
    mean, std = (", ".join(f"{value:g}" for value in constants[name]) for name in ("mean", "std"))
    divided = " (stated for pixels from 0 to 255)" if constants["divided_by"] == 255 else ""
    return f"by the file: mean {mean}; std {std}{divided}"


def _guard(facts: dict[str, Any]) -> str:
    """What a guarded model does, as a phrase."""
    targets = ", ".join(map(str, facts["targets"]))
    return (
        f"answers {targets} are checked by corrected nets ({facts['arrays']} arrays, sha256"
        f" {facts['sha256']})"
    )
