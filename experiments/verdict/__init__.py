"""Verdicts on models that nobody here made, on digit models, and on searches without power."""
