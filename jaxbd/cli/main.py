"""`jaxbd VERB …`: runs one verb; an error becomes one line on stderr and exit code 2.

Imports only the module of the requested verb, so help appears at once.
"""

import importlib
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence

from jaxbd.cli import brief, machines

VERBS = {
    "demo": "plant, find and remove a backdoor in a small model; one-page report",
    "scan": "look for a backdoor in a model and name the class it targets",
    "calibrate": "scan models you know to be clean, as a baseline for later scans",
    "repair": "remove a backdoor and write the repaired model",
    "guard": "flag triggered images, with a model from `repair --method bna`",
    "evaluate": "measure clean accuracy and a given trigger's attack success rate",
    "attack": "train a backdoored (or clean) model to try the other verbs on",
    "inspect": "show what is in a model file, without executing anything in it",
    "verify": "check that files are unchanged since a result was recorded",
    "convert": "write a model in another format",
    "methods": "list all methods, with links to their papers",
}
"""Verb -> what it does; the verb's module is `jaxbd.cli.commands.<verb>`, with a dataclass `Args`
and `run(args) -> int`."""

HELP = """usage: jaxbd VERB [flags]

Finds and removes backdoors in image classifiers.

{verbs}

`jaxbd VERB --help` explains a verb, `--help-all` lists all its flags.
Every verb also takes:
  --devices N    use N devices of this machine (default: all)
  --distributed  share the work with the same command on other machines
                 (Slurm, cloud TPU, or JAX_COORDINATOR_ADDRESS)

Exit codes: 0 done (scan: clean), 1 scan found a backdoor,
3 scan inconclusive, 2 could not run, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name). Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text(), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"jaxbd {importlib.import_module('importlib.metadata').version('jaxbd')}")
        return 0
    if argv[0] not in VERBS:
        return _fail(f"unknown verb {argv[0]!r}; known: {', '.join(VERBS)}")
    if short := brief.of(argv[0], argv[1:]):
        print(short, end="")
        return 0
    joins, devices, rest = machines.take_flags(brief.spell_out(argv[1:]))
    if devices is not None:
        os.environ["JAXBD_DEVICES"] = devices
    if joins and not {"-h", "--help"} & {*rest}:
        return machines.supervise(lambda: _attempt(argv, rest, True))
    return _attempt(argv, rest)


def _attempt(argv: list[str], rest: list[str], joins: bool = False) -> int:
    """Runs the verb of `argv` with the flags `rest`. Returns the exit code; on failure, prints one
    line about the error first."""
    try:
        return _run(argv[0], rest, joins)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        _fail("interrupted; no file was left half-written")
        if machines.is_joined():
            raise  # the other processes did not agree to stop: `supervise` must not wait for them
        return INTERRUPTED
    except BrokenPipeError:
        # the reader closed the pipe (`| head`); without this, flushing stdout at exit fails again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except Exception as error:
        if (signal := getattr(error, "stopped_by", None)) is not None:
            _say(f"{error}; resume with: {_again(argv)}")
            return 128 + signal
        if os.environ.get("JAXBD_DEBUG"):
            traceback.print_exc()
        if not _is_users_fault(error) and machines.is_lost(error):
            return _fail(machines.LOST)
        if isinstance(error, FloatingPointError) and ";" not in str(error):
            return _fail(f"{error}; lower the learning rate, or check the model's weights")
        if _is_users_fault(error):
            return _fail(str(error))
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail(
                "the device ran out of memory; use smaller batches, or fewer cells at a time"
            )
        # Python exits with 1 on a crash, but here 1 means "backdoored"
        return _fail(
            f"internal error, {type(error).__name__}: {error}; please report it with the traceback"
            " that JAXBD_DEBUG=1 prints"
        )


def help_text() -> str:
    """The text of `jaxbd --help`."""
    width = max(map(len, VERBS))
    return HELP.format(
        verbs="\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    )


def _run(verb: str, argv: list[str], joins: bool) -> int:
    """Parses the verb's flags and runs it; `joins` says whether to join other machines first."""
    module = importlib.import_module(f"jaxbd.cli.commands.{verb}")
    from jaxbd.cli import parse

    kind, default = module.choose(argv) if hasattr(module, "choose") else (module.Args, None)
    args = parse.parse(kind, argv, f"jaxbd {verb}", default)
    if joins:
        machines.join()
    return module.run(args)


def _is_users_fault(error: Exception) -> bool:
    """Whether the input or the machine caused the error, rather than a bug."""
    from jaxbd.base import UserError

    return isinstance(error, UserError | FloatingPointError | OSError)


def _again(argv: list[str]) -> str:
    """The shell command that resumes the job started by `argv`."""
    program = sys.argv[0]
    if os.path.basename(program) != "jaxbd":
        words = [sys.executable, "-m", "jaxbd"]
    else:
        words = ["jaxbd" if shutil.which("jaxbd") == program else program]
    return shlex.join([*words, *argv, *([] if "--resume" in argv else ["--resume"])])


def _fail(message: str) -> int:
    """Prints `message` as one line on stderr. Returns exit code 2, "could not run"."""
    _say(" ".join(message.split()))
    return 2


def _say(message: str) -> None:
    """Prints a line on stderr, stripped of terminal escape codes: a name from a file may contain
    them."""
    from jaxbd.limits import clean_text  # imports JAX, which --help can do without

    print("jaxbd: " + clean_text(message), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
