"""Parses a command line into an instance of the verb's `Args`, or reports one line of error.

If a verb's flags depend on a method, they are parsed twice: `preview` reads the few flags that
choose the method, then `parse` reads all flags into the `Args` built for that method.
"""

import argparse
import dataclasses
import difflib
import os
import pathlib
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

import tyro
from tyro import _errors as complaints  # the only form in which tyro reports errors as data

from jaxbd.base import UserError
from jaxbd.training.memory import Bytes

REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _bytes_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Parses sizes with units: 500MB, 2GiB."""
    if info.type is not Bytes:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="BYTES",
        instance_from_str=lambda words: Bytes.parse(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(int(value))],
    )


@REGISTRY.primitive_rule
def _path_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Expands "~" once, here: the shell leaves it in --out=~/x.pth, and no later reader of a path
    has to know."""
    if info.type is not pathlib.Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: pathlib.Path(os.path.expanduser(words[0])),
        is_instance=lambda value: isinstance(value, pathlib.Path),
        str_from_instance=lambda value: [str(value)],
    )


def preview(argv: Sequence[str], *flags: str) -> list[str | None]:
    """The values of `flags`, None for those not given; everything else is left to `parse`.

    `flags` are written like "--scan-method"; a value may follow after a space or "=".
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        spellings = {flag, "--" + flag[2:].replace("-", "_")}
        parser.add_argument(*sorted(spellings), dest=flag, nargs="?", default=None, const="")
    found = vars(parser.parse_known_args(list(argv))[0])
    return [found[flag] for flag in flags]


def parse(kind: Any, argv: Sequence[str], program: str, default: Any = None) -> Any:
    """An instance of the dataclass `kind`.

    Args:
      default: an instance with the default values; None for the class's own defaults.
    Raises: SystemExit after printing the help; UserError naming the wrong flag.
    """

    def complain(event: complaints.ParseErrorEvent) -> NoReturn:
        near = _suggest(event, kind)
        raise UserError(f"{describe(event, argv)}{near}; see {program} --help")

    with complaints.on_parse_error(complain):
        return tyro.cli(
            kind,
            args=list(argv),
            prog=program,
            default=tyro.MISSING_NONPROP if default is None else default,
            config=(tyro.conf.HelptextFromCommentsOff, tyro.conf.DisallowNone),
            registry=REGISTRY,
        )


def describe(event: complaints.ParseErrorEvent, argv: Sequence[str]) -> str:
    """What is wrong with the flags, in one line."""
    match event:
        case complaints.MissingArgs():
            names = [_flag_of(missing.arg) for missing in event.missing_arguments]
            return f"missing: {', '.join(names)}"
        case complaints.UnrecognizedArgs():
            return f"unrecognised: {' '.join(event.tokens)}"
        case complaints.InvalidChoice():
            known = ", ".join(event.choices)
            return f"{_flag_of(event.argument)} is {event.value!r}; choose from {known}"
        case complaints.BadValue():
            return f"{_flag_of(event.argument)} needs {_metavar_of(event.argument)}"
        case complaints.InstantiationFailure():
            flag = f"{_flag_of(event.argument)}: " if event.argument is not None else ""
            return flag + " ".join(event.message.split())
    return f"cannot parse the flags: {' '.join(argv)}"


def _flag_of(argument: Any) -> str:
    """An argument as written on the command line."""
    lowered = argument.lowered
    if argument.is_positional():
        return lowered.metavar or argument.field.intern_name.upper()
    return lowered.name_or_flags[0]


def _metavar_of(argument: Any) -> str:
    return argument.lowered.metavar or "a value"


def _suggest(event: complaints.ParseErrorEvent, kind: Any) -> str:
    """The suggestion "did you mean FLAG?" for a mistyped flag; "" if no known flag is close."""
    tokens = getattr(event, "tokens", [])
    words = [token.split("=", 1)[0] for token in tokens if token.startswith("--")]
    near = difflib.get_close_matches(words[0], _flags_of_kind(kind), n=1) if words else []
    return f"; did you mean {near[0]}?" if near else ""


def _flags_of_kind(kind: Any, prefix: str = "--") -> list[str]:
    """The flags of a dataclass, roughly as tyro writes them; nested fields both with and without
    the outer field's name."""
    origin, found = typing.get_origin(kind) or kind, []
    if not dataclasses.is_dataclass(origin):
        return []
    hints = typing.get_type_hints(origin)
    for field in dataclasses.fields(origin):
        name = field.name.replace("_", "-")
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            found += _flags_of_kind(inner, f"{prefix}{name}.") + _flags_of_kind(inner, prefix)
        found.append(f"{prefix}{name}")
    return found
