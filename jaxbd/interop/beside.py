"""Activation bounds stored next to a model file as `<stem>.bounds.safetensors`, because a
state_dict has no place for them.

The bounds file names its model file by SHA-256: model files with the same stem would share it.
"""

import pathlib

import jax.numpy as jnp

from jaxbd.base import UserError, Variables
from jaxbd.interop import fit, folder, safetensors_file
from jaxbd.limits import Limits, Refusal, opened, quote, refusing, sha256
from jaxbd.models import build

ENDING = ".bounds.safetensors"
OWNER = "model_sha256"
"""Metadata key with the SHA-256 of the model file; without it the bounds are not applied."""


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The bounds file next to the model file `path`, if there is one."""
    found = path.with_name(f"{path.stem}{ENDING}")
    return found if not path.is_dir() and found.exists() else None


def read(
    path: pathlib.Path, owner: str, spec: build.Spec, variables: Variables, limits: Limits
) -> tuple[Variables, str]:
    """Reads the collection `bounds` from `path` for the model file with SHA-256 `owner`; returns it
    with the SHA-256 of `path`.

    Raises: UserError naming the file when it is damaged, belongs to another model file, does not
      fit the net of `spec` with its `variables`, or holds values that are not finite.
    """
    with refusing(path):
        with opened(path, limits) as (file, size):
            tensors, notes = safetensors_file.read(file, size, limits)
            digest = sha256(file)
        if OWNER not in notes:
            raise Refusal(
                "it does not say which model its activation bounds belong to, and would change the"
                f" model's answers; delete it, or set its metadata {OWNER} to the model's sha256"
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
                else "the model already has bounds of its own"
            )
        fit.check({**folder.flatten(variables), **tensors}, spec)
        for name, tensor in tensors.items():
            if bad := fit.complaint(name, tensor):
                raise Refusal(f"tensor {quote(name)} {bad}")
    arrays = {name: jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()}
    return folder.unflatten(arrays)["bounds"], digest


def write(path: pathlib.Path, owner: str, bounds: Variables) -> str:
    """Writes the bounds of the model file `path`, which has the SHA-256 `owner`. Returns a note for
    the user."""
    beside = path.with_name(f"{path.stem}{ENDING}")
    with refusing(beside):
        safetensors_file.write(beside, folder.flatten({"bounds": bounds}), {OWNER: owner})
    return (
        f"a state_dict has no place for activation bounds; they are in {beside.name}, "
        f"and without them {path.name} is not repaired"
    )


def check_free(path: pathlib.Path) -> None:
    """Raises UserError if a model file written to `path` would pick up or overwrite the bounds of
    another model."""
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
