"""Names of our arrays in a PyTorch state_dict, by architecture and naming scheme."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax

from jaxbd.models import build

NAMINGS: dict[str, tuple[tuple[str, Any], ...]] = {
    "torchvision": (
        (r"^layer(\d)_(\d+)", r"layer\1.\2"),
        (r"/shortcut_conv$", "/downsample.0"),
        (r"/shortcut_norm$", "/downsample.1"),
        (r"^head$", "fc"),
    ),
    "kuangliu": (
        (r"^layer(s|\d)_(\d+)", r"layer\1.\2"),
        (r"/shortcut_conv$", "/shortcut.0"),
        (r"/shortcut_norm$", "/shortcut.1"),
        (r"^head$", "linear"),
    ),
    "wide": (
        (r"^block(\d)_(\d+)", r"block\1.layer.\2"),
        (r"/shortcut_conv$", "/convShortcut"),
        (r"^head$", "fc"),
    ),
    # a stage has 8 modules: conv, norm, ELU, conv, norm, ELU, pooling, dropout
    "sequence": (
        (r"^conv(\d)_(\d)$", lambda found: f"features.{8 * int(found[1]) + 3 * int(found[2])}"),
        (r"^bn(\d)_(\d)$", lambda found: f"features.{8 * int(found[1]) + 3 * int(found[2]) + 1}"),
        (r"^head$", "classifier"),
    ),
    "plain": (),
}
"""Naming scheme -> (pattern, replacement) pairs that turn the path of one of our modules into the
name of a PyTorch module."""

ARCH_NAMINGS: dict[str, tuple[str, ...]] = {
    "mobilenet": ("kuangliu",),
    "preactresnet18": ("kuangliu",),
    "resnet18": ("torchvision", "kuangliu"),
    "resnet34": ("torchvision", "kuangliu"),
    "vgg": ("sequence",),
    "wrn16-1": ("wide",),
    "wrn28-10": ("wide",),
    "wrn40-1": ("wide",),
    "wrn40-2": ("wide",),
}
"""Architecture -> the naming schemes it occurs in; we write the first one. All other architectures
use "plain"."""

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
COUNTER = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var")
AS_IT_IS = "as it is"
"""Pseudo naming scheme for tensors that keep their names and PyTorch's order of axes."""


class Layout(NamedTuple):
    """The correspondence between a state_dict and a net.

    Attributes:
      spec: the net, with default input normalisation.
      naming: a key of `NAMINGS`, or `AS_IT_IS`.
      names: path of each of our arrays ("params/conv1/kernel") -> name of its tensor
        ("conv1.weight").
      shapes: the same paths -> the shape of our array.
      forms: all specs that fit the tensors equally well, including `spec`; they differ in things
        that leave no trace in the weights, e.g. strides.
    """

    spec: build.Spec
    naming: str
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    forms: tuple[build.Spec, ...] = ()


def lay_out(spec: build.Spec, naming: str) -> Layout:
    """Traces the net of `spec`, without computing anything, and names its arrays."""
    net = build.net(spec)
    abstract = jax.eval_shape(lambda: net.init(jax.random.key(0)))
    flat: dict[str, Any] = dict(flax.traverse_util.flatten_dict(abstract, sep="/"))
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    names = {}
    for path in shapes:
        _, *modules, leaf = path.split("/")
        names[path] = f"{translate('/'.join(modules), naming)}.{LEAVES.get(leaf, leaf)}"
    return Layout(spec, naming, names, shapes)


def lay_out_function(spec: build.Spec, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of an architecture that is a function of PyTorch's tensors, unconverted."""
    names = {}
    for name in shapes:
        leaf = name.rpartition(".")[2]
        if leaf != COUNTER:
            collection = "batch_stats" if leaf in STATISTICS else "params"
            names[f"{collection}/{name}"] = name
    return Layout(spec, AS_IT_IS, names, {path: shapes[name] for path, name in names.items()})


def export_names(spec: build.Spec) -> Layout:
    """The layout for writing one of our own nets as a state_dict, when there is no source file with
    names to keep."""
    return lay_out(spec, namings(spec.arch)[0])


def namings(arch: str) -> tuple[str, ...]:
    """The naming schemes of `arch`; we write the first one."""
    return ARCH_NAMINGS.get(arch, ("plain",))


def translate(module: str, naming: str) -> str:
    """Path of one of our modules -> name of the PyTorch module: "layer1_0/conv1" ->
    "layer1.0.conv1"."""
    for pattern, replacement in NAMINGS[naming]:
        module = re.sub(pattern, replacement, module)
    return module.replace("/", ".")


def counters(layout: Layout) -> set[str]:
    """Names of the scalars with which PyTorch's BatchNorm layers count batches."""
    if layout.naming == AS_IT_IS:
        ends = (".running_mean",)
        return {
            f"{n.rpartition('.')[0]}.{COUNTER}" for n in layout.names.values() if n.endswith(ends)
        }
    norms = [name for path, name in layout.names.items() if path.endswith("/mean")]
    return {f"{name.rpartition('.')[0]}.{COUNTER}" for name in norms}
