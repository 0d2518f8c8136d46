"""`scripts/accelerator`: the queue runs, keeps what it measures, ends in time, and takes back only
what belongs there."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import matrix, units  # noqa: E402
from experiments.accelerator import __main__ as command  # noqa: E402
from experiments.accelerator import (  # noqa: E402
    compiling,
    memory,
    merge,
    pack,
    papers,
    queue,
    records,
    run,
    suite,
    tables,
)
from experiments.accelerator.queue import Item  # noqa: E402
from jaxbd import files  # noqa: E402
from jaxbd.base import UserError  # noqa: E402

WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"value\": 1}')"
GPU = run.Machine("gpu", "a GPU x1")


def item(name, code, *words, seconds=60, **others):
    """Runs Python code that needs no JAX."""
    return Item(name, ("-c", code, *words), ("-c", code, *words), seconds, **others)


def place(folder, toy=False):
    return run.Place(folder / "out", folder / "work", folder / "shared", toy=toy)


def written(folder):
    return records.read_lines(folder / "out" / records.NAME)


def test_two_items(tmp_path):
    """A record each, as soon as it is there; the one that fails stops nothing."""
    fails = item("fails", "import sys; print('why it failed'); sys.exit(3)")
    said = []
    works = item("works", WRITES, "{out}")
    found = run.run([fails, works], place(tmp_path), GPU, 200, said.append)
    assert written(tmp_path) == found == [json.loads(json.dumps(each)) for each in found]
    failed, done = found
    assert (failed["status"], failed["content"]) == ("failed", None)
    assert failed["tail"] == ["why it failed"]
    assert (done["status"], done["content"], done["tail"]) == ("done", {"value": 1}, None)
    assert done["code"] == records.code_hash() and done["device"] == "a GPU x1"
    assert any("works: done" in line for line in said)


def test_an_item_has_a_time_of_its_own(tmp_path):
    slow = item("slow", "import time; time.sleep(600)", seconds=1)
    found = run.run(
        [slow, item("next", WRITES, "{out}")], place(tmp_path), GPU, 300, lambda _: None
    )
    assert [each["status"] for each in found] == ["out of time", "done"]
    assert found[0]["seconds"] < 300


@pytest.mark.parametrize("manners", ["polite", "deaf"])
def test_what_runs_too_long_is_asked_and_then_killed(manners, tmp_path, monkeypatch):
    """It may save; what it started ends with it."""
    monkeypatch.setattr(run, "GRACE", 60.0 if manners == "polite" else 0.5)
    save = "pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(1)"
    code = f"""
import pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def save(*_): {save if manners == "polite" else "pass"}
signal.signal(signal.SIGTERM, save)
print(child.pid, flush=True)
while True: time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "saved")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    run.end(process)
    assert process.returncode == (1 if manners == "polite" else -signal.SIGKILL)
    assert (tmp_path / "saved").exists() == (manners == "polite")
    process.stdout.read()  # ends when no process holds the other end any more
    process.stdout.close()
    assert not Path(f"/proc/{child}/exe").exists()


def test_nothing_begins_when_the_time_is_over(tmp_path):
    said = []
    assert run.run([item("a", WRITES, "{out}")], place(tmp_path), GPU, 5, said.append) == []
    assert said == ["time is over; 1 items were not begun"]


def test_no_item_may_take_more_than_what_is_left(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "spawn", lambda words, env, log, seconds: asked.append(seconds) or log.touch() or "done")  # fmt: skip  # noqa: E501
    run.run([item("a", "", seconds=10_000)], place(tmp_path), GPU, 120, lambda _: None)
    assert 0 < asked[0] <= 120 - run.GRACE


def test_what_is_missing_is_said(tmp_path):
    (found,) = run.run(
        [item("a", WRITES, "{out}", needs=("models",))], place(tmp_path), GPU, 200, lambda _: None
    )
    assert (found["status"], found["tail"]) == ("left out", ["not there: models"])


def test_parts_come_back_and_go_on(tmp_path):
    """What an item stores in its folder is packed, and there again in the next run."""
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]) / 'n'; p.write_text((p.read_text() if p.exists() else '') + 'x')"  # fmt: skip  # noqa: E501
    one = item("long", code, "{part}", resumes=True)
    run.run([one], place(tmp_path / "first"), GPU, 200, lambda _: None)
    archives = tmp_path / "first" / "out"
    assert sorted(os.listdir(archives)) == ["long.tar.gz", records.NAME]
    assert run.unpack_parts(archives, tmp_path / "second" / "work") == ["long.tar.gz"]
    run.run([one], place(tmp_path / "second"), GPU, 200, lambda _: None)
    assert (tmp_path / "second" / "work" / "parts" / "long" / "n").read_text() == "xx"


def test_too_large_a_part_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MOST_BYTES", 100)
    code = "import os, pathlib, sys; (pathlib.Path(sys.argv[1]) / 'n').write_bytes(os.urandom(500))"
    run.run([item("a", code, "{part}", resumes=True)], place(tmp_path), GPU, 200, lambda _: None)
    assert os.listdir(tmp_path / "out") == [records.NAME]


def test_an_archive_writes_nowhere_else(tmp_path):
    evil = tmp_path / "in" / "evil.tar.gz"
    evil.parent.mkdir()
    with tarfile.open(evil, "w:gz") as packed:
        packed.add(__file__, "../../escaped")
    with pytest.raises(tarfile.OutsideDestinationError):
        run.unpack_parts(evil.parent, tmp_path / "work")
    assert not list(tmp_path.rglob("escaped"))


def record(name="device", **changes):
    known = {"schema": records.SCHEMA, "name": name, "status": "done", "words": [], "seconds": 1.0}
    known |= {"code": "c0de", "backend": "gpu", "device": "a GPU x1", "toy": False, "tail": None}
    return {**known, "versions": {"jax": "0.11.2"}, "content": {"value": 1}, **changes}


def came_back(folder, *every):
    folder.mkdir(exist_ok=True)
    (folder / records.NAME).write_text("".join(json.dumps(each) + "\n" for each in every))
    return folder


def take(folder, results, **others):
    return merge.merge(folder, results, queue.queue(), "c0de", **others)


def test_merge_and_skip(tmp_path, monkeypatch):
    """Records become results; the next run leaves out what is done, and repeats what failed."""
    results = tmp_path / "results"
    folder = came_back(tmp_path / "out", record(), record("tests", status="failed", tail="why"))
    assert take(folder, results) == ["device", "tests"]
    monkeypatch.setattr(command.records, "RESULTS", results)
    found = records.committed(results)
    assert {name: each["status"] for name, each in found.items()} == {
        "device": "done",
        "tests": "failed",
    }
    monkeypatch.setattr(records, "committed", lambda: found)
    names = lambda *flags: [one.name for one in command._chosen(command.parse([*flags]))]
    ran = names("--run")
    assert "device" not in ran and ran[0] == "tests"
    assert names("--dry")[0] == "device" and names("--run", "--only", "device") == ["device"]
    with pytest.raises(UserError, match="nonsense"):
        names("--run", "--only", "nonsense")


def test_a_failure_replaces_no_success(tmp_path):
    results = tmp_path / "results"
    take(came_back(tmp_path / "out", record()), results)
    again = came_back(tmp_path / "out", record(status="failed", content=None))
    assert take(again, results) == []
    assert records.committed(results)["device"]["status"] == "done"
    again = came_back(tmp_path / "out", record(content={"value": 2}), record(status="failed"))
    assert take(again, results) == ["device"]
    assert records.committed(results)["device"]["content"] == {"value": 2}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"code": "other"}, "made by code other"),
        ({"backend": "cpu"}, "cpu at full size"),
        ({"toy": True}, "at toy size"),
        ({"name": "nobody"}, "no item of the queue"),
        ({"status": "great"}, "status 'great'"),
        ({"seconds": "1"}, "damaged: seconds"),
        ({"schema": "else"}, "schema"),
    ],
)
def test_refused(changes, message, tmp_path):
    """And then nothing of the folder is written."""
    folder = came_back(tmp_path / "out", record("tests"), record(**changes))
    with pytest.raises(UserError, match=message):
        take(folder, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_cpu_s_records_are_taken_when_asked_for(tmp_path):
    folder = came_back(tmp_path / "out", record(backend="cpu", toy=True))
    assert take(folder, tmp_path / "results", allow_cpu=True) == ["device"]
    with pytest.raises(UserError, match="has no records"):
        take(tmp_path / "nothing", tmp_path / "results")


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    folder = came_back(tmp_path / "out", record(), record("tests"))
    path = folder / records.NAME
    path.write_text(path.read_text()[:-20])
    assert [each["name"] for each in records.read_lines(path)] == ["device"]
    path.write_text("{\n" + path.read_text())
    with pytest.raises(UserError, match="line 1"):
        records.read_lines(path)


def test_the_hash_is_of_names_and_contents(tmp_path):
    (tmp_path / "jaxbd").mkdir()
    hashes = set()
    for name, text in (("a", "1"), ("a", "2"), ("b", "2")):
        for path in tmp_path.glob("jaxbd/*"):
            path.unlink()
        (tmp_path / "jaxbd" / f"{name}.py").write_text(text)
        (tmp_path / "jaxbd" / "notes.md").write_text(name)
        hashes.add(records.code_hash(tmp_path))
    assert len(hashes) == 3 and records.code_hash(tmp_path) in hashes


def test_a_pack_has_room_for_what_matters(tmp_path):
    """Pieces in order; one that does not fit is named with its size, and later ones may still
    fit."""
    put = lambda size: lambda path: path.write_bytes(bytes(size))
    every = [pack.Piece("a/one", put(60)), pack.Piece("two", put(50)), pack.Piece("three", put(40))]
    found = pack.fill(tmp_path, iter(every), 100)
    assert found["in"] == {"a/one": 60, "three": 40}
    assert found["left out"] == {"two": "50 bytes are more than what is left of 100"}
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["one", "three"]


def test_a_pack_s_images_are_the_same_in_fewer_bytes(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    header = bytes(range(256)) * 3
    images = [{"bytes": header + os.urandom(50), "path": None} for _ in range(300)]
    table = arrow.table({"image": images, "label": list(range(300))})
    table = table.replace_schema_metadata({"huggingface": "names"})
    source = tmp_path / "shared" / pack.TABLES[1]
    source.parent.mkdir(parents=True)
    parquet.write_table(table, source, compression="none")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("tyro-1-py3-none-any.whl", "toml-1-py2.py3-none-any.whl"):
        (wheels / name).write_bytes(b"x")
    every = list(pack.pieces(tmp_path / "shared", tmp_path / "parts", wheels))
    assert [piece.name for piece in every] == [
        "wheels/tyro-1-py3-none-any.whl",
        f"shared/{pack.TABLES[1]}",
        "wheels/toml-1-py2.py3-none-any.whl",
    ]
    found = pack.fill(tmp_path / "made", iter(every), 1 << 20)
    copy = tmp_path / "made" / "shared" / pack.TABLES[1]
    assert parquet.read_table(copy).equals(table, check_metadata=True)
    assert copy.stat().st_size < source.stat().st_size / 3
    assert copy.stat().st_size == found["in"][f"shared/{pack.TABLES[1]}"]


def test_wheels_that_are_not_there_are_installed(tmp_path, monkeypatch):
    """Those alone, and from the folder."""
    (tmp_path / "wheels").mkdir()
    for name in ("pytest-1-py3-none-any.whl", "not_there_at_all-1-py3-none-any.whl"):
        (tmp_path / "wheels" / name).touch()
    called = []
    monkeypatch.setattr(pack.subprocess, "run", lambda words, **_: called.append(words))
    names = pack.install(tmp_path, tmp_path / "site")
    assert names == ["not_there_at_all-1-py3-none-any.whl"]
    assert "--no-index" in called[0] and not any(
        word.endswith("pytest-1-py3-none-any.whl") for word in called[0]
    )


def test_versions_of_wheels_are_the_pinned_ones():
    pinned = pack.constraints()
    assert {"docstring-parser", "typeguard", "tensorflow-datasets"} <= pinned.keys()
    assert set(pack.WHEELS) - pinned.keys() == set()


def test_every_item_can_be_told_apart_and_runs_dry():
    """Names are unique, every dry form names the same program, and nothing is left to fill in."""
    items = queue.queue()
    assert len({one.name for one in items}) == len(items) > 20
    places = dict.fromkeys(("out", "part", "runs", "shared", "data", "models"), "X")
    for one in items:
        first = 2 if one.words[0] == "-m" else 1
        assert one.dry[:first] == one.words[:first]
        assert one.dry != one.words and "{out}" in one.words
        assert not any("{" in word for word in queue.fill([*one.words, *one.dry], places))
        if first == 1:
            assert (ROOT / one.words[0]).is_file()
    assert [one.name for one in items if one.resumes] == ["paper-dhbe-released"]
    assert next(iter(papers.UNITS)) == "base"


def test_counts_of_pytest_s_last_line():
    text = "FAILED tests/a.py::b - no\n1 failed, 2 passed in 0.10s\n"
    text += "== 3 passed, 1 error in 61.20s (0:01:01) =="
    assert suite.counts(text) == {"passed": 3, "error": 1}
    assert suite.broken(text) == ["tests/a.py::b - no"] and suite.counts("nothing") == {}


def test_the_suite_of_two_tests(tmp_path):
    path = tmp_path / "test_two.py"
    path.write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    code, text = suite.run([str(path)], "-c", os.devnull, "--rootdir", str(tmp_path))
    assert code == 1 and suite.counts(text) == {"failed": 1, "passed": 1}
    assert "test_two.py::test_b" in suite.broken(text)[0]


def test_a_row_of_the_matrix(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix.units, "ROOT", tmp_path)
    new = matrix.row("3.12", ["tests/a"], 1, "FAILED x - y\n1 failed, 5 passed, 2 skipped in 3.0s")
    figures = (new["passed"], new["failed"], new["skipped"], new["releases"], new["broken"])
    assert figures == (5, 1, 2, "newest", ["x - y"])
    old = [{"python": "3.13"}, {"python": "3.12", "passed": 0}, {"python": "3.9"}]
    assert matrix.merged(old, [new]) == [old[2], new, old[0]]


def test_compile_seconds_are_told_apart():
    """A second compilation of the same program is traced and lowered, and adds to what was."""
    import jax

    listener = compiling.Listener()
    before = listener.read()
    jax.jit(lambda x: x * 3 + 1)(2.0)
    after = listener.read()
    assert before == compiling.Parts(0, 0, 0, 0, 0, 0)
    assert after.trace > 0 and after.lower > 0 and after.backend > 0


def test_what_memory_runs_must_show():
    """Fewer slots with the same losses, a refusal in one line, and halving where there is a GPU."""
    whole = {"slots": 4, "losses": [1.0, 2.0]}
    half, refused = {"slots": 2, "losses": [1.0, 2.0]}, {"error": "one cell needs 9 bytes"}
    sound = {"all at once": whole, "some of the memory": half, "a byte": refused}
    sound["out of memory"] = "left out on a CPU"
    assert memory.is_sound(sound)
    assert memory.is_sound({**sound, "out of memory": {"notices": ["halved"]}})
    assert not memory.is_sound({**sound, "out of memory": {"notices": []}})
    assert not memory.is_sound({**sound, "some of the memory": {**half, "losses": [1.0, 2.1]}})
    assert not memory.is_sound({**sound, "some of the memory": whole})
    assert not memory.is_sound({**sound, "a byte": whole})


def test_pages_say_when_there_is_nothing(monkeypatch):
    """And what there is, when there is; records of a CPU or of failures are nothing."""
    peaks = {"float32": {"operations_per_second": 5e13, "relative_error": 1e-7}}
    real = record(content={"peaks": peaks})
    for found in ({}, {"device": {**real, "backend": "cpu"}}, {"device": {**real, "toy": True}}):
        assert tables.filled("peaks", found) == tables.filled("words", found) == tables.NOTHING
    failed = {"device": {**real, "status": "failed"}}
    assert tables.filled("peaks", failed) == tables.NOTHING
    text = tables.filled("peaks", {"device": real})
    assert "| float32 | 50 | 1.0e-07 |" in text and "a GPU x1, jax 0.11.2" in text
    assert tables.filled("words", {"device": real}) == "measured on a GPU x1, jax 0.11.2"


def test_the_blocks_of_pages_are_filled(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    pages = units.script("readme_tables")
    monkeypatch.setattr(pages.tables, "filled", lambda name: f"({name})")
    text = "jaxbd <!-- accelerator: words -->old<!-- end -->.\n"
    text += "<!-- accelerator: scans -->\nold\n<!-- end -->\n"
    assert pages.filled(text) == text.replace("old\n", "(scans)\n").replace("old", "(words)")
    with pytest.raises(UserError, match="nonsense"):
        pages.filled("<!-- accelerator: nonsense --><!-- end -->")


def test_bad_flags_are_one_line(capsys, monkeypatch):
    assert command.main(["--run", "--minutes", "1"]) == 2
    assert "--run needs --minutes and --out" in capsys.readouterr().err
    monkeypatch.setattr(command.run, "probe", lambda place: run.Machine("cpu", "a CPU"))
    monkeypatch.setattr(command.pack, "install", lambda folder, site: [])
    assert command.main(["--run", "--minutes", "1", "--out", "nowhere"]) == 2
    assert "no accelerator" in capsys.readouterr().err and not Path("nowhere").exists()


@pytest.mark.slow
def test_the_whole_queue_dry(tmp_path):
    """Every item runs on a CPU at toy size, in the processes that a GPU will see."""
    words = [sys.executable, "-m", "experiments.accelerator", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    found = records.read_lines(tmp_path / records.NAME)
    assert [one["name"] for one in found] == [one.name for one in queue.queue()]
    for one in found:
        assert one["status"] in ("done", "left out"), f"{one['name']}: {one['tail']}"
        assert one["toy"] and one["backend"] == "cpu"
    assert done.returncode == 0
    assert files.plain(found) and sum(one["status"] == "done" for one in found) >= 15
    assert len(os.listdir(tmp_path)) <= run.MOST_FILES
