"""Architectures, and the way from an architecture's name to a `Net`."""
