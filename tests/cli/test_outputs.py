"""Outputs and runs that are in each other's way: one line, and nothing lost."""

import contextlib
import json
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import toys

from jaxbd.base import UserError
from jaxbd.cli import findings, job
from jaxbd.cli.main import main
from jaxbd.training import lock

JOB = ["attack", "--data", "digits", "--width", "4", "--num-steps", "60", "--save-every", "10"]
JOB += ["--image-shape", "8", "8", "1"]


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> pathlib.Path:
    """A small victim's folder."""
    place = tmp_path_factory.mktemp("outputs") / "model"
    assert main([*JOB[:4], "8", *JOB[5:], "--num-steps", "100", "--out", str(place)]) == 0
    return place


@pytest.fixture
def model(victim, tmp_path) -> pathlib.Path:
    """A copy of it."""
    return pathlib.Path(shutil.copytree(victim, tmp_path / "model"))


def contents(path: pathlib.Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def refusal(capsys) -> str:
    """The one line that was said, what is being read apart."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("read")]
    assert len(lines) == 1 and lines[0].startswith("jaxbd: "), lines
    return lines[0]


# Locks.


def test_a_second_process_with_the_same_output_is_refused(tmp_path, capsys):
    """Before it reads anything, whether it is to resume or not; and it changes nothing."""
    out = tmp_path / "made"
    with lock.hold(tmp_path / "made.run"):
        before = sorted(path.name for path in tmp_path.iterdir())
        for flags in ([], ["--resume"]):
            assert main([*JOB, "--out", str(out), "--data", "absent", *flags]) == 2
            assert "made.run is in use by another process" in refusal(capsys)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_two_processes_with_one_output_end_as_one(tmp_path):
    """Together; and the second while the first is at work, with --resume."""
    wanted = tmp_path / "alone"
    assert main([*JOB, "--out", str(wanted)]) == 0
    for flags in ([], ["--resume"]):
        out = tmp_path / f"made{len(flags)}"
        words = [sys.executable, "-m", "jaxbd", *JOB, "--num-steps", "1500", "--out", str(out)]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        both = [subprocess.Popen(words, **pipes)]
        checkpoints = out.with_name(f"{out.name}.run")
        while flags and both[0].poll() is None and not any(checkpoints.glob("*/[1-9]*")):
            time.sleep(0.01)
        both.append(subprocess.Popen([*words, *flags], **pipes))
        said = [process.communicate()[1] for process in both]
        assert sorted(process.returncode for process in both) == [0, 2], said
        assert "in use by another process" in "".join(said)
        left = sorted(path.name for path in tmp_path.glob(f"*{out.name}*"))
        assert left == [out.name]


def test_the_lock_of_a_process_that_was_killed_is_in_nobodys_way(tmp_path):
    code = f"""
import os, signal
from jaxbd.training import lock
with lock.hold({str(tmp_path / "made.run")!r}):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL and lock.lock_file(tmp_path / "made.run").exists()
    lock.check(tmp_path / "made.run")
    with lock.hold(tmp_path / "made.run"):
        pass


# Outputs that are inputs, links, or full.


def test_no_verb_writes_onto_what_it_reads(model, tmp_path, capsys):
    """By whatever name it is called: the trigger and the record of the attack lie there."""
    before = contents(model)
    (tmp_path / "link").symlink_to("model")
    names = [model, tmp_path / "link", tmp_path / "x" / ".." / "model"]
    (tmp_path / "x").mkdir()
    for verb in (["convert"], ["repair", "--method", "dhbe"], ["repair", "--data", "digits"]):
        for name in names:
            assert main([*verb[:1], str(model), *verb[1:], "--out", str(name)]) == 2
            assert "--out" in refusal(capsys) and contents(model) == before
    assert main(["convert", str(model), "--out", str(tmp_path / "m.pth")]) == 0
    known = (tmp_path / "m.pth").read_bytes()
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "m.pth"), "--out", str(tmp_path / "m.pth")]) == 2
    assert "--out" in refusal(capsys) and (tmp_path / "m.pth").read_bytes() == known


def test_an_output_that_is_a_link_stays_one(model, tmp_path):
    """The folder or file that it names is replaced, whole, and nothing is left beside it."""
    shutil.copytree(model, tmp_path / "target")
    (tmp_path / "link").symlink_to("target")
    assert main(["convert", str(model), "--out", str(tmp_path / "link"), "--force"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert {"model.safetensors", "config.json"} == {*contents(tmp_path / "target")}
    (tmp_path / "real.pth").write_bytes(b"old")
    (tmp_path / "link.pth").symlink_to("real.pth")
    assert main(["convert", str(model), "--out", str(tmp_path / "link.pth"), "--force"]) == 0
    assert (tmp_path / "link.pth").is_symlink() and (tmp_path / "real.pth").stat().st_size > 999
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["link", "link.pth", "model", "real.pth", "target"]


@contextlib.contextmanager
def small_files(most: int):
    """Files may grow no longer than so many bytes, as on a disk that is full in their middle."""
    known = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, known[1]))
    try:
        yield
    finally:  # before pytest writes its own line: its output may be a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, known)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["new.safetensors", "new.pth", "new"])
def test_a_model_for_which_there_is_no_space(model, tmp_path, capsys, name):
    capsys.readouterr()
    with small_files(4096):
        assert main(["convert", str(model), "--out", str(tmp_path / name)]) == 2
    line = refusal(capsys)
    assert name in line and "internal" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_result_for_which_there_is_no_space(model, tmp_path, capsys):
    """An older result stays."""
    out = tmp_path / "found.json"
    command = ["evaluate", str(model), "--data", "digits", "--force", "--out"]
    assert main([*command, str(out)]) == 0
    known = out.read_bytes()
    capsys.readouterr()
    with small_files(100):
        assert main([*command, str(out)]) == 2
    assert f"cannot write {out}: File too large" in capsys.readouterr().err
    assert out.read_bytes() == known
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "model"]


def test_settings_of_a_run_that_are_no_settings(tmp_path, capsys):
    (tmp_path / "made.run").mkdir()
    settings = tmp_path / "made.run" / "config.json"
    for text in ("[" * 100_000, '{"schema": 1, "schema": 2}', "NaN", "\x00"):
        settings.write_text(text)
        assert main([*JOB, "--out", str(tmp_path / "made"), "--resume"]) == 2
        line = refusal(capsys)
        assert "config.json" in line and "internal" not in line and len(line) < 400
        assert settings.read_text() == text


def test_checkpoints_that_are_not_what_their_names_say(tmp_path, capsys, monkeypatch):
    """Swapped or copied: the run ends as one that nothing disturbed, or is refused."""
    from test_resume import followed

    whole, stopped = tmp_path / "whole", tmp_path / "made"
    assert main([*JOB, "--out", str(whole)]) == 0
    assert followed(lambda: main([*JOB, "--out", str(stopped)]), 2)[0] == 143
    stage = next(path for path in (tmp_path / "made.run").iterdir() if path.is_dir())
    older, newer = sorted((path for path in stage.iterdir()), key=lambda path: int(path.name))
    shutil.copytree(tmp_path / "made.run", tmp_path / "copied.run")
    for name in ("swapped", "copied"):
        run = tmp_path / f"{name}.run"
        if name == "swapped":
            older.rename(stage / "aside")
            newer.rename(older)
            (stage / "aside").rename(newer)
            (tmp_path / "made.run").rename(run)
        else:
            place = run / stage.name
            shutil.rmtree(place / newer.name)
            shutil.copytree(place / older.name, place / newer.name)
        capsys.readouterr()
        code = main([*JOB, "--out", str(tmp_path / name), "--resume"])
        said = capsys.readouterr().err
        if code:
            assert code == 2 and "checkpoint" in said and "internal" not in said
        else:
            assert "is damaged and was not used" in " ".join(said.split())
            weights = [
                (path / "model.safetensors").read_bytes() for path in (whole, tmp_path / name)
            ]
            assert weights[0] == weights[1]


def test_the_record_of_a_repair_is_whole_or_not_at_all(model, tmp_path, capsys, monkeypatch):
    """What is written last, the figures, does not make the model half."""
    from jaxbd.cli import outcome

    def full(*args):
        raise OSError(28, "No space left on device")

    out = tmp_path / "fixed.pth"
    flags = ["--method", "finetune", "--data", "digits", "--limit", "200"]
    command = ["repair", str(model), *flags, "--steps", "2", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(outcome.models, "save_model", full)
        assert main(command) == 2
    assert "o space left on device" in capsys.readouterr().err and not out.exists()
    assert main(command) == 0
    content = json.loads((tmp_path / "fixed.repair.json").read_text())
    assert np.isfinite(content["after"]["clean_accuracy"])


def test_home_is_expanded_once_and_for_all(tmp_path, monkeypatch, capsys):
    """`--out=~/x` reaches the program as it is; what was checked is what is written."""
    home, here = tmp_path / "home", tmp_path / "here"
    for place in (home, here):
        place.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    toy = toys.save(tmp_path / "toy")
    for name in ("x.pth", "x"):
        assert main(["convert", str(toy), f"--out=~/{name}"]) == 0
        assert (home / name).exists()
        assert main(["convert", str(toy), f"--out=~/{name}"]) == 2
        assert "already exists" in refusal(capsys)
    (home / "null.json").write_text("{}")
    words = ["calibrate", str(toy), "--data", "never-read.npz", "--out=~/null.json"]
    assert main(words) == 2 and "already exists" in refusal(capsys)
    assert not list(here.iterdir()), "a folder called ~"


def scan_flags(args: dict, **stopping):
    outputs = {"out": None, "report": None, "sarif": None, "mlbom": None, **args}
    return SimpleNamespace(model=pathlib.Path("m.pth"), stopping=job.Flags(**stopping), **outputs)


def test_resume_replaces_nothing_without_an_unfinished_run(tmp_path, monkeypatch, capsys):
    """Then it is a first run, and the other outputs are someone else's."""
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    for flag in ("sarif", "mlbom", "report"):
        other = mine.with_suffix(".html") if flag == "report" else mine
        other.write_text("{}")
        flags = scan_flags({"out": tmp_path / "fresh.json", flag: other}, resume=True)
        with pytest.raises(UserError, match="already exists"):
            findings.check(flags)
        with monkeypatch.context() as patch:
            patch.setattr(
                job.checkpoint, "is_started", lambda folder: folder.name == "fresh.json.run"
            )
            findings.check(flags)
    command = ["repair", "m.pth", "--method", "dhbe", "--out", str(tmp_path / "f.pth"), "--resume"]
    command += ["--report", str(tmp_path / "mine.html")]
    for name in ("f.repair.json", "mine.html"):
        (tmp_path / name).write_text("mine")
        assert main(command) == 2
        assert f"{name} already exists" in capsys.readouterr().err
        (tmp_path / name).unlink()


def test_two_outputs_of_one_path_are_refused_with_force_too(tmp_path):
    """By any of its names: the second would replace the first."""
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("a.json")
    for other in ("a.json", "link.json", "x/../a.json"):
        (tmp_path / "x").mkdir(exist_ok=True)
        paths = {"out": tmp_path / "a.json", "mlbom": tmp_path / other}
        with pytest.raises(UserError, match="is also another input or output"):
            findings.check(scan_flags(paths, force=True))


@pytest.mark.parametrize("name", ["m", "m.onnx"])
def test_inspect_compares_an_architecture_that_the_file_states_itself(tmp_path, capsys, name):
    toy = toys.save(tmp_path / "m")
    if name != "m":
        assert main(["convert", str(toy), "--out", str(tmp_path / name)]) == 0
    assert main(["inspect", str(tmp_path / name), "--arch", "zzz"]) == 2
    assert "leave --arch out" in refusal(capsys)
    assert main(["inspect", str(toy), "--arch", "cnn"]) == 0
