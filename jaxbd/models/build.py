"""Builds a `Net` from an architecture's name."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxbd.base import Array, ArrayTree, Key, Net, UserError, Variables
from jaxbd.caching import cached
from jaxbd.models import families, fold, own
from jaxbd.models.cnn import CNN
from jaxbd.models.linen import apply_module, apply_mutable
from jaxbd.models.mobilenet import MobileNet
from jaxbd.models.norm import NORMALISATIONS, normalise
from jaxbd.models.resnet import RESNET18, RESNET34, PreActResNet, ResNet
from jaxbd.models.vgg import VGG
from jaxbd.models.wide_resnet import WideResNet

MODULES: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    "mobilenet": MobileNet,
    "preactresnet18": functools.partial(PreActResNet, blocks=RESNET18),
    "resnet18": functools.partial(ResNet, blocks=RESNET18),
    "resnet34": functools.partial(ResNet, blocks=RESNET34),
    "vgg": VGG,
    "wrn16-1": functools.partial(WideResNet, depth=16, factor=1),
    "wrn28-10": functools.partial(WideResNet, depth=28, factor=10),
    "wrn40-1": functools.partial(WideResNet, depth=40, factor=1),
    "wrn40-2": functools.partial(WideResNet, depth=40, factor=2),
}
"""Architecture name -> (classes, image_shape, dtype, **options) module factory."""

SOWN = ("intermediates", "output")
"""Collection and name under which a module sows its output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything needed to build a net, as stored in a model folder's `config.json`.

    Attributes:
      arch: a key of `MODULES`.
      classes: K.
      image_shape: (H, W, C).
      mean, std: input normalisation of pixels in [0, 1], per channel or one number for all.
      options: architecture options (width, stem, …).
      dtype: compute type, "float32" or "bfloat16"; parameters, statistics, sums and logits are
        float32 either way.
    """

    arch: str
    classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    class_names: tuple[str, ...] = ()


def module(spec: Spec) -> nn.Module:
    """The Flax module of `spec`. Raises UserError on an unknown architecture or option."""
    if spec.arch in families.FAMILIES:
        return _family(spec)
    if spec.arch not in MODULES:
        raise UserError(f"unknown architecture {spec.arch!r}; known: {', '.join(sorted(MODULES))}")
    try:
        return MODULES[spec.arch](classes=spec.classes, dtype=jnp.dtype(spec.dtype), **spec.options)
    except TypeError as error:
        raise UserError(f"architecture {spec.arch}: {error}") from None


def _family(spec: Spec) -> nn.Module:
    """A net described by its table of layers (option "layers") and by options for what the layers
    do not determine."""
    form = {name: value for name, value in spec.options.items() if name != "layers"}
    layers = spec.options.get("layers")
    if not isinstance(layers, Mapping):
        raise UserError(f"architecture {spec.arch} needs the table of its layers")
    families.parse(layers)
    # frozen, because modules must be hashable to be cached
    return families.Family(
        spec.classes, spec.arch, FrozenDict(layers), FrozenDict(form), jnp.dtype(spec.dtype)
    )


def title(spec: Spec) -> str:
    """The net's usual name, for example "ResNet-50", or the architecture's name."""
    if spec.arch not in families.FAMILIES:
        return spec.arch
    return families.FAMILIES[spec.arch].title(families.open_table(spec.options["layers"]))


def net(spec: Spec) -> Net:
    """The net of `spec`; its first operation is the input normalisation."""
    constants = tuple(spec.mean), tuple(spec.std)
    if own.is_own(spec.arch):
        return _build_own(spec.arch, spec.image_shape, *constants)
    return _build_from_module(spec.arch, module(spec), spec.image_shape, *constants)


def from_flax(
    flax_module: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    mean: tuple[float, ...] = NORMALISATIONS["none"][0],
    std: tuple[float, ...] = NORMALISATIONS["none"][1],
) -> Net:
    """Makes a `Net` on images of `image_shape` from any Flax module that is called as
    `module(images, train=bool)` -> logits.

    `Net.outputs` returns everything that its modules sow as `intermediates/<path>/output`, as
    `models.norm` does; an empty dict if none does.
    """

    def init(key: Key) -> Variables:
        # drops what the modules sow during initialisation
        variables = flax_module.init(key, jnp.zeros((2, *image_shape)), train=False)
        return {
            "batch_stats": {},
            **{k: v for k, v in variables.items() if k in ("params", "batch_stats")},
        }

    def apply(
        variables: Variables, images: Array, *, train: bool = False
    ) -> tuple[Array, ArrayTree]:
        inputs = normalise(images, mean, std)
        if not train:
            logits = apply_module(flax_module, variables, inputs, train=False)
            return wide(logits), variables.get("batch_stats", {})
        logits, updates = apply_mutable(flax_module, variables, "batch_stats", inputs, train=True)
        return wide(logits), updates.get("batch_stats", {})

    def outputs(variables: Variables, images: Array) -> tuple[Array, dict[str, Array]]:
        paths: list[tuple[str, ...]] = []
        with nn.intercept_methods(functools.partial(_note_sown, paths)):
            inputs = normalise(images, mean, std)
            logits, sown = apply_mutable(
                flax_module, variables, "intermediates", inputs, train=False
            )
        flat: dict[tuple[str, ...], Any] = dict(
            flax.traverse_util.flatten_dict(dict(sown.get("intermediates", {})))
        )
        return wide(logits), {"/".join(path): flat[*path, "output"][-1] for path in paths}

    return Net(init, apply, outputs)


def wide(logits: Array) -> Array:
    """`logits` in at least float32, so that no loss is computed in bfloat16."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _note_sown(
    paths: list[tuple[str, ...]], call: Callable[..., Any], args: Any, kwargs: Any, context: Any
) -> Any:
    """Records the path of every module that has sown its output, in order of execution.

    The collection's own order is useless: compiled functions sort dictionaries by name.
    """
    result = call(*args, **kwargs)
    path = context.module.path
    if (
        context.method_name == "__call__"
        and path not in paths
        and context.module.has_variable(*SOWN)
    ):
        paths.append(path)
    return result


@cached(64)
def _build_own(
    arch: str,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Net:
    return own.net(arch, image_shape, mean, std, from_flax)


@cached(64)
def _build_from_module(
    arch: str,
    flax_module: nn.Module,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Net:
    """`from_flax`, cached: equal settings give the same functions, so that model files with the
    same settings share compiled programs."""
    net = from_flax(flax_module, image_shape, mean=mean, std=std)
    return net._replace(frozen=functools.partial(fold.frozen, arch))


def from_apply(apply: Callable[[Variables, Array], Array]) -> Net:
    """Makes a `Net` from any pure `apply(variables, images in [0, 1]) -> logits` (without running
    statistics)."""

    def init(key: Key) -> Variables:
        raise UserError(
            "this net was made from a bare apply function and cannot make fresh variables; give"
            " existing ones"
        )

    def wrapped(
        variables: Variables, images: Array, *, train: bool = False
    ) -> tuple[Array, ArrayTree]:
        del train
        return apply(variables, images), (
            variables.get("batch_stats", {}) if isinstance(variables, dict) else {}
        )

    return Net(init, wrapped)


def parameter_count(variables: Variables) -> int:
    """Number of trainable scalars."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
