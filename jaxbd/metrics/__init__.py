"""Measurements of a net: accuracy and attack success, activations, distances."""
