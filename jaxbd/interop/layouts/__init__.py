"""Converts between PyTorch state_dicts and our variables: recognises the architecture, and maps the
names of tensors.

Tensors are matched by name, then checked by shape; their order in the file does not matter. On the
PyTorch side arrays are NumPy, named as in the state_dict without a common prefix like "module.".
"""

from jaxbd.interop.layouts.convert import check, to_tensors, to_variables
from jaxbd.interop.layouts.naming import Layout, export_names
from jaxbd.interop.layouts.recognition import fits, recognise

__all__ = ["Layout", "check", "export_names", "fits", "recognise", "to_tensors", "to_variables"]
