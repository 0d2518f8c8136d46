"""Data sources, one file each with one `load`; `load.load` picks the one a person's words mean."""
