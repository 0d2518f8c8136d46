"""What is read off the flags before they are parsed, or made of them. Quick to import."""

import itertools
import re
from collections.abc import Container

BUDGET = "--memory-budget"
UNITS = {"": 1, "b": 1} | {
    letter + ending: base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
"""Unit of a number of bytes, in small letters -> bytes."""


def named(argv: list[str], flag: str, choices: Container[str], otherwise: str | None) -> str | None:
    """The choice that the last `flag` in `argv` names; `otherwise` when there is none, or none of those."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    given = [value for word, value in itertools.pairwise(words) if word.replace("_", "-") == flag]
    return given[-1] if given and given[-1] in choices else otherwise


def size(text: str) -> int:
    """Bytes that a text such as 2GiB, 500MB, 1.5e9 or 4096 stands for. Raises: UserError for any other."""
    from jaxbd.base import UserError

    found = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?) *([a-z]*)", text.strip().lower())
    count = int(float(found[1]) * UNITS.get(found[2], 0)) if found else 0
    if not count:
        raise UserError(f"{BUDGET} {text!r} is no size; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return count


def budgeted(argv: list[str], prefix: str) -> list[str]:
    """`argv` with the value of every `--memory-budget` in bytes, as the flag that the verb has under `prefix`."""
    known, rest, words = {BUDGET, f"--{prefix}memory-budget"}, [], iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if name.replace("_", "-") not in known:
            rest.append(word)
            continue
        value = value if given else next(words, "")
        rest += [f"--{prefix}memory-budget", str(size(value))]
    return rest
