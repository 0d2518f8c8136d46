"""`jaxbd methods`: lists all methods, what they need, and links to their papers."""

import dataclasses
import json
from typing import Any

from jaxbd import methods
from jaxbd.cli import show

NEEDS = {"clean": "clean images", "trigger": "a trigger"}
"""What a repair may need -> its description."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Lists all methods: what each does, what a repair needs, and links to the papers.

    Attributes:
      json: print JSON instead of a table.
    """

    json: bool = False


def run(args: Args) -> int:
    """Prints the table."""
    found = methods.all_methods()
    if args.json:
        print(json.dumps([_as_record(method) for method in found], indent=1))
        return 0
    # the link goes below the description: in its own column the longest link would leave too little
    # room for the text
    rows = [(method.kind, method.name, _describe(method)) for method in found]
    show.table(("kind", "method", "what it is"), rows, left=3)
    show.say(
        "`jaxbd scan --method auto` combines neural-cleanse (where to look) with mesa (what is"
        " there).",
        "`jaxbd repair --method NAME --help` shows the settings of a repair. If it needs a trigger"
        " and you give none, jaxbd searches for one.",
    )
    return 0


def _as_record(method: methods.Method) -> dict[str, Any]:
    """A method as JSON."""
    found = {
        "kind": method.kind,
        "method": method.name,
        "what it is": method.summary,
        "paper": method.paper,
    }
    if method.kind == "repair":
        found |= {
            "needs": sorted(method.needs),
            "guards": method.guards,
            "presets": list(method.presets),
        }
    return found


def _describe(method: methods.Method) -> tuple[str, ...]:
    """The summary, a repair's needs, guard and presets, and the paper."""
    lines = [method.summary]
    if method.kind == "repair":
        needs = [words for need, words in NEEDS.items() if need in method.needs]
        lines.append(f"Needs {' and '.join(needs) or 'nothing but the model'}.")
        if method.guards:
            lines[-1] += " Leaves the weights as they are and writes a guarded model."
        if method.presets:
            lines[-1] += f" Presets: {', '.join(method.presets)}."
    return (*lines, method.paper)
