"""`jaxbd VERB …`: runs one verb, and turns what went wrong into one line on stderr and exit code 2.

Only the module of the verb that was asked for is imported, so that the help is there at once.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from jaxbd.cli import flags, machines, signals

VERBS = {
    "demo": "plant a backdoor in a small model, find it, remove it, and show all of it on one page",
    "scan": "is there a backdoor in this model? Which class does it lead to?",
    "repair": "remove the backdoor and write the repaired model",
    "guard": "which of these images carry the trigger? Asks a model that `repair --method bna` wrote",
    "evaluate": "clean accuracy, and the attack success rate of a trigger you have",
    "attack": "train a model with a backdoor (or a clean one) to try the other verbs on",
    "inspect": "what is in this model file? Nothing in it is executed",
    "convert": "write a model in another format",
    "methods": "all methods, with links to their papers",
}
"""Verb -> what it does; the verb's module is `jaxbd.cli.<verb>`, with a dataclass `Args` and `run(args) -> int`."""

VARIANTS = {
    "scan": {"pairs": "pair_scan", "pt-red": "pair_scan"},
    "repair": {"bna": "repair_bna", "dhbe": "repair_dhbe"},
}
"""Verb -> value of `--method` -> module in place of the verb's own, for methods that have other flags."""

SEARCHES = {"scan": "", "pair_scan": "", "repair": "search.", "repair_bna": "search."}
"""Module of a verb that searches triggers -> what the flags of its search begin with."""

HELP = """usage: jaxbd VERB [flags]

Finds and removes backdoors in image classifiers.

{verbs}

`jaxbd VERB --help` explains a verb and its flags. Every verb takes these two as well:
  --devices N    use N devices of this machine; all of them without it
  --distributed  share the work with the same command on other machines (Slurm, cloud TPU, or JAX_COORDINATOR_ADDRESS)

Exit codes: 0 done (scan: clean), 1 scan found a backdoor, 3 scan cannot tell, 2 could not run, 130 stopped by
Ctrl-C, 143 by SIGTERM.
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
    joins, devices, rest = machines.taken(argv[1:])
    if devices is not None:
        os.environ["JAXBD_DEVICES"] = devices
    if joins and not {"-h", "--help"} & {*rest}:
        return machines.supervised(lambda: _attempt(argv, rest, True))
    return _attempt(argv, rest)


def _attempt(argv: list[str], rest: list[str], joins: bool = False) -> int:
    """Runs the verb of `argv` with the flags `rest`; the exit code, after a line about what went wrong."""
    try:
        return _run(argv[0], rest, joins)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except signals.Stopped as stop:
        print(f"jaxbd: {stop}; go on with: {_again(argv)}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        _fail("interrupted; no file was left half-written")
        if machines.joined():
            raise  # the others did not agree to end, and are not to be waited for
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe went away; a second complaint at exit would help nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except Exception as error:
        if os.environ.get("JAXBD_DEBUG"):
            traceback.print_exc()
        if not _expected(error) and machines.lost(error):
            return _fail(machines.LOST)
        if isinstance(error, FloatingPointError) and ";" not in str(error):
            return _fail(f"{error}; lower the learning rate, or check the model's weights")
        if _expected(error):
            return _fail(str(error))
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail("the device ran out of memory; use smaller batches, or fewer cells at a time")
        # Python's own exit code for a crash is 1, which says "backdoored" here
        return _fail(f"internal error, {type(error).__name__}: {error}; JAXBD_DEBUG=1 shows where, please report it")


def help_text() -> str:
    """What `jaxbd --help` prints."""
    width = max(map(len, VERBS))
    return HELP.format(verbs="\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()))


def _run(verb: str, argv: list[str], joins: bool) -> int:
    """Parses the verb's flags and runs it, together with other machines if it `joins` them."""
    name = _module(verb, argv)
    module = importlib.import_module(f"jaxbd.cli.{name}")
    argv = flags.budgeted(argv, SEARCHES[name]) if name in SEARCHES else argv
    defaults = getattr(module, "defaults", None)
    args = parse(module.Args, argv, f"jaxbd {verb}", None if defaults is None else defaults(argv))
    if isinstance(args, str):
        return _fail(args)
    if joins:
        machines.join()
    return module.run(args)


def _module(verb: str, argv: list[str]) -> str:
    """Name of the module that runs a verb with these flags."""
    variants = VARIANTS.get(verb, {})
    method = "pairs" if verb == "scan" and "--pairs" in argv else flags.named(argv, "--method", variants, None)
    return variants.get(method, verb)


def parse(kind: type, argv: list[str], program: str, default: Any = None):
    """An instance of the dataclass `kind` from flags, or what is wrong with them in one line.

    `default` is an instance whose values stand where there is no flag; the class's own when None.

    Raises: SystemExit after printing the help; UserError where a value is refused by the dataclass itself.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                args=argv,
                prog=program,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.HelptextFromCommentsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        return f"{_condense(complaint.getvalue())}; see {program} --help"


def _condense(box: str) -> str:
    """The sentence inside tyro's framed complaint, of which the first line is a heading."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [re.sub(r"^[\s│╭╰─╮╯|-]+(?=\s|$)|[\s│╭╰─╮╯|]+$", "", line).strip() for line in plain.splitlines()[1:]]
    if any(line.startswith("Missing from") for line in lines):
        missing = [line.split()[0] for line in lines if re.match(r"(--[\w.-]+( \S+)?|[A-Z]+)$", line)]
        return f"missing: {', '.join(missing)}"
    text = " ".join(line for line in lines if line)
    text = re.split(r"Argument helptext|For full helptext", text)[0]
    text = re.sub(r"\s+\.", ".", re.sub(r"\s+", " ", text)).strip(" .")
    return text or "the flags cannot be understood"


def _expected(error: Exception) -> bool:
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
    print("jaxbd: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
