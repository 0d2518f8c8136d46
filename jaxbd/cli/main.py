"""`jaxbd VERB …`: runs one verb, and turns what went wrong into one line on stderr and exit code 2.

Only the module of the verb that was asked for is imported, so that the help is there at once.
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
    "demo": "plant a backdoor in a small model, find it, remove it, and show all of it on one page",
    "scan": "is there a backdoor in this model? Which class does it lead to?",
    "calibrate": "scan models you know to be clean, so that others can be compared with them",
    "repair": "remove the backdoor and write the repaired model",
    "guard": (
        "which of these images carry the trigger? Asks a model that `repair --method bna` wrote"
    ),
    "evaluate": "clean accuracy, and the attack success rate of a trigger you have",
    "attack": "train a model with a backdoor (or a clean one) to try the other verbs on",
    "inspect": "what is in this model file? Nothing in it is executed",
    "verify": "are the files still those that a record speaks of?",
    "convert": "write a model in another format",
    "methods": "all methods, with links to their papers",
}
"""Verb -> what it does; the verb's module is `jaxbd.cli.commands.<verb>`, with a dataclass `Args`
and `run(args) -> int`."""

HELP = """usage: jaxbd VERB [flags]

Finds and removes backdoors in image classifiers.

{verbs}

`jaxbd VERB --help` explains a verb, `--help-all` all of its flags. Every verb takes these as well:
  --devices N    use N devices of this machine; all of them without it
  --distributed  share the work with the same command on other machines (Slurm, cloud TPU, or
                 JAX_COORDINATOR_ADDRESS)

Exit codes: 0 done (scan: clean), 1 scan found a backdoor, 3 scan cannot tell, 2 could not run,
130 stopped by Ctrl-C, 143 by SIGTERM.
"""
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The command line on `argv` (without the program's name). Returns the exit code."""
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
    """Runs the verb of `argv` with the flags `rest`; the exit code, after a line about what went
    wrong."""
    try:
        return _run(argv[0], rest, joins)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        _fail("interrupted; no file was left half-written")
        if machines.is_joined():
            raise  # the others did not agree to end, and are not to be waited for
        return INTERRUPTED
    except (
        BrokenPipeError
    ):  # the reader of a pipe went away; a second complaint at exit would help nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except Exception as error:
        if (signal := getattr(error, "stopped_by", None)) is not None:
            _say(f"{error}; go on with: {_again(argv)}")
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
        # Python's own exit code for a crash is 1, which says "backdoored" here
        return _fail(
            f"internal error, {type(error).__name__}: {error}; JAXBD_DEBUG=1 shows where, please"
            " report it"
        )


def help_text() -> str:
    """What `jaxbd --help` prints."""
    width = max(map(len, VERBS))
    return HELP.format(
        verbs="\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    )


def _run(verb: str, argv: list[str], joins: bool) -> int:
    """Parses the verb's flags and runs it, together with other machines if it `joins` them."""
    module = importlib.import_module(f"jaxbd.cli.commands.{verb}")
    from jaxbd.cli import parse

    kind, default = module.choose(argv) if hasattr(module, "choose") else (module.Args, None)
    args = parse.parse(kind, argv, f"jaxbd {verb}", default)
    if joins:
        machines.join()
    return module.run(args)


def _is_users_fault(error: Exception) -> bool:
    """Whether the error is the input's or the machine's fault, not the program's."""
    from jaxbd.base import UserError

    return isinstance(error, UserError | FloatingPointError | OSError)


def _again(argv: list[str]) -> str:
    """The shell command that goes on with the job that `argv` began."""
    program = sys.argv[0]
    if os.path.basename(program) != "jaxbd":
        words = [sys.executable, "-m", "jaxbd"]
    else:
        words = ["jaxbd" if shutil.which("jaxbd") == program else program]
    return shlex.join([*words, *argv, *([] if "--resume" in argv else ["--resume"])])


def _fail(message: str) -> int:
    """Says it in one line; the exit code of everything that could not run."""
    _say(" ".join(message.split()))
    return 2


def _say(message: str) -> None:
    """A line on stderr. It may hold a name from a file, and that what a terminal would obey."""
    from jaxbd.limits import clean_text  # imports JAX, which --help can do without

    print("jaxbd: " + clean_text(message), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
