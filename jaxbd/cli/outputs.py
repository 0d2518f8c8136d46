"""Output paths: checked before any long work, and written whole or not at all."""

import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable

from jaxbd import devices
from jaxbd.base import UserError, Variables
from jaxbd.interop import load as models

MODEL_SUFFIXES = models.FILE_SUFFIXES
"""Endings of the model files jaxbd writes; a name without an ending is a folder."""
COMPANIONS = {
    models.folder.WEIGHTS,
    models.folder.CONFIG,
    models.folder.GUARD,
    "trigger.npz",
    "attack.json",
    "repair.json",
}
"""Files the verbs write into a model folder. A folder with anything else in it is not replaced."""


def check_output(path: pathlib.Path | None, *, folder: bool = False) -> None:
    """Checks before any long work that `path` can be written; leaves nothing behind.

    Args:
      folder: whether the output is a folder; it may replace a model folder but nothing else.
    Raises: UserError naming the path.
    """
    if path is None:
        return
    path = path.absolute()
    if folder and path.exists():
        held = {f"a file of that name, {path.name}"}
        if path.is_dir():
            held = {entry.name for entry in path.iterdir()}
        if held and not (models.folder.is_model(path) and held <= COMPANIONS):
            other = ", ".join(sorted(held - COMPANIONS)[:3]) or "half a model"
            raise UserError(
                f"output {path} is not overwritten: it contains {other}; choose another --out"
            )
    if not folder and path.is_dir():
        raise UserError(f"output {path} is a folder; give the name of a file")
    if path.suffix in MODEL_SUFFIXES:
        models.beside.check_free(path)
    check_writable(path)


def check_writable(path: pathlib.Path) -> None:
    """Raises UserError if nothing can be written at `path`, which need not exist."""
    path = path.absolute()
    above = next(parent for parent in path.parents if parent.exists() or parent.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {above}: {error.strerror}; choose a writable folder"
        ) from None


def ending(path: pathlib.Path) -> str:
    """The ending of a file name as a person would see it: "v1.2" has none."""
    return path.suffix if re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) else ""


def check_ending(flag: str, path: pathlib.Path | None, known: tuple[str, ...]) -> None:
    """Raises UserError unless the name given by `flag` has one of the `known` endings."""
    if path is not None and ending(path) not in known:
        raise UserError(
            f"{flag} {path} has no known ending; use {' or '.join(filter(None, known))}"
            + (", or no ending for a folder" if "" in known else "")
        )


def refuse_existing(flag: str, path: pathlib.Path | None, *, replace: bool) -> None:
    """Raises UserError if `path` already exists, unless it may be replaced.

    Args:
      replace: whether --force is given, or --resume, which continues an earlier output.
    """
    if path is None or replace:
        return
    if path.exists() and not _is_empty_folder(path):
        raise UserError(f"{flag} {path} already exists; choose another name, or give --force")


def _is_empty_folder(path: pathlib.Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def check_model_output(
    path: pathlib.Path, inputs: Iterable[str | os.PathLike | None], *, force: bool = False
) -> None:
    """`check_output` for a model, which must not overwrite one of its inputs.

    Args:
      inputs: files and folders that are read; None for those not given.
      force: allow overwriting an input.
    Raises: UserError on an ending that jaxbd writes no model with, or if `path` is an input.
    """
    if ending(path) and path.suffix not in MODEL_SUFFIXES:
        known = ", ".join(MODEL_SUFFIXES)
        raise UserError(
            f"models cannot be written as {path.suffix}; end --out with {known}, or with no ending"
            " for a jaxbd folder"
        )
    place = path.resolve()
    for each in () if force else inputs:
        # --data is text, in which the parser expands no "~"
        if each is not None and place == pathlib.Path(os.path.expanduser(each)).resolve():
            raise UserError(
                f"--out {path} is also an input; choose another path, or give --force to overwrite"
                " it"
            )
    check_output(path, folder=is_folder(path))


def check_page(path: pathlib.Path | None, others: Iterable[pathlib.Path]) -> None:
    """`check_output` for a page, which must not be at or inside any of `others`: model, output,
    checkpoints. Raises: UserError naming the page."""
    if path is None:
        return
    check_output(path)
    place = path.resolve()
    if {other.resolve() for other in others} & {place, *place.parents}:
        raise UserError(
            f"--report {path} is where the model, output or checkpoints are; choose another name"
        )


def is_folder(path: pathlib.Path) -> bool:
    """Whether a model written to `path` becomes a jaxbd folder."""
    return path.suffix not in MODEL_SUFFIXES


def write_folder(path: pathlib.Path, fill: Callable[[pathlib.Path], object]) -> None:
    """Lets `fill(folder)` write a folder under a temporary name, then renames it to `path`.

    An old folder at `path` has passed `check_output`; it is deleted only once the new one is in
    place.
    """
    if not devices.is_first():
        return
    path = path.resolve()  # of a symlink, replace the folder and keep the link
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fill(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_model(path: pathlib.Path, model: models.Model, variables: Variables) -> str | None:
    """`load.save_model`; a folder is replaced as a whole."""
    if not is_folder(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return models.save_model(path, model, variables)
    write_folder(path, lambda new: models.save_model(new, model, variables))
    return None


def list_notes(path: pathlib.Path, model: models.Model, note: str | None) -> list[str]:
    """What a user of the new file must know but the file does not hold."""
    found = [f"Note: {note}."] if note else []
    mean, std = (
        ", ".join(f"{value:g}" for value in values) for values in (model.spec.mean, model.spec.std)
    )
    # a model folder stores the normalisation; for ONNX the writer's own note covers it
    holds = is_folder(path) or path.suffix == ".onnx"
    if not holds and (set(model.spec.mean), set(model.spec.std)) != ({0.0}, {1.0}):
        found.append(
            f"Note: the file does not hold the input normalisation: mean {mean}; std {std}."
        )
    return found
