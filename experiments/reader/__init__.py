"""Differential fuzzing of the readers: what jaxbd accepts, the format's own reader accepts and
understands alike."""
