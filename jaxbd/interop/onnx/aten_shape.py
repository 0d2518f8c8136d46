"""aten operators that reshape, split and join tensors, as functions (converter, arguments) ->
name."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxbd.interop.onnx.aten import Converter, widened
from jaxbd.interop.onnx.aten_arguments import Arguments, Tensor, source
from jaxbd.limits import Refusal

INT_MAX = 1 << 62


def first(c: Converter, a: Arguments) -> str:
    """The operator's input, unchanged."""
    return c.value(source(a))


def dropout(c: Converter, a: Arguments) -> list[str]:
    """The operator's input: dropout changes nothing in evaluation mode. The second output of
    `native_dropout`, the mask, is not supported and gets no name."""
    probability, training = a.get("p"), a.get("train")
    if training is not False and probability != 0:
        raise Refusal(
            "it drops values at random: the model was exported in training mode; call .eval() "
            "before torch.export.export"
        )
    return [first(c, a), ""]


def view(c: Converter, a: Arguments) -> str:
    return c.add("Reshape", [c.value(a["self"]), c.dims(a.get("size", a.get("shape")))])


def flatten(c: Converter, a: Arguments) -> str:
    """Merges the axes from `start_dim` to `end_dim`."""
    x = source(a)
    start, end = c.axis(x, a.get("start_dim", 0)), c.axis(x, a.get("end_dim", -1))
    shape = c.meta(x).shape
    if start == 1 and end == len(shape) - 1:
        return c.add("Flatten", [c.value(x)], axis=1)
    merged = (
        -1
        if any(dim is None for dim in shape[start : end + 1])
        else int(np.prod(shape[start : end + 1]))
    )
    # in ONNX a 0 copies the input's dimension at the same index: that only works before the merged
    # axes, where indices do not shift
    after = [-2 if dim is None else dim for dim in shape[end + 1 :]]
    if -2 in after:
        raise Refusal("a flatten with a symbolic size after it is not supported")
    return c.add("Reshape", [c.value(x), c.integers([*([0] * start), merged, *after])])


def unflatten(c: Converter, a: Arguments) -> str:
    x = a["self"]
    axis, shape = c.axis(x, a["dim"]), c.meta(x).shape
    if any(dim is None for dim in shape[axis + 1 :]):
        raise Refusal("an unflatten with a symbolic size after it is not supported")
    return c.add(
        "Reshape", [c.value(x), c.integers([*([0] * axis), *a["sizes"], *shape[axis + 1 :]])]
    )


def permute(c: Converter, a: Arguments) -> str:
    x = a["self"]
    return c.add("Transpose", [c.value(x)], perm=tuple(c.axis(x, axis) for axis in a["dims"]))


def transpose(c: Converter, a: Arguments) -> str:
    x = a["self"]
    one, other = c.axis(x, a.get("dim0", 0)), c.axis(x, a.get("dim1", 1))
    perm = list(range(c.rank(x)))
    if len(perm) > 1:
        perm[one], perm[other] = perm[other], perm[one]
    return c.add("Transpose", [c.value(x)], perm=tuple(perm))


def cat(c: Converter, a: Arguments) -> str:
    return c.add(
        "Concat", [c.value(x) for x in a["tensors"]], axis=c.axis(a["tensors"][0], a.get("dim", 0))
    )


def stack(c: Converter, a: Arguments) -> str:
    axis = a.get("dim", 0) % (c.rank(a["tensors"][0]) + 1)
    parts = [c.add("Unsqueeze", [c.value(x), c.integers([axis])]) for x in a["tensors"]]
    return c.add("Concat", parts, axis=axis)


def split(c: Converter, a: Arguments) -> list[str]:
    """Splits into parts of `split_size`, of the listed `split_sizes`, or into `chunks` parts."""
    x = a["self"]
    axis = c.axis(x, a.get("dim", 0))
    whole = c.size(x, axis)
    sizes = a.get("split_sizes", a.get("split_size"))
    if "chunks" in a:
        sizes = -(-whole // a["chunks"])
    if isinstance(sizes, int):
        if sizes < 1:
            raise Refusal(f"a split into parts of {sizes}")
        sizes = [min(sizes, whole - at) for at in range(0, whole, sizes)]
    parts = c.add("Split", [c.value(x), c.integers(sizes)], "split", len(sizes), axis=axis)
    return [parts] if len(sizes) == 1 else list(parts)


def unbind(c: Converter, a: Arguments) -> list[str]:
    x, axis = a["self"], a.get("dim", 0)
    return [select(c, {"self": x, "dim": axis, "index": i}) for i in range(c.size(x, axis))]


def select(c: Converter, a: Arguments) -> str:
    x = a["self"]
    axis = c.axis(x, a["dim"])
    if c.values[x.name] in c.known:  # a NumPy view, so that writing into it changes the original
        name = c.name("select")
        c.known[name] = c.known[c.values[x.name]][(slice(None),) * axis + (a["index"],)]
        return name
    return c.add("Gather", [c.value(x), c.constant(a["index"], np.int64)], axis=axis)


def slice_(c: Converter, a: Arguments) -> str:
    x = a["self"]
    bounds = [a.get("start"), a.get("end"), a.get("step", 1)]
    bounds = [
        default if bound is None else bound
        for bound, default in zip(bounds, (0, INT_MAX, 1), strict=True)
    ]
    start, end, step = (
        c.dims([bound]) if isinstance(bound, int) else c.vector([bound]) for bound in bounds
    )
    return c.add("Slice", [c.value(x), start, end, c.integers([c.axis(x, a.get("dim", 0))]), step])


def index(c: Converter, a: Arguments) -> str:
    """Advanced indexing by a tensor along one axis, or by constants along several, each along its
    own as in x[:, :, rows[:, None], columns]."""
    x, indices = a["self"], a.get("indices", a.get("index"))
    if isinstance(indices, Tensor):
        return c.add("Gather", [c.value(x), c.value(indices)], axis=c.axis(x, a.get("dim", 0)))
    given = [(axis, each) for axis, each in enumerate(indices) if each is not None]
    if not given or any(c.meta(each).dtype.kind not in "iu" for _, each in given):
        raise Refusal("indexing by a mask is not supported")
    names = [c.value(each) for _, each in given]
    if len(given) > 1:
        names = [c.integers(each) for each in _open_mesh(c, names)]
        if given[-1][0] - given[0][0] != len(given) - 1:
            raise Refusal("indexing by tensors along axes apart from each other is not supported")
    y = c.value(x)
    for (axis, _), name in zip(given, names, strict=True):
        y = c.add("Gather", [y, name], axis=axis)
    return y


def _open_mesh(c: Converter, names: list[str]) -> list[list[int]]:
    """The numbers along axis i of array i, where each array has one entry along all others."""
    arrays = [c.known.get(name) for name in names]
    for place, array in enumerate(arrays):
        shape = () if array is None else (1,) * (len(names) - array.ndim) + array.shape
        if array is None or shape != tuple(
            array.size if i == place else 1 for i in range(len(names))
        ):
            raise Refusal("indexing by several tensors that are not an open mesh is not supported")
    return [array.reshape(-1).tolist() for array in arrays if array is not None]


def unsqueeze(c: Converter, a: Arguments) -> str:
    return c.add(
        "Unsqueeze", [c.value(a["self"]), c.integers([a["dim"] % (c.rank(a["self"]) + 1)])]
    )


def squeeze(c: Converter, a: Arguments) -> str:
    x = a["self"]
    axes = a.get("dim", list(range(c.rank(x))))
    axes = [c.axis(x, axis) for axis in (axes if isinstance(axes, list) else [axes])]
    # an open number of images is not squeezed, even if it happens to be one
    alone = [axis for axis in axes if (axis or c.meta(x).shape[0]) and c.size(x, axis) == 1]
    return c.add("Squeeze", [c.value(x), c.integers(alone)])


def expand(c: Converter, a: Arguments) -> str:
    """Expand. PyTorch keeps a dimension with -1, ONNX with 1."""
    sizes = [1 if size == -1 else size for size in a["size"]]
    return c.add("Expand", [c.value(a["self"]), c.vector(sizes)])


def repeat(c: Converter, a: Arguments) -> str:
    more = len(a["repeats"]) - c.rank(a["self"])
    x = c.value(a["self"])
    x = c.add("Unsqueeze", [x, c.integers(range(more))]) if more else x
    return c.add("Tile", [x, c.vector(a["repeats"])])


def flip(c: Converter, a: Arguments) -> str:
    """Reverses axes: slices from the last entry backwards."""
    axes = [c.axis(a["self"], axis) for axis in a["dims"]]
    bounds = ([number] * len(axes) for number in (-1, -INT_MAX))
    inputs = [*map(c.integers, bounds), c.integers(axes), c.integers([-1] * len(axes))]
    return c.add("Slice", [c.value(a["self"]), *inputs])


def roll(c: Converter, a: Arguments) -> str:
    """Rolls each axis by cutting it in two and swapping the parts."""
    x = c.value(a["self"])
    for shift, dim in zip(a["shifts"], a.get("dims", []), strict=True):
        axis = c.axis(a["self"], dim)
        cut = -shift % c.size(a["self"], axis)
        tail, head = (
            c.add("Slice", [x, c.integers([low]), c.integers([high]), c.integers([axis])])
            for low, high in ((cut, INT_MAX), (0, cut))
        )
        x = c.add("Concat", [tail, head], axis=axis)
    return x


def pad(c: Converter, a: Arguments) -> str:
    """Pad. PyTorch lists the widths from the last axis backwards."""
    x, widths = a["self"], a["pad"]
    rank, value = c.rank(x), a.get("value") or 0.0
    pairs = [(0, 0)] * (rank - len(widths) // 2) + list(
        zip(widths[::2], widths[1::2], strict=True)
    )[::-1]
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[
        a.get("mode", "constant")
    ]
    spread = c.integers([*(low for low, _ in pairs), *(high for _, high in pairs)])
    return c.add(
        "Pad", [c.value(x), spread, c.constant(value, widened(c.meta(x).dtype))], mode=mode
    )


SHAPES: dict[str, Callable[[Converter, Arguments], Any]] = {
    **dict.fromkeys(("contiguous", "clone", "alias", "detach", "lift_fresh_copy"), first),
    **dict.fromkeys(
        ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
        dropout,
    ),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), view),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), split),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("index", "index_select"), index),
    **dict.fromkeys(("transpose", "t"), transpose),
    "flatten": flatten,
    "unflatten": unflatten,
    "permute": permute,
    "cat": cat,
    "concat": cat,
    "stack": stack,
    "unbind": unbind,
    "select": select,
    "slice": slice_,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "expand": expand,
    "repeat": repeat,
    "roll": roll,
    "flip": flip,
}
"""Name of an aten operator, without overload -> its handler."""
