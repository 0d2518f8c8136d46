"""Selects a file's tensors that are the classifier: which dictionary, and which prefix of the names
(or two, for body and head).

People save a net nested in other things: under the key of a training framework, with a prefix for
every wrapper, next to its moving average, a generator or an optimiser. A group of tensors counts as
the classifier if its names and shapes are exactly those of a known architecture.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jaxbd.interop import pieces
from jaxbd.interop.pieces import Piece
from jaxbd.limits import Refusal, quote

Shapes = Mapping[str, tuple[int, ...]]
Fits = Callable[[Shapes, bool], bool]
"""(names and shapes, loose) -> whether they are exactly those of an architecture. `loose` also
allows a plain chain of layers, which hardly constrains the names."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile add to every key."""
INNER = re.compile(r"(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What a wrapper around one module of a net adds to its keys."""
AVERAGE = re.compile(r"(^|[._-])(ema|swa|shadow|averaged?)($|[._\d-])", re.IGNORECASE)
"""Names for the moving average of a net's weights, which is used only if there is no other net."""
MOST_PREFIXES = 40
MOST_NAME = 256
"""Maximum length of a tensor's name, in characters."""
FEWEST = 3
"""Minimum number of tensors under a prefix for it to be tried."""


class Selection(NamedTuple):
    """The tensors of one net.

    Attributes:
      names: name of each weight -> its parts in the file, in file order.
      prefix: the prefix of all names; with two prefixes, that of most of them (the body).
      ignored: keys of the file that belong to none of the weights.
      constants: keys of the input's mean and standard deviation, or None.
      fits: whether the names and shapes are those of an architecture.
      unused: weights of layers in the same dictionary that belong to none of its nets.
      link: how one of them shows that the net is only a part of another; "" if none does.
      whole: name of each weight -> its key in a file that stores it as one tensor.
    """

    names: dict[str, Piece]
    prefix: str
    ignored: tuple[str, ...] = ()
    constants: tuple[str, str] | None = None
    fits: bool = False
    unused: tuple[str, ...] = ()
    link: str = ""
    whole: Mapping[str, str] = {}


def select(shapes: Shapes, fits: Fits, check: Callable[[], None] = lambda: None) -> list[Selection]:
    """Every net among the tensors of one dictionary. If there is none, a single selection of all
    tensors with `fits` False.

    Args:
      check: called before each try; raises Refusal when the time is up.
    """
    check()
    # every dot in a name gives another prefix to try, so names of any length could take hours
    if any(len(name) > MOST_NAME for name in shapes):
        return [Selection({name: Piece((name,), "") for name in shapes}, "")]
    constants = pieces.normalisation(shapes)
    rest = {
        name: shape
        for name, shape in shapes.items()
        if name not in (constants or ()) and name.rpartition(".")[2] not in pieces.COUNTS
    }
    parts = pieces.pieces(rest)
    whole = {
        name: rest[piece.keys[-1 if piece.how == "weight_norm" else 0]]
        for name, piece in parts.items()
    }
    found: list[Selection] = []
    taken: list[set[str]] = []
    for names, prefix, loose in _tries(whole, check):
        if loose and found:
            break
        # skip what is part of a net that was found already
        if not names or any(set(names.values()) <= earlier for earlier in taken):
            continue
        if fits({short: whole[full] for short, full in names.items()}, loose):
            chosen = {short: parts[full] for short, full in names.items()}
            used = {key for piece in chosen.values() for key in piece.keys} | {*(constants or ())}
            ignored = _without_parts(tuple(key for key in shapes if key not in used))
            found.append(Selection(chosen, prefix, ignored, constants, True, whole=names))
            taken.append(set(names.values()))
            if len(names) == len(whole):
                break
    left = {
        name: shape
        for name, shape in whole.items()
        if _is_layer(name, shape) and not any(name in names for names in taken)
    }
    return [
        each._replace(unused=tuple(left), link=_link([whole[n] for n in whole if n in names], left))
        for each, names in zip(found, taken, strict=True)
    ] or [_as_it_is(shapes)]


def _tries(whole: Shapes, check: Callable[[], None]) -> Iterator[tuple[dict[str, str], str, bool]]:
    """(name without prefix -> full name, the prefix, loose) to try, in order. They are made one by
    one, because together they may take gigabytes."""
    for loose in (False, True):
        for prefixes in _prefixes(whole):
            check()
            for names in _strip(whole, prefixes):
                yield names, prefixes[0], loose


def _is_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution."""
    return len(shape) >= 2 and "weight" in name.rpartition(".")[2]


def _link(net: list[tuple[int, ...]], left: Shapes) -> str:
    """How a weight that is `left` shows that a net is only a part of another: it takes as many
    numbers as the net puts out, or makes as many channels as the net's images have; "" if none
    does.

    Args:
      net: the shapes of the net's tensors, in file order.
    """
    linear = [shape for shape in net if len(shape) == 2]
    convs = [shape for shape in net if len(shape) == 4]
    if not linear and not convs:
        return ""
    outputs = (linear or convs)[-1][0]
    firsts = {shape[1] for shape in convs}
    # a depthwise convolution has 1 input channel too
    channels = next((count for count in (3, 1) if count in firsts), None)
    for name, shape in left.items():
        # without a linear layer, the net's outputs are still an image that is flattened
        takes = shape[1] == outputs or not (linear or shape[1] % outputs)
        if takes and set(shape[2:]) <= {1}:
            return f"{quote(name)} takes its {outputs} outputs"
        if len(shape) == 4 and shape[0] == channels:
            return f"{quote(name)} makes its {channels}-channel input"
    return ""


def _without_parts(keys: tuple[str, ...]) -> tuple[str, ...]:
    """`keys` without those of adversarial neuron pruning: masks were used, noise is not needed."""
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
    """Prefixes to try, singly and then in pairs (body, head), the likeliest first."""
    counts: dict[str, int] = {"": len(names)}
    for name in names:
        for dot in [found.end() for found in re.finditer(r"\.", name)]:
            counts[name[:dot]] = counts.get(name[:dot], 0) + 1
    first = common_prefix(names)
    # most names first, then the longest prefix: a prefix of all names is not part of the net's own
    # names
    single = [prefix for prefix, count in counts.items() if count >= FEWEST]
    single = sorted(single, key=lambda prefix: (-counts[prefix], -len(prefix)))
    single = single[:MOST_PREFIXES]
    yield from ((prefix,) for prefix in single)
    inner = len(first)
    heads = {"": 0} | {name[: name.find(".", inner) + 1]: 0 for name in names}
    heads = sorted({head for head in heads if counts[head] <= 8} | {first})
    bodies = [prefix for prefix in single if prefix and counts[prefix] >= len(names) // 2]
    yield from ((body, head) for body in bodies for head in heads[:MOST_PREFIXES] if body != head)


def _strip(names: Shapes, prefixes: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Name without its prefix -> full name; then, if that changes any, the same without the marks
    of inner wrappers. Nothing where two names become the same."""
    pairs = []
    for name in names:
        prefix = next((each for each in prefixes if name.startswith(each)), None)
        if prefix == name:
            return
        if prefix is not None:
            pairs.append((name[len(prefix) :], name))
    inner = [(INNER.sub("", short), name) for short, name in pairs]
    for each in (pairs, inner) if inner != pairs else (pairs,):
        if len(dict(each)) == len(each):
            yield dict(each)


class Candidate(NamedTuple):
    """A net in a file: the path of its dictionary, and the selection of that dictionary's
    tensors."""

    path: tuple[str | int, ...]
    selection: Selection

    def title(self) -> str:
        """The name that users see and give: "model", "ema.module", "the file itself"."""
        inner = self.selection.prefix.rstrip(".") if self.selection.fits else ""
        parts = [str(part) for part in self.path] + ([inner] if inner else [])
        return ".".join(parts) or "the file itself"


def choose(
    candidates: list[Candidate],
    key: str | None,
    known: Callable[[Candidate], bool],
    equal: Callable[[Candidate, Candidate], bool],
) -> Candidate:
    """Chooses the one net of a file.

    Args:
      key: the name of the net that the user asked for, or None.
      known: tells whether a candidate is under a name commonly used for classifiers.
      equal: tells whether two candidates hold the same values.
    Raises: Refusal naming the candidates when no single one can be chosen, or when it is only a
      part of another net and `key` does not name it.
    """
    if not candidates:
        raise Refusal("no dictionary of tensors is found in it")
    chosen = _choose(candidates, known, equal) if key is None else _pick(candidates, key)
    selected, title = chosen.selection, chosen.title()
    if selected.link and (key or "").rstrip(".") not in (title, selected.prefix.rstrip(".")):
        raise Refusal(
            f"the net {quote(title)} in it is only a part of another: {selected.link}; export the"
            f" whole model as ONNX (torch.onnx.export), or take the part alone with --key {title}"
        )
    return chosen


def _choose(
    candidates: list[Candidate],
    known: Callable[[Candidate], bool],
    equal: Callable[[Candidate, Candidate], bool],
) -> Candidate:
    """`choose` without a name."""
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
            f"it holds several dictionaries of tensors ({_titles(candidates)}), and none has a"
            " known architecture; say which with --key NAME, or save the one to read on its own"
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
        raise Refusal(f"--key {key} names no single net in it; there are {_titles(candidates)}")
    return named[0]


def _titles(candidates: list[Candidate]) -> str:
    return ", ".join(quote(candidate.title()) for candidate in candidates[:8])
