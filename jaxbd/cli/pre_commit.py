"""`jaxbd-pre-commit FILE …`: the first answer, without data, for every model file of a commit.

Exit code 1 where a class of one stands out, 2 where one cannot be read, else 0. Files beside a
model, such as its activation bounds or a jaxbd folder's guard, are read with it.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxbd.limits import clean_text

BESIDE = (".bounds.safetensors", "guard.safetensors")
"""Endings of files that are no model by themselves."""


def main(argv: Sequence[str] | None = None) -> int:
    """Answers for each model in turn; the worst exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxbd-pre-commit", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    parser.add_argument(
        "--pass-unreadable",
        action="store_true",
        help="pass files that jaxbd does not read, such as models of other tasks",
    )
    args = parser.parse_args(argv)
    codes = [_answer(path, args.pass_unreadable) for path in list_models(args.files)]
    return max(codes, default=0)


def list_models(files: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """What to open for the changed `files`: a model folder once, however many of its files
    changed."""
    from jaxbd.interop import folder

    models = []
    for path in files:
        if folder.is_model(path.parent):
            models.append(path.parent)
        elif not path.name.endswith(BESIDE):
            models.append(path)
    return list(dict.fromkeys(models))


def _answer(path: pathlib.Path, pass_unreadable: bool) -> int:
    """Says in a line what the weights alone say."""
    from jaxbd.base import UserError

    try:
        content = answer(path)
    except UserError as error:
        # a refused file may be a hostile one, so it passes only where the user says so
        _say(f"{path}: {'passed over, ' if pass_unreadable else ''}{error}")
        return 0 if pass_unreadable else 2
    from jaxbd.cli import first_answer

    names = tuple(row["name"] for row in content["classes"])
    _say(f"{path}: {first_answer.headline(content['margin'], names, content['decided_by'])}")
    found = content["margin"] is not None and content["margin"]["classes"]
    return 1 if found else 0


def answer(path: pathlib.Path) -> dict[str, Any]:
    """scan.json of the search without data. Raises: UserError when the file is no model that jaxbd
    reads."""
    from jaxbd.cli import common, first_answer
    from jaxbd.pipelines import margin_scan
    from jaxbd.training.run import Run

    common.start()
    reading = common.Reading()
    model = first_answer.open_suspect(path, reading)
    return first_answer.search(Run(), model, reading, margin_scan.Config())


def _say(line: str) -> None:
    print("jaxbd: " + clean_text(" ".join(line.split())))


if __name__ == "__main__":
    sys.exit(main())
