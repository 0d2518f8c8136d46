"""The table of methods: attacks, inversions, repairs and guards, built in or from other packages.

The command line, `jaxbd methods`, the contract tests and the docs are generated from it. A built-in
method is one line of `TABLE`. Another package adds methods through the entry point group
`jaxbd.methods`: each entry point is a module with `PAPER`, `Config` and `make`. The entry point's
prefix names the kind of method (`"repair:mine"`); without a prefix, the return annotation of `make`
does.

Modules are imported on first use.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_args

GROUP = "jaxbd.methods"
Kind = Literal["attack", "inversion", "repair", "guard"]
CONTRACTS: dict[str, Kind] = {
    "Attack": "attack",
    "Inversion": "inversion",
    "Repair": "repair",
    "Net": "guard",
}
"""Return type of `make` -> kind of method."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
      kind, name: together unique; the name is the value of `--method`.
      path: of the module.
      pipeline: for a repair, the module with the function `repair` that drives it, called like
        `pipelines.repair.repair`. If the module has a `Config`, it replaces the method's.
      presets: for a repair, functions of the module (or of the pipeline, if that has a `Config`)
        that return settings; the first is the default. Without presets, only `Config()`.
      search: for a repair that needs a trigger, the scan method that searches for one by default.
      guards: for a repair, whether it corrects each target separately and its result guards itself.
      plantable: for an attack, whether `jaxbd attack` can plant it.
      load: imports the module; None to import `path`.
    """

    kind: Kind
    name: str
    path: str
    pipeline: str = "jaxbd.pipelines.repair"
    presets: tuple[str, ...] = ()
    search: str = "auto"
    guards: bool = False
    plantable: bool = True
    load: Callable[[], ModuleType] | None = dataclasses.field(default=None, compare=False)

    @functools.cached_property
    def module(self) -> ModuleType:
        """The method's module."""
        return self.load() if self.load is not None else importlib.import_module(self.path)

    @functools.cached_property
    def driver(self) -> ModuleType:
        """The module with the function `repair` that drives the method."""
        return importlib.import_module(self.pipeline)

    @property
    def config(self) -> type:
        """The class of settings that the driver takes."""
        return getattr(self.driver, "Config", None) or self.module.Config

    @property
    def needs(self) -> frozenset[str]:
        """Inputs that a repair requires, see `Repair.needs`: "clean", "trigger"."""
        return getattr(self.module, "NEEDS", frozenset({"clean"}))

    @property
    def summary(self) -> str:
        """Description of the method: the first paragraph of its module's docstring, as one line."""
        return " ".join((self.module.__doc__ or "").strip().partition("\n\n")[0].split())

    @property
    def paper(self) -> str:
        """Link to the method's source."""
        return self.module.PAPER

    def preset(self, name: str | None = None) -> Any:
        """The settings of the preset `name`, or the default settings."""
        if not self.presets:
            return self.config()
        source = self.driver if hasattr(self.driver, "Config") else self.module
        return getattr(source, name or self.presets[0])()


def _attack(name: str, **others: Any) -> Method:
    return Method("attack", name, f"jaxbd.attacks.{name.replace('-', '_')}", **others)


def _inversion(name: str) -> Method:
    return Method("inversion", name, f"jaxbd.inversion.{name.replace('-', '_')}")


def _repair(name: str, *presets: str, **others: Any) -> Method:
    path = f"jaxbd.repairs.{name.replace('-', '_')}"
    return Method("repair", name, path, presets=presets, **others)


TABLE = (
    _attack("amplified", plantable=False),
    _attack("badnets"),
    _attack("blend"),
    _attack("chessboard"),
    _attack("clean-label"),
    _attack("l0-inv"),
    _attack("l2-inv"),
    _attack("latent", plantable=False),
    _attack("single-pixel"),
    _attack("sinusoid"),
    _attack("steganography"),
    _attack("trojan"),
    _attack("wanet"),
    _inversion("margin"),
    _inversion("mesa"),
    _inversion("neural-cleanse"),
    _inversion("pixel"),
    _inversion("plain"),
    _inversion("pt-red"),
    _repair("anp", "quick", "released", "paper"),
    _repair("argd", "quick", "paper", "released"),
    _repair(
        "bna",
        "quick",
        "paper",
        "released",
        pipeline="jaxbd.pipelines.correct",
        search="pairs",
        guards=True,
    ),
    _repair("clip"),
    _repair("dhbe", "released", "paper", "quick"),
    _repair("fine-pruning", "quick", "released", "compared"),
    _repair("finetune", "quick"),
    _repair("ft-sam", "quick", "released"),
    _repair("ibau", "quick", "released", "paper"),
    _repair("mcr", "quick", "released"),
    _repair("nad", "quick", "released", "compared"),
    _repair("nc-unlearn", "quick", "paper", search="neural-cleanse"),
    _repair("unlearn", "quick", "rounds", "released"),
    Method("guard", "bna", "jaxbd.detection.guard"),
    Method("guard", "strip", "jaxbd.detection.strip"),
)
"""The built-in methods."""


def all_methods(kind: Kind | None = None) -> list[Method]:
    """All methods, or those of one kind; built-in methods first, then those of other packages."""
    return [each for each in (*TABLE, *_plug_ins()) if kind in (None, each.kind)]


def names(kind: Kind) -> list[str]:
    """The names of all methods of one kind, in alphabetical order."""
    return sorted(method.name for method in all_methods(kind))


def find(kind: Kind, name: str) -> Method:
    """The method of that kind and name. Raises: UserError when there is none."""
    # imported here, so that the table alone does not import JAX
    from jaxbd.base import UserError

    for method in all_methods(kind):
        if method.name == name:
            return method
    raise UserError(f"unknown {kind} {name!r}; choose from {', '.join(names(kind))}")


def rows() -> list[tuple[str, str, str, str]]:
    """(kind, name, description, link to the paper) of every method."""
    return [(each.kind, each.name, each.summary, each.paper) for each in all_methods()]


def kind_of(module: ModuleType) -> Kind:
    """The kind of method in a module, from the return annotation of its `make`.

    Raises: UserError when `make` is missing or returns no contract of `jaxbd.base`.
    """
    from jaxbd.base import UserError

    make = getattr(module, "make", None)
    returned = None if make is None else inspect.signature(make).return_annotation
    name = getattr(returned, "__name__", str(returned)).rpartition(".")[2]
    if name not in CONTRACTS:
        raise UserError(
            f"{module.__name__} has no `make` that returns one of {', '.join(CONTRACTS)};"
            " name the kind in the entry point, for example 'repair:mine'"
        )
    return CONTRACTS[name]


def _plug_ins() -> list[Method]:
    """The methods of other packages. Raises: UserError when a name is already taken."""
    from jaxbd.base import UserError

    found: list[Method] = []
    taken = {(each.kind, each.name) for each in TABLE}
    for point in importlib.metadata.entry_points(group=GROUP):
        method = _plug_in(point)
        if (method.kind, method.name) in taken:
            raise UserError(
                f"entry point {point.name!r} of {_package(point)}: there is a {method.kind}"
                f" {method.name!r} already; choose another name"
            )
        taken.add((method.kind, method.name))
        found.append(method)
    return found


def _plug_in(point: importlib.metadata.EntryPoint) -> Method:
    """The method of an entry point. Its module is imported only if the name does not give the
    kind."""
    from jaxbd.base import UserError

    prefix, colon, name = point.name.partition(":")
    if colon and prefix not in get_args(Kind):
        raise UserError(
            f"entry point {point.name!r} of {_package(point)}: the kind must be one of"
            f" {', '.join(get_args(Kind))}, got {prefix!r}"
        )
    load = functools.partial(_load, point)
    kind: Any = prefix if colon else kind_of(load())
    return Method(kind, name if colon else point.name, point.value, load=load)


def _load(point: importlib.metadata.EntryPoint) -> ModuleType:
    """The module of an entry point. Raises: UserError when it cannot be imported."""
    from jaxbd.base import UserError

    try:
        return point.load()
    except Exception as error:  # importing another package can raise anything
        raise UserError(
            f"entry point {point.name!r} of {_package(point)} cannot be loaded:"
            f" {type(error).__name__}: {error}"
        ) from None


def _package(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"
