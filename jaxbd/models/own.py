"""The user's own architecture, named on the command line as `package.module:make`.

This imports the module and calls `make()`. It only runs code that the *user* names, never code that
a file names. `make` takes no arguments and returns one of:

- a Flax Linen module, called as `module(images, train=bool)` or `module(images)`;
- a Flax NNX module, called as `module(images)`;
- a function `(tensors, images) -> logits`, where `tensors` maps the state_dict's names to arrays in
  PyTorch's order of axes.

Images are [B, H, W, C] and already normalised, logits [B, K].
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from jaxbd.base import Array, ArrayTree, Key, Net, UserError, Variables
from jaxbd.caching import cached
from jaxbd.models.norm import normalise

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def is_own(arch: str | None) -> bool:
    """Whether `arch` names code: "package.module:make"."""
    return arch is not None and ":" in arch


@cached(16)
def make(arch: str) -> Any:
    """Calls `package.module:make`. Raises UserError when it cannot be found or fails."""
    module_name, _, name = arch.partition(":")
    try:
        found = cast(Any, importlib.import_module(module_name))
        for part in name.split("."):
            found = getattr(found, part)
        return found if isinstance(found, nn.Module) else found()
    except Exception as error:  # whatever the user's own code raises
        why = str(error).partition("\n")[0]
        raise UserError(f"--arch {arch}: {type(error).__name__}: {why}") from None


def is_function(arch: str) -> bool:
    """Whether the architecture is a bare function of a state_dict's tensors."""
    made = make(arch)
    return not isinstance(made, nn.Module) and not _is_nnx(made) and callable(made)


def net(
    arch: str,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    linen: Callable[..., Net],
) -> Net:
    """The net of the user's architecture; `linen` makes a net from a Linen module."""
    made = make(arch)
    if isinstance(made, nn.Module):
        takes_train = "train" in inspect.signature(type(made).__call__).parameters
        return linen(made if takes_train else _Untrained(made), image_shape, mean=mean, std=std)
    if _is_nnx(made):
        return _nnx_net(made, mean, std)
    if callable(made):
        return _function_net(made, mean, std)
    raise UserError(
        f"--arch {arch} makes a {type(made).__name__}; return a Flax module or a function"
    )


class _Untrained(nn.Module):
    """Wraps a module that takes no `train` argument."""

    inner: nn.Module

    def init(self, key: Key, x: Array, *, train: bool) -> Any:
        del train
        return self.inner.init(key, x)

    def apply(self, variables: Variables, x: Array, *, train: bool, mutable: Any = False) -> Any:
        del train
        return self.inner.apply(variables, x, mutable=mutable)


def _is_nnx(made: Any) -> bool:
    from flax import nnx

    return isinstance(made, nnx.Module)


def _nnx_net(made: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Net:
    from flax import nnx

    graph, params, stats, rest = nnx.split(made, nnx.Param, nnx.BatchStat, ...)

    def init(key: Key) -> Variables:
        del key
        return {"params": _nest(params), "batch_stats": _nest(stats)}

    def apply(
        variables: Variables, images: Array, *, train: bool = False
    ) -> tuple[Array, ArrayTree]:
        states = [
            _fill(state, variables.get(name, {}))
            for state, name in ((params, "params"), (stats, "batch_stats"))
        ]
        # a new module every time: the user's own must not change under tracing
        model = nnx.merge(graph, *states, rest)
        model.train() if train else model.eval()
        logits = model(normalise(images, mean, std))
        after = nnx.split(model, nnx.Param, nnx.BatchStat, ...)[2]
        return logits, _nest(after) if train else variables.get("batch_stats", {})

    return Net(init, apply)


def _nest(state: Any) -> Any:
    flat = {tuple(map(str, path)): leaf.get_value() for path, leaf in state.flat_state()}
    return flax.traverse_util.unflatten_dict(flat)


def _fill(state: Any, values: Any) -> Any:
    flat = flax.traverse_util.flatten_dict(dict(values))
    leaves, tree = jax.tree.flatten(state)
    paths = [tuple(map(str, path)) for path, _ in state.flat_state()]
    return jax.tree.unflatten(tree, [flat[path] for path in paths]) if leaves else state


def _function_net(
    made: Callable[..., Any],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Net:
    """The net of `made`: (tensors by name, images [B, H, W, C]) -> logits [B, K]."""

    def init(key: Key) -> Variables:
        raise UserError("an architecture that is a function cannot make fresh weights")

    def apply(
        variables: Variables, images: Array, *, train: bool = False
    ) -> tuple[Array, ArrayTree]:
        del train
        stats = variables.get("batch_stats", {})
        tensors = {**variables["params"], **stats}
        return made(tensors, jnp.asarray(normalise(images, mean, std))), stats

    return Net(init, apply)
