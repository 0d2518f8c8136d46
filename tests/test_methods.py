"""The table of methods, and methods of other packages."""

import json
import sys
import textwrap

import jax
import numpy as np
import pytest
import toys

from jaxbd import methods, testing
from jaxbd.base import Suspect, UserError
from jaxbd.cli.main import main
from jaxbd.interop import folder
from jaxbd.models import build
from jaxbd.pipelines import repair
from jaxbd.training.run import Run

PLUG_IN = '''
    """Shrink: multiplies all weights by a number below 1."""

    import dataclasses
    from typing import NamedTuple

    import jax
    import jax.numpy as jnp

    from jaxbd.base import Array, Phase, Problem, Repair, Variables

    PAPER = "https://example.org/shrink"


    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        factor: float = 0.9


    class State(NamedTuple):
        step: Array
        variables: Variables


    class Info(NamedTuple):
        norm: Array


    def make(problem: Problem, config: Config) -> Repair:
        def init(key, variables, data):
            return State(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, dict(variables)))

        def step(key, state, batch):
            params = jax.tree.map(lambda leaf: leaf * config.factor, state.variables["params"])
            norm = sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params))
            return State(state.step + 1, {**state.variables, "params": params}), Info(norm)

        def extract(state, dial=None):
            return state.variables

        return Repair(init, (Phase("shrink", step, 2, Info),), extract)
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of one module into a folder: (entry points, source) -> None."""

    def into_folder(entry_points: dict[str, str], source: str = PLUG_IN) -> None:
        (tmp_path / "shrinkage.py").write_text(textwrap.dedent(source))
        info = tmp_path / "shrinkage-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shrinkage\nVersion: 1.0\n")
        lines = [f"{name} = {module}" for name, module in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[jaxbd.methods]", *lines, ""]))
        monkeypatch.syspath_prepend(str(tmp_path))

    yield into_folder
    sys.modules.pop("shrinkage", None)


@pytest.mark.parametrize("name", ["shrink", "repair:shrink"])
def test_a_method_of_another_package_is_one_of_the_table(install, name):
    """Its kind is that of the contract which its `make` returns, or of its entry point's name."""
    install({name: "shrinkage"})
    method = methods.find("repair", "shrink")
    assert ("shrinkage" in sys.modules) == (name == "shrink"), "imported only where it must be"
    known = {each.name for each in methods.TABLE if each.kind == "repair"}
    assert methods.names("repair") == sorted({*known, "shrink"})
    summary = "Shrink: multiplies all weights by a number below 1."
    assert ("repair", "shrink", summary, "https://example.org/shrink") in methods.rows()
    testing.check_method(method.module)
    net = build.net(build.Spec(arch="cnn", classes=4, image_shape=toys.SHAPE, options={"width": 4}))
    suspect = Suspect(net, jax.jit(net.init)(jax.random.key(0)), toys.SHAPE, 4)
    clean = toys.quadrants(0, 80)
    key, config = jax.random.key(0), method.preset()
    result = repair.repair(Run(), key, suspect, clean, [], "shrink", config)
    for now, before in zip(
        *(jax.tree.leaves(each["params"]) for each in (result.variables, suspect.variables)),
        strict=True,
    ):
        np.testing.assert_allclose(now, 0.81 * before, rtol=1e-5)


def test_the_command_line_takes_a_method_of_another_package(install, tmp_path, capsys):
    """Its flags, its help, its line in `jaxbd methods`; one that has no length refuses --steps."""
    install({"repair:shrink": "shrinkage"})
    model, out = tmp_path / "model", tmp_path / "fixed"
    small = ["--image-shape", "8", "8", "1", "--width", "4", "--num-steps", "60", "--no-attack"]
    assert main(["attack", "--data", "digits", *small, "--out", str(model)]) == 0
    command = ["repair", str(model), "--method", "shrink", "--out", str(out)]
    command += ["--data", "digits", "--limit", "200"]
    assert main([*command, "--steps", "3"]) == 2
    assert "leave --steps out" in capsys.readouterr().err
    assert main([*command, "--with.factor", "0.5"]) == 0
    content = json.loads((out / "repair.json").read_text())
    assert content["method"] == "shrink" and content["config"] == {"factor": 0.5}
    fixed, before = (folder.load(path)[1]["params"] for path in (out, model))
    for now, old in zip(jax.tree.leaves(fixed), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(now, 0.25 * old, rtol=1e-5)
    capsys.readouterr()
    assert main(["repair", "--method", "shrink", "--help"]) == 0
    assert "--with.factor" in capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    (row,) = (row for row in json.loads(capsys.readouterr().out) if row["method"] == "shrink")
    assert (row["needs"], row["guards"], row["presets"]) == (["clean"], False, [])


@pytest.mark.parametrize(
    "name, source, words",
    [
        ("repair:dhbe", PLUG_IN, "entry point 'repair:dhbe' of shrinkage: there is a repair"),
        ("charm:shrink", PLUG_IN, "the kind must be one of attack, inversion, repair, guard"),
        ("shrink", "import no_such_module", "cannot be loaded: ModuleNotFoundError"),
        ("shrink", "make = None", "shrinkage has no `make` that returns one of Attack"),
    ],
)
def test_a_faulty_entry_point_is_named(install, name, source, words):
    install({name: "shrinkage"}, source)
    with pytest.raises(UserError, match=words):
        methods.all_methods()


def test_names_are_unique_and_every_module_is_what_the_table_says():
    taken = [(method.kind, method.name) for method in methods.TABLE]
    assert len({*taken}) == len(taken)
    for method in methods.TABLE:
        assert method.module.__name__ == method.path
        assert method.summary.endswith(".") and "\n" not in method.summary, method.name
        assert method.paper.startswith("https://")
        if method.kind == "repair":
            assert methods.kind_of(method.module) == "repair"
            for name in method.presets:
                assert isinstance(method.preset(name), method.config), name
            assert callable(method.driver.repair)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"unknown inversion 'luck'; choose from .*mesa, neural"):
        methods.find("inversion", "luck")
