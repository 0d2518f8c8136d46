"""Repairs, one file per method with `Config`, `State`, `Info` and `make`; shared measures are in
the other files."""
