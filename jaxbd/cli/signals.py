"""SIGINT and SIGTERM for jobs that save before they end. Quick to import."""

import os
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"


class Watch:
    """A context manager that keeps the first signal in `caught` and lets a second one end the
    program at once.

    A thread listens, because Python runs handlers only between instructions of its own, and a
    compiled program may take minutes for one. A signal that was ignored before (`nohup`) stays so.
    For the main thread only.

    Attributes:
      caught: number of the first signal; None as long as there was none.
    """

    def __init__(self):
        self.caught: int | None = None

    def __enter__(self) -> "Watch":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._woken = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in heeded}
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
        """Takes the number of each signal from the pipe, until a 0."""
        while number := os.read(self._read, 1)[0]:
            if number not in self._handlers:
                continue
            if self.caught is not None:
                _end_at_once(number)
            self.caught = number
            name = signal.Signals(number).name
            print(
                f"{name}: ends after these steps and saves; once more ends at once",
                file=sys.stderr,
                flush=True,
            )


def _end_at_once(number: int) -> None:
    """Leaves without a clean-up of any kind, the cursor of a terminal apart, which a progress bar
    hides."""
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    os._exit(128 + number)
