"""Several processes are one run: two on this machine, with two devices each, joined over the
loopback interface."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from jaxbd import devices
from jaxbd.cli import machines

HERE = pathlib.Path(__file__).parents[1]
PROGRAM = f"""
import sys
import jaxbd.cli.commands
from jaxbd.cli import main
jaxbd.cli.commands.__path__.append({str(HERE)!r})
main.VERBS["probe"] = ""
sys.exit(main.main(["probe", *sys.argv[1:]]))
"""
PATIENCE = 300.0
"""Seconds for what takes a few on an idle machine."""


def start(*flags: str, **environment: str) -> subprocess.Popen:
    """The verb of `probe.py` in a process of its own."""
    given = {
        name: value
        for name, value in os.environ.items()
        if name not in (devices.LIMIT, "XLA_FLAGS")
    }
    given |= {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE / "training"), str(HERE.parent)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_ENABLE_X64": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *flags],
        env=given | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )


def start_two(*flags: str, outs: Sequence[pathlib.Path]) -> list[subprocess.Popen]:
    """Two processes with the same flags, but for the output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    who = {machines.ADDRESS: address, machines.COUNT: "2"}
    return [
        start("--out", str(out), *flags, **who, **{machines.NUMBER: str(number)})
        for number, out in enumerate(outs)
    ]


def wait_for(file: pathlib.Path, processes: Sequence[subprocess.Popen]) -> None:
    """Until the file is there, or a process has ended."""
    deadline = time.monotonic() + PATIENCE
    while (
        not file.exists()
        and time.monotonic() < deadline
        and all(process.poll() is None for process in processes)
    ):
        time.sleep(0.05)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    try:
        said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, *said


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return dict(found)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process on one device finds."""
    out = tmp_path_factory.mktemp("alone") / "out.npz"
    code, said, complaints = ended(start("--out", str(out), "--devices", "1"))
    assert code == 0, complaints
    assert said.endswith("1 devices, resumed None\n")
    return arrays(out)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys() and len(found) > 8
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-9, err_msg=name)


def test_two_processes_find_what_one_finds_and_the_first_alone_speaks(alone, tmp_path):
    out, others = tmp_path / "out.npz", tmp_path / "other" / "out.npz"
    (code, said, complaints), (other_code, *other_said) = map(ended, start_two(outs=(out, others)))
    assert (code, other_code) == (0, 0), (complaints, other_said)
    assert "process 1 has another number than process 0; count anew" in said
    assert said.endswith("4 devices, resumed None\n") and "Gloo" not in said + complaints
    assert other_said == ["", ""]
    assert_same(arrays(out), alone)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run_in_one_line_and_it_can_be_resumed(lost, alone, tmp_path):
    out = tmp_path / "out.npz"
    both = start_two("--stall-at", "30", "--stalls", str(lost), outs=(out, out))
    wait_for(stalled := out.with_suffix(".stalled"), both)
    both[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, said, complaints = ended(both[1 - lost])
    both[lost].communicate()
    assert stalled.exists(), complaints
    assert time.monotonic() - killed < machines.HEARTBEAT + 60
    # the exchange that fails says it, or the runtime's abort does
    assert code == 2 and complaints in [
        f"jaxbd: {who}{machines.LOST}\n" for who in ("", f"process {1 - lost}: ")
    ]
    assert ("five: step 20" in said) == (lost == 1) and not out.exists()

    code, said, complaints = ended(start("--out", str(out), "--resume"))  # on what is left
    assert code == 0, complaints
    assert "resumed {'stage': 'five', 'step': " in said and said.endswith("}\n")
    assert_same(arrays(out), alone)


@pytest.mark.parametrize("first", [0, 1])
def test_ctrl_c_before_the_work_ends_one_at_once_and_the_other_with_a_line(first, tmp_path):
    """They have not agreed to end, so the one does not wait for the other, which waits for the
    one."""
    out = tmp_path / "out.npz"
    both = start_two("--stall-at", "-1", "--stalls", str(first), outs=(out, out))
    wait_for(out.with_suffix(".stalled"), both)
    both[first].send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    codes, _, complaints = zip(*map(ended, both), strict=True)
    assert time.monotonic() - interrupted < machines.HEARTBEAT + 60
    assert (codes[first], codes[1 - first]) == (130, 2), complaints
    assert "interrupted; no file was left half-written" in complaints[first]
    assert machines.LOST in complaints[1 - first] and complaints[1 - first].count("\n") == 1


def test_who_is_who_must_be_known(tmp_path):
    given = {name: "" for name in (machines.ADDRESS, machines.COUNT, machines.NUMBER)}
    code, said, complaints = ended(
        start("--out", str(tmp_path / "out.npz"), "--distributed", **given)
    )
    assert (code, said) == (2, "")
    said = "jaxbd: neither Slurm nor a cloud TPU was found: set JAX_COORDINATOR_ADDRESS"
    assert complaints.startswith(said)
    assert complaints.count("\n") == 1


def test_flags_about_machines_are_taken_out_wherever_they_stand(monkeypatch):
    monkeypatch.delenv(machines.ADDRESS, raising=False)
    assert machines.take_flags(["m.pth", "--devices", "4", "--data", "d"]) == (
        False,
        "4",
        ["m.pth", "--data", "d"],
    )
    assert machines.take_flags(["--distributed", "m.pth", "--devices=2"]) == (True, "2", ["m.pth"])
    monkeypatch.setenv(machines.ADDRESS, "host:1")
    assert machines.take_flags(["m.pth"]) == (True, None, ["m.pth"])
