"""Drivers: loops over time and over cells, checkpoints, placement on devices. Programs are compiled
here."""
