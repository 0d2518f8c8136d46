"""PyTorch state_dicts and our variables: which architecture a file holds, and what a tensor is
called on either side.

Tensors are matched by name, then checked by shape; their order in the file means nothing. Arrays
are NumPy on the PyTorch side, named as in the state_dict without any common prefix such as
"module.".
"""

from jaxbd.interop.layouts.convert import check, to_tensors, to_variables
from jaxbd.interop.layouts.naming import Layout, export_names
from jaxbd.interop.layouts.recognition import fits, recognise

__all__ = ["Layout", "check", "export_names", "fits", "recognise", "to_tensors", "to_variables"]
