"""jaxbd's own model folder: `model.safetensors` with the arrays, `config.json` with the net's
`Spec`.

A guarded model's folder also holds `guard.safetensors`, see `interop.guarded`. It has another
version number, so that no reader mistakes its suspect for the whole model.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import devices
from jaxbd.base import UserError, Variables
from jaxbd.interop import fit, safetensors_file
from jaxbd.limits import (
    Limits,
    Refusal,
    opened,
    parse_json,
    quote,
    read_bounded,
    refusing,
    sha256,
)
from jaxbd.models import build

WEIGHTS, CONFIG, GUARD = "model.safetensors", "config.json", "guard.safetensors"
ORBAX = "_METADATA"
"""Orbax's table of contents. A folder that also holds this file would be two models."""
FORMAT, VERSION, GUARDED_VERSION = "jaxbd-model", 1, 2
COLLECTIONS = ("params", "batch_stats", "bounds")
FIELDS = ("arch", "classes", "image_shape", "mean", "std", "options", "dtype", "class_names")


def is_model(path: pathlib.Path) -> bool:
    """Whether `path` is a folder with both `model.safetensors` and `config.json`."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def save(
    path: str | os.PathLike,
    spec: build.Spec,
    variables: Variables,
    notes: dict[str, Any] | None = None,
) -> None:
    """Writes a model folder atomically. An existing model folder is replaced.

    Args:
      variables: the collections named in `COLLECTIONS`; each array is stored under its path, e.g.
        "params/conv0/kernel".
      notes: JSON values to store in `config.json`, e.g. where the model came from.
    Raises: UserError when `path` exists and is not a model folder, or holds files other than the
      model's.
    """

    def more(written: pathlib.Path) -> dict[str, Any]:
        with (written / WEIGHTS).open("rb") as file:
            return {"sha256": {WEIGHTS: sha256(file)}, "notes": notes or {}}

    write(path, spec, {WEIGHTS: flatten(variables)}, more)


def write(
    path: str | os.PathLike,
    spec: build.Spec,
    files: dict[str, dict[str, np.ndarray]],
    more: Callable[[pathlib.Path], dict[str, Any]],
    version: int = VERSION,
) -> None:
    """Writes a model folder atomically: the arrays of each of `files`, then `config.json`.

    Args:
      files: file name -> its arrays by name.
      more: (folder with `files` already written) -> further entries of `config.json`, added to the
        spec.
    """
    path = pathlib.Path(path).resolve()  # replace the folder that a link points to, not the link
    if not devices.is_first():
        return
    _check_replaceable(path)
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sibling = path.with_name(f".{path.name}.{os.getpid()}.writing")
        aside = path.with_name(f".{path.name}.{os.getpid()}.replaced")
        try:
            sibling.mkdir()
            for name, tensors in files.items():
                safetensors_file.write(sibling / name, tensors)
            config = {
                "format": FORMAT,
                "version": version,
                **{field: getattr(spec, field) for field in FIELDS},
            }
            text = json.dumps({**config, **more(sibling)}, indent=2, allow_nan=False) + "\n"
            (sibling / CONFIG).write_text(text)
            _exchange(path, sibling, aside)
        finally:
            shutil.rmtree(sibling, ignore_errors=True)


def _check_replaceable(path: pathlib.Path) -> None:
    if not path.exists():
        return
    # replacing a folder deletes it, so it must not hold anyone else's files
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {"a file"}
    if names and not (is_model(path) and names <= {WEIGHTS, CONFIG, GUARD}):
        others = ", ".join(sorted(names - {WEIGHTS, CONFIG, GUARD})[:3])
        raise UserError(
            f"{path}: not overwritten, it holds {others or 'half a model'}; choose another folder"
        )


def _exchange(path: pathlib.Path, sibling: pathlib.Path, aside: pathlib.Path) -> None:
    """Moves `sibling` to `path`. The old folder is deleted only after the new one is in place."""
    if not path.exists():
        os.rename(sibling, path)
        return
    # a folder that is not empty cannot be replaced in one step
    os.rename(path, aside)
    try:
        os.rename(sibling, path)
    except OSError:
        # put the old folder back
        os.rename(aside, path)
        raise
    shutil.rmtree(aside)


def flatten(variables: Variables) -> dict[str, np.ndarray]:
    """Maps each array's path, e.g. "params/conv0/kernel", to the array. Collections that a folder
    does not store are left out."""
    collections = {name: variables[name] for name in COLLECTIONS if variables.get(name)}
    return {
        path: np.asarray(leaf)
        for path, leaf in flax.traverse_util.flatten_dict(collections, sep="/").items()
    }


def unflatten(tensors: Mapping[str, Any]) -> Variables:
    """The inverse of `flatten`."""
    return {"batch_stats": {}, **flax.traverse_util.unflatten_dict(tensors, sep="/")}


class Loaded(NamedTuple):
    """The contents of a model folder: the net's spec, its variables, and {name: SHA-256} of the
    files that were read."""

    spec: build.Spec
    variables: Variables
    files: dict[str, str]


def load(
    path: str | os.PathLike,
    limits: Limits = Limits(),
) -> tuple[build.Spec, Variables, str]:
    """Returns the net's spec, its variables, and the SHA-256 of `model.safetensors`.

    Raises: UserError when a file is damaged, or naming the tensors that are missing, extra or
      mis-shaped for the net.
    """
    found = read(path, limits)
    return found.spec, found.variables, found.files[WEIGHTS]


def read(
    path: str | os.PathLike,
    limits: Limits = Limits(),
    own: str | None = None,
) -> Loaded:
    """Like `load`, but with the hashes of all files that decide what the model computes.

    Args:
      own: an architecture of the user's own. The folder may name it because the user named it too.
    """
    path = pathlib.Path(path)
    with refusing(path):
        config, settings = read_config(path, limits, VERSION, own)
        spec, tensors, digest = read_weights(path, config, limits)
        # folders written by older versions do not record the hash of their weights
        if config.get("sha256", {WEIGHTS: digest}) != {WEIGHTS: digest}:
            bad = [
                f"tensor {quote(n)} {what}, and "
                for n, array in tensors.items()
                if (what := fit.complaint(n, np.asarray(array)))
            ]
            raise Refusal(f"{''.join(bad[:1])}{WEIGHTS} is not the file that {CONFIG} names")
    return Loaded(spec, unflatten(tensors), {WEIGHTS: digest, CONFIG: settings})


def read_weights(
    path: pathlib.Path, config: dict[str, Any], limits: Limits
) -> tuple[build.Spec, dict[str, jax.Array], str]:
    """The spec in `config`, the arrays of `model.safetensors`, checked to fit it, and that file's
    SHA-256."""
    spec = as_spec(config)
    with opened(path / WEIGHTS, limits) as (file, size):
        tensors, _ = safetensors_file.read(file, size, limits)
        digest = sha256(file)
    fit.check(tensors, spec)
    return spec, {name: jnp.asarray(array, jnp.float32) for name, array in tensors.items()}, digest


def read_config(
    path: pathlib.Path, limits: Limits, version: int, own: str | None = None
) -> tuple[dict[str, Any], str]:
    """A folder's `config.json`, with every field of the spec checked, and its SHA-256.

    A file must never make us import code: an architecture "package.module:make" is accepted only if
    it is `own`, the one that the user named. Raises Refusal naming the field that is wrong.
    """
    if not is_model(path):
        raise Refusal(f"the folder does not hold {WEIGHTS} and {CONFIG}")
    if (path / ORBAX).exists():
        raise Refusal("the folder holds a model of jaxbd and an Orbax checkpoint; give one of them")
    text = read_bounded(path / CONFIG, limits, limits.header_bytes)
    config = parse_json(text, CONFIG, limits)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise Refusal(f"{CONFIG} does not describe a jaxbd model")
    _check_version(path, config.get("version"), version)
    wrong = [field for field, is_right in _CHECKS.items() if not is_right(config.get(field))]
    if wrong[:1] == ["arch"] and own is not None and config["arch"] == own:
        wrong = wrong[1:]
    if wrong:
        raise Refusal(f"{CONFIG}: {wrong[0]} is {quote(config.get(wrong[0]))}")
    if len(config["class_names"]) not in (0, config["classes"]):
        raise Refusal(
            f"{CONFIG}: it gives {len(config['class_names'])} class_names to"
            f" {config['classes']} classes"
        )
    return config, hashlib.sha256(text).hexdigest()


def _check_version(path: pathlib.Path, found: Any, wanted: int) -> None:
    """Raises Refusal if a guarded model could pass for a plain one, or the other way round."""
    if found not in (VERSION, GUARDED_VERSION) or type(found) is not int:
        raise Refusal(
            f"{CONFIG} is of version {quote(found)}; this jaxbd reads version {VERSION} and"
            f" {GUARDED_VERSION}"
        )
    if found == GUARDED_VERSION and not (path / GUARD).exists():
        raise Refusal(f"{CONFIG} describes a guarded model, but {GUARD} is missing")
    if found == VERSION and (path / GUARD).exists():
        raise Refusal(f"it holds {GUARD}, but {CONFIG} does not describe a guarded model")
    if found != wanted:
        raise Refusal("it is a guarded model; open it as one (jaxbd.interop.load.open_model)")


def as_spec(config: dict[str, Any]) -> build.Spec:
    """The `Spec` in a checked `config.json`."""
    frozen: dict[str, Any] = {
        field: tuple(config[field]) if type(config[field]) is list else config[field]
        for field in FIELDS
    }
    frozen["options"] = {
        name: tuple(v) if type(v) is list else v for name, v in config["options"].items()
    }
    return build.Spec(**frozen)


def _is_whole(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _are_numbers(value: Any) -> bool:
    """Whether `value` is a list of numbers. An empty list is valid: it means that every image is
    standardised by its own mean and std."""
    if type(value) is not list or len(value) > 64:
        return False
    return all(type(number) in (int, float) and abs(number) < 1e9 for number in value)


def _are_options(value: Any) -> bool:
    """Whether `value` is a valid table of options. The options size the net, so their values are
    bounded to keep building it cheap; names that Flax or the builder use themselves are refused."""
    return type(value) is dict and all(
        name not in ("classes", "dtype", "parent", "name", "family", "form")
        and (
            (name == "layers" and _is_table(option))
            or type(option) in (str, bool)
            or (type(option) is float and math.isfinite(option))
            or _is_whole(option, 4096 if name == "width" else 64)
            or (
                type(option) is list and all(_is_whole(x, 64) for x in option) and sum(option) <= 64
            )
        )
        for name, option in value.items()
    )


def _is_table(value: Any) -> bool:
    """Whether an option is the table of a net's layers."""
    if type(value) is not dict:
        return False
    try:
        build.families.parse(value)
    except UserError:
        return False
    return True


_CHECKS = {
    "arch": lambda value: (
        type(value) is str and (value in build.MODULES or value in build.families.FAMILIES)
    ),
    "classes": lambda value: _is_whole(value, 100_000),
    "image_shape": (
        lambda value: (
            type(value) is list and len(value) == 3 and all(_is_whole(x, 4096) for x in value)
        )
    ),
    "mean": _are_numbers,
    "std": lambda value: _are_numbers(value) and min(value, default=1) > 0,
    "options": _are_options,
    "dtype": lambda value: value in ("float32", "bfloat16"),
    "class_names": lambda value: (
        type(value) is list
        and all(type(name) is str and len(name) <= 100 and name.isprintable() for name in value)
    ),
}
"""Field of `config.json` -> predicate for a valid value."""
