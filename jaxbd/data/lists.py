"""Image folders with a list of labels beside them.

Examples: GTSRB's test set and Kaggle's sets (a .csv), Hugging Face's `metadata.csv` and
`metadata.jsonl`, and Tiny-ImageNet's `val`.
"""

import csv
import io
import itertools
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxbd.base import Dataset, UserError
from jaxbd.data import bounded, folder, labels, pack, pictures, splits, words

FILE_COLUMNS = (
    *("filename", "file_name", "file", "path", "filepath", "image", "img", "image_path"),
    *("image_id", "image_name", "name", "id"),
)
LABEL_COLUMNS = ("classid", "class_id", "label", "labels", "class", "target", "category", "y")
"""Column titles in order of preference; case is ignored."""
ANSWERS = "suspect_label"
"""Column of the lines that `jaxbd guard` writes. Their labels are a model's answers."""
MAX_LIST_BYTES, MAX_LISTED, MAX_ROW = 64 << 20, 1_500_000, 1 << 20
"""Limits: bytes of a list, images in a list, characters of a row."""
ANNOTATIONS = "val_annotations.txt"
"""Tiny-ImageNet's list of the images in `val/images`: file, class, box; tab-separated."""


class List(NamedTuple):
    """A list file: image file names [N] and their labels as text [N]."""

    path: Path
    files: list[str]
    labels: list[str]


def find(path: Path, split: str) -> List | None:
    """Finds the list of the images in the folder `path`; None if there is none.

    Looks in `path` first, then beside it for a file with the folder's name. Of several lists the
    one named after `split` is used.

    Raises: UserError if several lists qualify.
    """
    if bounded.is_regular(path / ANNOTATIONS):
        return _columns(_rows(path / ANNOTATIONS, "\t"), (0, 1), path / ANNOTATIONS)
    found = [table for entry in _tables(path) if (table := _read(entry)) is not None]
    # of several lists, prefer those named after the split
    named = [table for table in found if splits.name_in(table.path.stem) == splits.name(split)]
    found = named or found if len(found) > 1 else found
    if len(found) > 1:
        names = ", ".join(table.path.name for table in found[:4])
        raise UserError(f"data {path} has several lists of images ({names}); leave one there")
    return found[0] if found else None


def _tables(path: Path) -> list[Path]:
    is_table = lambda entry: (
        entry.suffix.lower() in (".csv", ".tsv", ".jsonl")
        and folder.is_visible(entry.name)
        and bounded.is_regular(entry)
    )
    beside = [e for e in path.parent.iterdir() if e.stem.lower() == path.name.lower()]
    return sorted(filter(is_table, path.iterdir())) or sorted(filter(is_table, beside))


def _read(path: Path) -> List | None:
    """Reads the list in a file; None if it lacks a column of files or of labels."""
    rows = _json_rows(path) if path.suffix.lower() == ".jsonl" else _rows(path)
    head = next(rows, [])
    titles = [title.strip().lower() for title in head]
    if ANSWERS in titles:
        return None
    file = next((titles.index(each) for each in FILE_COLUMNS if each in titles), None)
    label = next((titles.index(each) for each in LABEL_COLUMNS if each in titles), None)
    if file is not None and label is not None:
        return _columns(rows, (file, label), path)
    if len(head) == 2 and Path(head[0]).suffix.lower() in pictures.SUFFIXES:  # no titles
        return _columns(itertools.chain([head], rows), (0, 1), path)
    return None


class Lines:
    """The lines of a UTF-8 file, for a parser that builds a row from one or more of them.

    Parsed into objects a row takes many times its bytes, so a row is limited to `MAX_ROW`
    characters.
    """

    def __init__(self, path: Path):
        self._path, self._row = path, 0
        content = bounded.read_file(path, MAX_LIST_BYTES, "list")
        self._text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        path = self._path
        try:
            line = self._text.readline(MAX_ROW + 1)
        except UnicodeDecodeError:
            raise UserError(f"data {path} is not UTF-8 text; convert or remove it") from None
        self._row += len(line)
        if self._row > MAX_ROW:
            raise UserError(f"data {path} has a row over {MAX_ROW:,} characters; correct it")
        if not line:
            raise StopIteration
        return line

    def rows(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Passes on `rows`, parsed from these lines, and resets the length count after each."""
        for row in rows:
            self._row = 0
            yield row


def _rows(path: Path, delimiter: str | None = None) -> Iterator[list[str]]:
    """The rows of a table. Without a `delimiter`, the first line's most frequent one is used."""
    lines = Lines(path)
    first = next(lines, "")
    delimiter = delimiter or max(",;\t", key=first.count)
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter)
    try:
        yield from (row for row in lines.rows(rows) if any(map(str.strip, row)))
    except csv.Error:
        raise UserError(f"data {path} is not a readable .csv list; correct or remove it") from None


def _json_rows(path: Path) -> Iterator[list[str]]:
    """Reads one JSON object per line as rows of a table; the first object's keys are the titles."""
    titles: list[str] = []
    try:
        lines = Lines(path)
        for line in filter(str.strip, lines.rows(lines)):
            row = json.loads(line)
            if not titles:
                titles = [str(title) for title in row]
                yield titles
            yield ["" if row[title] is None else str(row[title]) for title in titles]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise UserError(f"data {path} is not a readable list; correct or remove it") from None


def _columns(rows: Iterable[Sequence[str]], places: tuple[int, int], path: Path) -> List:
    """Takes the files and labels out of the columns `places` (file, label) of `rows`.

    Raises: UserError for an image without a label, or with two.
    """
    file, label = places
    found = List(path, [], [])
    known: dict[str, str] = {}
    for number, row in enumerate(rows):
        if number >= MAX_LISTED:
            raise UserError(f"data {path} lists more than {MAX_LISTED:,} images; give fewer")
        if len(row) <= max(places) or not row[label].strip():
            raise UserError(f"data {path}: image {number} of the list has no label; complete it")
        name, word = row[file].strip(), row[label].strip()
        if known.setdefault(name, word) != word:
            raise UserError(
                f"data {path} lists {name!r} with the labels {known[name]!r} and {word!r}; keep one"
            )
        found.files.append(name)
        found.labels.append(word)
    return found


def load(
    path: Path,
    table: List,
    *,
    image_shape: pictures.Shape | None = None,
    limit: int | None = None,
    seed: int = 0,
    classes: labels.Classes = labels.Classes(),
) -> Dataset:
    """Reads the images of a `table` that `find` returned for the folder `path`.

    `labels.number` turns text labels into class numbers.

    Raises: UserError when listed images are missing or outside the folder.
    """
    names, notes = None, (f"the classes are those of the list {table.path.name}",)
    train = path.parent / "train"
    if table.path.name == ANNOTATIONS and train.is_dir():
        names = [entry.name for entry in folder.sub_folders(train)]
    rows = pack.chosen_rows(len(table.files), limit, seed)
    files = [_find_file(path, table, table.files[row]) for row in rows]
    # number all labels, not only the drawn rows: a draw may miss a class and shift the numbers
    numbers, class_names = labels.number(table.labels, names, classes, f"data {table.path}")
    seen: pictures.Seen = []
    images = folder.decode_files(files, path, image_shape, seen)
    plain = lambda name: words.compose(name).lower()
    listed = {plain(Path(name).name) for name in table.files}
    here = [entry for entry in path.iterdir() if folder.is_picture(entry)]
    # compare stems too: a list may omit the suffix
    unlisted = sum(plain(e.name) not in listed and plain(e.stem) not in listed for e in here)
    if unlisted:
        notes += (f"skipped {unlisted} images that are not in the list",)
    notes += pictures.describe_changes(seen, images.shape[1:])
    return pack.dataset(images, numbers[rows], class_names, str(path), classes, notes)


def _find_file(path: Path, table: List, name: str) -> Path:
    """Finds the image file that a list calls `name`; looks only in and beside the folder."""
    given = Path(name.replace("\\", "/"))
    if given.is_absolute() or ".." in given.parts or not given.name:
        raise UserError(f"data {table.path} lists {name!r}; give names of files in this folder")
    places = (path / given, path / given.name, path / "images" / given.name, path.parent / given)
    for place in places:
        for spelling in _spellings(place.name):
            if folder.is_picture(file := place.with_name(spelling)):
                return file
    raise UserError(f"data {table.path} lists {name!r}, which is not there; add it or its suffix")


def _spellings(name: str) -> list[str]:
    """Names that a listed file may have: as listed; with a suffix, if the list omits it; with its
    suffix or its accents in another form."""
    stem, suffix = Path(name).stem, Path(name).suffix
    if suffix.lower() not in pictures.SUFFIXES:
        stem, suffix = name, ""
    ends = (suffix, suffix.lower()) if suffix else ("", *pictures.SUFFIXES)
    stems = (stem, unicodedata.normalize("NFC", stem), unicodedata.normalize("NFD", stem))
    ends = dict.fromkeys((*ends, *map(str.upper, ends)))
    return [stem + end for stem in dict.fromkeys(stems) for end in ends]
