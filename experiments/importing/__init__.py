"""The parts of the import section."""
