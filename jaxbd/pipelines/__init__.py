"""Compositions of methods and drivers: plant, scan, repair, compare. No mathematics of their
own."""
