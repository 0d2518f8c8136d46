"""Writes docs/third-party.md: the licence of every package that jaxbd needs to run.

    python scripts/notices.py           # rewrites the page from what is installed
    python scripts/notices.py --check   # exit code 1 when a pinned package is missing on the page

The packages are those of scripts/locks/runtime-py311.txt; licences are what each states of itself.
"""

import email.message
import importlib.metadata
import pathlib
import re
import sys
from typing import cast

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOCK = ROOT / "scripts" / "locks" / "runtime-py311.txt"
PAGE = ROOT / "docs" / "third-party.md"
HEAD = """# Third-party packages

What `pip install jaxbd` brings along, each under its own licence; none of their code is part of
this repository. `scripts/notices.py` writes this page from the packages' own statements.

| package | version | licence |
| --- | --- | --- |
"""


def list_pins() -> list[tuple[str, str]]:
    """(name, version) of every package of the lock."""
    return re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", LOCK.read_text(), re.M)


def state_licence(name: str) -> str:
    """What a package says of its licence: an SPDX expression, a classifier, or a short text."""
    # the stubs of Python 3.11 do not say that it is one
    stated = cast(email.message.Message, importlib.metadata.metadata(name))
    if expression := stated.get("License-Expression"):
        return expression
    classifiers = stated.get_all("Classifier") or []
    named = [c.split(" :: ")[-1] for c in classifiers if c.startswith("License ::")]
    named = [each for each in named if each != "OSI Approved"]
    if named:
        return ", ".join(named)
    text = (stated.get("License") or "not stated").strip().splitlines()[0]
    return text if len(text) <= 60 else "see the package"


def main() -> int:
    """Rewrites or checks the page."""
    if "--check" in sys.argv[1:]:
        page = PAGE.read_text()
        missing = [name for name, version in list_pins() if f"| {name} | {version} |" not in page]
        if missing:
            print(
                f"{PAGE.name} lacks {', '.join(missing)}; run scripts/notices.py", file=sys.stderr
            )
        return int(bool(missing))
    rows = [f"| {name} | {version} | {state_licence(name)} |" for name, version in list_pins()]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
