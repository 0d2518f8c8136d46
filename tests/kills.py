"""Child processes that die by SIGKILL at a given moment, for tests of what stays behind."""

import os
import pathlib
import signal
import sys

import jax

HERE = pathlib.Path(__file__).parent
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file(place: str, number: int) -> None:
    """From now on: dies at the event `number` about a file whose name contains `place`."""
    seen = [0]

    def hook(event, args):
        if event in EVENTS and any(place in str(arg) for arg in args):
            seen[0] += 1
            if seen[0] == number:
                die()

    sys.addaudithook(hook)


def die_at_rename(place: str, name: str) -> None:
    """From now on: dies when something at `place` is renamed to `name`."""

    def hook(event, args):
        here = event == "os.rename" and any(place in str(arg) for arg in args)
        if here and pathlib.Path(str(args[1])).name == name:
            die()

    sys.addaudithook(hook)


def environment(*folders: str) -> dict[str, str]:
    """Variables of a child that compiles as the tests do, so that bits can be compared.

    Args:
      folders: below tests/, from which it may import besides.
    """
    import conftest  # sets flags of XLA: not for children that only die here

    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "XLA_FLAGS": conftest.FLAGS + conftest.QUICK,
        "PYTHONPATH": os.pathsep.join(map(str, (*(HERE / f for f in folders), HERE, HERE.parent))),
    }
