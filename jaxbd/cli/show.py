"""What the verbs print: tables and plain sentences, on stdout.

Everything goes through `text`, since names in files may contain terminal escape codes.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from rich import box, console, markup
from rich.table import Table

from jaxbd.limits import clean_text

ROWS = 20
"""Most rows in a table of candidates."""


def out() -> console.Console:
    """A console on the current stdout; 120 columns wide if that is not a terminal."""
    plain = console.Console(highlight=False)
    return plain if plain.is_terminal else console.Console(highlight=False, width=120)


def text(line: str) -> str:
    """`line` for the console: control characters removed, rich mark-up escaped."""
    return markup.escape(clean_text(line))


def say(*lines: str) -> None:
    """Prints plain sentences; text that looks like rich mark-up is printed as is."""
    for line in lines:
        out().print(text(line), soft_wrap=True)


def note(line: str) -> None:
    """Prints a line on stderr about what is happening, so the screen is never empty."""
    console.Console(stderr=True, highlight=False).print(text(line), soft_wrap=True, style="dim")


def table(
    columns: tuple[str, ...],
    rows: Sequence[tuple[str | tuple[str, ...], ...]],
    *,
    title: str | None = None,
    left: int = 1,
) -> None:
    """Prints a table with `left` text columns, then number columns; a tuple is a cell with several
    lines."""
    title = None if title is None else text(title)
    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for number, name in enumerate(columns):
        grid.add_column(text(name), justify="left" if number < left else "right")
    for row in rows:
        grid.add_row(*(text(cell) if isinstance(cell, str) else _lines(cell) for cell in row))
    out().print(grid)


def _lines(cell: tuple[str, ...]) -> str:
    return "\n".join(map(text, cell))


def percent(rate: float | None) -> str:
    """0.123 -> "12.3 %"; a dash for None or nan."""
    return "–" if rate is None or rate != rate else f"{100 * rate:.1f} %"


def seconds(times: dict[str, float]) -> str:
    """A result's seconds as text, with the compile time in brackets."""
    return f"{times['total']:.1f} s ({times['compile']:.1f} s of it compiling)"


def written(*paths: pathlib.Path | None) -> None:
    """Prints the paths of the files that were written."""
    for path in paths:
        if path is not None:
            say(f"wrote {path}")


def notes(lines: tuple[str, ...]) -> None:
    """Prints notes on how the images were read, on stderr."""
    for line in lines:
        note(f"note: {line}")


def preprocessing(found) -> None:
    """Prints the table of `preprocess.check` and the row that was chosen; no table for a single
    row."""
    if found is None:
        return
    used = found.used
    if len(found.rows) > 1:
        ranked = sorted(found.rows, key=lambda row: -row.accuracy)[:ROWS]
        rows = [
            (row.normalisation, row.channels, _size(row), percent(row.accuracy), _distance(row))
            for row in ranked
        ]
        title = f"Preprocessing check on {found.images} images"
        columns = ("normalisation", "channels", "size", "clean accuracy", "moments off by")
        table(columns, rows, title=title, left=3)
    say(f"Images are read at {_size(used)}, normalisation {used.normalisation} ({used.channels}).")
    for line in filter(None, (found.doubt, found.caution)):
        say(f"Note: {line}.")


def _size(row) -> str:
    """Height x width of a row's images."""
    return "–" if row.size is None else f"{row.size[0]}x{row.size[1]}"


def _distance(row) -> str:
    return "–" if row.distance is None else f"{row.distance:.2f}"


def rates(rows: list[tuple[str, dict[str, Any]]], *, title: str | None = None) -> None:
    """Prints one line per named `evaluate.Rates` (as a dictionary), with both denominators."""
    body = [
        (
            name,
            percent(rate["clean_accuracy"]),
            percent(rate["attack_success_rate"]),
            percent(rate["source_inference_accuracy"]),
            str(rate["n_clean"]),
            str(rate["n_triggered"]) if rate["n_triggered"] else "–",
        )
        for name, rate in rows
    ]
    columns = (
        "",
        "clean accuracy",
        "attack success rate",
        "source inference accuracy",
        "clean",
        "triggered images",
    )
    table(columns, body, title=title)
