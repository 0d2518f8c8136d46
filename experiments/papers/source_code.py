"""The code that decides a result, as a hash: without what saves, reads or prints, without comments
and docstrings."""

import ast
import functools
import hashlib
import io
import pathlib
import tokenize
from collections.abc import Iterable
from typing import Any, TypeGuard

from experiments import units

DECIDES = (
    "jaxbd.attacks",
    "jaxbd.repairs",
    "jaxbd.inversion",
    "jaxbd.detection",
    "jaxbd.training",
    "jaxbd.metrics",
    "jaxbd.models",
    "jaxbd.pipelines",
    "jaxbd.data.draw",
    "jaxbd.data.digits",
    "jaxbd.images",
    "jaxbd.losses",
    "jaxbd.base",
    "experiments.papers",
)
"""Modules, and packages with all their modules, that are part of a unit's code."""
SAVES = tuple(
    f"jaxbd.training.{name}"
    for name in ("checkpoint", "lock", "memory", "run", "step_folder", "tree_arrays")
)
TELLS = tuple(
    f"experiments.papers.{name}"
    for name in (
        "ledger",
        "source_code",
        "runs",
        "sizes",
        "attacks",
        "claims",
        "grid",
        "tables",
        "tables_bna",
        "tables_dhbe",
        "tables_mesa",
        "tables_presets",
        "show",
        "reproduce_papers",
    )
)
"""Modules of those packages that save, read or print, or whose every value is in the settings."""
FOREIGN = ("jaxbd.models.families",)
"""Packages that rebuild nets of model files; no victim is one of those."""
LEAVES = ("jaxbd.pipelines.compare", "jaxbd.pipelines.repair")
"""Modules that are part of the code without what they import: everything uses their types. Callers
that use more must list the modules behind it."""


def digest(*parts: str) -> str:
    """First 12 hex digits of the SHA-256 of some texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@functools.cache
def code_hash(modules: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """The hash of the modules and of all they import that decides results."""
    return digest(*(f"{name} {_source_hash(name)}" for name in sorted(closure(modules, without))))


def closure(modules: Iterable[str], without: tuple[str, ...] = ()) -> set[str]:
    """Names of the modules and, of those they import, of all that decide results.

    Args:
      without: modules to leave out with what only they import.
    """
    left_out = {*SAVES, *TELLS, *without}
    waiting, known = list(modules), set()
    while waiting:
        name = waiting.pop()
        if name in known or name in left_out or _path(name) is None or _is_within(name, FOREIGN):
            continue
        known.add(name)
        if name not in LEAVES:
            waiting += [each for each in _imports(name) if _is_within(each, DECIDES)]
    return known


def _is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in packages)


@functools.cache
def _path(name: str) -> pathlib.Path | None:
    """The source file of a module of this repository; None where there is none."""
    place = units.ROOT.joinpath(*name.split("."))
    options = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in options if path.is_file()), None)


@functools.cache
def _imports(name: str) -> frozenset[str]:
    """Full names that a module imports; `from a import b` gives a and a.b."""
    path, found = _path(name), set()
    assert path is not None
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


@functools.cache
def _source_hash(name: str) -> str:
    """The hash of a module's code without comments and docstrings."""
    path = _path(name)
    assert path is not None
    return digest(bare(path.read_text()))


def bare(text: str) -> str:
    """Python code without comments, docstrings and blank lines; the same under every version of
    Python, whose ways to print a syntax tree differ."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if _is_text(node):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _is_text(node: ast.AST) -> TypeGuard[Any]:
    """Whether a node is a string on its own."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
