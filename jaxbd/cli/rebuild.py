"""Rebuilds settings from a record: the inverse of `report.results.settings`, for untrusted
records."""

import dataclasses
import pathlib
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jaxbd.base import UserError
from jaxbd.limits import quote

Kind = TypeVar("Kind")


def rebuild(kind: type[Kind], content: Any, where: str) -> Kind:
    """An instance of the dataclass `kind` from the JSON of its fields; missing fields get their
    defaults.

    Args:
      where: name of the place, for error messages.
    Raises: UserError on an unknown field, or a value of the wrong type.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where} is {quote(content)}; scan again")
    hints = get_type_hints(kind)
    if unknown := sorted({*content} - {*hints}):
        raise UserError(f"{where} has {quote(unknown[0])}, which this jaxbd does not know")
    values = {name: _as(hints[name], value, f"{where}.{name}") for name, value in content.items()}
    return kind(**values)


def _as(hint: Any, value: Any, where: str) -> Any:
    """`value` converted to the annotation `hint`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _as_one_of(parts, value, where)
    if dataclasses.is_dataclass(hint):
        return rebuild(hint, value, where)  # pyright: ignore[reportArgumentType]
    if origin is Literal and any(value == part and type(value) is type(part) for part in parts):
        return value
    if origin is tuple and isinstance(value, list):
        every = parts[:1] * len(value) if parts[1:] == (...,) else parts
        if len(every) == len(value):
            return tuple(_as(part, each, where) for part, each in zip(every, value, strict=True))
    if hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and issubclass(hint, int | str | None) and _is_plain(hint, value):
        return value
    raise UserError(f"{where} is {quote(value)}; scan again")


def _is_plain(hint: type, value: Any) -> bool:
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    # a subclass of int, such as `Bytes`, is written as a plain int
    return isinstance(value, int if issubclass(hint, int) else hint)


def _as_one_of(parts: tuple[Any, ...], value: Any, where: str) -> Any:
    for part in parts:
        try:
            return _as(part, value, where)
        except UserError:
            continue
    raise UserError(f"{where} is {quote(value)}; scan again")
