"""Which of a file's tensors are the classifier: the dictionary, the prefix of the names, or two of
them for body and head.

People save a net inside others: under the key of a training framework, with a prefix for every
wrapper around it, beside its own moving average, a generator or an optimiser. A group of tensors is
taken for the classifier where its names and shapes are exactly those of an architecture.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jaxbd.interop import pieces
from jaxbd.interop.pieces import Piece
from jaxbd.limits import Refusal, quote

Shapes = Mapping[str, tuple[int, ...]]
Fits = Callable[[Shapes, bool], bool]
"""(names and shapes, loose) -> whether they are exactly those of an architecture; with `loose` of a
plain chain of layers, too, which says little of what the names should be."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every key."""
AVERAGE = re.compile(r"(^|[._-])(ema|swa|shadow|averaged?)($|[._\d-])", re.IGNORECASE)
"""A name for the moving average of a net's weights, which is taken where there is no other."""
MOST_PREFIXES = 40
MOST_NAME = 256
"""Letters of a tensor's name."""
FEWEST = 3
"""Tensors that a prefix must stand before to be tried."""


class Selection(NamedTuple):
    """The tensors of one net.

    Attributes:
      names: name of each weight -> what the file makes it from, in file order.
      prefix: what stood before every name, or before most (the body's) where there were two.
      ignored: keys of the file that belong to none of the weights.
      constants: keys of the mean and standard deviation of the input, or None.
      fits: whether the names and shapes are those of an architecture.
    """

    names: dict[str, Piece]
    prefix: str
    ignored: tuple[str, ...] = ()
    constants: tuple[str, str] | None = None
    fits: bool = False


def select(shapes: Shapes, fits: Fits, check: Callable[[], None] = lambda: None) -> list[Selection]:
    """Every net among the tensors of one dictionary; the whole of it, which fits no architecture,
    where there is none.

    Args:
      check: called between two tries; raises Refusal where there is no time for another.
    """
    check()
    if any(len(name) > MOST_NAME for name in shapes):  # each dot in a name ends another prefix
        return [Selection({name: Piece((name,), "") for name in shapes}, "")]
    constants = pieces.normalisation(shapes)
    rest = {name: shape for name, shape in shapes.items() if name not in (constants or ())}
    parts = pieces.pieces(rest)
    whole = {
        name: rest[piece.keys[-1 if piece.how == "weight_norm" else 0]]
        for name, piece in parts.items()
    }
    found: list[Selection] = []
    taken: list[set[str]] = []
    tried = [(prefixes, loose) for loose in (False, True) for prefixes in _prefixes(whole)]
    for prefixes, loose in tried:
        check()
        if loose and found:
            break
        names = _strip(whole, prefixes)
        if names is None or not names or any(set(names.values()) <= held for held in taken):
            continue
        if fits({short: whole[full] for short, full in names.items()}, loose):
            chosen = {short: parts[full] for short, full in names.items()}
            used = {key for piece in chosen.values() for key in piece.keys} | {*(constants or ())}
            ignored = tuple(key for key in shapes if key not in used)
            found.append(Selection(chosen, prefixes[0], _without_parts(ignored), constants, True))
            taken.append(set(names.values()))
            if len(names) == len(whole):
                break
    return found or [_as_it_is(shapes)]


def _without_parts(keys: tuple[str, ...]) -> tuple[str, ...]:
    """`keys` without what adversarial neuron pruning leaves behind: it was used, or is noise."""
    return tuple(key for key in keys if key.rpartition(".")[2] not in pieces.ANP)


def _as_it_is(shapes: Shapes) -> Selection:
    prefix = common_prefix(shapes)
    return Selection({name.removeprefix(prefix): Piece((name,), "") for name in shapes}, prefix)


def common_prefix(names: Mapping[str, object]) -> str:
    """The longest run of `WRAPPERS` that every name begins with."""
    prefix = ""
    while True:
        longer = [
            prefix + more
            for more in WRAPPERS
            if all(name.startswith(prefix + more) for name in names)
        ]
        if not longer or any(name == longer[0] for name in names):
            return prefix
        prefix = longer[0]


def _prefixes(names: Shapes) -> Iterator[tuple[str, ...]]:
    """Prefixes to try, one or two (body, head) at a time, the likeliest first."""
    counts: dict[str, int] = {"": len(names)}
    for name in names:
        for dot in [found.end() for found in re.finditer(r"\.", name)]:
            counts[name[:dot]] = counts.get(name[:dot], 0) + 1
    first = common_prefix(names)
    # the longest prefix of the most names first: what stands before all of them is no part of the
    # net's own names
    single = [prefix for prefix, count in counts.items() if count >= FEWEST]
    single = sorted(single, key=lambda prefix: (-counts[prefix], -len(prefix)))
    single = single[:MOST_PREFIXES]
    yield from ((prefix,) for prefix in single)
    inner = len(first)
    heads = {"": 0} | {name[: name.find(".", inner) + 1]: 0 for name in names}
    heads = sorted({head for head in heads if counts[head] <= 8} | {first})
    bodies = [prefix for prefix in single if prefix and counts[prefix] >= len(names) // 2]
    yield from ((body, head) for body in bodies for head in heads[:MOST_PREFIXES] if body != head)


def _strip(names: Shapes, prefixes: tuple[str, ...]) -> dict[str, str] | None:
    """Name without its prefix -> the name; None where two become one."""
    short: dict[str, str] = {}
    for name in names:
        prefix = next((each for each in prefixes if name.startswith(each)), None)
        if prefix is None:
            continue
        if name[len(prefix) :] in short or name == prefix:
            return None
        short[name[len(prefix) :]] = name
    return short


class Candidate(NamedTuple):
    """A net of a file: path of its dictionary, and which of that dictionary's tensors it is."""

    path: tuple[str | int, ...]
    selection: Selection

    def title(self) -> str:
        """How a person names it: "model", "ema.module", "the file itself"."""
        inner = self.selection.prefix.rstrip(".") if self.selection.fits else ""
        parts = [str(part) for part in self.path] + ([inner] if inner else [])
        return ".".join(parts) or "the file itself"


def choose(
    candidates: list[Candidate],
    key: str | None,
    known: Callable[[Candidate], bool],
    equal: Callable[[Candidate, Candidate], bool],
) -> Candidate:
    """The one net of a file.

    Args:
      key: the name that the user gives it, or None.
      known: whether a candidate stands under a name that classifiers are saved under.
      equal: whether two candidates hold the same values.
    Raises: Refusal naming the candidates where none or several could be meant.
    """
    if not candidates:
        raise Refusal("no dictionary of tensors is found in it")
    if key is not None:
        return _pick(candidates, key)
    fitting = [candidate for candidate in candidates if candidate.selection.fits]
    plain = [candidate for candidate in fitting if not AVERAGE.search(candidate.title())]
    chosen = plain or fitting
    if chosen:
        first = next((candidate for candidate in chosen if known(candidate)), chosen[0])
        if all(other is first or equal(first, other) for other in chosen):
            return first
        raise Refusal(
            f"it holds several nets ({_titles(chosen)}) with different weights; say which with"
            " --key NAME"
        )
    chosen = candidates if len(candidates) == 1 else [each for each in candidates if known(each)]
    if len(chosen) != 1:
        raise Refusal(
            f"it holds several dictionaries of tensors ({_titles(candidates)}), and none is of a"
            " known architecture; say which with --key NAME, or save the one to be read on its own"
        )
    return chosen[0]


def _pick(candidates: list[Candidate], key: str) -> Candidate:
    wanted = key.rstrip(".")
    named = [each for each in candidates if each.title() == wanted]
    named = named or [
        each
        for each in candidates
        if wanted in (".".join(map(str, each.path)), each.selection.prefix.rstrip("."))
        or (each.path and str(each.path[-1]) == wanted)
    ]
    if len(named) != 1:
        raise Refusal(f"--key {key} names no single net of it; there are {_titles(candidates)}")
    return named[0]


def _titles(candidates: list[Candidate]) -> str:
    return ", ".join(quote(candidate.title()) for candidate in candidates[:8])
