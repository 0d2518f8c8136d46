"""`jaxbd-pre-commit FILE …`: scans every model file in a commit, without data.

Exit code 1 if a class stands out in any model, 2 if a file cannot be read, else 0. The files of a
jaxbd folder are read as one model; activation bounds are read with the model beside them.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxbd.limits import clean_text


def main(argv: Sequence[str] | None = None) -> int:
    """Checks each model in turn; returns the worst exit code."""
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
    """The models to open for the changed `files`; a model folder appears once, however many of its
    own files changed. Prints which files are no models."""
    from jaxbd.interop import folder

    own, models = (folder.WEIGHTS, folder.CONFIG, folder.GUARD), []
    for path in files:
        if path.name in own and folder.is_model(path.parent):
            models.append(path.parent)
        elif is_bounds(path):
            _say(f"{path}: activation bounds, which are read with the model beside them")
        else:
            models.append(path)
    return list(dict.fromkeys(models))


def is_bounds(path: pathlib.Path) -> bool:
    """Whether `path` holds activation bounds and nothing else. Its name alone proves nothing."""
    from jaxbd.base import UserError
    from jaxbd.interop import beside, safetensors_file
    from jaxbd.limits import Limits, opened, refusing

    if not path.name.endswith(beside.ENDING):
        return False
    try:
        with refusing(path), opened(path, Limits()) as (file, size):
            tensors, _ = safetensors_file.read(file, size, Limits())
    except (UserError, OSError):
        return False
    return all(name.startswith("bounds/") for name in tensors)


def _answer(path: pathlib.Path, pass_unreadable: bool) -> int:
    """Prints in one line what the weights alone reveal; returns the exit code."""
    from jaxbd.base import UserError

    try:
        content = answer(path)
    except UserError as error:
        # a refused file may be hostile, so it passes only if the user says so
        _say(f"{path}: {'passed over, ' if pass_unreadable else ''}{error}")
        return 0 if pass_unreadable else 2
    except Exception as error:
        # Python exits with 1 on a crash, but here 1 means that a class stands out
        _say(f"{path}: could not be checked, {type(error).__name__}: {error}")
        return 2
    from jaxbd.cli import first_answer

    names = tuple(row["name"] for row in content["classes"])
    _say(f"{path}: {first_answer.headline(content['margin'], names, content['decided_by'])}")
    found = content["margin"] is not None and content["margin"]["classes"]
    return 1 if found else 0


def answer(path: pathlib.Path) -> dict[str, Any]:
    """The scan.json content of a scan without data. Raises: UserError if jaxbd cannot read the file
    as a model."""
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
