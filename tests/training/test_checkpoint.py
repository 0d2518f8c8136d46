"""Checkpoints: a run that was stopped, killed or damaged goes on bit for bit; other runs' folders
are refused."""

import dataclasses
import errno
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kills
import numpy as np
import pytest
import toys
from jax.sharding import NamedSharding, PartitionSpec

from jaxbd import files
from jaxbd.base import UserError
from jaxbd.data import draw
from jaxbd.inversion import pixel
from jaxbd.models import build
from jaxbd.training import checkpoint, loop, step_folder, supervised, sweep
from jaxbd.training import run as run_module
from jaxbd.training.run import Checkpoints, Run

NET = build.net(
    build.Spec(arch="cnn", classes=4, image_shape=toys.SHAPE, options={"width": 4, "stages": 1})
)
TRAINING = supervised.Config(num_steps=15, optimiser="adam", learning_rate=0.01)
TRAINER = supervised.make(NET, TRAINING)
PIXEL = pixel.make(toys.NET, toys.SHAPE, pixel.Config())
STAGE = "1-training"
DATA = jax.tree.map(jnp.asarray, toys.stripes(0, 64))
CONFIG = {
    "method": "training",
    "config": dataclasses.asdict(TRAINING),
    "seed": 3,
    "versions": files.versions(),
}
DRAW = draw.uniform(8)


class Stopped(Exception):
    """Stands for whatever ends a run early."""


class Runner(NamedTuple):
    """A resumable stage: start () -> state; chunks (state, steps left) -> chunks; its Info."""

    start: Any
    chunks: Any
    info: Any


def variables():
    return NET.init(jax.random.key(7))


def training(over_time) -> Runner:
    advance = loop.with_batches(TRAINER.step, DRAW)
    chunks = lambda state, left: loop.chunks(
        advance, state, jax.random.key(3), DATA, (), num_steps=left, chunk=3, over_time=over_time
    )
    return Runner(lambda: TRAINER.init(variables()), chunks, supervised.Info)


TRAIN = training("host")
RUNS = {"host": TRAIN, "scan": training("scan")}


def uninterrupted(runner: Runner, steps: int):
    """State and infos of a run that saves nothing."""
    found = Run().follow(
        "training", runner.start(), runner.chunks, info=runner.info, num_steps=steps
    )
    return found.state, found.infos


def resumed(folder, runner: Runner, *, steps=14, every=3, stop_at=None, config=CONFIG, warn=None):
    """The run from where the folder stands; raises Stopped after the chunk that ends `stop_at`
    steps from there."""

    def watched(state, left):
        for chunk in runner.chunks(state, left):
            yield chunk
            if chunk.done == stop_at:
                raise Stopped

    extra = {} if warn is None else {"warn": warn}
    run = Run(checkpoints=Checkpoints(folder, config, every, **extra))
    found = run.follow("training", runner.start(), watched, info=runner.info, num_steps=steps)
    return found.state, found.infos


def restored(folder, like=None, info=None, **settings):
    like = TRAIN.start() if like is None else like
    return checkpoint.restore(folder, CONFIG, like, info or TRAIN.info, stage=STAGE, **settings)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())


def contents(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_is_uninterrupted(name, tmp_path):
    runner, stops = RUNS[name], random.Random(name)
    whole = uninterrupted(runner, 14)
    for stop_at in (stops.choice((3, 6)), 3):
        with pytest.raises(Stopped):
            resumed(tmp_path / "run", runner, stop_at=stop_at)
    assert_same_bits(resumed(tmp_path / "run", runner), whole)
    assert contents(tmp_path / "run") == [STAGE, "config.json"]
    assert contents(tmp_path / "run" / STAGE) == ["12", "9"]
    assert len(jax.tree.leaves(whole[1])[0]) == 14


def test_a_finished_stage_comes_back_without_a_step(tmp_path):
    whole = resumed(tmp_path, TRAIN, steps=12)
    no_steps = lambda state, left: iter(()) if left == 0 else pytest.fail("made steps")
    assert_same_bits(resumed(tmp_path, TRAIN._replace(chunks=no_steps), steps=12), whole)


def test_saves_as_often_as_asked_and_keeps_two(tmp_path):
    with pytest.raises(Stopped):
        resumed(tmp_path, TRAIN, every=4, stop_at=9)
    assert contents(tmp_path / STAGE) == ["6"]
    resumed(tmp_path, TRAIN, every=4, steps=24)
    assert contents(tmp_path / STAGE) == ["18", "24"]
    assert json.loads((tmp_path / "config.json").read_text())["run"]["seed"] == 3


def test_the_state_is_asked_for_only_when_a_checkpoint_is_due(tmp_path):
    """On an accelerator it is a copy to the host."""
    asked = []

    def watched(state, left):
        for chunk in TRAIN.chunks(state, left):
            yield chunk._replace(get_state=lambda: asked.append(chunk.done) or chunk.get_state())  # noqa: B023

    resumed(tmp_path, TRAIN._replace(chunks=watched), every=6, steps=15)
    assert asked == [6, 12, 15], "the last one is the result"


SEARCH_STOPS = np.array([2, 2, 6, 4, 8, 2, 30, 12, 2, 2, 4], np.float32)


class Search(NamedTuple):
    step: Any
    stop: Any
    sum: Any


def search(run: Run):
    """Pixel triggers for cells that converge after as many steps as their level says."""

    def init(key):
        return Search(jnp.int32(0), jnp.float32(1e6), jax.random.uniform(key, (3,)))

    def step(key, state, batch, cell, victim):
        total = state.sum + jax.random.uniform(key, (3,)) + batch.images.mean()
        return Search(state.step + 1, cell.level, total), total

    method = PIXEL._replace(init=init, step=step, converged=lambda state: state.step >= state.stop)
    none = np.full(len(SEARCH_STOPS), -1, np.int32)
    cells = sweep.Cell(none + 1, none, SEARCH_STOPS)
    settings = dict(num_steps=40, slots=4, chunk=2, course=True)
    return sweep.search(run, "search", jax.random.key(3), method, DRAW, DATA, cells, (), **settings)


def test_a_search_that_is_stopped_again_and_again_ends_bit_for_bit(tmp_path):
    """With the courses of cells that are done, in a slot, and waiting."""
    whole, widths, rng = search(Run()), set(), random.Random(0)
    for _ in range(60):
        left = [rng.choice((1, 2))]

        def note(name, chunk, first, left=left):
            widths.add(int(chunk.get_state().width))
            left[0] -= 1

        stop = lambda left=left: 15 if left[0] <= 0 else None
        run = Run(checkpoints=Checkpoints(tmp_path, CONFIG), observers=(note,), stop_requested=stop)
        try:
            found = search(run)
            break
        except run_module.Stopped as stopped:
            assert stopped.stopped_by == 15 and "saved in" in str(stopped)
    # the widths between depend on the size of the groups of cells, which depends on the processors
    assert run.resumed["stage"] == "search" and {4, 1} < widths
    assert_same_bits(list(found[:5]), list(whole[:5]))
    jax.tree.map(np.testing.assert_array_equal, found.course, whole.course)
    assert found.slots == whole.slots == 4 and (whole.steps == SEARCH_STOPS).all()


def test_started_and_discarded_whatever_run_it_is(saved, tmp_path):
    run, other = tmp_path / "run[1]", tmp_path / "other"
    assert not checkpoint.is_started(run)
    shutil.copytree(saved[0], run)
    shutil.copytree(saved[0], tmp_path / ".run[1].7.discarded")  # left by one that was killed
    other.mkdir()
    (other / "thesis.txt").touch()
    assert checkpoint.is_started(run)
    for _ in range(2):
        checkpoint.discard(run)
        assert contents(tmp_path) == ["other"] and not checkpoint.is_started(run)
    for refuse in (checkpoint.discard, checkpoint.is_started):
        with pytest.raises(UserError, match="is not a checkpoint folder"):
            refuse(other)
    assert contents(other) == ["thesis.txt"]
    (tmp_path / "fresh").mkdir()
    files.write_json(tmp_path / "fresh" / "config.json", {"schema": checkpoint.SCHEMA, "run": {}})
    assert not checkpoint.is_started(tmp_path / "fresh")


def test_nothing_is_printed(tmp_path, capfd):
    for _ in range(2):
        resumed(tmp_path, TRAIN)
    assert capfd.readouterr() == ("", "")


class Odd(NamedTuple):
    """Every kind of leaf a state may hold."""

    step: Any
    key: Any
    half: Any
    flags: Any
    empty: Any
    nothing: Any
    spread: Any


class OddInfo(NamedTuple):
    value: Any


def write(folder, state, infos, step, stage=STAGE):
    checkpoint.Writer(folder, CONFIG, state, stage=stage).write(
        checkpoint.Saved(state, infos, step)
    )


def test_every_kind_of_leaf_comes_back_as_it_was(tmp_path):
    spread = NamedSharding(jax.make_mesh((4,), ("cell",)), PartitionSpec("cell"))
    state = Odd(
        jnp.int32(2),
        jax.random.split(jax.random.key(1), 3),
        jnp.asarray([1.1, jnp.nan, -0.0], jnp.bfloat16),
        {"a": jnp.array([True, False])},
        jnp.zeros((0, 3), jnp.int8),
        (None, {}, ()),
        jax.device_put(jnp.arange(8.0), spread),
    )
    info = OddInfo(np.float32([1, 2]))
    write(tmp_path, state, info, 2)
    for like in (state, jax.eval_shape(lambda: state)):
        found = restored(tmp_path, like, OddInfo)
        assert found.step == 2
        assert_same_bits(found.infos, info)
        assert_same_bits(found.state._replace(key=0), state._replace(key=0))
        assert found.state.key.dtype == state.key.dtype
        assert (jax.random.key_data(found.state.key) == jax.random.key_data(state.key)).all()
    assert restored(tmp_path, state, OddInfo).state.spread.sharding == spread


def test_absent_and_empty_folders_have_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (
        tmp_path / "empty" / ".config.json.12.writing"
    ).touch()  # a run killed while it wrote its config
    for name in ("absent", "empty"):
        assert restored(tmp_path / name) is None
    assert not (tmp_path / "absent").exists()
    assert_same_bits(resumed(tmp_path / "empty", TRAIN), uninterrupted(TRAIN, 14))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 3 and 6 of 14, and what is in them."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    with pytest.raises(Stopped):
        resumed(folder, TRAIN, stop_at=6)
    return folder, restored(folder)


def damaged(saved, tmp_path, damage):
    """What `restore` finds, and its warnings, after `damage(a copy of the newest checkpoint)`."""
    folder, warnings = tmp_path / "run", []
    shutil.copytree(saved[0], folder, dirs_exist_ok=True)
    damage(folder / STAGE / "6")
    found = restored(folder, warn=warnings.append)
    shutil.rmtree(folder)
    return found, warnings


def test_damage_is_refused_by_name(saved, tmp_path):
    """Every file cut short, removed, or with one bit flipped."""
    rng, folder = random.Random(0), saved[0] / STAGE / "6"
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())

    def flip(path):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    damages = [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        pathlib.Path.unlink,
        flip,
        flip,
    ]
    assert len(names) > 5
    for name in names:
        for damage in damages:
            found, warnings = damaged(
                saved, tmp_path, lambda step, name=name, damage=damage: damage(step / name)
            )
            assert found.step == 3 and len(warnings) == 1
            if name.name != step_folder.DESCRIPTION:
                assert f"arrays/{name.relative_to('arrays')} is not as it was" in warnings[0]
            assert str(tmp_path / "run" / STAGE / "6") in warnings[0] and "\n" not in warnings[0]


def describe(folder: pathlib.Path, **changes) -> None:
    """Writes the description of a checkpoint anew, as its writer would for what lies there now."""
    old = json.loads((folder / step_folder.DESCRIPTION).read_text())
    old.pop("sha256")
    body = {**old, "files": step_folder._hash_files(folder / "arrays"), **changes}
    described = {**body, "sha256": step_folder.digest(body)}
    files.write_json(folder / step_folder.DESCRIPTION, described)


def test_whole_files_that_orbax_cannot_read_are_refused(saved, tmp_path):
    def alter(step):
        (step / "arrays" / "_METADATA").write_text("{}")
        describe(step)

    found, warnings = damaged(saved, tmp_path, alter)
    assert found.step == 3 and len(warnings) == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, '{"files": {}}', '{"step": 6, "files": []}', "\x00"],
    ids=range(7),
)
def test_descriptions_that_are_none(saved, tmp_path, text):
    found, warnings = damaged(
        saved, tmp_path, lambda step: (step / step_folder.DESCRIPTION).write_text(text)
    )
    assert found.step == 3 and len(warnings) == 1


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the folder with steps 3 and 6, and its stage."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run", tmp_path / "run" / STAGE


def test_swapped_checkpoints_are_refused(copy):
    folder, stage = copy
    (stage / "3").rename(stage / "aside")
    (stage / "6").rename(stage / "3")
    (stage / "aside").rename(stage / "6")
    warnings = []
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(steps \[3, 6\]\)"):
        resumed(folder, TRAIN, warn=warnings.append)
    assert "saved as step 3, not 6" in warnings[0] and "saved as step 6, not 3" in warnings[1]


@pytest.mark.parametrize("wrong", ["copied", "renamed", "of another stage", "of another run"])
def test_a_checkpoint_that_is_another_one_is_passed_over(wrong, copy):
    """And the run ends as if it had never been there."""
    folder, stage = copy
    if wrong in ("copied", "renamed"):
        shutil.rmtree(stage / "6")
        shutil.copytree(stage / "3", stage / ("6" if wrong == "copied" else "7"))
    elif wrong == "of another stage":
        describe(stage / "6", stage="2-other")
    else:
        describe(stage / "6", run_sha256=step_folder.digest({**CONFIG, "seed": 4}))
    warnings = []
    found = resumed(folder, TRAIN, warn=warnings.append)
    assert len(warnings) == 1 and "was not used: it was saved" in warnings[0]
    assert_same_bits(found, uninterrupted(TRAIN, 14))


def test_infos_that_are_not_those_of_every_step_are_refused(tmp_path):
    state, short = TRAIN.start(), TRAIN.info(*[np.zeros(4, np.float32)] * 2)
    write(tmp_path, state, short, 4)
    assert restored(tmp_path).step == 4
    write_again = checkpoint.Writer(
        tmp_path, CONFIG, state, restored=restored(tmp_path), stage=STAGE
    )
    write_again.write(checkpoint.Saved(state, short, 5))
    warnings = []
    assert restored(tmp_path, warn=warnings.append).step == 4
    assert "its infos are not those of 5 steps" in warnings[0]


def test_resumes_past_damage_and_overwrites_it(saved, tmp_path):
    folder, warnings = tmp_path / "run", []
    shutil.copytree(saved[0], folder)
    for file in (folder / STAGE / "6").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    with pytest.raises(Stopped):
        resumed(folder, TRAIN, stop_at=3, warn=warnings.append)
    assert len(warnings) == 1
    assert_same_bits(restored(folder), saved[1])
    assert_same_bits(resumed(folder, TRAIN), uninterrupted(TRAIN, 14))


def test_all_damaged_is_an_error(saved, tmp_path):
    folder, warnings = tmp_path / "run", []
    shutil.copytree(saved[0], folder)
    for step in ("3", "6"):
        (folder / STAGE / step / step_folder.DESCRIPTION).unlink()
    with pytest.raises(UserError, match=r"every checkpoint is damaged .*delete the folder"):
        resumed(folder, TRAIN, warn=warnings.append)
    assert len(warnings) == 2


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 4}, r"config\.seed is 3 there and 4 here"),
        (
            {"config": {**CONFIG["config"], "momentum": 0.5}},
            r"config\.config\.momentum is 0.9 there and 0.5 here",
        ),
        ({"sha256": "ab"}, r'config\.sha256 is null there and "ab" here'),
        ({"versions": {**CONFIG["versions"], "jax": "0.1"}}, r"config\.versions\.jax is"),
    ],
)
def test_another_runs_folder_is_refused(saved, change, named):
    with pytest.raises(
        UserError, match=f"belongs to another run: {named}[^;]*; choose another folder"
    ):
        resumed(saved[0], TRAIN, config={**CONFIG, **change})
    assert contents(saved[0] / STAGE) == ["3", "6"]


def test_another_states_folder_is_refused(saved):
    wide = build.net(
        build.Spec(arch="cnn", classes=4, image_shape=toys.SHAPE, options={"width": 8, "stages": 1})
    )
    state = jax.eval_shape(lambda key: TRAINER.init(wide.init(key)), jax.random.key(0))
    with pytest.raises(
        UserError,
        match=r"kernel is float32 of \(3, 3, 1, 4\) there and float32 of \(3, 3, 1, 8\) her",
    ):
        restored(saved[0], state)
    fewer = TRAIN.start()._replace(opt=())
    with pytest.raises(UserError, match=r"state/opt/.* there and absent here"):
        restored(saved[0], fewer)
    with pytest.raises(UserError, match="its infos are accuracy, loss"):
        restored(saved[0], info=pixel.Info)
    with pytest.raises(UserError, match="at step 6, past the 5 asked for"):
        resumed(saved[0], TRAIN, steps=5)
    with pytest.raises(UserError, match="has checkpoints of this run; resume"):
        checkpoint.Writer(saved[0], CONFIG, TRAIN.start(), stage=STAGE)


@pytest.mark.parametrize(
    "name, text", [("notes.txt", "mine"), ("config.json", '{"arch": "cnn"}'), ("config.json", "[]")]
)
def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="is not a checkpoint folder; choose an empty or a new one"):
        resumed(tmp_path, TRAIN)
    assert contents(tmp_path) == [name] and (tmp_path / name).read_text() == text


def test_unusable_places_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=r"^[^\n]*; choose another folder$"):
            resumed(tmp_path / place, TRAIN)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"schema')
    with pytest.raises(UserError, match="the file is not valid JSON"):
        resumed(tmp_path / "cut", TRAIN)
    with pytest.raises(UserError, match="must be at least 1 step apart, got 0"):
        resumed(tmp_path / "new", TRAIN, every=0)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="the file is not valid JSON"):
        resumed(tmp_path / "deep", TRAIN)
    with pytest.raises(UserError, match="the file is not valid JSON"):
        checkpoint.is_started(tmp_path / "deep")


def test_no_space_is_one_line_and_changes_nothing(saved, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        with pytest.raises(
            UserError,
            match=f"^cannot save a checkpoint in {folder / STAGE}: No space left on device; choose",
        ):
            resumed(folder, TRAIN)
    assert capfd.readouterr() == ("", "") and contents(folder / STAGE) == ["3", "6"]
    assert_same_bits(resumed(folder, TRAIN), uninterrupted(TRAIN, 14))


def test_a_failed_write_is_one_line_and_leaves_nothing_half_written(saved, tmp_path):
    """In a child process whose files may not grow beyond 600 bytes."""
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    run = in_child(f"resumed_in_little_space({str(folder)!r})", tmp_path / "cache")
    assert run.returncode == 1
    assert (
        f"UserError: cannot save a checkpoint in {folder / STAGE}: File too large; choose a"
        in run.stderr
    )
    assert contents(folder / STAGE) == ["3", "6"]
    assert_same_bits(restored(folder), saved[1])


def resumed_in_little_space(folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    resumed(folder, TRAIN)


def test_a_disk_that_is_full_half_way_leaves_the_older_checkpoints(copy, monkeypatch):
    """After the arrays, when their description is written; and when they are forced to disk."""
    folder, stage = copy

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("write_text", "sync_tree", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(files, name, full)
            with pytest.raises(UserError, match=r"^cannot save a checkpoint in .*No space left"):
                resumed(folder, TRAIN)
        assert set(contents(stage)) <= {"3", "6", "9"} and {"3", "6"} <= {*contents(stage)}
    assert_same_bits(resumed(folder, TRAIN), uninterrupted(TRAIN, 14))


def test_files_are_on_disk_before_they_get_their_names(copy, monkeypatch):
    folder, stage = copy
    synced, renames, fsync, rename = [], [], os.fsync, pathlib.Path.rename

    def watched(opened):
        synced.append(os.readlink(f"/proc/self/fd/{opened}"))
        fsync(opened)

    def renamed(path, target):
        renames.append((path, len(synced), {str(each) for each in (path, *path.rglob("*"))}))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(pathlib.Path, "rename", renamed)
    with pytest.raises(Stopped):
        resumed(folder, TRAIN, stop_at=3)
    ((temporary, before, needed),) = renames
    assert temporary == stage / "9.tmp" and len(needed) > 5 and needed <= set(synced[:before])
    assert str(stage) in synced[before:], "and then the new name"


def test_a_state_unlike_the_runs_is_a_mistake(tmp_path):
    writer = checkpoint.Writer(tmp_path, CONFIG, TRAIN.start())
    with pytest.raises(ValueError, match="not the run's whole state"):
        writer.write(checkpoint.Saved(TRAIN.start()._replace(opt=()), None, 1))


# Kills. A child process runs these functions; it dies where it should, and the next one goes on.

STEPS = 120


def child(folder: str, moment: str, number: float) -> None:
    """Trains to the end or dies by SIGKILL: "rename" of step `number`; "file" event `number`;
    "time": seconds after the first chunk."""
    if moment == "file":
        kills.die_at_file(folder, number)
    if moment == "rename":
        kills.die_at_rename(folder, str(int(number)))

    def watched(state, left):
        for chunk in TRAIN.chunks(state, left):
            if moment == "time" and chunk.done == 3:
                threading.Timer(number, kills.die).start()
            yield chunk

    resumed(folder, TRAIN._replace(chunks=watched), steps=STEPS)


def compare(folder: str) -> None:
    """Finishes the run, compares it with an uninterrupted one; prints the step it resumed from and
    what code ran."""
    watched, seen = [], []
    codes = (
        "pickle.find_class",
        "exec",
        "compile",
        "marshal.loads",
        "os.system",
        "subprocess.Popen",
        "os.exec",
    )
    sys.addaudithook(lambda event, args: seen.append(event) if watched and event in codes else None)
    restored(folder)  # imports what it needs
    like = TRAIN.start()
    watched.append(True)
    found = restored(folder, like)
    watched.clear()
    assert_same_bits(resumed(folder, TRAIN, steps=STEPS), uninterrupted(TRAIN, STEPS))
    print(json.dumps([found.step, seen]))


HERE = pathlib.Path(__file__).parent
PATHS = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))


def in_child(call: str, cache: pathlib.Path) -> subprocess.CompletedProcess:
    cached = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [sys.executable, "-c", f"import test_checkpoint; test_checkpoint.{call}"],
        cwd=HERE,
        env={**os.environ, **cached, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=300,
    )


def killed_then_compared(folder: pathlib.Path, moments) -> int:
    """The step the last child resumed from, after all kills and a comparison bit for bit."""
    for moment, number in moments:
        run = in_child(f"child({str(folder)!r}, {moment!r}, {number})", folder.parent / "cache")
        assert run.returncode == -signal.SIGKILL, run.stderr
    run = in_child(f"compare({str(folder)!r})", folder.parent / "cache")
    assert run.returncode == 0, run.stderr
    step, code_ran = json.loads(run.stdout)
    assert code_ran == []
    assert contents(folder / STAGE) == ["117", "120"]
    return step


def test_killed_at_the_rename(tmp_path):
    assert killed_then_compared(tmp_path / "run", [("rename", 12)]) == 9


@pytest.mark.slow
def test_ten_kills(tmp_path):
    rng = random.Random(2)
    moments = [("file", rng.randrange(3, 150)) for _ in range(5)] + [
        ("time", rng.uniform(0, 0.2)) for _ in range(5)
    ]
    rng.shuffle(moments)
    assert killed_then_compared(tmp_path / "run", moments) > 0
