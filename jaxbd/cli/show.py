"""What the verbs print: tables and plain sentences, on stdout."""

import pathlib
from typing import Any

from rich import box, console, markup
from rich.table import Table

from jaxbd.workflow import ScanConfig

ROWS = 20
"""Classes a table lists; of more, the ones with the highest rates."""


def out() -> console.Console:
    """Stdout as it is now; no wrapping of paths and sentences where it is no terminal."""
    plain = console.Console(highlight=False)
    return plain if plain.is_terminal else console.Console(highlight=False, width=120)


def say(*lines: str) -> None:
    """Plain sentences; what looks like mark-up in them is left alone."""
    for line in lines:
        out().print(markup.escape(line), soft_wrap=True)


def note(line: str) -> None:
    """A line on stderr about what is going on, so that nobody waits before an empty screen."""
    console.Console(stderr=True, highlight=False).print(markup.escape(line), soft_wrap=True, style="dim")


def table(
    columns: tuple[str, ...],
    rows: list[tuple[str, ...]],
    *,
    title: str | None = None,
    left: int = 1,
) -> None:
    """A table whose first `left` columns are text and the others numbers."""
    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for number, name in enumerate(columns):
        grid.add_column(name, justify="left" if number < left else "right")
    for row in rows:
        grid.add_row(*map(markup.escape, row))
    out().print(grid)


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


def preprocessing(found) -> None:
    """The table of `preprocess.check`, and which row was taken. Nothing for a single row."""
    if found is None:
        return
    if len(found.rows) > 1:
        ranked = sorted(found.rows, key=lambda row: -row.accuracy)
        rows = [(row.normalisation, row.channels, percent(row.accuracy)) for row in ranked]
        title = f"Preprocessing check on {found.images} images"
        table(("normalisation", "channels", "clean accuracy"), rows, title=title, left=2)
    used = found.used
    why = "stated" if found.stated else "the best"
    order = "; the images look BGR to this model, so it gets them that way" if used.channels == "bgr" else ""
    say(f"Preprocessing: {used.normalisation} ({why}), clean accuracy {percent(used.accuracy)}{order}.")


def scan(content: dict[str, Any], config: ScanConfig) -> None:
    """Classes, verdict, what the verdict means, time."""
    rows, listed = content["classes"], content["classes"]
    if len(rows) > ROWS:
        listed = sorted(rows, key=lambda row: -(row["attack_success_rate"] or 0))[:ROWS]
    columns, body = ["class", "name", "attack success rate", "score"], []
    masks = any("mask_norm" in row for row in rows)
    for row in listed:
        score = "–" if row["score"] is None else f"{row['score']:z.2f}"
        cells = [str(row["class"]), row["name"], percent(row["attack_success_rate"]), score]
        if masks:
            cells.append("–" if row["mask_norm"] is None else f"{row['mask_norm']:.1f}")
        body.append(tuple(cells))
    table((*columns, *(["mask size"] if masks else [])), body, left=2)
    if len(listed) < len(rows):
        say(f"({len(rows) - len(listed)} classes with lower rates are not listed)")
    say(verdict(content), f"Decided by {content['decided_by']}.", f"Searched: {searched(config)}.")
    say("Not ruled out: backdoors of any other kind. “Clean” means that nothing of the searched kind works.")
    steps = f"{content['steps']} steps{' at most' if config.retire else ''}"
    say(f"{content['cells']} cells, {steps}, {seconds(content['seconds'])}, {content['device']}.")


def verdict(content: dict[str, Any]) -> str:
    """The verdict of a scan in one sentence."""
    rows = {row["class"]: row for row in content["classes"]}
    held_out = content["data"].get("held_out")
    label = lambda row: str(row["class"]) + ("" if row["name"] == str(row["class"]) else f" ({row['name']})")
    if content["verdict"] == "backdoored":
        hits = [rows[target] for target in content["targets"]]
        found = "; ".join(f"{percent(row['attack_success_rate'])} of them to class {label(row)}" for row in hits)
        return f"BACKDOORED: the recovered triggers send images of other classes ({held_out} held out): {found}."
    best = max(content["classes"], key=lambda row: row["attack_success_rate"] or 0)
    reach = f"the strongest triggers found lead {percent(best['attack_success_rate'])} to class {label(best)}"
    if content["verdict"] == "clean":
        return f"CLEAN: no class stands out; {reach}."
    if content["method"] == "neural-cleanse":
        return "INCONCLUSIVE: the sizes of the masks do not tell; try --method auto, other --targets or --locate-steps."
    if (best["attack_success_rate"] or 0) < content["config"]["detection"]["doubt"]:
        return f"INCONCLUSIVE: {reach}, but a mask smaller than the others' works; try other --mesa.patch sizes."
    return f"INCONCLUSIVE: {reach}, too much for clean and too little for an alarm; try more images and --steps."


def searched(config: ScanConfig) -> str:
    """The trigger family a scan searches, in words."""
    patch, place = f"square patches of {config.mesa.patch}x{config.mesa.patch} pixels", _place(config.mesa)
    levels = ", ".join(f"{level:g}" for level in config.levels)
    mask = "one static trigger per class of any shape and place, the smaller the likelier"
    words = {
        "mesa": f"distributions of {patch} {place}, at confidence levels {levels}",
        "pixel": f"one patch of {config.pixel.patch}x{config.pixel.patch} pixels per class {_place(config.pixel)}",
        "neural-cleanse": mask,
        "auto": f"{mask}; then, for the likeliest classes, distributions of {patch} where that trigger lies, at "
        f"confidence levels {levels}",
    }
    only = f"; only classes {', '.join(map(str, config.targets))}" if config.targets else ""
    return words[config.method] + only


def _place(config) -> str:
    """Where a method's patches are pasted."""
    if config.place == "fixed":
        return f"at row {config.row}, column {config.column}"
    return "at a place that is searched too" if config.place == "searched" else "at random places"


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
    columns = ("", "clean accuracy", "attack success rate", "source inference accuracy", "clean", "triggered images")
    table(columns, body, title=title)
