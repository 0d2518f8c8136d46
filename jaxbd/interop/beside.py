"""Activation bounds beside a model file, `<stem>.bounds.safetensors`: a state_dict has no place for
them.

The file says by SHA-256 which model file it belongs to, since files of one stem share its name.
"""

import pathlib

import jax.numpy as jnp

from jaxbd.base import UserError, Variables
from jaxbd.interop import fit, folder, safetensors_file
from jaxbd.limits import Limits, Refusal, opened, quote, refusing, sha256
from jaxbd.models import build

ENDING = ".bounds.safetensors"
OWNER = "model_sha256"
"""The note that says which file the bounds are for; without it they are not applied."""


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The file of bounds beside the model file `path`, if it is there."""
    found = path.with_name(f"{path.stem}{ENDING}")
    return found if not path.is_dir() and found.exists() else None


def read(
    path: pathlib.Path, owner: str, spec: build.Spec, variables: Variables, limits: Limits
) -> tuple[Variables, str]:
    """The collection `bounds` in `path`, for the model file of SHA-256 `owner`, and the SHA-256 of
    `path`.

    Raises: UserError naming the file when it is damaged, belongs to another model file, does not
      fit the net of `spec` (whose arrays are `variables`), or holds what is not finite.
    """
    with refusing(path):
        with opened(path, limits) as (file, size):
            tensors, notes = safetensors_file.read(file, size, limits)
            digest = sha256(file)
        if OWNER not in notes:
            raise Refusal(
                "it does not say whose activation bounds it holds, and would change what the model"
                f" answers; delete it, or write the model's sha256 into its note {OWNER}"
            )
        if notes[OWNER] != owner:
            raise Refusal(
                "it holds the activation bounds of another model file; rename it, or the model"
            )
        others = [name for name in tensors if not name.startswith("bounds/")]
        if others or variables.get("bounds"):
            raise Refusal(
                f"it holds {quote(others[0])}"
                if others
                else "the model has bounds of its own already"
            )
        fit.check({**folder.flatten(variables), **tensors}, spec)
        for name, tensor in tensors.items():
            if bad := fit.complaint(name, tensor):
                raise Refusal(f"tensor {quote(name)} {bad}")
    arrays = {name: jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()}
    return folder.unflatten(arrays)["bounds"], digest


def write(path: pathlib.Path, owner: str, bounds: Variables) -> str:
    """Writes the bounds of the model file `path`, whose SHA-256 is `owner`. Returns: a note on them
    for people."""
    beside = path.with_name(f"{path.stem}{ENDING}")
    with refusing(beside):
        safetensors_file.write(beside, folder.flatten({"bounds": bounds}), {OWNER: owner})
    return (
        f"a state_dict has no place for activation bounds; they are in {beside.name}, "
        f"and without them {path.name} is not repaired"
    )


def check_free(path: pathlib.Path) -> None:
    """Raises UserError where a model file written to `path` would take or lose the bounds of
    another one."""
    found = find(path)
    if found is None:
        return
    with refusing(found):
        with opened(found, Limits()) as (file, size):
            owner = safetensors_file.read(file, size, Limits())[1].get(OWNER)
        if owner is not None and (not path.exists() or _digest(path) != owner):
            raise UserError(
                f"{found.name} holds the activation bounds of another model; choose another name"
                f" than {path.name}"
            )


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return sha256(file)
