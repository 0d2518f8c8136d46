"""A guarded model on disk: the suspect's model folder plus `guard.safetensors`.

`config.json` lists the targets in the net's order and the SHA-256 of both weight files, which only
work together. Arrays of the net corrected for target 9 are stored as `9/batch_stats/norm0/mean` or
`9/bounds/norm0/upper`.
"""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Net, UserError, Variables
from jaxbd.caching import cached
from jaxbd.detection import guard
from jaxbd.interop import fit, folder, safetensors_file
from jaxbd.limits import Limits, Refusal, opened, quote, refusing, sha256
from jaxbd.models import build

make, judge, flag = (cached(64)(made) for made in (guard.make, guard.verdicts, guard.flag))
"""The guard's functions, cached: the same net and targets give the same function objects, so JAX
does not trace them again."""


class Guard(NamedTuple):
    """The classes that have a corrected net, and the SHA-256 of `guard.safetensors`."""

    targets: tuple[int, ...]
    sha256: str


def is_guarded(path: pathlib.Path) -> bool:
    """Whether the model folder `path` holds a guard."""
    return folder.is_model(path) and (path / folder.GUARD).exists()


def net(spec: build.Spec, guard: Guard | None) -> Net:
    """The net of `spec`, guarded if `guard` is given."""
    plain = build.net(spec)
    return plain if guard is None else make(plain, guard.targets)


def save(
    path: str | os.PathLike,
    spec: build.Spec,
    variables: Variables,
    targets: Sequence[int],
    notes: dict[str, Any] | None = None,
) -> None:
    """Writes a guarded model's folder atomically. An existing model folder is replaced.

    Args:
      variables: as `detection.guard.pack` makes them, the corrected nets in the order of `targets`.
      notes: JSON values to store in `config.json`.
    Raises: UserError when `path` exists and is not a model folder, or the guard has more arrays
      than a reader accepts.
    """
    targets = [int(target) for target in targets]
    parts = {}
    for index, target in enumerate(targets):
        part = folder.flatten(
            jax.tree.map(lambda leaf, index=index: leaf[index], dict(variables["corrected"]))
        )
        parts |= {f"{target}/{name}": array for name, array in part.items()}
    if len(parts) > Limits().tensors:
        raise UserError(
            f"{path}: a guard of {len(targets)} targets has {len(parts):,} arrays; guard fewer"
            " targets"
        )

    def more(written: pathlib.Path) -> dict[str, Any]:
        digests = {name: _digest(written / name) for name in (folder.WEIGHTS, folder.GUARD)}
        return {"guard": {"targets": targets, "sha256": digests}, "notes": notes or {}}

    files = {folder.WEIGHTS: folder.flatten(variables["suspect"]), folder.GUARD: parts}
    folder.write(path, spec, files, more, folder.GUARDED_VERSION)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return sha256(file)


def load(
    path: str | os.PathLike,
    limits: Limits = Limits(),
) -> tuple[build.Spec, Variables, str, Guard]:
    """Returns the suspect's spec, the guarded net's variables, the SHA-256 of `model.safetensors`,
    and the guard.

    Raises: UserError when a file is damaged or is not the one that `config.json` names, or naming
      an array that is missing, extra, mis-shaped or not finite.
    """
    found, own = read(path, limits)
    return found.spec, found.variables, found.files[folder.WEIGHTS], own


def read(
    path: str | os.PathLike,
    limits: Limits = Limits(),
) -> tuple[folder.Loaded, Guard]:
    """Like `load`, but with the hashes of all files that decide what the model computes."""
    path = pathlib.Path(path)
    with refusing(path):
        config, settings = folder.read_config(path, limits, folder.GUARDED_VERSION)
        spec, weights, digest = folder.read_weights(path, config, limits)
        stated = _read_targets(config, spec.classes)
        tensors, found = _arrays(path / folder.GUARD, stated["targets"], limits)
        # compared after reading, so that the hashes are those of the bytes in use
        if stated["sha256"] != {folder.WEIGHTS: digest, folder.GUARD: found.sha256}:
            raise Refusal(
                f"{folder.WEIGHTS} and {folder.GUARD} are not the two that {folder.CONFIG} names"
            )
        suspect = folder.unflatten(weights)
        parts = [_read_correction(target, tensors, weights, spec) for target in found.targets]
        _check_nothing_else(tensors, found.targets)
        try:
            packed = guard.pack(suspect, [{**suspect, **part} for part in parts])
        except UserError as error:
            raise Refusal(f"{folder.GUARD}: {error}") from None
    digests = {folder.WEIGHTS: digest, folder.CONFIG: settings, folder.GUARD: found.sha256}
    return folder.Loaded(spec, packed, digests), found


def _arrays(
    path: pathlib.Path, targets: list[int], limits: Limits
) -> tuple[dict[str, np.ndarray], Guard]:
    """The arrays in `guard.safetensors`, and the `Guard` for `targets`."""
    try:
        with opened(path, limits) as (file, size):
            tensors, _ = safetensors_file.read(file, size, limits)
            return tensors, Guard(tuple(targets), sha256(file))
    except Refusal as refusal:
        raise Refusal(f"{folder.GUARD}: {refusal}") from None


def _read_targets(config: dict[str, Any], classes: int) -> dict[str, Any]:
    """The guard's entry in `config.json`. Raises Refusal unless it holds valid targets and
    hashes."""
    stated = config.get("guard")
    if type(stated) is not dict or stated.keys() != {"targets", "sha256"}:
        raise Refusal(f"{folder.CONFIG}: guard is {quote(stated)}")
    targets, digests = stated["targets"], stated["sha256"]
    if (
        type(targets) is not list
        or not targets
        or not all(type(t) is int and 0 <= t < classes for t in targets)
    ):
        raise Refusal(
            f"{folder.CONFIG}: the guard's targets are {quote(targets)}, but the net has {classes}"
            " classes"
        )
    if len(set(targets)) != len(targets):
        raise Refusal(f"{folder.CONFIG}: the guard's targets {quote(targets)} hold one class twice")
    if type(digests) is not dict or not all(is_digest(digest) for digest in digests.values()):
        raise Refusal(f"{folder.CONFIG}: the guard's sha256 is {quote(digests)}")
    return stated


def is_digest(value: Any) -> bool:
    """Whether `value` is a SHA-256 in hexadecimal."""
    return type(value) is str and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _read_correction(
    target: int, tensors: dict[str, np.ndarray], weights: dict[str, jax.Array], spec: build.Spec
) -> Variables:
    """Moments and bounds of the net corrected for `target`. Raises Refusal unless they fit the
    suspect's net and are finite."""
    prefix = f"{target}/"
    own = {
        name.removeprefix(prefix): array
        for name, array in tensors.items()
        if name.startswith(prefix)
    }
    inner = [name for name in own if not name.startswith(("batch_stats/", "bounds/"))]
    if not own or inner:
        what = f"holds {quote(prefix + inner[0])}" if inner else "holds nothing"
        raise Refusal(
            f"{folder.GUARD} {what} for target {target}; it must hold moments and bounds only"
        )
    params = {
        name: np.asarray(array) for name, array in weights.items() if name.startswith("params/")
    }
    try:
        # with the suspect's parameters the arrays form a complete net
        fit.check({**params, **own}, spec)
    except Refusal as refusal:
        raise Refusal(f"{folder.GUARD}, target {target}: {refusal}") from None
    for name, array in own.items():
        if bad := fit.complaint(name, array):
            raise Refusal(f"{folder.GUARD}: {quote(prefix + name)} {bad}")
    return folder.unflatten({name: jnp.asarray(array, jnp.float32) for name, array in own.items()})


def _check_nothing_else(tensors: dict[str, np.ndarray], targets: tuple[int, ...]) -> None:
    known = {str(target) for target in targets}
    others = [name for name in tensors if name.partition("/")[0] not in known]
    if others:
        raise Refusal(
            f"{folder.GUARD} holds {quote(others[0])}, which belongs to no target of"
            f" {folder.CONFIG}"
        )
