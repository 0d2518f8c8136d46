"""Rules about the code itself: who may import whom, who may compile, print, or run what it
reads."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import jaxbd
from jaxbd.cli import main

PACKAGE = pathlib.Path(jaxbd.__file__).parent
ROOT = PACKAGE.parent
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
}

FOUNDATION = {"base", "caching", "devices", "files", "limits", "zips"}
SHARED = FOUNDATION | {"images", "losses"}
BELOW_METHODS = SHARED | {"data", "models"}
METHODS = {"attacks", "inversion", "repairs", "detection"}
DRIVERS = {"training", "metrics"}
BELOW_INTEROP = BELOW_METHODS | METHODS | DRIVERS
MAY_IMPORT = {
    "base": set(),
    **{part: FOUNDATION for part in FOUNDATION - {"base"}},
    "images": FOUNDATION,
    "losses": FOUNDATION,
    "data": SHARED,
    "models": SHARED,
    **{kind: BELOW_METHODS for kind in METHODS},
    "training": BELOW_METHODS | METHODS,
    "metrics": BELOW_METHODS | METHODS | {"training"},
    "interop": BELOW_INTEROP,
    "methods": {"base"},
    "testing": BELOW_INTEROP | {"methods"},
    "pipelines": BELOW_INTEROP | {"interop", "methods"},
    "report": BELOW_INTEROP | {"interop", "methods", "pipelines"},
    "cli": BELOW_INTEROP | {"interop", "methods", "pipelines", "report"},
    "api": BELOW_INTEROP | {"interop", "methods", "pipelines"},
    "__main__": {"cli"},
    "__init__": {"api", "base"},
}
"""Part of the package -> other parts it may import. Methods never see the drivers, drivers never
see a method, and a repair or an inversion never sees an attack."""

JIT = "training/program.py"
NAMES_MODULES = {"__init__.py", "methods.py", "cli/main.py", "models/own.py"}
"""Import modules of this package by a name from their own tables, or the user's own architecture,
which the user names on the command line."""
SLOW_TO_IMPORT = {
    "pyarrow",
    "PIL",
    "tensorflow_datasets",
    "sklearn",
    "matplotlib",
    "orbax",
    "jinja2",
}
RUNS_WHAT_IT_READS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "pandas.read_pickle",
    "runpy.run_path",
    "os.system",
    "os.popen",
}


def part(path: str) -> str:
    """First name below the package: "sweep.py" -> sweep, "models/cnn.py" -> models."""
    return path.split("/")[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Full names of all modules that a file imports, wherever in it; `from a import b` gives a and
    a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def called(tree: ast.AST) -> set[str]:
    """Dotted names of everything that is called."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


each_file = pytest.mark.parametrize("path", sorted(SOURCES))


@each_file
def test_imports_go_one_way(path):
    own = part(path)
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if path.is_dir()
    }
    assert own in MAY_IMPORT, f"{own} has no place in the import order"
    used = {
        name.split(".")[1] for name in imported(SOURCES[path]) if name.startswith("jaxbd.")
    } & parts
    assert used - {own} <= MAY_IMPORT[own]


@each_file
def test_one_method_does_not_import_another_of_its_folder(path):
    """Helpers without a `make` of their own, such as the choice of poisoned rows, are for all."""
    if part(path) not in {"attacks", "inversion", "repairs"}:
        return
    methods = {
        name.removesuffix(".py").replace("/", ".")
        for name, tree in SOURCES.items()
        if part(name) == part(path)
        and any(isinstance(n, ast.FunctionDef) and n.name == "make" for n in tree.body)
    }
    assert not {name.removeprefix("jaxbd.") for name in imported(SOURCES[path])} & methods


@each_file
def test_one_file_compiles(path):
    compiles = {"jax.jit", "jax.pmap", "jax.experimental.pjit"}
    attributes = {
        ast.unparse(node) for node in ast.walk(SOURCES[path]) if isinstance(node, ast.Attribute)
    }
    found = (attributes | imported(SOURCES[path])) & compiles
    assert found == ({"jax.jit"} if path == JIT else set())


@each_file
def test_only_the_command_line_prints(path):
    if part(path) != "cli":
        assert not called(SOURCES[path]) & {"print", "sys.stdout.write", "sys.stderr.write"}


@each_file
def test_nothing_that_is_read_is_run(path):
    found = called(SOURCES[path])
    assert not found & (RUNS_WHAT_IT_READS | {"eval", "exec", "compile", "__import__"})
    if "importlib.import_module" in found:
        assert path in NAMES_MODULES
    keywords = {
        (k.arg, ast.unparse(k.value)) for k in ast.walk(SOURCES[path]) if isinstance(k, ast.keyword)
    }
    assert not keywords & {("allow_pickle", "True"), ("shell", "True")}


@each_file
def test_no_torch_and_slow_imports_inside_functions_only(path):
    assert "torch" not in {name.split(".")[0] for name in imported(SOURCES[path])}
    top = ast.Module(
        [node for node in SOURCES[path].body if isinstance(node, ast.Import | ast.ImportFrom)], []
    )
    assert not {name.split(".")[0] for name in imported(top)} & SLOW_TO_IMPORT


def test_no_verb_computes_when_it_is_imported():
    """Other machines are joined after a verb's module is imported, and before anything is
    computed."""
    program = f"""
import importlib
for verb in {sorted(main.VERBS)}:
    importlib.import_module("jaxbd.cli.commands." + verb)
import jax
jax.config.update("jax_platforms", "no device is asked for by this name")
try:
    jax.devices()
except RuntimeError:
    print("not yet")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "not yet\n", done.stderr


def text_files() -> list[pathlib.Path]:
    """What is shipped: source, tests, scripts, experiments and their results, documents."""
    wanted = {".py", ".md", ".json", ".toml", ".html", ".sh", ""}
    folders = [
        ROOT / name
        for name in ("jaxbd", "tests", "scripts", "experiments", ".ci")
        if (ROOT / name).exists()
    ]
    found = [
        path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts
    ]
    found += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml"}]
    return [path for path in found if path.is_file() and path.suffix in wanted]


def test_no_path_of_a_private_machine():
    private = re.compile(r"(?<![\w.])/(?:work|home|root|Users|tmp)/[\w.-]+")
    hits = {
        f"{path.relative_to(ROOT)}: {hit}"
        for path in text_files()
        for hit in private.findall(path.read_text(errors="replace"))
    }
    assert not hits


def test_methods_keep_no_key_in_their_state():
    """Drivers derive keys from the step number, so that a resumed run replays the same stream."""
    for path, tree in SOURCES.items():
        if part(path) in METHODS:
            states = [
                node
                for node in tree.body
                if isinstance(node, ast.ClassDef) and node.name == "State"
            ]
            fields = {
                n.target.id: ast.unparse(n.annotation)
                for s in states
                for n in s.body
                if isinstance(n, ast.AnnAssign)
            }
            assert "Key" not in fields.values(), path
            assert not states or "step" in fields, path
