"""Trigger searches, one file per method with `Config`, `State`, `Info` and `make`."""
