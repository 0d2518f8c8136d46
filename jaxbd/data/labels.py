"""Converts labels and class names, in the forms people use, to class numbers 0..K-1."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbd.base import UserError
from jaxbd.data import bounded, words

MAX_LETTERS, MAX_TEXTS = 1_000, 2_000_000
"""Limits on text labels, since each becomes a Python object: characters per label, and labels."""
MAX_CLASSES = 100_000
"""Labels must be below this; default names for more classes would fill the memory."""
FIX = "name all classes in the model's order with --classes FILE"


@dataclasses.dataclass(frozen=True)
class Classes:
    """What is known of the classes before any image is read.

    Attributes:
      count: the model's number of classes K; None without a model.
      names: class names in the model's order; () if unknown.
      stated: whether the user gave `names`. If not, they come from the model, and the labels need
        not use them.
    """

    count: int | None = None
    names: tuple[str, ...] = ()
    stated: bool = False


def read_names(path: str | Path, count: int | None) -> tuple[str, ...]:
    """Reads class names from a text file, one per line, in the model's order.

    Args:
      count: the model's number of classes, all of which the file must name; None without a model.
    Raises: UserError when the file is unreadable, names a class twice, or does not name `count`.
    """
    path = Path(path).expanduser()
    try:
        text = bounded.read_file(path, 4 << 20, "--classes file").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--classes file {str(path)!r} is not UTF-8 text; convert it") from None
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    times = collections.Counter(map(words.compose, names))
    double = next((name for name in names if times[words.compose(name)] > 1), None)
    if double is not None:
        raise UserError(
            f"--classes file {str(path)!r} names {double!r} twice; name each class once"
        )
    if not names or (count is not None and len(names) != count):
        wanted = "at least one" if count is None else f"all {count} classes of the model"
        raise UserError(
            f"--classes file {str(path)!r} names {len(names)}; name {wanted}, one a line"
        )
    return names


def number_folders(
    names: Sequence[str], classes: Classes, where: str
) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
    """Numbers class folders by the first rule that applies.

    1. By name, if the user or the model names the classes; folders that are numbers only if a
       class is named by a number too.
    2. In the order of the names, if there are as many folders as classes.
    3. By the number in the name, if all names are numbers.

    Args:
      names: folder names, sorted as text.
    Returns: (class number of each folder, names of all classes, notes for the user).
    Raises: UserError, with both counts, if no rule applies.
    """
    if _go_by_name(names, classes):
        numbers = _by_name(names, classes, f"{where}: class folder")
        return numbers, classes.names, _few(names, classes, "by their names")
    decimal = words.are_decimal(names)
    if words.are_numbers(names):
        _check_order(names, where)  # before rule 2, which relies on the order
    stated = classes.names if classes.stated else ()
    if classes.count is None or len(names) == classes.count:
        return list(range(len(names))), stated or tuple(names), ()
    numbers = [int(name) for name in names] if decimal else []
    if decimal and len(names) < classes.count and max(numbers) < classes.count:
        every = stated or tuple(str(number) for number in range(classes.count))
        return numbers, every, _few(names, classes, "their names are taken for class numbers")
    raise UserError(
        f"{where} has {_count(len(names), 'class folder')} ({_join_names(names)}), the model has"
        f" {classes.count} classes; {FIX}"
    )


def _check_order(names: Sequence[str], where: str) -> None:
    """Raises UserError for numbers that sort differently as text.

    Loaders disagree about them: some put 10 before 2.
    """
    for text, number in zip(names, sorted(names, key=words.value), strict=True):
        if text != number:
            raise UserError(
                f"{where}: as text class folder {text} comes before {number}; pad the numbers with"
                " zeros (00, 01, …), or give the model's order with --classes FILE"
            )


def _few(names: Sequence[str], classes: Classes, how: str) -> tuple[str, ...]:
    if len(names) == len(classes.names or ()) or len(names) == classes.count:
        return ()
    total = classes.count or len(classes.names)
    return (f"{_count(len(names), 'class folder')}, the model has {total} classes: {how}",)


def _go_by_name(found: Sequence[str], classes: Classes) -> bool:
    """Whether folders or labels are looked up among the names of the classes.

    Stated names must have them all. But if no name is a number, numbers are class numbers.
    """
    known = set(map(words.compose, classes.names))
    if known and known.issuperset(map(words.compose, found)):
        return True
    has_number = any(words.are_numbers([name]) for name in known)
    return classes.stated and (has_number or not words.are_numbers(found))


def _by_name(names: Sequence[str], classes: Classes, what: str) -> list[int]:
    place = _places(classes.names)
    unknown = next((name for name in names if words.compose(name) not in place), None)
    if unknown is not None:
        raise UserError(
            f"{what} {unknown!r} is not among the {len(place)} names"
            f" ({_join_names(classes.names)}); rename it, or correct the --classes file"
        )
    return [place[words.compose(name)] for name in names]


def _places(names: Sequence[str]) -> dict[str, int]:
    return {words.compose(name): number for number, name in enumerate(names)}


def number(
    labels: Any, names: Sequence[str] | None, classes: Classes, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Converts labels in any of the usual forms to class numbers.

    Args:
      labels: whole numbers [N] or [N, 1] (floats and booleans may hold them), one-hot rows [N, K],
        or text [N].
      names: class names of the source; None if it gives none.
    Returns: (int32 [N] in 0..K-1, K names).
    Raises: UserError when the labels have another form, are out of range, or do not fit the model.
    """
    labels = _as_array(labels, where)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 1 and labels.dtype.kind in "SUO":
        labels, names = _number_text(labels, names, classes, where)
    elif labels.ndim == 2 and labels.size and labels.dtype.kind in "buif":
        labels = _from_one_hot(labels, where)
    elif labels.ndim == 1 and labels.dtype.kind in "fb":
        labels = _whole(labels, where)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        given = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"{where}: labels are {given}; give one whole class number per image, [N]")
    if not len(labels):
        raise UserError(f"{where} holds no images; give at least one")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise UserError(
            f"{where}: labels run from {labels.min()} to {labels.max()}; give class numbers 0..K-1"
        )
    _check_count(int(labels.max()) + 1, names, classes, where)
    if names is None:
        count = classes.count or int(labels.max()) + 1
        names = classes.names or [str(k) for k in range(count)]
    return labels.astype(np.int32), tuple(str(name) for name in names)


def _as_array(labels: Any, where: str) -> np.ndarray:
    """Labels as an array, within the limits on their number and length."""
    # NumPy pads every text to the longest one, so one long label would multiply the memory
    if isinstance(labels, list):
        longest = max((len(label) for label in labels if isinstance(label, str | bytes)), default=0)
        if longest > MAX_LETTERS:
            raise UserError(f"{where}: a label has {longest:,} characters; give the class's name")
    labels = np.asarray(labels)
    if labels.size and labels.shape and len(labels) > bounded.LIMITS.images:
        raise UserError(f"{where} has {len(labels):,} labels; give fewer")
    if labels.dtype.kind in "SUO" and labels.size > MAX_TEXTS:
        raise UserError(f"{where} has {labels.size:,} labels of text; give class numbers")
    return labels


def _check_count(count: int, names: Sequence[str] | None, classes: Classes, where: str) -> None:
    """Raises UserError if the source's classes cannot be the model's."""
    if names is not None and len(names) < count:
        raise UserError(
            f"{where}: label {count - 1} has no name, there are {len(names)} class names; add the"
            " rest"
        )
    if classes.count is None:
        return
    if names is not None and len(names) != classes.count:
        raise UserError(
            f"{where} has {_count(len(names), 'class', 'es')} ({_join_names(names)}), the model has"
            f" {classes.count} classes; give the data of this model"
        )
    if count > classes.count:
        raise UserError(
            f"{where} has at least {count} classes (label {count - 1}), the model has"
            f" {classes.count} classes 0..{classes.count - 1}; relabel or remove images"
        )


def _number_text(
    labels: np.ndarray, names: Sequence[str] | None, classes: Classes, where: str
) -> tuple[np.ndarray, Sequence[str] | None]:
    """Numbers text labels by known names, else as numbers in any spelling, else in alphabetical
    order."""
    decode = lambda value: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    given = [decode(value) for value in labels.tolist()]
    if not all(isinstance(word, str) for word in given):
        raise UserError(f"{where}: labels are neither numbers nor text; give class numbers, [N]")
    given = list(map(words.compose, given))
    found = sorted(set(given))
    if len(found) > MAX_CLASSES:
        raise UserError(f"{where} has {len(found):,} different labels, too many; correct them")
    if (blank := words.missing(found)) is not None:
        raise UserError(f"{where}: image {given.index(blank)} has no label; add it")
    if _go_by_name(found, classes):
        _by_name(found, classes, f"{where}: label")
        names = classes.names
    elif words.are_numbers(found) and not _are_ids(found):
        value = {word: float(word) for word in found}
        return _whole(np.array([value[word] for word in given]), where), names
    elif names is None:
        if classes.count not in (None, len(found)):
            raise UserError(
                f"{where} has {_count(len(found), 'class', 'es')} ({_join_names(found)}), the model"
                f" has {classes.count} classes; {FIX}"
            )
        names = found
    place = _places(names)
    unknown = next((word for word in found if word not in place), None)
    if unknown is not None:
        raise UserError(f"{where}: label {unknown!r} is not among the class names; {FIX}")
    return np.array([place[word] for word in given], np.int64), names


def _are_ids(found: Sequence[str]) -> bool:
    """Whether numbers, sorted as text, are names: too large for class numbers, and in the same
    order as numbers."""
    is_large = words.are_decimal(found) and max(map(int, found)) >= MAX_CLASSES
    return is_large and sorted(found, key=int) == list(found)


def _from_one_hot(labels: np.ndarray, where: str) -> np.ndarray:
    # the comparison takes many bytes per label, so check a part at a time
    step = max(1, (1 << 20) // labels.shape[1])
    parts = (labels[row : row + step] for row in range(0, len(labels), step))
    is_one = lambda part: np.isin(part, (0, 1)).all() and (part.sum(1) == 1).all()
    if labels.shape[1] > MAX_CLASSES or not all(map(is_one, parts)):
        raise UserError(
            f"{where}: labels are {labels.dtype} {list(labels.shape)} without exactly one 1 per"
            " row; give one whole class number per image, [N]"
        )
    return labels.argmax(1)


def _whole(labels: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(labels).all() or (labels != np.round(labels)).any():
        raise UserError(
            f"{where}: labels are {labels.dtype} with fractions; give class numbers, [N]"
        )
    # clip before the cast, which is undefined for huge floats; the range check refuses both ends
    return np.clip(labels, -1, 2**31).astype(np.int64)


def _count(count: int, thing: str, plural: str = "s") -> str:
    return f"{count} {thing}{'' if count == 1 else plural}"


def _join_names(names: Sequence[str]) -> str:
    more = ", …" if len(names) > 4 else ""
    return ", ".join(repr(str(name)[:40]) for name in names[:4]) + more
