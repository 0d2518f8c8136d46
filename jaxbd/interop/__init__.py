"""Reads and writes model files of other tools. Nothing from a file is ever executed."""
