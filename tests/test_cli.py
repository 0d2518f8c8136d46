"""The command line: every verb on a tiny model, its files, its exit codes."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxbd import workflow
from jaxbd.base import Batch
from jaxbd.cli import main as entry
from jaxbd.cli.main import main
from jaxbd.cli.progress import Progress
from jaxbd.inversion import mesa

DATA = ["--data", "digits", "--limit", "300"]
TINY = ["--search.levels", "0.9", "--search.steps", "20", "--search.mesa.hidden", "16", "--search.method", "mesa"]
SCAN = [*(flag.replace("search.", "") for flag in TINY), "--targets", "3"]
RATES = {
    "clean_accuracy",
    "attack_success_rate",
    "source_inference_accuracy",
    "attack_success_rate_correct_only",
    "n_clean",
    "n_triggered",
}


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A tiny victim of class 3 on 8x8 digits, made by the command line itself."""
    path = tmp_path_factory.mktemp("cli") / "victim"
    flags = ["--arch", "cnn", "--width", "4", "--num-steps", "240", "--image-shape", "8", "8", "1", "--target", "3"]
    assert main(["attack", "--data", "digits", "--out", str(path), *flags, "--poison-rate", "0.2"]) == 0
    return path


def read(path):
    return json.loads(path.read_text())


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_help_imports_no_jax_and_names_every_verb():
    code = "import sys; from jaxbd.cli.main import main; main(['--help']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {verb} " in done.stdout for verb in entry.VERBS)


@pytest.mark.parametrize("verb", entry.VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"jaxbd {verb}" in capsys.readouterr().out


def test_module_runs_as_a_program(victim, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxbd", "scan", str(tmp_path / "absent"), "--data", "digits"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("jaxbd: ")] and "Traceback" not in done.stderr


def test_presets_are_where_the_flags_start_from():
    """`--preset` changes the defaults, a flag beside it still wins, and the record says what ran."""
    from jaxbd.cli import scan

    def parsed(*flags):
        argv = ["model", "--data", "digits", *flags]
        return entry.parse(scan.Args, argv, "jaxbd scan", scan.defaults(argv)).search

    assert parsed() == workflow.PRESETS["quick"]
    paper = parsed("--preset", "paper", "--steps", "7")
    assert (paper.method, paper.steps, paper.batch_size) == ("mesa", 7, 128)
    assert (paper.mesa.noise, paper.mesa.generator, paper.mesa.trigger_noise) == ("normal", "paper", 0.0)
    assert parsed("--preset=released").mesa == mesa.Config()


def test_missing_arguments_are_named(capsys):
    assert main(["scan"]) == 2
    assert capsys.readouterr().err == "jaxbd: missing: MODEL, --data; see jaxbd scan --help\n"


def test_attack_writes_model_trigger_and_figures(victim):
    assert {"model.safetensors", "config.json", "trigger.npz", "attack.json"} == {p.name for p in victim.iterdir()}
    content = read(victim / "attack.json")
    assert content["clean_accuracy"] > 0.8 and content["attack_success_rate"] > 0.5
    assert content["n_clean"] == 449 and content["data"]["train"] == 1348
    assert read(victim / "config.json")["image_shape"] == [8, 8, 1]
    with np.load(victim / "trigger.npz") as trigger:
        assert trigger["pattern"].shape == (3, 3, 1) and int(trigger["target"]) == 3


def test_attack_replaces_its_own_folder_only(victim, tmp_path, capsys):
    out, flags = tmp_path / "twin", ["--no-attack", "--num-steps", "2", "--width", "4", "--image-shape", "8", "8", "1"]
    run = lambda: main(["attack", "--data", "digits", "--out", str(out), *flags])
    assert run() == 0 and run() == 0
    assert {"model.safetensors", "config.json", "attack.json"} == {p.name for p in out.iterdir()}
    assert read(out / "attack.json")["attack_success_rate"] is None
    (out / "thesis.txt").write_text("precious")
    capsys.readouterr()
    assert run() == 2 and "thesis.txt" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "precious" and files_in(tmp_path)[0] == "twin"


def test_attack_poisons_statically_at_a_fixed_place(tmp_path):
    out = tmp_path / "static"
    flags = ["--poison", "static", "--poison-count", "7", "--place", "fixed", "--row", "2", "--column", "1"]
    small = ["--num-steps", "2", "--width", "4", "--image-shape", "8", "8", "1"]
    assert main(["attack", "--data", "digits", "--out", str(out), *flags, *small]) == 0
    with np.load(out / "trigger.npz") as trigger:
        assert trigger["place"].tolist() == [2, 1]
    assert read(out / "attack.json")["config"]["poison_count"] == 7


def test_evaluate_finds_the_figures_of_the_attack(victim, tmp_path, capsys):
    out = tmp_path / "evaluate.json"
    trigger = ["--trigger", str(victim / "trigger.npz")]
    assert main(["evaluate", str(victim), "--data", "digits", *trigger, "--out", str(out)]) == 0
    content, planted = read(out), read(victim / "attack.json")
    assert content.keys() >= RATES
    assert content["n_clean"] == 1797 and content["n_triggered"] == 1797 - 183
    assert content["attack_success_rate"] == pytest.approx(planted["attack_success_rate"], abs=0.06)
    assert content["trigger"]["target"] == 3 and content["trigger"]["place"] == "random"
    assert len(content["model"]["sha256"]) == 64
    assert "1614" in capsys.readouterr().out  # the denominator is on screen


def test_evaluate_applies_squares_and_pictures_where_told(victim, tmp_path):
    from PIL import Image

    picture, rates = tmp_path / "trigger.png", []
    Image.fromarray(np.full((2, 2), 255, np.uint8)).save(picture)
    for source in ("white:2x2", str(picture)):
        out = tmp_path / "evaluate.json"
        flags = ["--trigger", source, "--place", "3,4", "--target", "3", "--out", str(out)]
        assert main(["evaluate", str(victim), "--data", "digits", *flags]) == 0
        rates.append(read(out)["attack_success_rate"])
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("threshold", "doubt", "verdict", "code"),
    [("1", "1", "clean", 0), ("1e-6", "1e-6", "backdoored", 1), ("1", "1e-6", "inconclusive", 3)],
)
def test_scan_says_and_writes_its_verdict(victim, tmp_path, capsys, threshold, doubt, verdict, code):
    out = tmp_path / "scan.json"
    rule = ["--detection.threshold", threshold, "--detection.doubt", doubt]
    assert main(["scan", str(victim), *DATA, *SCAN, *rule, "--out", str(out)]) == code
    content = read(out)
    wanted = "schema verdict targets classes method config model data seed cells steps seconds device versions"
    assert set(wanted.split()) <= content.keys()
    assert content["verdict"] == verdict and content["cells"] == 1 and content["steps"] == 20
    assert {"class", "name", "attack_success_rate", "score"} <= content["classes"][3].keys()
    assert content["classes"][4]["attack_success_rate"] is None  # not searched
    assert {"path", "sha256", "arch"} <= content["model"].keys()
    assert content["data"]["search"] == 225 and content["data"]["held_out"] == 75
    assert {"compile", "run", "total"} == content["seconds"].keys()
    shown = capsys.readouterr().out
    assert verdict.upper() in shown and "patches of 3x3 pixels" in shown and "Not ruled out" in shown


@pytest.mark.parametrize("method", ["auto", "neural-cleanse"])
def test_scan_by_masks_and_its_page(victim, tmp_path, method):
    out, page = tmp_path / "scan.json", tmp_path / "report.html"
    flags = ["--method", method, "--locate-steps", "20", "--steps", "20", "--levels", "0.9", "--mesa.hidden", "16"]
    command = ["scan", str(victim), *DATA, *flags, "--targets", "3"]
    code = main([*command, "--out", str(out), "--report", str(page)])
    content = read(out)
    assert code == {"clean": 0, "backdoored": 1, "inconclusive": 3}[content["verdict"]]
    assert "neural-cleanse" in content["decided_by"]
    assert content["classes"][3]["mask_norm"] > 0 and content["classes"][0]["mask_norm"] is None
    assert "<svg" in page.read_text() and content["model"]["sha256"] in page.read_text()
    assert files_in(tmp_path) == ["report.html", "scan.json"]


def test_repair_with_a_given_trigger_removes_it(victim, tmp_path, capsys):
    out = tmp_path / "repaired"
    trigger = ["--trigger", str(victim / "trigger.npz")]
    assert main(["repair", str(victim), *DATA, "--num-steps", "200", "--out", str(out), *trigger]) == 0
    content = read(out / "repair.json")
    assert {"method", "before", "after", "config", "seconds"} <= content.keys()
    assert content["before"].keys() == RATES == content["after"].keys()
    before, after = (content[when]["attack_success_rate"] for when in ("before", "after"))
    assert before > 0.5 and after < 0.2
    assert content["after"]["clean_accuracy"] > content["before"]["clean_accuracy"] - 0.05
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "repair.json"}
    assert main(["evaluate", str(out), "--data", "digits", *trigger]) == 0


def test_repair_recovers_the_trigger_of_a_named_class_and_keeps_the_format(victim, tmp_path):
    foreign, out = tmp_path / "victim.pth", tmp_path / "repaired.safetensors"
    assert main(["convert", str(victim), "--out", str(foreign)]) == 0
    flags = [*DATA, "--image-shape", "8", "8", "1", *TINY, "--target", "3", "--num-steps", "5"]
    assert main(["repair", str(foreign), *flags, "--out", str(out)]) == 0
    assert files_in(tmp_path) == ["repaired.repair.json", "repaired.safetensors", "victim.pth"]
    content = read(tmp_path / "repaired.repair.json")
    assert content["target"] == 3 and content["evidence"] == "mixture" and content["scan"]["steps"] == 20


def test_repair_takes_the_targets_of_an_earlier_scan(victim, tmp_path):
    earlier, out = tmp_path / "scan.json", tmp_path / "repaired"
    earlier.write_text(json.dumps({"targets": [3]}))
    flags = [*TINY, "--search.detection.threshold", "1e-6", "--search.detection.doubt", "1e-6"]
    command = ["repair", str(victim), *DATA, *flags, "--num-steps", "5", "--scan", str(earlier)]
    assert main([*command, "--evidence", "level", "--level", "0.9", "--out", str(out)]) == 0
    content = read(out / "repair.json")
    assert [row["class"] for row in content["classes"]] == [3] and content["trigger_models"] == {"3": 1}
    assert content["scan"]["config"]["targets"] == [3] and "only classes 3" in content["scan"]["searched"]


def test_repair_with_one_reversed_trigger(victim, tmp_path):
    out = tmp_path / "repaired"
    command = ["repair", str(victim), *DATA, *TINY, "--target", "3", "--evidence", "pixel"]
    assert main([*command, "--num-steps", "5", "--out", str(out)]) == 0
    assert read(out / "repair.json")["evidence"] == "pixel"


def test_repair_of_a_clean_model_writes_nothing(victim, tmp_path, capsys):
    rule = ["--search.detection.threshold", "1", "--search.detection.doubt", "1"]
    command = ["repair", str(victim), *DATA, *TINY, *rule, "--search.targets", "5"]
    assert main([*command, "--out", str(tmp_path / "repaired")]) == 0
    assert "nothing to repair" in capsys.readouterr().out and files_in(tmp_path) == []


def test_convert_there_and_back_keeps_every_weight(victim, tmp_path, capsys):
    from safetensors.numpy import load_file

    there, back = tmp_path / "model.safetensors", tmp_path / "back"
    assert main(["convert", str(victim), "--out", str(there)]) == 0
    shape = ["--image-shape", "8", "8", "1"]
    assert main(["convert", str(there), "--out", str(back), *shape]) == 2
    assert "--normalisation" in capsys.readouterr().err
    assert main(["convert", str(there), "--out", str(back), *shape, "--normalisation", "none"]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (victim, back))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def test_inspect_prints_and_refuses(victim, tmp_path, capsys):
    assert main(["inspect", str(victim), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] > 0 and facts["sha256"] == read(victim / "attack.json").get("sha256", facts["sha256"])
    assert main(["inspect", str(victim)]) == 0
    assert "params/conv0/kernel" in capsys.readouterr().out
    (tmp_path / "model.pth").write_bytes(b"\x80\x04cos\nsystem\n")
    assert main(["inspect", str(tmp_path / "model.pth")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("jaxbd: refused") and shown.err.count("\n") == 1 and "sha256" in shown.out


def test_methods_lists_every_method_with_its_paper(capsys):
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"badnets", "mesa", "neural-cleanse", "pixel", "unlearn"} <= {row["method"] for row in rows}
    assert all(row["paper"].startswith("https://") and row["what it is"].endswith(".") for row in rows)
    assert main(["methods"]) == 0
    assert "https://arxiv.org/abs/1910.04749" in capsys.readouterr().out


def test_progress_tells_the_first_and_last_step_at_least():
    stream = io.StringIO()
    with Progress(stream) as progress:
        for done in range(6):
            progress("mesa", done, 5)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].endswith("mesa: compiling …") and lines[1].endswith("step 5 of 5")


def test_progress_shows_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(stream) as progress:
        progress("mesa", 0, 5)
        progress("mesa", 5, 5)
    assert "5/5" in stream.getvalue()


def test_interrupting_says_so_in_one_line(monkeypatch, capsys):
    def interrupted(verb, argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_run", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "jaxbd: interrupted; no file was left half-written\n"


def test_a_crash_is_no_verdict(monkeypatch, capsys):
    def crash(verb, argv):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.delenv("JAXBD_DEBUG", raising=False)
    monkeypatch.setattr(entry, "_run", crash)
    assert main(["scan"]) == 2
    assert capsys.readouterr().err.startswith("jaxbd: internal error, ZeroDivisionError: division by zero;")


def test_a_given_trigger_changes_its_own_pixels_only(tmp_path):
    import jax
    from PIL import Image

    from jaxbd.attacks import given
    from jaxbd.interop import trigger

    pixels = np.array([[[255, 0, 0, 255], [0, 255, 0, 0]], [[0, 0, 255, 51], [9, 9, 9, 0]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "trigger.png")
    loaded = trigger.load(str(tmp_path / "trigger.png"))
    images = jax.random.uniform(jax.random.key(0), (2, 5, 5, 3))
    attack, planted = given.make((5, 5, 3), 10, given.Config(row=1, column=3), loaded)
    stamped, before = np.array(attack.stamp(jax.random.key(1), planted, images)), np.asarray(images)
    np.testing.assert_array_equal(stamped[:, 1, 3], [[1, 0, 0]] * 2)  # opaque
    np.testing.assert_allclose(stamped[:, 2, 3], 0.8 * before[:, 2, 3] + [0, 0, 0.2], rtol=1e-6)  # one fifth
    stamped[:, 1:3, 3] = before[:, 1:3, 3]
    np.testing.assert_array_equal(stamped, before)  # the transparent pixels and all others, bit for bit


def test_an_added_trigger_is_clipped_and_a_random_place_varies(tmp_path):
    import jax

    from jaxbd.attacks import given
    from jaxbd.interop import trigger

    np.savez(tmp_path / "t.npz", pattern=np.full((5, 5, 1), -0.25, np.float32), application=np.asarray("add"))
    loaded = trigger.load(str(tmp_path / "t.npz"))
    images = jax.numpy.linspace(0, 1, 75).reshape(1, 5, 5, 3)
    attack, planted = given.make((5, 5, 3), 10, given.Config(apply=loaded.apply), loaded)
    stamped = attack.stamp(jax.random.key(0), planted, images)
    np.testing.assert_allclose(stamped, np.clip(np.asarray(images) - 0.25, 0, 1), atol=1e-6)
    config = given.Config(place="random", target=2, poison_rate=1.0)
    attack, planted = given.make((5, 5, 3), 10, config, trigger.load("white:1x1"))
    black = attack.poison(jax.random.key(0), planted, Batch(jax.numpy.zeros((30, 5, 5, 3)), jax.numpy.arange(30) % 10))
    assert (np.asarray(black.images).sum((1, 2, 3)) == 3).all() and (np.asarray(black.labels) == 2).all()
    assert len({int(where) for where in np.asarray(black.images)[..., 0].reshape(30, -1).argmax(1)}) > 5


def test_the_compile_cache_has_a_home_of_its_own_unless_told(tmp_path):
    code = "import jax; from jaxbd.cli import common; common.start(); print(jax.config.jax_compilation_cache_dir)"
    known = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    for extra, wanted in (
        ({}, tmp_path / "jaxbd" / "xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "/dev/null/x"}, "/dev/null/x"),
    ):
        environment = {**known, "XDG_CACHE_HOME": str(tmp_path), **extra}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == str(wanted)


def test_the_demo_writes_all_it_names(tmp_path, monkeypatch, capsys):
    """So few steps find nothing, so the verdict is given; exit code 1, since the twin is accused too."""
    from jaxbd import detect

    accused = detect.Decision("backdoored", [7], [0.0] * 10)
    monkeypatch.setattr(detect, "decide", lambda rates, config: accused)
    steps = ["--train-steps", "2", "--scan-steps", "2", "--repair-steps", "2", "--baseline-runs", "1"]
    assert main(["demo", *steps, "--levels", "0.9", "--out", str(tmp_path / "demo")]) == 1
    assert "verdicts are not what was planted" in capsys.readouterr().out
    written = "repair.json repaired report.html scan-twin.json scan.json suspect twin"
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == written.split()
    table = [row["method"] for row in read(tmp_path / "demo" / "repair.json")["table"]]
    assert table[0] == "before" and {"MESA level 0.9", "MESA mixture", "ideal (true trigger)"} < set(table)
    assert {"search", "held_out"} < read(tmp_path / "demo" / "scan.json")["data"].keys()
