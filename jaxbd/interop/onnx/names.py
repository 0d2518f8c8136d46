"""Names of layers and weights: the PyTorch module's name if the file reveals it, otherwise the
node's."""

import re
from typing import Any

from jaxbd.interop.onnx.graph import Node


def layer_name(node: Node, parts: list[tuple[str, str, Any]]) -> str:
    """The module's name if the names of the tensors contain it ("layer1.0.conv1.weight"), otherwise
    the node's name without the operator."""
    for tensor, _, _ in parts:
        if found := re.fullmatch(r"(.+)\.(weight|running_mean)", tensor):
            return safe(found[1])
    scopes = [part for part in node.name.split("/") if part]
    if len(scopes) > 1 and re.fullmatch(rf"{node.op}(_\d+)?", scopes[-1]):
        scopes.pop()
    # TorchScript writes "/layer1/layer1.0/conv1": an inner scope repeats the name of the outer one
    modules = [
        part
        for part, inner in zip(scopes, [*scopes[1:], ""], strict=False)
        if not inner.startswith(f"{part}.")
    ]
    return safe(".".join(modules) or f"{node.op}.{node.outputs[0]}")


def safe(name: str) -> str:
    """`name` made safe as one step of a variable's path: no slashes, no control characters."""
    return re.sub(r"[^\w.\-:]", ".", name).strip(".")[:200] or "unnamed"


def unique(name: str, taken: Any) -> str:
    """`name`, with a number appended if it is in `taken`."""
    number, free = 1, name
    while free in taken:
        number, free = number + 1, f"{name}_{number}"
    return free
