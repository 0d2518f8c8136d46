"""What can be read off the flags before they are parsed, since what may be given depends on it. Quick to import."""

import itertools
from collections.abc import Container


def named(argv: list[str], flag: str, choices: Container[str], otherwise: str | None) -> str | None:
    """The choice that the last `flag` in `argv` names; `otherwise` when there is none, or none of those."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    given = [value for word, value in itertools.pairwise(words) if word.replace("_", "-") == flag]
    return given[-1] if given and given[-1] in choices else otherwise
