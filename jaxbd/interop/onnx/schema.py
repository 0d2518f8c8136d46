"""Checks the nodes of an ONNX file against the standard's definitions of their operators.

The handlers read the attributes and inputs that an operator has in the file's opset. Anything else
would be ignored without a word, like the attribute `axes` of a ReduceMean of opset 18.
"""

import functools
from typing import Any

from jaxbd.limits import Refusal, quote


def check(onnx: Any, node: Any, opset: int, place: str) -> None:
    """Raises Refusal unless the opset's definition has the inputs, outputs and attributes of
    `node`, with the attributes' types. Operators that the installed package `onnx` does not know
    are not checked.

    Args:
      onnx: the package.
      node: the node, a protocol buffer.
      place: the operator and node, for the message.
    """
    schema = _schema(onnx, node.op_type, opset)
    if schema is None:
        return
    if schema.deprecated:
        raise Refusal(f"{place} does not exist in opset {opset}")
    for kind, count, most in (
        ("inputs", len(node.input), schema.max_input),
        ("outputs", len(node.output), schema.max_output),
    ):
        if count > most:
            raise Refusal(f"{place} has {count} {kind}; in opset {opset} it has at most {most}")
    if len(node.input) < schema.min_input:
        raise Refusal(f"{place} has {len(node.input)} inputs; it needs {schema.min_input}")
    for attribute in node.attribute:
        known = schema.attributes.get(attribute.name)
        if known is None:
            raise Refusal(
                f"{place} has an attribute {quote(attribute.name)}, which opset {opset} does not "
                "define"
            )
        if attribute.type != known.type.value:
            raise Refusal(f"{place}, attribute {quote(attribute.name)} is of another type")


@functools.lru_cache(maxsize=512)
def _schema(onnx: Any, op: str, opset: int) -> Any:
    """The definition of `op` in `opset`; None if the package has none."""
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
