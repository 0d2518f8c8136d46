"""Checkpoints: a run that was stopped, killed or damaged goes on bit for bit; other runs' folders are refused."""

import dataclasses
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
import numpy as np
import pytest
import toys
from jax.sharding import NamedSharding, PartitionSpec

from jaxbd import checkpoint, loop, record, supervised, sweep
from jaxbd.base import UserError
from jaxbd.data import draw
from jaxbd.inversion import mesa
from jaxbd.models import build

NET = build.net(build.Spec(arch="cnn", classes=4, image_shape=toys.SHAPE, options={"width": 4, "stages": 1}))
TRAINING = supervised.Config(num_steps=15, optimiser="adam", learning_rate=0.01)
TRAINER = supervised.make(NET, TRAINING)
MESA = mesa.make(NET, toys.SHAPE, mesa.Config(hidden=8, noise_dim=4))
CELLS = sweep.grid(target=(0, 1), level=(0.8,))
DATA = jax.tree.map(jnp.asarray, toys.stripes(0, 64))
CONFIG = {"method": "training", "config": dataclasses.asdict(TRAINING), "seed": 3, "versions": record.versions()}
DRAW = draw.uniform(8)


class Stopped(Exception):
    """Stands for whatever ends a run early."""


class Runner(NamedTuple):
    """A resumable run: start () -> state; fit (state, steps, on_chunk) -> (state, infos, seconds); its Info."""

    start: Any
    fit: Any
    info: Any


def variables():
    return NET.init(jax.random.key(7))


TRAIN = Runner(
    lambda: TRAINER.init(variables()),
    lambda state, left, on_chunk: loop.fit(
        jax.random.key(3), TRAINER.step, DRAW, DATA, state, num_steps=left, chunk=3, on_chunk=on_chunk
    ),
    supervised.Info,
)
SCAN = TRAIN._replace(
    fit=lambda state, left, on_chunk: loop.fit(
        jax.random.key(3), TRAINER.step, DRAW, DATA, state,
        num_steps=left, chunk=3, on_chunk=on_chunk, over_time="scan",
    )
)  # fmt: skip
SWEEP = Runner(
    lambda: sweep.init(jax.random.key(3), MESA, CELLS),
    lambda state, left, on_chunk: sweep.fit(
        jax.random.key(3), MESA, DRAW, DATA, CELLS, variables(), states=state, num_steps=left, chunk=3,
        on_chunk=on_chunk,
    ),
    mesa.Info,
)  # fmt: skip
RUNS = {"loop, host": TRAIN, "loop, scan": SCAN, "sweep": SWEEP}


def resumed(folder, run: Runner, *, steps=14, every=3, stop_at=None, config=CONFIG, warn=None):
    """The run from where the folder stands; raises Stopped in the chunk that ends `stop_at` steps from there."""

    def fit(state, left, on_chunk):
        def watched(done, state, infos):
            on_chunk(done, state, infos)
            if done == stop_at:
                raise Stopped

        return run.fit(state, left, watched)

    extra = {} if warn is None else {"warn": warn}
    state, infos, _ = checkpoint.resume(
        folder, config, run.start(), fit, info=run.info, num_steps=steps, every=every, **extra
    )
    return state, infos


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())


def contents(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_is_uninterrupted(name, tmp_path):
    run, stops = RUNS[name], random.Random(name)
    whole = run.fit(run.start(), 14, None)[:2]
    for stop_at in (stops.choice((3, 6)), 3):
        with pytest.raises(Stopped):
            resumed(tmp_path / "run", run, stop_at=stop_at)
    assert_same_bits(resumed(tmp_path / "run", run), whole)
    assert contents(tmp_path / "run") == ["12", "9", "config.json"]
    assert len(jax.tree.leaves(whole[1])[0]) == 14


def test_finished_run_comes_back_without_a_step(tmp_path):
    whole = resumed(tmp_path, TRAIN, steps=12)
    assert_same_bits(resumed(tmp_path, TRAIN._replace(fit=no_steps), steps=12), whole)


def no_steps(state, left, on_chunk):
    assert left == 0
    return state, None, None


def test_saves_as_often_as_asked_and_keeps_two(tmp_path):
    with pytest.raises(Stopped):
        resumed(tmp_path, TRAIN, every=4, stop_at=9)
    assert contents(tmp_path) == ["6", "config.json"]
    resumed(tmp_path, TRAIN, every=4, steps=100)
    assert contents(tmp_path) == ["100", "96", "config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["run"]["seed"] == 3


def test_saves_also_where_it_is_asked_to(tmp_path):
    """The steps since the last save are counted from there; the question comes with the seconds since then."""
    asked, start = [], TRAIN.start()
    also = lambda seconds: asked.append(seconds) or len(asked) == 2
    on_chunk = checkpoint.make(tmp_path, CONFIG, 4, start, also=also)
    for done in range(1, 7):
        on_chunk(done, start, TRAIN.info(*(np.zeros(1, np.float32) for _ in TRAIN.info._fields)))
    assert contents(tmp_path) == ["2", "6", "config.json"]
    assert len(asked) == 5 and 0 <= asked[0] < asked[1] and asked[3] > asked[2] >= 0
    assert checkpoint.restore(tmp_path, CONFIG, start, TRAIN.info).step == 6


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
    record.write_json(tmp_path / "fresh" / "config.json", {"schema": checkpoint.SCHEMA, "run": {}})
    assert not checkpoint.is_started(tmp_path / "fresh")


def test_nothing_is_printed(tmp_path, capfd):
    resumed(tmp_path, TRAIN)
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
    checkpoint.make(tmp_path, CONFIG, 1, state)(2, state, info)
    for like in (state, jax.eval_shape(lambda: state)):
        found = checkpoint.restore(tmp_path, CONFIG, like, OddInfo)
        assert found.step == 2
        assert_same_bits(found.infos, info)
        assert_same_bits(found.state._replace(key=0), state._replace(key=0))
        assert found.state.key.dtype == state.key.dtype
        assert (jax.random.key_data(found.state.key) == jax.random.key_data(state.key)).all()
    assert checkpoint.restore(tmp_path, CONFIG, state, OddInfo).state.spread.sharding == spread


def test_absent_and_empty_folders_have_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".config.json.12.writing").touch()  # a run killed while it wrote its config
    for name in ("absent", "empty"):
        assert checkpoint.restore(tmp_path / name, CONFIG, TRAIN.start(), TRAIN.info) is None
    assert not (tmp_path / "absent").exists()
    assert_same_bits(resumed(tmp_path / "empty", TRAIN), TRAIN.fit(TRAIN.start(), 14, None)[:2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 3 and 6 of 14, and what is in them."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    with pytest.raises(Stopped):
        resumed(folder, TRAIN, stop_at=6)
    newest = checkpoint.restore(folder, CONFIG, TRAIN.start(), TRAIN.info)
    return folder, newest


def damaged(saved, tmp_path, damage):
    """What `restore` finds, and its warnings, after `damage(a copy of the newest checkpoint)`."""
    folder, warnings = tmp_path / "run", []
    shutil.copytree(saved[0], folder, dirs_exist_ok=True)
    damage(folder / "6")
    found = checkpoint.restore(folder, CONFIG, TRAIN.start(), TRAIN.info, warnings.append)
    shutil.rmtree(folder)
    return found, warnings


def test_damage_is_refused_by_name(saved, tmp_path):
    """Every file cut short, removed, or with one bit flipped."""
    rng = random.Random(0)
    files = sorted(path.relative_to(saved[0] / "6") for path in (saved[0] / "6").rglob("*") if path.is_file())

    def flip(path):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    damages = [lambda path: os.truncate(path, path.stat().st_size // 2), pathlib.Path.unlink, flip, flip]
    assert len(files) > 5
    for name in files:
        for damage in damages:
            found, warnings = damaged(saved, tmp_path, lambda step, name=name, damage=damage: damage(step / name))
            if name.name != "sha256.json":
                assert found.step == 3 and f"arrays/{name.relative_to('arrays')} is not as it was" in warnings[0]
            assert found.step == 3 and len(warnings) == 1
            assert str(tmp_path / "run" / "6") in warnings[0] and "\n" not in warnings[0]


def test_whole_files_that_orbax_cannot_read_are_refused(saved, tmp_path):
    def alter(step):
        (step / "arrays" / "_METADATA").write_text("{}")
        record.write_json(step / "sha256.json", checkpoint._hashes(step / "arrays"))

    found, warnings = damaged(saved, tmp_path, alter)
    assert found.step == 3 and len(warnings) == 1


def test_resumes_past_damage_and_overwrites_it(saved, tmp_path):
    folder, warnings = tmp_path / "run", []
    shutil.copytree(saved[0], folder)
    for file in (folder / "6").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    with pytest.raises(Stopped):
        resumed(folder, TRAIN, stop_at=3, warn=warnings.append)
    assert len(warnings) == 1
    assert_same_bits(checkpoint.restore(folder, CONFIG, TRAIN.start(), TRAIN.info), saved[1])
    assert_same_bits(resumed(folder, TRAIN), TRAIN.fit(TRAIN.start(), 14, None)[:2])


def test_all_damaged_is_an_error(saved, tmp_path):
    folder, warnings = tmp_path / "run", []
    shutil.copytree(saved[0], folder)
    for step in ("3", "6"):
        (folder / step / "sha256.json").unlink()
    with pytest.raises(UserError, match=r"every checkpoint is damaged .*delete the folder"):
        resumed(folder, TRAIN, warn=warnings.append)
    assert len(warnings) == 2


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 4}, r"config\.seed is 3 there and 4 here"),
        ({"config": {**CONFIG["config"], "momentum": 0.5}}, r"config\.config\.momentum is 0.9 there and 0.5 here"),
        ({"sha256": "ab"}, r'config\.sha256 is null there and "ab" here'),
        ({"versions": {**CONFIG["versions"], "jax": "0.1"}}, r"config\.versions\.jax is"),
    ],
)
def test_another_runs_folder_is_refused(saved, change, named):
    with pytest.raises(UserError, match=f"belongs to another run: {named}[^;]*; choose another folder"):
        resumed(saved[0], TRAIN, config={**CONFIG, **change})
    assert contents(saved[0]) == ["3", "6", "config.json"]


def test_another_states_folder_is_refused(saved):
    wide = build.net(build.Spec(arch="cnn", classes=4, image_shape=toys.SHAPE, options={"width": 8, "stages": 1}))
    state = jax.eval_shape(lambda key: TRAINER.init(wide.init(key)), jax.random.key(0))
    with pytest.raises(UserError, match=r"kernel is float32 of \(3, 3, 1, 4\) there and float32 of \(3, 3, 1, 8\) her"):
        checkpoint.restore(saved[0], CONFIG, state, TRAIN.info)
    fewer = TRAIN.start()._replace(opt=())
    with pytest.raises(UserError, match=r"state/opt/.* there and absent here"):
        checkpoint.restore(saved[0], CONFIG, fewer, TRAIN.info)
    with pytest.raises(UserError, match="its infos are accuracy, loss"):
        checkpoint.restore(saved[0], CONFIG, TRAIN.start(), mesa.Info)
    with pytest.raises(UserError, match="at step 6, past the 5 asked for"):
        resumed(saved[0], TRAIN, steps=5)
    with pytest.raises(UserError, match="has checkpoints of this run; resume"):
        checkpoint.make(saved[0], CONFIG, 3, TRAIN.start())


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
    with pytest.raises(UserError, match="cannot be read as JSON"):
        resumed(tmp_path / "cut", TRAIN)
    with pytest.raises(UserError, match="every is 0"):
        resumed(tmp_path / "new", TRAIN, every=0)


def test_no_space_is_one_line_and_changes_nothing(saved, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        with pytest.raises(
            UserError, match=f"^cannot save a checkpoint in {folder}: No space left on device; choose a "
        ):
            resumed(folder, TRAIN)
    assert capfd.readouterr() == ("", "") and contents(folder) == ["3", "6", "config.json"]
    assert_same_bits(resumed(folder, TRAIN), TRAIN.fit(TRAIN.start(), 14, None)[:2])


def test_a_failed_write_is_one_line_and_leaves_nothing_half_written(saved, tmp_path):
    """In a child process whose files may not grow beyond 600 bytes."""
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    run = in_child(f"resumed_in_little_space({str(folder)!r})", tmp_path / "cache")
    assert run.returncode == 1
    assert f"UserError: cannot save a checkpoint in {folder}: File too large; choose a writable folder" in run.stderr
    assert contents(folder) == ["3", "6", "config.json"]
    assert_same_bits(checkpoint.restore(folder, CONFIG, TRAIN.start(), TRAIN.info), saved[1])


def resumed_in_little_space(folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    resumed(folder, TRAIN)


def test_one_cell_at_a_time_is_refused(tmp_path):
    run = SWEEP._replace(
        fit=lambda state, left, on_chunk: sweep.fit(
            jax.random.key(3), MESA, DRAW, DATA, CELLS, variables(), states=state, num_steps=left, how="loop",
            on_chunk=on_chunk,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="not the run's whole state"):
        resumed(tmp_path, run)


# Kills. A child process runs these functions; it dies where it is told to, and the next one goes on.

STEPS, FILE_EVENTS = 120, ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir")


def child(folder: str, moment: str, number: float) -> None:
    """Trains to the end or dies by SIGKILL: "rename" of step `number`; "file" event `number`; "time": seconds after
    the first chunk."""
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    seen = [0]

    def hook(event, args):
        if event in FILE_EVENTS and any(folder in str(arg) for arg in args):
            seen[0] += 1
            if moment == "file" and seen[0] == number:
                die()
            if moment == "rename" and event == "os.rename" and pathlib.Path(str(args[1])).name == str(int(number)):
                die()

    if moment in ("file", "rename"):
        sys.addaudithook(hook)

    def fit(state, left, on_chunk):
        def watched(done, state, infos):
            if moment == "time" and done == 3:
                threading.Timer(number, die).start()
            on_chunk(done, state, infos)

        return TRAIN.fit(state, left, watched)

    resumed(folder, TRAIN._replace(fit=fit), steps=STEPS)


def compare(folder: str) -> None:
    """Finishes the run, compares it with an uninterrupted one; prints the step it resumed from and what code ran."""
    watched, seen = [], []
    codes = ("pickle.find_class", "exec", "compile", "marshal.loads", "os.system", "subprocess.Popen", "os.exec")
    sys.addaudithook(lambda event, args: seen.append(event) if watched and event in codes else None)
    checkpoint.restore(folder, CONFIG, TRAIN.start(), TRAIN.info)  # imports what it needs
    like = TRAIN.start()
    watched.append(True)
    found = checkpoint.restore(folder, CONFIG, like, TRAIN.info)
    watched.clear()
    assert_same_bits(resumed(folder, TRAIN, steps=STEPS), TRAIN.fit(TRAIN.start(), STEPS, None)[:2])
    print(json.dumps([found.step, seen]))


def in_child(call: str, cache: pathlib.Path) -> subprocess.CompletedProcess:
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.run(
        [sys.executable, "-c", f"import test_checkpoint; test_checkpoint.{call}"],
        cwd=pathlib.Path(__file__).parent, env={**os.environ, **cached}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def killed_then_compared(folder: pathlib.Path, kills) -> int:
    """The step the last child resumed from, after all kills and a comparison bit for bit."""
    for moment, number in kills:
        run = in_child(f"child({str(folder)!r}, {moment!r}, {number})", folder.parent / "cache")
        assert run.returncode == -signal.SIGKILL, run.stderr
    run = in_child(f"compare({str(folder)!r})", folder.parent / "cache")
    assert run.returncode == 0, run.stderr
    step, code_ran = json.loads(run.stdout)
    assert code_ran == []
    assert contents(folder) == ["117", "120", "config.json"]
    return step


def test_killed_at_the_rename_and_at_any_time(tmp_path):
    kills = [("rename", 12), ("time", random.Random(1).uniform(0, 0.3))]
    assert killed_then_compared(tmp_path / "run", kills) >= 9


@pytest.mark.slow
def test_ten_kills(tmp_path):
    rng = random.Random(2)
    kills = [("file", rng.randrange(3, 150)) for _ in range(5)] + [("time", rng.uniform(0, 0.2)) for _ in range(5)]
    rng.shuffle(kills)
    assert killed_then_compared(tmp_path / "run", kills) > 0
