"""Backdoor attacks for testing the defences, one file per attack with `Config` and `make`."""
