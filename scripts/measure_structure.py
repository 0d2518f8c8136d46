"""Counts what says how easy a package is to read: modules, imports, long functions, comments.

    python scripts/measure_structure.py [PATH]                    a table for a checkout (this one)
    python scripts/measure_structure.py [PATH] --json FILE        and the same numbers in a file
    python scripts/measure_structure.py [PATH] --details          and the names behind them
    python scripts/measure_structure.py [PATH] --pyright PROGRAM  and pyright's errors

Only the standard library is needed; the code is parsed and never imported.
"""

import argparse
import ast
import collections
import io
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator

PACKAGE, USERS = "jaxbd", ("experiments", "scripts", "tests")
LONG, MANY = 40, 8
"""Lines above which a function is long; parameters from which it has many."""
PARTICIPLES = {
    "begun",
    "bound",
    "built",
    "chosen",
    "done",
    "drawn",
    "driven",
    "found",
    "given",
    "gone",
    "held",
    "hidden",
    "kept",
    "known",
    "left",
    "lost",
    "made",
    "met",
    "paid",
    "put",
    "seen",
    "sent",
    "shown",
    "sold",
    "spent",
    "spoken",
    "stuck",
    "sunk",
    "swept",
    "taken",
    "thrown",
    "told",
    "torn",
    "understood",
    "woken",
    "worn",
    "written",
}
"""Irregular ones; the regular ones end in -ed."""
FINITE = {"need", "feed", "seed", "embed", "speed", "shed", "proceed", "exceed", "breed", "bleed"}
"""Words in -ed that are none."""

Imports = dict[str, set[str]]


def modules(root: pathlib.Path, folder: str = PACKAGE) -> dict[str, pathlib.Path]:
    """Dotted name -> file of every module in `folder`; an `__init__` bears its package's name."""
    found = {}
    for path in sorted((root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(files: dict[str, pathlib.Path]) -> Imports:
    """Module -> modules of `files` that it imports, also inside functions; never itself."""
    return {name: set(_imported(name, path, files.keys())) - {name} for name, path in files.items()}


def _imported(name: str, path: pathlib.Path, known) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                if node.level
                else ""
            )
            source = ".".join(part for part in (base, node.module) if part)
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from (each for each in names if each in known)
            # `from package import function` is an import of the package itself
            if source in known and not all(each in known for each in names):
                yield source


def components(graph: Imports) -> list[list[str]]:
    """Strongly connected components, those first that import no other (Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            found.append(stack[cut:])
            del stack[cut:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def longest_chain(graph: Imports) -> list[str]:
    """The longest chain of imports, the importing module first; of a cycle one module counts."""
    chains: dict[str, list[str]] = {}
    for part in components(graph):
        below = [chains[other] for node in part for other in graph[node] if other not in part]
        chain = [part[0], *max(below, key=len, default=[])]
        chains |= {node: chain for node in part}
    return max(chains.values(), key=len, default=[])


def rooms(graph: Imports) -> Imports:
    """The same graph with every folder, and every module at the root, as one node."""
    room = lambda name: ".".join(
        name.split(".")[:-1] if name.count(".") > 1 else name.split(".")[:2]
    )
    found: Imports = collections.defaultdict(set)
    for name, used in graph.items():
        found[room(name)] |= {room(other) for other in used} - {room(name)}
    return dict(found)


def functions(
    files: dict[str, pathlib.Path],
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(where, node) of every function and method, nested ones too."""
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, decorators left out."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """All parameters, keyword-only ones and a method's `self` included."""
    given = node.args
    starred = (given.vararg is not None) + (given.kwarg is not None)
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) + starred


def is_participle(name: str) -> bool:
    """Roughly: whether the first word is a past participle, by its ending or from a list."""
    first = name.strip("_").split("_")[0]
    return first in PARTICIPLES or (
        re.fullmatch(r"[a-z]+ed", first) is not None and first not in FINITE
    )


def lines(files: dict[str, pathlib.Path]) -> collections.Counter:
    """Lines by kind: "all", "blank", "docstring", "comment" (nothing else on them), "code".

    On top of these "fmt: skip", and "remark": comments after code that are no directive to a tool.
    """
    counts = collections.Counter()
    for path in files.values():
        text = path.read_text()
        documented, commented = _documented(ast.parse(text)), set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                counts["fmt: skip"] += re.match(r"#\s*fmt:\s*skip", token.string) is not None
                if token.line.lstrip().startswith("#"):
                    commented.add(token.start[0])
                elif not re.match(r"#\s*(fmt|noqa|type|pyright|pragma)\b", token.string):
                    counts["remark"] += 1
        every = text.splitlines()
        blank = {number for number, line in enumerate(every, 1) if not line.strip()} - documented
        counts.update({"all": len(every), "blank": len(blank), "docstring": len(documented)})
        counts.update(comment=len(commented), code=len(every) - len(blank | documented | commented))
    return counts


def _documented(tree: ast.AST) -> set[int]:
    """Numbers of the lines taken by docstrings, those of attributes too."""
    return {
        number
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def pyright(root: pathlib.Path, program: str, python: str) -> dict[str, int]:
    """Errors in the package at the level "basic", whatever configuration the checkout has."""
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / PACKAGE).symlink_to(root / PACKAGE)
        settings = {"include": [PACKAGE], "typeCheckingMode": "basic", "pythonVersion": "3.11"}
        (pathlib.Path(folder) / "pyrightconfig.json").write_text(json.dumps(settings))
        command = [program, "--project", folder, "--pythonpath", python, "--outputjson"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if not done.stdout.strip():
        sys.exit(f"pyright gave no answer: {done.stderr.strip()[-500:]}")
    summary = json.loads(done.stdout)["summary"]
    if not summary["filesAnalyzed"]:
        sys.exit("pyright looked at no file")
    return {
        "pyright: files": summary["filesAnalyzed"],
        "pyright: basic errors": summary["errorCount"],
    }


def measure(root: pathlib.Path) -> dict[str, float | int]:
    """All numbers that need no other program."""
    files = modules(root)
    graph = imports(files)
    folders = rooms(graph)
    cyclic = lambda graph: sum(len(part) for part in components(graph) if len(part) > 1)
    every = list(functions(files))
    lengths = sorted(length(node) for _, node in every)
    counts = lines(files)
    everything = {
        name: path for folder in (PACKAGE, *USERS) for name, path in modules(root, folder).items()
    }
    named = sum(is_participle(node.name) for _, node in every)
    at_root = [path for path in (root / PACKAGE).glob("*.py") if not path.name.startswith("__")]
    return {
        "modules": len(files),
        "modules at the package root": len(at_root),
        "imports between modules": sum(map(len, graph.values())),
        "modules in import cycles": cyclic(graph),
        "deepest import chain": len(longest_chain(graph)),
        "rooms (folders and root modules)": len(folders),
        "imports between rooms": sum(map(len, folders.values())),
        "rooms in import cycles": cyclic(folders),
        "deepest chain of rooms": len(longest_chain(folders)),
        "functions": len(every),
        "functions: median lines": lengths[len(lengths) // 2],
        "functions: 90th percentile of lines": lengths[int(0.9 * len(lengths))],
        f"functions over {LONG} lines": sum(each > LONG for each in lengths),
        f"functions with {MANY} or more parameters": sum(
            parameters(node) >= MANY for _, node in every
        ),
        "functions: most parameters": max(parameters(node) for _, node in every),
        "functions named by a participle": named,
        "functions named by a participle, %": round(100 * named / len(every), 1),
        "lines": counts["all"],
        "lines of code": counts["code"],
        "lines of docstrings": counts["docstring"],
        "comments": counts["comment"] + counts["remark"],
        "comments per 100 lines of code": round(
            100 * (counts["comment"] + counts["remark"]) / counts["code"], 2
        ),
        "fmt: skip": counts["fmt: skip"],
        "files over 250 lines": sum(
            len(path.read_text().splitlines()) > 250 for path in files.values()
        ),
        "whole checkout: modules in import cycles": cyclic(imports(everything)),
        "whole checkout: fmt: skip": lines(everything)["fmt: skip"],
        "whole checkout: lines": lines(everything)["all"],
    }


def print_table(numbers: dict[str, float | int]) -> None:
    width = max(map(len, numbers))
    for name, number in numbers.items():
        print(f"{name:<{width}}  {number:>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "path", nargs="?", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file too")
    parser.add_argument("--pyright", metavar="PROGRAM", help="count type errors with this pyright")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter whose packages pyright looks at"
    )
    parser.add_argument(
        "--details", action="store_true", help="also name the long functions and the deepest chain"
    )
    args = parser.parse_args()
    root = args.path.resolve()
    if not (root / PACKAGE).is_dir():
        sys.exit(f"{root} has no folder {PACKAGE}; give the path of a checkout")
    numbers = measure(root)
    if args.pyright:
        numbers |= pyright(root, args.pyright, args.python)
    print_table(numbers)
    if args.details:
        print_details(root)
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


def print_details(root: pathlib.Path) -> None:
    files = modules(root)
    every = list(functions(files))
    print("\ndeepest import chain:", " -> ".join(longest_chain(imports(files))))
    print(f"\nfunctions over {LONG} lines:")
    for where, node in sorted(every, key=lambda one: -length(one[1])):
        if length(node) > LONG:
            print(f"  {length(node):>4}  {where}")
    print(f"\nfunctions with {MANY} or more parameters:")
    for where, node in sorted(every, key=lambda one: -parameters(one[1])):
        if parameters(node) >= MANY:
            print(f"  {parameters(node):>4}  {where}")
    print(
        "\nnamed by a participle:",
        ", ".join(where for where, node in every if is_participle(node.name)),
    )


if __name__ == "__main__":
    main()
