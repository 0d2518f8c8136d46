"""One flat file per table or figure of the papers; `reproduce.py` runs a section of them and checks
its figures."""
