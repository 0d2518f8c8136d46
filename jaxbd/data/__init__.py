"""Data sources: one file per kind of source with one `load`; `load.load` picks the right one."""
