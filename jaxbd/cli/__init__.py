"""The command line: parsing, running and printing. Each verb is a module in `commands`."""
