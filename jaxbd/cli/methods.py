"""`jaxbd methods`: all methods, with links to their papers."""

import dataclasses
import json

from jaxbd import methods
from jaxbd.cli import show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Lists all methods, with links to their papers.

    Attributes:
      json: print JSON instead of a table.
    """

    json: bool = False


def run(args: Args) -> int:
    """Prints the table."""
    columns, rows = ("kind", "method", "what it is", "paper"), methods.rows()
    if args.json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1))
        return 0
    # the link below what it leads to: in a column of its own the longest link would leave the words no room
    show.table(columns[:3], [(kind, name, f"{what}\n{paper}") for kind, name, what, paper in rows], left=3)
    show.say("`jaxbd scan --method auto` combines neural-cleanse (where to look) with mesa (what is there).")
    return 0
