"""SIGINT and SIGTERM handling for jobs that save before they end. Quick to import."""

import os
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"


class Watch:
    """A context manager that records the first signal in `caught`; a second one ends the program at
    once.

    A thread listens, because Python runs signal handlers only between bytecode instructions, and
    one call of a compiled program may take minutes. A signal that was ignored before (`nohup`)
    stays ignored. Use it only in the main thread.

    Attributes:
      caught: number of the first signal; None until there is one.
    """

    def __init__(self):
        self.caught: int | None = None

    def __enter__(self) -> "Watch":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._woken = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        watched = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in watched}
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._woken)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._listener.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        """Reads signal numbers from the pipe, until a 0."""
        while number := os.read(self._read, 1)[0]:
            if number not in self._handlers:
                continue
            if self.caught is not None:
                _end_at_once(number)
            self.caught = number
            name = signal.Signals(number).name
            print(
                f"{name}: stopping after these steps and saving; send it again to stop at once",
                file=sys.stderr,
                flush=True,
            )


def _end_at_once(number: int) -> None:
    """Exits without any clean-up, except to show the terminal's cursor, which a progress bar
    hides."""
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    os._exit(128 + number)
