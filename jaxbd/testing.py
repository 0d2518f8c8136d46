"""Contract tests for methods, as functions that also work for methods of other packages.

    import my_method
    from jaxbd.testing import check_method

    def test_my_method():
        check_method(my_method)

Every check raises AssertionError that names the broken rule.
"""

import dataclasses
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import methods
from jaxbd.base import (
    Array,
    ArrayTree,
    Attack,
    Batch,
    Cell,
    Inversion,
    Key,
    Problem,
    Repair,
    RepairData,
    UserError,
    Variables,
)
from jaxbd.models import build
from jaxbd.repairs import mixture
from jaxbd.training.program import Program

IMAGE_SHAPE, CLASSES, ROWS, TARGET = (8, 8, 3), 4, 12, 1
"""The toy problem: shape of the images, classes, rows of a batch, target of the trigger."""
NET = build.net(
    build.Spec(
        arch="cnn", classes=CLASSES, image_shape=IMAGE_SHAPE, options={"width": 4, "stages": 2}
    )
)
PARTS = {
    "attack": ("PAPER", "Config", "make"),
    "inversion": ("PAPER", "Config", "State", "Info", "make"),
    "repair": ("PAPER", "Config", "State", "Info", "make"),
    "guard": ("PAPER", "flag"),
}
"""Kind of method -> names that its module must have."""


class Stepping(NamedTuple):
    """A method in the form that `check_steps` takes.

    Attributes:
      init: (key, variables) -> state; the variables are those of a victim of `NET`.
      step: (key, state, batch, variables) -> (state, any other outputs).
      donated: whether drivers donate the state, which then must not share arrays with the variables
        or contain an array twice.
    """

    init: Callable[..., ArrayTree]
    step: Callable[..., tuple[ArrayTree, ArrayTree]]
    donated: bool = False


def check_method(
    module: ModuleType,
    config: Any = None,
    *,
    kind: methods.Kind | None = None,
    eagerly: bool = True,
) -> None:
    """Checks a method's whole contract on a small problem.

    Args:
      config: the settings to check with; the defaults of `module.Config` if None.
      kind: of the method; by default from the return annotation of its `make`.
      eagerly: whether to run a step also without compilation, in float64, and compare.
    Raises: AssertionError that names the broken rule.
    """
    kind = kind or methods.kind_of(module)
    for name in PARTS[kind]:
        assert hasattr(module, name), f"{module.__name__} has no {name}"
    assert module.__doc__, f"{module.__name__} has no docstring that says what the method is"
    assert module.PAPER.startswith("https://"), f"{module.__name__}: PAPER must be a link"
    if kind == "guard":
        return
    config = module.Config() if config is None else config
    check_config(config)
    if kind == "attack":
        check_attack(module.make(IMAGE_SHAPE, CLASSES, config), eagerly=eagerly)
    elif kind == "inversion":
        check_inversion(module.make(NET, IMAGE_SHAPE, config), eagerly=eagerly)
    else:
        made = module.make(problem(), config)
        needs = getattr(module, "NEEDS", frozenset({"clean"}))
        assert made.needs == needs, f"{module.__name__}: NEEDS and Repair.needs differ"
        check_repair(made, eagerly=eagerly)


def check_config(config: Any) -> None:
    """Checks that settings are frozen, keyword-only and hashable, survive a round trip through
    JSON, and refuse unknown choices."""
    kind, fields = type(config), dataclasses.fields(config)
    assert kind.__dataclass_params__.frozen, f"{kind} must be frozen"
    assert all(field.kw_only for field in fields), f"{kind} must be keyword-only"
    hash(config)
    # records store settings as JSON
    again = kind(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config, f"{kind} does not survive JSON: {again}"
    for field in fields:
        if isinstance(getattr(config, field.name), str):
            message = _refusal(config, {field.name: "sideways"})
            assert field.name in message, f"{kind} must refuse a wrong {field.name} by its name"


def _refusal(config: Any, changes: dict[str, Any]) -> str:
    """The error message on changed settings; empty if they are accepted."""
    try:
        dataclasses.replace(config, **changes)
    except UserError as error:
        return str(error)
    return ""


def check_attack(attack: Attack, *, eagerly: bool = True) -> None:
    """Checks an attack on images of `IMAGE_SHAPE` with `CLASSES`."""

    def step(key, trigger, batch, variables):
        del variables
        poisoned = attack.poison(key, trigger, batch)
        _assert_alike(poisoned, batch, "poisoned batch")
        stamped = attack.stamp(key, trigger, batch.images)
        _assert_alike(stamped, batch.images, "stamped images")
        return trigger, (stamped, poisoned, attack.relabel(batch.labels))

    check_steps(Stepping(lambda key, variables: attack.init(key), step), eagerly=eagerly)


def check_inversion(inversion: Inversion, *, eagerly: bool = True) -> None:
    """Checks an inversion for victims of `NET`."""

    def step(key, state, batch, variables):
        cell = Cell(jnp.int32(TARGET), jnp.int32(-1), batch.images.dtype.type(0.8))
        new, info = inversion.step(key, state, batch, cell, variables)
        triggers = inversion.sample(key, new, 5)
        assert triggers.shape[0] == 5 and triggers.ndim == 4, "sample gives [n, h, w, C]"
        assert triggers.shape[3] == IMAGE_SHAPE[2], "triggers have the images' channels"
        stamped = inversion.stamp(key, new, batch.images)
        _assert_alike(stamped, batch.images, "stamped images")
        return new, (info, triggers, stamped)

    check_steps(Stepping(lambda key, variables: inversion.init(key), step), eagerly=eagerly)


def check_repair(repair: Repair, *, eagerly: bool = True) -> None:
    """Checks a repair made for `problem()`: runs every phase in order and checks the extracted
    net."""
    names = [phase.name for phase in repair.phases]
    assert names and len({*names}) == len(names), "phases need distinct names"
    assert repair.needs <= {"clean", "trigger"}, f"unknown needs {repair.needs}"

    def init(key, variables):
        return repair.init(key, variables, repair_data(repair, variables))

    def step(key, state, batch, variables):
        infos = []
        for phase in repair.phases:
            state = state if phase.begin is None else phase.begin(state)
            state, info = phase.step(key, state, batch if phase.draws else None)
            assert isinstance(info, phase.info), f"phase {phase.name} must return its info"
            infos.append(info)
        extracted = repair.extract(state)
        _check_extracted(extracted, variables)
        # both ends of the dial must give nets
        for value in [] if repair.dial is None else np.asarray(repair.dial)[[0, -1]]:
            _check_extracted(repair.extract(state, jnp.asarray(value)), variables)
        return state, (infos, extracted)

    check_steps(Stepping(init, step, donated=True), eagerly=eagerly)


def _check_extracted(extracted: Variables, variables: Variables) -> None:
    """Checks that a repaired net has all variables of the suspect in the same shapes; it may have
    more."""
    for name, tree in variables.items():
        assert name in extracted, f"extract gives no {name}"
        _assert_alike(extracted[name], tree, f"extracted {name}")


def check_steps(method: Stepping, *, eagerly: bool = True) -> None:
    """Checks that `init` and `step` can be traced on shapes alone, that a step preserves structure,
    shapes and types of the state, that two steps share one trace, and that all values are
    finite."""
    variables = Program(NET.init)(jax.random.key(0))
    state = jax.eval_shape(method.init, jax.random.key(0), variables)
    after, _ = jax.eval_shape(
        method.step, jax.random.key(0), state, batch_of(jnp.float32), variables
    )
    assert jax.tree.structure(after) == jax.tree.structure(state), "a step changed the state's tree"
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        # a weak type would change in the next step and force a second trace
        kinds = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in (before, now)]
        assert kinds[0] == kinds[1], f"a step changed a leaf of the state: {kinds}"
        # drivers derive keys from the step, so that a resumed run replays them
        assert not jnp.issubdtype(before.dtype, jax.dtypes.prng_key), "a state holds a key"
    with jax.enable_x64(eagerly):
        _check_two_steps(method, variables, eagerly)


def _check_two_steps(method: Stepping, variables: Variables, eagerly: bool) -> None:
    """Runs two steps and checks traces and values; compares with eager execution if `eagerly`.

    The comparison needs float64: in float32, Adam can turn a rounding error into a full step.
    """
    batch, step = batch_of(jnp.float64 if eagerly else jnp.float32), Program(method.step)
    wide = _widen if eagerly else lambda tree: tree
    variables = wide(variables)
    first = wide(Program(method.init)(jax.random.key(1), variables))
    second, made = step(jax.random.key(2), first, batch, variables)
    third, _ = step(jax.random.key(3), second, batch, variables)
    assert step.traces == 1, f"two steps took {step.traces} traces"
    leaves = jax.tree.leaves((second, made, third))
    assert all(map(_is_finite_or_unset, leaves)), "a step made NaN or infinity"
    if eagerly and method.donated:
        # checked on an eager `init`, since a compiled one always copies
        _check_copies(method.init(jax.random.key(1), variables), variables)
    if eagerly:
        eager = method.step(jax.random.key(2), first, batch, variables)
        for one, other in zip(*map(jax.tree.leaves, ((second, made), eager)), strict=True):
            np.testing.assert_allclose(
                one, other, rtol=1e-6, atol=1e-6, err_msg="compiled and eager steps differ"
            )


def _check_copies(state: ArrayTree, variables: Variables) -> None:
    """Checks that no two leaves of the state share memory, and that none shares it with the
    suspect."""
    at, own = (
        [jnp.asarray(leaf).unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if leaf.size]
        for tree in (state, variables)
    )
    assert len({*at}) == len(at), "two leaves of the state share memory; copy them"
    assert not {*own} & {*at}, "the state shares memory with the suspect; copy its variables"


def _is_finite_or_unset(leaf: Array) -> bool:
    """Whether all values are finite; a scalar +inf is allowed, as the initial value of a
    minimum."""
    return bool(jnp.isfinite(leaf).all() or (leaf.ndim == 0 and leaf == jnp.inf))


def _widen(tree: ArrayTree) -> ArrayTree:
    """Converts every float32 leaf to float64."""
    wide = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf
    return jax.tree.map(wide, jax.tree.map(jnp.asarray, tree))


def _assert_alike(one: ArrayTree, other: ArrayTree, what: str) -> None:
    kinds = [
        (jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)])
        for tree in (one, jax.tree.map(lambda leaf: leaf, other))
    ]
    assert kinds[0] == kinds[1], f"{what} changed: {kinds[0]} instead of {kinds[1]}"


def batch_of(dtype: Any) -> Batch:
    """`ROWS` images of noise, with equally many of each class."""
    images = np.random.default_rng(0).uniform(size=(ROWS, *IMAGE_SHAPE))
    return Batch(jnp.asarray(images, dtype), jnp.arange(ROWS, dtype=jnp.int32) % CLASSES)


def stamp(key: Key, pattern: Array, images: Array) -> Array:
    """The trigger of the toy problem: `pattern` [h, w, C] pasted at a random place per image."""
    height, width, _ = pattern.shape
    most = jnp.array([[IMAGE_SHAPE[0] - height + 1, IMAGE_SHAPE[1] - width + 1]])
    places = jax.random.randint(key, (images.shape[0], 2), 0, most)
    paste = lambda image, place: jax.lax.dynamic_update_slice(
        image, pattern.astype(image.dtype), (place[0], place[1], 0)
    )
    return jax.vmap(paste)(images, places)


def problem() -> Problem:
    """The toy problem, with a stamp for a mixture of triggers."""
    return Problem(NET, IMAGE_SHAPE, CLASSES, stamp=mixture.mix(stamp))


def repair_data(repair: Repair, variables: Variables) -> RepairData:
    """The data of the toy problem that a repair needs, in the float type of `variables`."""
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    batch, data = batch_of(dtype), RepairData()
    if "clean" in repair.needs:
        data = data._replace(clean=batch)
    if "trigger" in repair.needs:
        patterns = jnp.linspace(0, 1, 24, dtype=dtype).reshape(2, 2, 2, 3)
        data = data._replace(trigger_params=mixture.uniform(patterns))
    if {"clean", "trigger"} <= repair.needs:
        rows = np.arange(ROWS) % CLASSES == TARGET
        sources, target = (Batch(*(leaf[part] for leaf in batch)) for part in (~rows, rows))
        data = data._replace(clean_sources=sources, clean_target=target)
    return data
