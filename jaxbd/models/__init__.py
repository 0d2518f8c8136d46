"""Architectures, and from their names to a `Net`."""
