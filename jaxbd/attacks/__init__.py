"""Backdoor attacks to study the defences on: one file each, with `Config` and `make`."""
