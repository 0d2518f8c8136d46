"""Names of layers and weights: the module's where a file tells them, else the node's."""

import re
from typing import Any

from jaxbd.interop.onnx.graph import Node


def layer_name(node: Node, parts: list[tuple[str, str, Any]]) -> str:
    """The module's name where the tensors tell it ("layer1.0.conv1.weight"), else the node's,
    without its operator."""
    for tensor, _, _ in parts:
        if found := re.fullmatch(r"(.+)\.(weight|running_mean)", tensor):
            return safe(found[1])
    scopes = [part for part in node.name.split("/") if part]
    if len(scopes) > 1 and re.fullmatch(rf"{node.op}(_\d+)?", scopes[-1]):
        scopes.pop()
    # TorchScript's "/layer1/layer1.0/conv1": a scope repeats the one that it lies in
    kept = [
        part
        for part, inner in zip(scopes, [*scopes[1:], ""], strict=False)
        if not inner.startswith(f"{part}.")
    ]
    return safe(".".join(kept) or f"{node.op}.{node.outputs[0]}")


def safe(name: str) -> str:
    """`name` as one step of a path of variables: no slash, and no control characters."""
    return re.sub(r"[^\w.\-:]", ".", name).strip(".")[:200] or "unnamed"


def unique(name: str, taken: Any) -> str:
    number, free = 1, name
    while free in taken:
        number, free = number + 1, f"{name}_{number}"
    return free
