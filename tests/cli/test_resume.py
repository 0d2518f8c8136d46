"""Scans, repairs and attacks that were stopped or killed anywhere go on bit for bit, stage by
stage."""

import hashlib
import itertools
import json
import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import kills
import numpy as np
import pytest

from jaxbd.cli import signals
from jaxbd.cli.commands import attack
from jaxbd.cli.main import main
from jaxbd.cli.progress import Progress
from jaxbd.data import digits
from jaxbd.training import checkpoint
from jaxbd.training import run as runs

HERE = pathlib.Path(__file__).parents[1]
IMAGES = ["--data", "digits", "--image-shape", "8", "8", "1"]
FEW = ["--data", "digits", "--limit", "200"]
OFTEN = ["--save-every", "15"]
MASKS = [
    "--method",
    "auto",
    "--locate-steps",
    "40",
    "--steps",
    "60",
    "--levels",
    "0.9",
    "--candidates",
    "1",
]
MASKS += ["--mesa.hidden", "8", "--batch-size", "16"]
PAIRS = [
    "--targets",
    "3",
    "4",
    "--steps",
    "60",
    "--perturbation-steps",
    "40",
    "--joint-steps",
    "40",
    "--slots",
    "4",
]
PAIRS += ["--threshold", "1", "--working-rate", "0.01", "--lone-factor", "1", "--coverage", "0.01"]
PAIRS += ["--least-images", "2", "--intrinsic-factor", "9"]
PAIRS += [
    "--margin.test.level",
    "0.5",
]  # so weak a victim's margin stands out on some machines only


def prefixed(flags: list[str], prefix: str) -> list[str]:
    return [flag.replace("--", f"--{prefix}.") for flag in flags]


ATTACK = ["--arch", "cnn", "--width", "4", "--target", "3", "--num-steps", "140"]
VERBS = {
    "attack": ["attack", *IMAGES, *ATTACK, "--poison-rate", "0.2"],
    "clean-label": [
        "attack",
        "--attack",
        "clean-label",
        *IMAGES,
        *ATTACK[:-1],
        "40",
        "--steps",
        "2",
        "--poison-rate",
        "0.2",
    ],
    "trojan": [
        "attack",
        "--attack",
        "trojan",
        *IMAGES,
        *ATTACK[:-1],
        "40",
        "--search-steps",
        "40",
        "--retrain-steps",
        "40",
        "--neurons",
        "2",
    ],
    "scan": ["scan", "MODEL", *FEW, *MASKS],
    "pairs": ["scan", "MODEL", "--method", "pairs", *FEW, *PAIRS],
    "unlearn": [
        "repair",
        "MODEL",
        "--method",
        "unlearn",
        *FEW,
        "--target",
        "3",
        "--steps",
        "60",
        *prefixed(MASKS, "search"),
    ],
    "finetune": ["repair", "MODEL", "--method", "finetune", *FEW, "--steps", "60"],
    "clip": ["repair", "MODEL", "--method", "clip", *FEW, "--steps", "60"],
    "bna": [
        "repair",
        "MODEL",
        "--method",
        "bna",
        *FEW,
        "--with.correction.num-steps",
        "40",
        "--with.rounds",
        "1",
        *prefixed(PAIRS, "search"),
    ],
}
COMPARED = ("ft-sam", "fine-pruning", "nad", "argd", "anp", "ibau", "mcr")
"""Repairs that need clean images alone."""
LENGTH = {"ibau": ["--with.outer-steps", "40"]}
"""How a run is made short where --steps does not do it."""
VERBS |= {
    name: ["repair", "MODEL", "--method", name, *FEW, *LENGTH.get(name, ["--steps", "100"])]
    for name in COMPARED
} | {"nc-unlearn": [*VERBS["unlearn"][:3], "nc-unlearn", *VERBS["unlearn"][4:]]}
"""Verb or method -> its command, all but where it writes; MODEL stands for a victim."""
LEAST_STAGES = {"clean-label": 3, "trojan": 3, "scan": 2, "pairs": 3, "unlearn": 3, "bna": 6}
"""How many stages a command has at least; 1 where nothing is said."""
QUICK = ("attack", "scan", "finetune", "bna")
"""The commands that are stopped and resumed without --slow: each kind of driver once."""


class Case:
    """One command, and what it gives when nothing interrupts it."""

    def __init__(self, name: str, model: pathlib.Path, folder: pathlib.Path):
        self.name, self.model = name, model
        self.out = self.place(folder)
        self.code, self.calls = followed(lambda: main(self.command(self.out)))

    def place(self, folder: pathlib.Path) -> pathlib.Path:
        return folder / ("found.json" if VERBS[self.name][0] == "scan" else "made")

    def command(self, out: pathlib.Path, *flags: str) -> list[str]:
        words = [str(self.model) if word == "MODEL" else word for word in VERBS[self.name]]
        return [*words, "--out", str(out), *OFTEN, *flags]

    def record(self, out: pathlib.Path) -> dict[str, object]:
        """The output's JSON."""
        return json.loads(
            (out / f"{VERBS[self.name][0]}.json" if out.is_dir() else out).read_text()
        )

    def assert_same(self, out: pathlib.Path) -> None:
        """All files are those of the run that nothing interrupted, but for seconds; nothing else is
        left."""
        assert contents(out) == contents(self.out)
        metrics = f"{out.name}.metrics.jsonl"
        left = sorted(path.name for path in out.parent.glob(f"{out.name}*"))
        assert left == [out.name, *([metrics] if VERBS[self.name][0] == "repair" else [])]
        if metrics in left:
            one, other = (lines(each) for each in (out, self.out))
            assert one == other, "metrics have a gap or a line twice"


def contents(out: pathlib.Path) -> dict[str, object]:
    """Every file of an output by its name: JSON without what may differ, others as they are."""
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    return {
        path.name: (
            timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
        )
        for path in files
        if path.suffix != ".npz"
    } | {
        path.name: {k: v.tolist() for k, v in np.load(path).items()}
        for path in files
        if path.suffix == ".npz"
    }


def lines(out: pathlib.Path) -> list[object]:
    """The metrics beside an output."""
    text = out.with_name(f"{out.name}.metrics.jsonl").read_text()
    return [timeless(json.loads(line)) for line in text.splitlines()]


def timeless(value):
    """JSON without the seconds, where the run began, and where it wrote."""
    if isinstance(value, dict):
        return {
            k: timeless(v)
            for k, v in value.items()
            if k not in ("seconds", "peak_mb", "resumed", "out", "path")
        }
    return [timeless(each) for each in value] if isinstance(value, list) else value


def followed(run, at: int | None = None, number: int = signal.SIGTERM):
    """Calls `run`: its result, and every (stage, steps done, of all) that it told; sends a signal
    at one of them."""
    told, watches = [], []
    call, enter = Progress.__call__, signals.Watch.__enter__

    def calling(self, label, done, total):
        told.append((label, done, total))
        call(self, label, done, total)
        if len(told) - 1 == at:
            os.kill(os.getpid(), number)
            while watches[-1].caught is None:
                time.sleep(0.01)

    def entering(self):
        watches.append(self)
        return enter(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "__call__", calling)
        patch.setattr(signals.Watch, "__enter__", entering)
        return run(), told


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No test depends on how long anything takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SHORT", float("inf"))
        patch.setattr(runs, "LONGEST", float("inf"))
        yield


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    return Case("attack", pathlib.Path(), tmp_path_factory.mktemp("attack"))


@pytest.fixture(scope="module")
def case(request, attacked, tmp_path_factory):
    name = request.param
    return attacked if name == "attack" else Case(name, attacked.out, tmp_path_factory.mktemp(name))


def each(*names: str):
    """The cases of these names, or all; those that are not `QUICK` are slow."""
    marked = [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in names or VERBS
    ]
    return pytest.mark.parametrize("case", marked, indirect=True)


def stages_of(calls) -> list[list[tuple[int, int]]]:
    """(steps done, of all) that were told, by stage. A stage that goes on begins with the steps of
    its checkpoint."""
    by_stage = itertools.groupby(calls, key=lambda call: call[0])
    return [[(done, total) for _, done, total in told] for _, told in by_stage]


@each()
def test_stopped_by_a_signal_twice_and_resumed(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "SHORT", 0.0)  # as if every stage took long
    out, rng, whole = case.place(tmp_path), random.Random(case.name), case.calls
    assert case.code in (0, 1, 3) and len(stages_of(whole)) >= LEAST_STAGES.get(case.name, 1)
    assert len({label for label, *_ in whole}) == len(stages_of(whole)), "stages of one name"

    at = rng.choice([n for n, (_, done, _) in enumerate(whole[: len(whole) // 2]) if done])
    code, before = followed(lambda: main(case.command(out)), at)
    label, done, total = before[-1]
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 143 and before == whole[: at + 1] and not out.exists()
    assert line.startswith(
        f"jaxbd: stopped at step {done} of {total} of “{label}”, saved in {out}.run; resume with: "
    )
    again = shlex.split(line.split("resume with: ")[1])
    assert (
        again[1:] == ["-m", "jaxbd", *case.command(out), "--resume"]
        and pathlib.Path(again[0]).exists()
    )

    finished = len(stages_of(before)) - (done != total)
    calls = finished + (done != total) + len(whole) - len(before)
    code, middle = followed(lambda: main(again[3:]), rng.randrange(calls // 2, calls))
    assert code == 143 and not out.exists() and "resume with: " in capsys.readouterr().err
    code, rest = followed(lambda: main(again[3:]))
    assert code == case.code and len(stages_of(rest)) == len(stages_of(whole))
    for calls in (middle, rest):
        for told in stages_of(calls)[:finished]:
            assert len(told) == 1 and told[0][0] == told[0][1], "a stage that was saved ran again"
    case.assert_same(out)
    assert case.record(out)["resumed"]["step"] > 0


@each("scan")
def test_what_ends_in_the_first_minute_is_done_again_instead(case, tmp_path):
    """Unless it was saved on the way: only the stage that was stopped is."""
    out = case.place(tmp_path)
    command = [word for word in case.command(out) if word not in OFTEN]
    code, before = followed(lambda: main(command), len(case.calls) - 2)
    folders = [path.name for path in out.with_name("found.json.run").iterdir() if path.is_dir()]
    assert code == 143 and folders == ["3-mesa-classes-3-at-the-located-place"]
    code, rest = followed(lambda: main([*command, "--resume"]))
    assert code == case.code and stages_of(rest)[0] == stages_of(before)[0]
    case.assert_same(out)
    assert case.record(out)["resumed"] == {"stage": before[-1][0], "step": before[-1][1]}


@each("scan", "unlearn")
def test_a_short_run_touches_no_disk(case, tmp_path, monkeypatch):
    """By default; and one that fails leaves nothing behind."""

    def refuse(*args):
        raise AssertionError("a checkpoint is written")

    def fail(*args, **more):
        raise RuntimeError("it failed")

    monkeypatch.setattr(checkpoint.Writer, "write", refuse)
    out = case.place(tmp_path)
    command = [word for word in case.command(out) if word not in OFTEN]
    assert main(command) == case.code
    case.assert_same(out)
    monkeypatch.setattr(runs.Run, "follow", fail)
    assert main([*command[:-1], str(tmp_path / "other")]) == 2
    assert not list(tmp_path.glob("other*"))


@pytest.fixture
def stopped(attacked, tmp_path, monkeypatch, capsys):
    """A training that was stopped at step 60 of 140: its case, its output, the command to go on
    with."""
    monkeypatch.setattr(runs, "SHORT", 0.0)
    out = attacked.place(tmp_path)
    code, _ = followed(lambda: main(attacked.command(out)), 3)
    steps = out.with_name("made.run") / "1-train"
    assert code == 143 and sorted(path.name for path in steps.iterdir()) == ["40", "60"]
    capsys.readouterr()
    return attacked, out, attacked.command(out, "--resume")


def one_line(capsys) -> str:
    """What was said at the end, after what was being read."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxbd: ")]
    assert len(lines) == 1
    return lines[0]


def test_another_run_is_refused_by_name(stopped, capsys):
    case, out, again = stopped
    known = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    for change, named in (
        (["--seed", "4"], "seed is 0 there and 4 here"),
        (["--momentum", "0.5"], "training.momentum is 0.9 there and 0.5 here"),
        (["--limit", "1700"], "limit is null there and 1700 here"),
        (["--patch", "2"], "planting.patch is 3 there and 2 here"),
    ):
        assert main([*again, *change]) == 2
        assert f"{out}.run belongs to another run: config.flags.{named}; " in one_line(capsys)
    assert main(
        again[:-1]
    ) == 2 and "is an unfinished run; give --resume to continue it, or delete it" in one_line(
        capsys
    )
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")} == known
    assert main(again) == 0
    case.assert_same(out)
    assert main(again) == 2 and "nothing to resume" in one_line(capsys)


@each("scan")
def test_other_contents_under_the_same_name_are_refused(case, tmp_path, capsys):
    """Images and models are known by what is in them, wherever they lie."""
    file, model, out = tmp_path / "data.npz", tmp_path / "model", tmp_path / "found.json"
    images = digits.load(8)
    labels = np.asarray(images.labels)
    command = case.command(out)
    command[command.index("digits")], command[1] = str(file), str(model)
    shutil.copytree(case.model, model)
    np.savez(file, images=images.images, labels=labels)
    assert followed(lambda: main(command), 2)[0] == 143
    capsys.readouterr()
    moved = [word.replace("data.npz", "moved.npz") for word in command]
    shutil.copy(file, tmp_path / "moved.npz")
    altered = np.array(images.images)
    altered[:, 0, 0] ^= 1
    np.savez(file, images=altered, labels=labels)
    assert main([*command, "--resume"]) == 2 and "config.read.data is " in one_line(capsys)
    weights = model / "model.safetensors"
    known, settings = weights.read_bytes(), (model / "config.json").read_text()
    other = known[:-4] + bytes(4)
    weights.write_bytes(other)
    assert main([*moved, "--resume"]) == 2 and "not the file that config.json" in one_line(capsys)
    first, second = (hashlib.sha256(data).hexdigest() for data in (known, other))
    (model / "config.json").write_text(settings.replace(first, second))
    assert main([*moved, "--resume"]) == 2 and "config.model.manifest" in one_line(capsys)
    weights.write_bytes(known)
    (model / "config.json").write_text(settings)
    assert main([*moved, "--resume"]) in (0, 1, 3) and not out.with_name("found.json.run").exists()


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(stopped, capsys):
    case, out, again = stopped
    newest = out.with_name("made.run") / "1-train" / "60"
    for path in filter(pathlib.Path.is_file, newest.rglob("*")):
        os.truncate(path, path.stat().st_size // 2)
    code, calls = followed(lambda: main(again))
    told = " ".join(capsys.readouterr().err.split())
    assert (
        code == 0
        and f"checkpoint {newest} is damaged and was not used" in told
        and 40 in [done for _, done, _ in calls[:3]]
    )
    case.assert_same(out)


def test_folders_of_others_are_refused_and_untouched(attacked, tmp_path, capsys):
    for number, name in enumerate(("thesis.txt", "config.json")):
        out = tmp_path / str(number)
        other = out.with_name(f"{number}.run")
        other.mkdir()
        (other / name).write_text("{}")
        for flags in ([], ["--resume"]):
            assert main(
                attacked.command(out, *flags)
            ) == 2 and "is not a checkpoint folder" in one_line(capsys)
        assert (other / name).read_text() == "{}" and not out.exists()


def test_a_full_disk_is_one_line_and_loses_nothing(stopped, monkeypatch, capsys):
    case, out, again = stopped
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
        assert main(again) == 2
    assert (
        "cannot save a checkpoint in" in (line := one_line(capsys))
        and "No space left on device; choose" in line
    )
    with monkeypatch.context() as patch:

        def full(*args):
            raise OSError(28, "No space left on device")

        patch.setattr(attack.folder.safetensors_file, "write", full)
        assert main(again) == 2 and "o space left on device" in one_line(capsys)
    assert not out.exists()
    code, calls = followed(lambda: main(again))
    done = {done for _, done, _ in calls}
    assert code == 0 and done == {140}, "trained, and saved, before the output was written"
    case.assert_same(out)


def test_places_that_cannot_be_written_are_one_line(attacked, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(attacked.command(tmp_path / "file" / "made")) == 2
    assert "choose a writable folder" in one_line(capsys) and [
        path.name for path in tmp_path.iterdir()
    ] == ["file"]


@each("scan")
def test_a_scan_without_a_file_has_nothing_to_resume(case, tmp_path, capsys):
    command = case.command(tmp_path / "page.html")
    where = command.index("--out")
    assert main([*command[:where], *command[where + 2 :], "--resume"]) == 2
    assert "give the same --out as before" in one_line(capsys)
    command[where] = "--report"
    code, _ = followed(lambda: main(command), 1)
    assert (
        code == 143
        and (tmp_path / "page.html.run").is_dir()
        and not (tmp_path / "page.html").exists()
    )
    assert main([*command, "--resume"]) == case.code
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


# Kills. A child process dies by SIGKILL where it is told to; it compiles as the tests do, so that
# bits can be compared.


def child(words: list[str], out: str, moment: str, number: int) -> None:
    """Runs a command that dies at the "file" event `number` of its checkpoints or output, or soon
    after it told of its progress for the time `number` ("told")."""
    runs.SHORT = 0.0
    counted, call = [0], Progress.__call__

    def calling(self, label, done, total):
        call(self, label, done, total)
        counted[0] += 1
        if counted[0] == number:
            threading.Timer(random.Random(number).uniform(0, 0.3), kills.die).start()

    if moment == "file":
        kills.die_at_file(out, number)
    else:
        Progress.__call__ = calling
    sys.exit(main(words))


def killed(case: Case, out: pathlib.Path, moments) -> int:
    """Kills one run after the other; how often a checkpoint stood there."""
    stood = 0
    for moment, number in moments:
        call = (
            f"import test_resume as t; t.child({case.command(out, '--resume')!r}, {str(out)!r},"
            f" {moment!r}, {number})"
        )
        run = subprocess.run(
            [sys.executable, "-c", call],
            cwd=HERE,
            env=kills.environment("cli"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode in (case.code, -signal.SIGKILL) and "Traceback" not in run.stderr, (
            run.stderr
        )
        if (
            out.exists() and not out.with_name(f"{out.name}.run").exists()
        ):  # it was done before its time came
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        elif out.with_name(f"{out.name}.run").exists():
            stood += checkpoint.is_started(out.with_name(f"{out.name}.run"))
    return stood


@pytest.mark.slow
@each(*(name for name in VERBS if name not in ("clean-label", "trojan")))
def test_ten_kills(case, tmp_path):
    rng = random.Random(case.name)
    moments = [("file", rng.randrange(3, 250)) for _ in range(6)]
    moments += [("told", rng.randrange(1, len(case.calls))) for _ in range(4)]
    rng.shuffle(moments)
    out = case.place(tmp_path)
    assert killed(case, out, moments) > 3
    if not out.exists() or out.with_name(f"{out.name}.run").exists():
        assert main(case.command(out, "--resume")) == case.code
    case.assert_same(out)
