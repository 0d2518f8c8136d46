"""`jaxbd repair --method dhbe`: reads no data, and can be stopped or killed anywhere and go on bit
for bit."""

import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kills
import numpy as np
import pytest

from jaxbd.base import Suspect, UserError
from jaxbd.cli import erasing, parse
from jaxbd.cli.commands import repair as repairing
from jaxbd.cli.main import main
from jaxbd.cli.metrics import Metrics, seconds_at
from jaxbd.data import load
from jaxbd.detection import guard
from jaxbd.interop import folder, guarded
from jaxbd.interop import load as models
from jaxbd.models import build
from jaxbd.pipelines.repair import Repaired
from jaxbd.repairs import dhbe
from jaxbd.training import checkpoint
from jaxbd.training.loop import Chunk
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run

STEPS = 24
SMALL = ["--with.batch-size", "4", "--with.width", "2", "--with.inner-steps", "1"]
SMALL += [
    "--with.noise-dim",
    "4",
    "--with.trigger-size",
    "3",
    "--steps",
    str(STEPS),
    "--save-every",
    "5",
]
SPEC = build.Spec(arch="cnn", classes=10, image_shape=(8, 8, 1), options={"width": 2, "stages": 1})
HERE = pathlib.Path(__file__).parents[1]


def command(model, out, *flags) -> list[str]:
    return ["repair", str(model), "--method", "dhbe", "--out", str(out), *SMALL, *flags]


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A tiny net that knows nothing."""
    path = tmp_path_factory.mktemp("dhbe") / "victim"
    folder.save(path, SPEC, build.net(SPEC).init(jax.random.key(0)))
    return path


@pytest.fixture(scope="module")
def whole(victim):
    """What a run gives that nothing interrupts; it compiles for all others."""
    out = victim.with_name("whole")
    assert main(command(victim, out)) == 0
    return out


def read(path):
    return json.loads(path.read_text())


def lines(out):
    return [
        json.loads(line)
        for line in out.with_name(f"{out.name}.metrics.jsonl").read_text().splitlines()
    ]


def saved_steps(out):
    folder = out.with_name(f"{out.name}.run")
    return sorted(int(each.name) for each in folder.glob("*/[0-9]*") if each.name.isdigit())


def assert_same(out, whole):
    """Weights, curves and metrics are those of the uninterrupted run; nothing else is left, but for
    hidden folders of writers that were killed at it."""
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert read(out / "repair.json")["curves"] == read(whole / "repair.json")["curves"]
    timeless = [[{**line, "seconds": 0} for line in lines(path)] for path in (out, whole)]
    assert timeless[0] == timeless[1]
    seconds = [line["seconds"] for line in lines(out)]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert sorted(path.name for path in out.parent.glob(f"{out.name}*")) == [
        out.name,
        f"{out.name}.metrics.jsonl",
    ]


def test_repair_writes_model_figures_and_metrics(victim, whole):
    assert {path.name for path in whole.iterdir()} == {
        "model.safetensors",
        "config.json",
        "repair.json",
    }
    content = read(whole / "repair.json")
    assert (
        content["schema"] == "jaxbd/1/repair"
        and content["method"] == "dhbe"
        and content["seed"] == 0
    )
    assert content["config"]["num_steps"] == STEPS and content["config"]["width"] == 2
    assert (
        content["before"]
        is content["after"]
        is content["data"]
        is content["trigger"]
        is content["resumed"]
        is None
    )
    assert content["model"]["image_shape"] == [8, 8, 1] and "jax" in content["versions"]
    assert content["seconds"]["compile"] > 0 and content["seconds"]["run"] > 0
    assert (
        content["curves"].keys() == {"step", *dhbe.Info._fields}
        and content["curves"]["step"][-1] == STEPS
    )
    assert content["noise"].keys() == {"before", "after"}
    assert content["metrics"] == "whole.metrics.jsonl"
    rows = lines(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0].keys() == {"stage", "step", "seconds", *dhbe.Info._fields}
    assert [row["discrepancy"] for row in rows] == content["curves"]["discrepancy"]
    assert rows[0]["learning_rate"] == pytest.approx(0.1) and rows[-1][
        "learning_rate"
    ] == pytest.approx(0.001)
    weights = [(path / "model.safetensors").read_bytes() for path in (victim, whole)]
    assert weights[0] != weights[1]


def test_a_net_that_generated_images_tell_little_about(victim, tmp_path, capsys, monkeypatch):
    """The share of the commonest answer is written down, and a person is warned where it is nearly
    all of them."""
    spec, variables, _ = folder.load(victim)
    biased = jax.tree.map(lambda leaf: leaf, variables)
    biased["params"]["head"]["bias"] = biased["params"]["head"]["bias"].at[3].set(1e3)
    folder.save(tmp_path / "biased", spec, biased)
    assert main(command(tmp_path / "biased", tmp_path / "fixed")) == 0
    assert read(tmp_path / "fixed" / "repair.json")["one_answer"] == {"class": 3, "share": 1.0}
    told = capsys.readouterr().err
    assert "warning: the model answers 100% of untrained generators' images with class 3" in told
    monkeypatch.setattr(erasing, "ONE_ANSWER", 1.1)
    assert main(command(tmp_path / "biased", tmp_path / "again")) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_net_that_the_repair_ruined(capsys):
    """Answers to noise are written down, and a person is warned where the repair has left one."""

    def apply(variables, images):
        pixels = images[:, ::4, ::4].reshape(len(images), -1)  # 4 classes: which pixel is brightest
        return pixels + variables["params"]["bias"][None]

    def warned(before: int | None, after: int | None) -> bool:
        """Whether of nets that answer with one class, or each, one is told that it is ruined."""
        nets = [
            {"params": {"bias": jnp.zeros(4) if label is None else 9.0 * jnp.eye(4)[label]}}
            for label in (before, after)
        ]
        suspect = Suspect(build.from_apply(apply), nets[0], (8, 8, 1), 4)
        config = dhbe.Config(batch_size=4, width=2, noise_dim=4, trigger_size=3)
        watch = erasing.Watch(Run(), suspect, config, 0, False)
        capsys.readouterr()
        watch.check(Repaired(nets[1], {}, Seconds(0, 0)))
        for label, found in zip((before, after), watch.facts["noise"].values(), strict=True):
            if label is None:
                assert 0.25 <= found["share"] < 0.5
            else:
                assert found == {"class": label, "share": 1.0}
        told = capsys.readouterr().err
        assert ("answers 100% of images of noise with class 2" in told) == ("ruined" in told)
        return "ruined" in told

    assert warned(before=None, after=2)
    assert not warned(before=None, after=None)
    assert not warned(before=2, after=2), "it was so before"


# No data. Everything that Python opens or lists while a repair runs is written down.

seen: list[str] | None = None


def note_down(event, args):
    if (
        seen is not None
        and event in ("open", "os.listdir", "os.scandir")
        and isinstance(args[0], str | bytes)
    ):
        name = os.fsdecode(args[0])
        if os.path.isabs(name) or os.path.exists(
            name
        ):  # the deletion of a folder names files relative to it
            seen.append(os.path.abspath(name))


@pytest.fixture(scope="module")
def hook():
    """There is no way to take it away again."""
    sys.addaudithook(note_down)


@pytest.fixture
def watched(hook, tmp_path, monkeypatch):
    """Runs a command in a folder full of data: returns the files it read that are neither code nor
    its own."""
    place = tmp_path / "here"
    (place / "data" / "0").mkdir(parents=True)
    np.savez(place / "data.npz", images=np.zeros((9, 8, 8, 1), np.uint8), labels=np.arange(9))
    shutil.copy(place / "data.npz", place / "data" / "0" / "data.npz")
    monkeypatch.chdir(place)

    def run(*words):
        global seen
        seen = []
        try:
            code = main([str(word) for word in words])
            found = sorted({*seen})
        finally:
            seen = None
        code_lies = (
            sys.prefix,
            sys.base_prefix,
            str(HERE.parent / "jaxbd"),
            jax.config.jax_compilation_cache_dir,
        )
        harmless = (*code_lies, "/dev", "/proc", "/sys", "/etc")
        return code, [
            path for path in found if "datasets/data" in path or not path.startswith(harmless)
        ]

    return run


def test_no_data_is_read(victim, whole, watched, monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("data is read")

    monkeypatch.setattr(load, "load", refuse)
    out = pathlib.Path("fixed").absolute()
    code, found = watched(*command(victim, out))
    assert (
        code == 0
        and (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    )
    assert [path for path in found if not may_open(pathlib.Path(path), victim)] == []


def may_open(path: pathlib.Path, model: pathlib.Path) -> bool:
    """The model, what the run writes (in the current folder), and a nameless temporary file that
    tries the disk."""
    here = pathlib.Path.cwd()
    if path.is_relative_to(here):
        return path == here or path.relative_to(here).parts[0].lstrip(".").startswith("fixed")
    return path.is_relative_to(model) or path.parent == pathlib.Path(tempfile.gettempdir())


def test_data_is_read_once_the_repair_is_written(victim, watched, monkeypatch):
    """And only where it is given; the watch sees it."""
    out, real = pathlib.Path("fixed").absolute(), load.load
    place = out.with_name("page.html")

    def reading(*args, **more):
        assert (out / "model.safetensors").exists() and read(out / "repair.json")["after"] is None
        assert "nothing was measured" in page(place) and not out.with_name("fixed.run").exists()
        return real(*args, **more)

    monkeypatch.setattr(load, "load", reading)
    trigger = ["--trigger", "white:2x2", "--place", "0,0", "--target", "3", "--report", str(place)]
    code, found = watched(*command(victim, out, "--test-data", "digits", "--limit", "50", *trigger))
    assert code == 0 and any("datasets/data" in path for path in found)
    content = read(out / "repair.json")
    assert content["amplified"].keys() == {"1", "4", "9"}
    assert content["amplified"]["1"] == [
        content[which]["attack_success_rate"] for which in ("before", "after")
    ]
    told = page(place)
    assert "nothing was measured" not in told and "clean images" in told and "white:2x2" in told
    for copies, rates in content["amplified"].items():
        assert " ".join([copies, *(f"{100 * rate:.1f} %" for rate in rates)]) in told
    assert (
        content["after"]["n_clean"] == content["data"]["images"] == 50
        and content["data"]["source"] == "digits"
    )
    assert content["before"]["n_triggered"] < 50 and content["trigger"]["target"] == 3
    assert content["config"]["num_steps"] == STEPS


# The page.


def page(path) -> str:
    """What a page says."""
    return " ".join(re.sub("<style>.*?</style>|<[^>]*>", " ", path.read_text(), flags=re.S).split())


def shown(path) -> list[int]:
    """After how many iterations the page shows what was generated."""
    return [int(step) for step in re.findall(r"<h4>After (\d+) iteration", path.read_text())]


def pictures(path) -> list[str]:
    """Generated images and triggers in turn, in order of time."""
    return re.findall('<img [^>]*src="([^"]+)" alt="[0-9]+ generated', path.read_text())


def test_a_page_of_what_was_generated(victim, whole, tmp_path, monkeypatch, capsys):
    """Looking on changes nothing; a run that was stopped shows what it generates from there on, all
    losses, and why."""
    out, place = tmp_path / "fixed", tmp_path / "page.html"
    report = ["--report", str(place)]
    assert main(command(victim, out, *report)) == 0
    assert_same(out, whole)
    assert f"wrote {place}" in capsys.readouterr().out
    told, made, steps = page(place), pictures(place), shown(place)
    assert (
        "nothing was measured" in told
        and "This run was stopped" not in told
        and steps == [0, 3, 8, STEPS]
    )
    assert len(set(made)) == len(made) == 8
    assert (
        f"over {STEPS} recorded steps" in place.read_text()
        and "student and teacher" in place.read_text()
    )

    shutil.rmtree(out)
    place.unlink()
    with monkeypatch.context() as patch:
        signalled(patch, 7, signal.SIGTERM)
        assert main(command(victim, out, *report)) == 143
    assert not place.exists()
    assert main(command(victim, out, *report, "--resume")) == 0
    assert_same(out, whole)
    stopped = read(out / "repair.json")["resumed"]["step"]
    assert f"This run was stopped at iteration {stopped} after" in page(place)
    after = [step for step in steps if step > stopped]
    assert shown(place) == after and pictures(place) == made[-2 * len(after) :]
    assert f"over {STEPS} recorded steps" in place.read_text()


def test_pages_that_cannot_be_written(victim, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "model.pth").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    out = tmp_path / "fixed"
    for model, where, named in (
        (victim, tmp_path, "is a folder"),
        (victim, tmp_path / "file" / "page.html", "writable"),
        (tmp_path / "model.pth", tmp_path / "model.pth", "--report"),
        (victim, tmp_path / "link" / "config.json", "--report"),
        (victim, out, "--report"),
        (victim, out.with_name("fixed.run") / "page.html", "--report"),
        (victim, out.with_name("fixed.metrics.jsonl"), "--report"),
    ):
        assert main(command(model, out, "--report", str(where))) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and named in told[0] and str(where) in told[0]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == b"precious"


def test_a_repair_that_cannot_be_measured_stands(victim, whole, tmp_path, capsys):
    out, place = tmp_path / "fixed", tmp_path / "page.html"
    assert (
        main(command(victim, out, "--test-data", str(tmp_path / "absent"), "--report", str(place)))
        == 2
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert "is written, but could not be measured" in line and "absent" in line
    assert_same(out, whole)
    assert shown(place) == [0, 3, 8, STEPS]


def test_a_foreign_file_is_repaired_in_its_own_form(victim, whole, tmp_path, capsys):
    there, out = tmp_path / "model.pth", tmp_path / "fixed.pth"
    assert main(["convert", str(victim), "--out", str(there)]) == 0
    capsys.readouterr()
    assert main(command(there, out)) == 2 and "--normalisation" in capsys.readouterr().err
    assert main(command(there, out, "--normalisation", "none")) == 2
    assert "--image-shape" in capsys.readouterr().err
    shape = ["--image-shape", "8", "8", "1"]
    assert main(command(there, out, "--normalisation", "none", *shape)) == 0
    names = ["fixed.pth", "fixed.pth.metrics.jsonl", "fixed.repair.json", "model.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    repaired = models.open_model(out, image_shape=(8, 8, 1)).variables
    expected = models.open_model(whole).variables
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), repaired, {**expected}))


def test_presets_are_where_the_flags_start_from():
    def parsed(*words):
        argv = ["m", "--out", "o", "--method", "dhbe", *words]
        kind, default = repairing.choose(argv)
        found = parse.parse(kind, argv, "jaxbd repair", default)
        return repairing.with_steps(found.settings, found.steps)

    assert parsed() == dhbe.released()
    changed = parsed("--preset", "paper", "--with.trigger-size", "6", "--steps", "9")
    assert changed == dhbe.paper(trigger_size=6, num_steps=9)
    assert parsed("--preset", "quick") == dhbe.quick() != dhbe.released()
    changed = parsed("--preset", "quick", "--with.milestones", "0.5", "0.9")
    assert changed == dhbe.quick(milestones=(0.5, 0.9))


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--data", "digits"], "takes no data; leave --data out, or give --test-data"),
        (["--data=digits"], "--test-data"),
        (["--trigger", "white:2x2"], "--test-data"),
        (["--target", "3"], "--trigger"),
        (["--with.num-steps", "7"], "--steps and the method's num-steps"),
        (["--with.inner", "scan"], "--with.inner"),
        (["--save-every", "0"], "--save-every must be at least 1 step, got 0"),
        (["--with.trigger-size", "9"], "9x9 trigger does not fit 8x8"),
        (["--with.trigger-size", "2"], "2 pixels"),
        (["--image-shape", "16", "16", "1"], "(8, 8, 1)"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_flags_that_make_no_sense(victim, tmp_path, capsys, flags, named):
    assert main(command(victim, tmp_path / "fixed", *flags)) == 2
    told = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading ")
    ]
    assert len(told) == 1 and named in told[0] and list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_used(victim, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "o.run").mkdir()
    (tmp_path / "o.run" / "thesis.txt").write_text("precious")
    variables = models.open_model(victim).variables
    guarded.save(tmp_path / "guarded", SPEC, guard.pack(variables, [variables]), [3])
    for model, out, named in (
        (victim, tmp_path / "file" / "fixed", "writable"),
        (victim, tmp_path / "o", "is not a checkpoint folder"),
        (tmp_path / "guarded", tmp_path / "fixed", "guarded model"),
    ):
        assert main(command(model, out)) == 2
        told = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading ")
        ]
        assert len(told) == 1 and named in told[0]
    assert (tmp_path / "o.run" / "thesis.txt").read_text() == "precious"


# Stops. A signal is sent where a metrics line is written.


def signalled(monkeypatch, at_step: int, number: int):
    """Sends `number` to this process at a step, once, and waits until it was noticed."""
    add, pending = Metrics.add, [number]

    def adding(self, stage, chunk, first):
        add(self, stage, chunk, first)
        if first + chunk.done == at_step and pending:
            os.kill(os.getpid(), pending.pop())
            time.sleep(0.2)

    monkeypatch.setattr(Metrics, "add", adding)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_and_resumed(
    victim, whole, tmp_path, monkeypatch, capsys, number, code
):
    out, handlers = (
        tmp_path / "two words",
        [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)],
    )
    with monkeypatch.context() as patch:
        signalled(patch, 7, number)
        assert main(command(victim, out)) == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(
        f"jaxbd: stopped at step 7 of {STEPS} of “dhbe”, saved in {out}.run; resume with: "
    )
    again = shlex.split(told[-1].split("resume with: ")[1])
    assert (
        again[1:] == ["-m", "jaxbd", *command(victim, out), "--resume"]
        and pathlib.Path(again[0]).exists()
    )
    assert not out.exists() and saved_steps(out) == [5, 7] and len(lines(out)) == 7

    state = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(command(victim, out)) == 2
    assert "give --resume to continue it, or delete it" in capsys.readouterr().err
    for change, named in (
        (["--seed", "4"], "reading.seed is 0 there and 4 here"),
        (["--with.regularisation", "0.2"], "settings.regularisation is 0.1 there"),
    ):
        assert main(command(victim, out, "--resume", *change)) == 2
        assert f"config.flags.{named}" in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == state

    assert main(again[3:]) == 0
    assert_same(out, whole)
    resumed = read(out / "repair.json")["resumed"]
    assert resumed["step"] == 7 and resumed["seconds"] == lines(out)[6]["seconds"]
    capsys.readouterr()
    assert main(again[3:]) == 2 and "nothing to resume" in capsys.readouterr().err


def test_resuming_what_never_began_begins(victim, whole, tmp_path, capsys):
    """A job that is always started with --resume needs no first time; leftovers of an early kill
    bind nobody."""
    out = tmp_path / "fixed"
    (tmp_path / "fixed.run").mkdir()
    early = {"schema": checkpoint.SCHEMA, "run": {"seed": 9}}
    (tmp_path / "fixed.run" / "config.json").write_text(json.dumps(early))
    assert main(command(victim, out, "--resume")) == 0
    assert "starting from the beginning" in " ".join(capsys.readouterr().err.split())
    assert_same(out, whole)


@pytest.mark.parametrize("where", ["checkpoint", "metrics", "model"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    victim, whole, tmp_path, monkeypatch, capsys, where
):
    out = tmp_path / "fixed"
    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
        elif where == "metrics":
            add = Metrics.add

            def adding(self, stage, chunk, first):
                if first + chunk.done == 8:
                    self._file.close()
                    self._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
                add(self, stage, chunk, first)

            patch.setattr(Metrics, "add", adding)
        else:

            def full(*args):
                raise OSError(28, "No space left on device")

            patch.setattr(folder.safetensors_file, "write", full)
        assert main(command(victim, out)) == 2
    told = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("reading ", "warning: ", "["))
    ]
    assert len(told) == 1 and told[0].startswith("jaxbd: ") and "o space left on device" in told[0]
    assert (
        not out.exists()
        and saved_steps(out) == {"checkpoint": [], "metrics": [5], "model": [15, 20]}[where]
    )
    assert main(command(victim, out, "--resume")) == 0
    assert_same(out, whole)


class Seen(NamedTuple):
    loss: np.ndarray


def chunk_of(done: int, *losses) -> Chunk:
    return Chunk(done, lambda: None, Seen(np.float32(losses)))


def test_metrics_go_on_without_gap_or_double(tmp_path):
    path, pair = tmp_path / "m.jsonl", ([1, 2], [3, 4])
    with Metrics(path, False) as metrics:
        for step in (2, 4, 6):
            metrics.add("first", chunk_of(step, *pair), 0)
        # on disk before it is closed
        assert json.loads(path.read_text().splitlines()[-1])["loss"] == [2, 3]
    with path.open("a") as file:
        file.write('{"stage": "first", "step": 8, "loss": [2, 3], "sec')  # killed while writing
    assert seconds_at(path, "first", 4) == json.loads(path.read_text().splitlines()[1])["seconds"]
    with Metrics(path, True) as metrics:
        metrics.add("first", chunk_of(2, np.nan), 4)
        assert metrics.earlier == seconds_at(path, "first", 4) > 0
        metrics.add("second", chunk_of(1, 5), 0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 1] and rows[2]["loss"] is None
    assert [row["stage"] for row in rows[2:]] == ["first", "second"]
    with Metrics(path, False) as metrics:
        metrics.add("first", chunk_of(1, 7), 0)
    assert len(path.read_text().splitlines()) == 1
    path.write_bytes(b"\xff\n")
    with Metrics(path, True) as metrics:
        metrics.add("first", chunk_of(1, 7), 6)
    assert metrics.earlier == 0 and len(path.read_text().splitlines()) == 1
    with (
        pytest.raises(UserError, match="choose a writable folder"),
        Metrics(tmp_path / "m.jsonl" / "below", False) as metrics,
    ):
        metrics.add("first", chunk_of(1, 7), 0)


def test_a_second_signal_ends_at_once_even_inside_compiled_code():
    code = """
import hashlib
from jaxbd.cli import signals
with signals.Watch() as watch:
    print("on", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout.readline() == "on\n"
        run.send_signal(signal.SIGINT)
        assert (
            run.stderr.readline()
            == "SIGINT: stopping after these steps and saving; send it again to stop at once\n"
        )
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=30) == 143
    finally:
        run.kill()
        run.communicate()


# Kills. A child process dies by SIGKILL where it is told to; it compiles as the tests do, so that
# bits can be compared.

CHILD = "import test_repair_dhbe as t; t.child({!r}, {!r}, {!r}, {})"


def child(words: list[str], out: str, moment: str, number: float) -> None:
    """Runs a command that dies at the "file" event `number`, at the "rename" to step `number`, or
    so many seconds ("time") after its first line of metrics."""
    if moment == "file":
        kills.die_at_file(out, number)
    if moment == "rename":
        kills.die_at_rename(out, str(int(number)))
    if moment == "time":
        add, waits = Metrics.add, []

        def adding(self, stage, chunk, first):
            if not waits:
                waits.append(threading.Timer(number, kills.die))
                waits[0].start()
            add(self, stage, chunk, first)

        Metrics.add = adding
    sys.exit(main(words))


def killed(victim, out, moments) -> list[int]:
    """Kills one run after the other; the steps from which the checkpoints stand after each."""
    stood = []
    for moment, number in moments:
        words = command(victim, out, "--resume")
        call = CHILD.format(words, str(out), moment, number)
        run = subprocess.run(
            [sys.executable, "-c", call],
            cwd=HERE,
            env=kills.environment("cli"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode in (0, -signal.SIGKILL), run.stderr
        if (
            out.exists() and not out.with_name(f"{out.name}.run").exists()
        ):  # it was done before its time came
            shutil.rmtree(out)
            continue
        stood.append(max(saved_steps(out), default=0))
    return stood


def test_killed_and_resumed(victim, whole, tmp_path):
    out = tmp_path / "fixed"
    stood = killed(victim, out, [("rename", 15), ("file", random.Random(3).randrange(10, 60))])
    assert 10 in stood and len(lines(out)) >= stood[-1]
    assert main(command(victim, out, "--resume")) == 0
    assert_same(out, whole)


@pytest.mark.slow
def test_ten_kills(victim, whole, tmp_path):
    rng = random.Random(2)
    moments = [("file", rng.randrange(3, 250)) for _ in range(6)] + [
        ("time", rng.uniform(0, 0.5)) for _ in range(4)
    ]
    rng.shuffle(moments)
    out = tmp_path / "fixed"
    killed(victim, out, moments)
    if not out.exists() or out.with_name("fixed.run").exists():
        assert main(command(victim, out, "--resume")) == 0
    assert_same(out, whole)


@pytest.mark.slow
def test_the_printed_command_goes_on(victim, whole, tmp_path):
    """As a person does it: a signal to the program, and what it printed in a shell."""
    out = tmp_path / "fixed"
    run = subprocess.Popen(
        [sys.executable, "-m", "jaxbd", *command(victim, out)],
        env=kills.environment("cli"),
        stderr=subprocess.PIPE,
        text=True,
    )
    while run.poll() is None and not (out.with_name("fixed.metrics.jsonl").exists() and lines(out)):
        time.sleep(0.005)
    run.send_signal(signal.SIGTERM)
    told = run.communicate()[1].splitlines()
    assert run.returncode == 143 and not out.exists()
    again = told[-1].split("resume with: ")[1]
    assert (
        subprocess.run(again, shell=True, env=kills.environment("cli"), check=False).returncode == 0
    )
    assert_same(out, whole)
