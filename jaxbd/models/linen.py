"""Typed wrappers of `flax.linen.Module.apply`, whose own return type is unspecific."""

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn

from jaxbd.base import Array, Variables


def apply_module(module: nn.Module, variables: Variables, *inputs: Array, **flags: Any) -> Array:
    """The output of `module` for `inputs`; its variables do not change."""
    return cast(Array, module.apply(variables, *inputs, **flags))


def apply_mutable(
    module: nn.Module, variables: Variables, collection: str, *inputs: Array, **flags: Any
) -> tuple[Array, Mapping[str, Any]]:
    """The output of `module` for `inputs`, and {collection: its new content}; {} if the module
    writes nothing to it."""
    result = module.apply(variables, *inputs, mutable=[collection], **flags)
    return cast(tuple[Array, Mapping[str, Any]], result)
