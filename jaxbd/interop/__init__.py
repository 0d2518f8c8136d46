"""Model files of others, in and out. Nothing that is read is ever executed."""
