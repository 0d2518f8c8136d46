"""The command line: parsing, running, and printing; verbs are in `commands`."""
