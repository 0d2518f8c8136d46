"""jaxbd: finds and removes backdoors in image classifiers, in JAX."""

__version__ = "0.1.0"
