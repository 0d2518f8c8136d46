"""jaxbd's own model folder: `model.safetensors` with the arrays, `config.json` with the net's `Spec`."""

import json
import math
import os
import pathlib
import shutil
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import UserError, Variables
from jaxbd.interop import safetensors_file
from jaxbd.interop.files import Limits, Refusal, opened, quote, refusing, sha256
from jaxbd.models import build

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT, VERSION = "jaxbd-model", 1
COLLECTIONS = ("params", "batch_stats", "bounds")
FIELDS = ("arch", "classes", "image_shape", "mean", "std", "options", "dtype", "class_names")


def is_model(path: pathlib.Path) -> bool:
    """Whether `path` is a folder with both files of a model."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def save(path: str | os.PathLike, spec: build.Spec, variables: Variables, notes: dict[str, Any] | None = None) -> None:
    """Writes a model folder, whole or not at all; a model folder that is already there is replaced.

    Args:
      variables: collections of `COLLECTIONS`; each array is stored under its path, "params/conv0/kernel".
      notes: JSON values kept in `config.json`, e.g. where the model came from.
    Raises: UserError when `path` is something else than a model folder, or holds other files beside the model.
    """
    path = pathlib.Path(path)
    _check_replaceable(path)
    config = {"format": FORMAT, "version": VERSION, **{field: getattr(spec, field) for field in FIELDS}}
    text = json.dumps({**config, "notes": notes or {}}, indent=2, allow_nan=False) + "\n"
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sibling = path.with_name(f".{path.name}.{os.getpid()}.writing")
        aside = path.with_name(f".{path.name}.{os.getpid()}.replaced")
        try:
            sibling.mkdir()
            safetensors_file.write(sibling / WEIGHTS, flatten(variables))
            (sibling / CONFIG).write_text(text)
            _exchange(path, sibling, aside)
        finally:
            shutil.rmtree(sibling, ignore_errors=True)


def _check_replaceable(path: pathlib.Path) -> None:
    if not path.exists():
        return
    held = {entry.name for entry in path.iterdir()} if path.is_dir() else {"a file"}
    if held and not (is_model(path) and held == {WEIGHTS, CONFIG}):
        others = ", ".join(sorted(held - {WEIGHTS, CONFIG})[:3])
        raise UserError(f"{path}: not overwritten, it holds {others or 'half a model'}; name another folder")


def _exchange(path: pathlib.Path, sibling: pathlib.Path, aside: pathlib.Path) -> None:
    """Puts `sibling` in the place of `path`; the old folder is deleted only once the new one stands."""
    if not path.exists():
        os.rename(sibling, path)
        return
    os.rename(path, aside)
    try:
        os.rename(sibling, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside)


def flatten(variables: Variables) -> dict[str, np.ndarray]:
    """Every array under its path, "params/conv0/kernel"; collections that a folder does not keep are left out."""
    kept = {name: variables[name] for name in COLLECTIONS if variables.get(name)}
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(kept, sep="/").items()}


def unflatten(tensors: dict[str, np.ndarray]) -> Variables:
    """The inverse of `flatten`."""
    return {"batch_stats": {}, **flax.traverse_util.unflatten_dict(tensors, sep="/")}


def load(
    path: str | os.PathLike,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> tuple[build.Spec, Variables, str]:
    """The net's spec, its variables, and the SHA-256 of `model.safetensors`.

    Raises: UserError when a file is damaged, or when tensors are missing, extra or mis-shaped for the net, by name.
    """
    path = pathlib.Path(path)
    with refusing(path):
        if not is_model(path):
            raise Refusal(f"the folder does not hold {WEIGHTS} and {CONFIG}")
        spec = read_spec(path, limits)
        with opened(path / WEIGHTS, limits) as (file, size):
            tensors, _ = safetensors_file.read(file, size, limits)
            digest = sha256(file)
        check_fit(tensors, spec)
    return spec, unflatten({path: jnp.asarray(array, jnp.float32) for path, array in tensors.items()}), digest


def read_spec(path: pathlib.Path, limits: Limits) -> build.Spec:
    """The `Spec` in a folder's `config.json`. Raises Refusal naming the field that is wrong."""
    with opened(path / CONFIG, limits) as (file, size):
        if size > limits.header_bytes:
            raise Refusal(f"{CONFIG} has {size:,} bytes")
        try:
            config = json.loads(file.read().decode("utf-8"))
        except (ValueError, RecursionError):
            raise Refusal(f"{CONFIG} is not valid JSON") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise Refusal(f"{CONFIG} is not that of a jaxbd model")
    if config.get("version") != VERSION:
        raise Refusal(f"{CONFIG} is of version {quote(config.get('version'))}; this jaxbd reads version {VERSION}")
    wrong = [field for field, is_right in _CHECKS.items() if not is_right(config.get(field))]
    if wrong:
        raise Refusal(f"{CONFIG}: {wrong[0]} is {quote(config.get(wrong[0]))}")
    frozen = {field: tuple(config[field]) if type(config[field]) is list else config[field] for field in FIELDS}
    frozen["options"] = {name: tuple(v) if type(v) is list else v for name, v in config["options"].items()}
    return build.Spec(**frozen)


def _is_whole(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _are_numbers(value: Any) -> bool:
    if type(value) is not list or not 1 <= len(value) <= 64:
        return False
    return all(type(number) in (int, float) and abs(number) < 1e9 for number in value)


def _are_options(value: Any) -> bool:
    """Options build the net, so they bound what building costs: no thousand layers, and no field of Flax's own."""
    return type(value) is dict and all(
        name not in ("classes", "dtype", "parent", "name")
        and (
            type(option) in (str, bool)
            or (type(option) is float and math.isfinite(option))
            or _is_whole(option, 4096 if name == "width" else 64)
            or (type(option) is list and all(_is_whole(x, 64) for x in option) and sum(option) <= 64)
        )
        for name, option in value.items()
    )


_CHECKS = {
    "arch": lambda value: type(value) is str and value in build.MODULES,
    "classes": lambda value: _is_whole(value, 100_000),
    "image_shape": lambda value: type(value) is list and len(value) == 3 and all(_is_whole(x, 4096) for x in value),
    "mean": _are_numbers,
    "std": lambda value: _are_numbers(value) and min(value) > 0,
    "options": _are_options,
    "dtype": lambda value: value in ("float32", "bfloat16"),
    "class_names": lambda value: (
        type(value) is list and all(type(name) is str and len(name) <= 100 and name.isprintable() for name in value)
    ),
}
"""Field of `config.json` -> whether a value is one."""


def check_fit(tensors: dict[str, np.ndarray], spec: build.Spec) -> None:
    """Raises Refusal listing by name what is missing, extra, or of another shape or kind than the net of `spec` has."""
    expected = expected_shapes(spec)
    # bounds clip the output of a normalisation layer, one pair per channel, and may be absent
    bounds = {
        path.replace("batch_stats/", "bounds/", 1).removesuffix("mean") + side: shape
        for path, shape in expected.items()
        for side in ("lower", "upper")
        if path.startswith("batch_stats/") and path.endswith("/mean")
    }
    expected |= {path: shape for path, shape in bounds.items() if path in tensors}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{quote(name)} is not in the net" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name]:
            wrong.append(f"{name} has shape {tensors[name].shape} where the net has {expected[name]}")
        elif not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            wrong.append(f"{name} holds {tensors[name].dtype}, not floats")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise Refusal(f"it does not fit {spec.arch}: {'; '.join(sorted(wrong)[:5])}{more}")


def expected_shapes(spec: build.Spec) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array of the net, traced without computing anything."""
    try:
        abstract = jax.eval_shape(build.net(spec).init, jax.random.key(0))
    except UserError as error:
        raise Refusal(f"{CONFIG}: {error}") from None
    except Exception as error:  # whatever Flax makes of options that a stranger wrote
        raise Refusal(f"{CONFIG} does not describe a net: {quote(str(error).partition(chr(10))[0])}") from None
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(dict(abstract), sep="/").items()}
