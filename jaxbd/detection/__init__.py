"""Turns search results into a verdict, and detects triggered images at test time."""
