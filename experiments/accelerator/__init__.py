"""One command on a borrowed GPU machine: what to carry there, a queue of measurements in order of
value, and what came back among the records. See docs/accelerators.md."""
