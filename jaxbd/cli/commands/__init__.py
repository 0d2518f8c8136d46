"""One file per verb, each with `Args` (its flags) and `run(args) -> exit code`."""
