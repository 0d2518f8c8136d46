"""One process at a time works on an output."""

import multiprocessing
import os
import pathlib
import signal

import pytest

from jaxbd import devices
from jaxbd.base import UserError
from jaxbd.training import lock


def test_the_second_is_told_who_holds_it_and_nothing_is_left(tmp_path):
    out = tmp_path / "model"
    with lock.hold(out):
        with (
            pytest.raises(UserError, match=rf"model is in use by another process \({os.getpid()} "),
            lock.hold(out),
        ):
            pytest.fail("held twice")
        with lock.hold(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
    with lock.hold(out):
        assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_it_is_released_when_the_work_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path / "model"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_in_a_lock_file_reaches_the_terminal_as_text(tmp_path):
    with lock.hold(tmp_path / "model"):
        lock.lock_file(tmp_path / "model").write_bytes(b"\x1b[31m\xff\nsecond line")
        with pytest.raises(UserError) as caught, lock.hold(tmp_path / "model"):
            pass
    assert str(caught.value).isprintable()


def _hold_for_ever(out: pathlib.Path, ready) -> None:
    with lock.hold(out):
        ready.set()
        signal.pause()


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    """Its file is still there."""
    out, spawn = tmp_path / "model", multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=_hold_for_ever, args=(out, ready))
    process.start()
    assert ready.wait(120)
    taken = rf"in use by another process \({process.pid} "
    with pytest.raises(UserError, match=taken), lock.hold(out):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert lock.lock_file(out).exists()
    with lock.hold(out):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """Opened just before its holder let go: two processes would hold two files of one name."""
    out, real = tmp_path / "model", os.open
    place = lock.lock_file(out)
    place.touch()

    def opened(path, *flags, **named):
        found = real(path, *flags, **named)
        if path == place and place.exists():
            monkeypatch.setattr(os, "open", real)
            place.unlink()
        return found

    monkeypatch.setattr(os, "open", opened)
    with lock.hold(out):
        assert place.exists()
        with pytest.raises(UserError, match="in use"), lock.hold(out):
            pass


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    unwritable = r"cannot be written: .*; choose a writable folder"
    with pytest.raises(UserError, match=unwritable), lock.hold(tmp_path / "file" / "model"):
        pass


def test_other_processes_of_the_run_hold_nothing_and_stop_with_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "is_first", lambda: False)
    with lock.hold(tmp_path / "model"):
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(devices, "from_all", lambda value: __import__("numpy").array([1.0, 0.0]))
    with pytest.raises(UserError, match="says process 0"), lock.hold(tmp_path / "model"):
        pass
