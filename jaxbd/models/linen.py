"""Calls of Flax Linen modules with the types that `flax.linen.Module.apply` leaves open."""

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn

from jaxbd.base import Array, Variables


def apply_module(module: nn.Module, variables: Variables, *inputs: Array, **flags: Any) -> Array:
    """What `module` gives for `inputs`; its variables do not change."""
    return cast(Array, module.apply(variables, *inputs, **flags))


def apply_mutable(
    module: nn.Module, variables: Variables, collection: str, *inputs: Array, **flags: Any
) -> tuple[Array, Mapping[str, Any]]:
    """What `module` gives for `inputs`, and {collection: its new content}; without that key where
    the module writes none."""
    result = module.apply(variables, *inputs, mutable=[collection], **flags)
    return cast(tuple[Array, Mapping[str, Any]], result)
