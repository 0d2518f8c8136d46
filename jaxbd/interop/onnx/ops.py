"""All supported operators, by their names in ONNX's own domain, for opsets 9 to 28."""

from jaxbd.interop.onnx.ops_elementwise import ELEMENTWISE
from jaxbd.interop.onnx.ops_index import INDEX
from jaxbd.interop.onnx.ops_linear import LINEAR
from jaxbd.interop.onnx.ops_shape import SHAPE
from jaxbd.interop.onnx.ops_window import WINDOW

TABLE = {**ELEMENTWISE, **SHAPE, **INDEX, **WINDOW, **LINEAR}
"""Name -> pure function (node, *inputs) -> output, or tuple of outputs; omitted inputs are None."""
