"""Repairs: one file each, with `Config`, `State`, `Info` and `make`; shared measures beside
them."""
