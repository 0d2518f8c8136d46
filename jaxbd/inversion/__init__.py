"""Searches for triggers: one file each, with `Config`, `State`, `Info` and `make`."""
