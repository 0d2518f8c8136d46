"""What the verbs print: tables and plain sentences, on stdout.

Everything goes through `text`: names in files may hold what a terminal would obey.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from rich import box, console, markup
from rich.table import Table

from jaxbd.limits import clean_text

ROWS = 20
"""Most rows of a table of candidates."""


def out() -> console.Console:
    """Stdout as it is now; no wrapping of paths and sentences where it is no terminal."""
    plain = console.Console(highlight=False)
    return plain if plain.is_terminal else console.Console(highlight=False, width=120)


def text(line: str) -> str:
    """`line` for the console: without control characters, and with mark-up shown as it is."""
    return markup.escape(clean_text(line))


def say(*lines: str) -> None:
    """Plain sentences; what looks like mark-up in them is left alone."""
    for line in lines:
        out().print(text(line), soft_wrap=True)


def note(line: str) -> None:
    """A line on stderr about what is going on, so that nobody waits before an empty screen."""
    console.Console(stderr=True, highlight=False).print(text(line), soft_wrap=True, style="dim")


def table(
    columns: tuple[str, ...],
    rows: Sequence[tuple[str | tuple[str, ...], ...]],
    *,
    title: str | None = None,
    left: int = 1,
) -> None:
    """A table whose first `left` columns are text and the others numbers; a tuple is a cell of
    several lines."""
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
    """0.123 -> "12.3 %"; a dash where there is no number."""
    return "–" if rate is None or rate != rate else f"{100 * rate:.1f} %"


def seconds(times: dict[str, float]) -> str:
    """The seconds of a result in words, compile time apart."""
    return f"{times['total']:.1f} s ({times['compile']:.1f} s of it compiling)"


def written(*paths: pathlib.Path | None) -> None:
    """Names the files that were written."""
    for path in paths:
        if path is not None:
            say(f"wrote {path}")


def notes(lines: tuple[str, ...]) -> None:
    """What people should know of how the images were read, on stderr."""
    for line in lines:
        note(f"note: {line}")


def preprocessing(found) -> None:
    """The table of `preprocess.check`, and which row was taken; no table for a single row."""
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
    """Height x width of the images of a row."""
    return "–" if row.size is None else f"{row.size[0]}x{row.size[1]}"


def _distance(row) -> str:
    return "–" if row.distance is None else f"{row.distance:.2f}"


def rates(rows: list[tuple[str, dict[str, Any]]], *, title: str | None = None) -> None:
    """A line per named `evaluate.Rates` (as a dictionary), with both denominators."""
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
