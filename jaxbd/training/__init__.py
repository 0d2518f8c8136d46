"""Drivers: loops over time and over cells, checkpoints, placement on devices. This is the only
package that compiles programs."""
