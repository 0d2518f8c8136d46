"""Families of architectures: one function covers every depth and width, read from the layers' names
and shapes."""

from jaxbd.models.families.family import FAMILIES, Family, open_table, parse
from jaxbd.models.families.layers import Layers, Mismatch

__all__ = ["FAMILIES", "Family", "Layers", "Mismatch", "open_table", "parse"]
