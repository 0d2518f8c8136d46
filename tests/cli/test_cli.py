"""The command line: every verb on a tiny model, its files, its exit codes."""

import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxbd.base import Batch
from jaxbd.cli import holding
from jaxbd.cli import main as entry
from jaxbd.cli.main import main
from jaxbd.cli.progress import Progress
from jaxbd.inversion import mesa
from jaxbd.pipelines import fresh, hold
from jaxbd.pipelines import scan as scanning
from jaxbd.training.program import Seconds

DATA = ["--data", "digits", "--limit", "300"]
TINY = [
    "--search.levels",
    "0.9",
    "--search.steps",
    "20",
    "--search.mesa.hidden",
    "16",
    "--search.method",
    "mesa",
]
ONCE = ["--method", "unlearn"]
"""The repair that does not check itself."""
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
    flags = [
        "--arch",
        "cnn",
        "--width",
        "4",
        "--num-steps",
        "240",
        "--image-shape",
        "8",
        "8",
        "1",
        "--target",
        "3",
    ]
    assert (
        main(["attack", "--data", "digits", "--out", str(path), *flags, "--poison-rate", "0.2"])
        == 0
    )
    return path


def read(path):
    return json.loads(path.read_text())


def files_in(folder, pattern="**/*"):
    return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))


def test_help_imports_no_jax_and_names_every_verb():
    code = (
        "import sys; from jaxbd.cli.main import main; main(['--help']); sys.exit('jax' in"
        " sys.modules)"
    )
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
    assert [
        line for line in done.stderr.splitlines() if line.startswith("jaxbd: ")
    ] and "Traceback" not in done.stderr


def test_presets_are_where_the_flags_start_from():
    """`--preset` changes the defaults, a flag beside it still wins, and the record says what
    ran."""
    from jaxbd.cli import parse
    from jaxbd.cli.commands import scan

    def parsed(*flags):
        argv = ["model", "--data", "digits", *flags]
        kind, default = scan.choose(argv)
        return parse.parse(kind, argv, "jaxbd scan", default).search

    assert parsed() == scanning.PRESETS["quick"]
    paper = parsed("--preset", "paper", "--steps", "7")
    assert (paper.method, paper.steps, paper.batch_size) == ("mesa", 7, 128)
    assert (paper.mesa.noise, paper.mesa.generator, paper.mesa.trigger_noise) == (
        "normal",
        "paper",
        0.0,
    )
    assert parsed("--preset=released").mesa == mesa.Config()


def test_missing_arguments_are_named(capsys):
    assert main(["scan"]) == 2
    assert capsys.readouterr().err == "jaxbd: missing: MODEL; see jaxbd scan --help\n"


def test_attack_writes_model_trigger_and_figures(victim):
    assert {"model.safetensors", "config.json", "trigger.npz", "attack.json"} == {
        p.name for p in victim.iterdir()
    }
    content = read(victim / "attack.json")
    assert content["clean_accuracy"] > 0.8 and content["attack_success_rate"] > 0.5
    assert content["n_clean"] == 449 and content["data"]["train"] == 1348
    assert read(victim / "config.json")["image_shape"] == [8, 8, 1]
    with np.load(victim / "trigger.npz") as trigger:
        assert trigger["pattern"].shape == (3, 3, 1) and int(trigger["target"]) == 3


def test_attack_replaces_its_own_folder_only(victim, tmp_path, capsys):
    out, flags = (
        tmp_path / "twin",
        ["--no-attack", "--num-steps", "2", "--width", "4", "--image-shape", "8", "8", "1"],
    )
    command = ["attack", "--data", "digits", "--out", str(out), *flags]
    run = lambda: main([*command, "--force"])
    assert main(command) == 0 and run() == 0
    assert {"model.safetensors", "config.json", "attack.json"} == {p.name for p in out.iterdir()}
    assert read(out / "attack.json")["attack_success_rate"] is None
    (out / "thesis.txt").write_text("precious")
    capsys.readouterr()
    assert run() == 2 and "thesis.txt" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "precious" and files_in(tmp_path)[0] == "twin"


def test_attack_poisons_statically_at_a_fixed_place(tmp_path):
    out = tmp_path / "static"
    flags = [
        "--poison",
        "static",
        "--poison-count",
        "7",
        "--place",
        "fixed",
        "--row",
        "2",
        "--column",
        "1",
    ]
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
        assert main(["evaluate", str(victim), "--data", "digits", *flags, "--force"]) == 0
        rates.append(read(out)["attack_success_rate"])
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("threshold", "doubt", "verdict", "code"),
    # nothing works: of one class of ten that is not enough to be clean
    [
        ("1", "1", "inconclusive", 3),
        ("1e-6", "1e-6", "backdoored", 1),
        ("1", "1e-6", "inconclusive", 3),
    ],
)
def test_scan_says_and_writes_its_verdict(
    victim, tmp_path, capsys, threshold, doubt, verdict, code
):
    out = tmp_path / "scan.json"
    rule = ["--detection.threshold", threshold, "--detection.doubt", doubt]
    assert main(["scan", str(victim), *DATA, *SCAN, *rule, "--out", str(out)]) == code
    content = read(out)
    wanted = (
        "schema verdict targets classes method config model data seed cells steps seconds device"
        " versions"
    )
    assert set(wanted.split()) <= content.keys()
    assert content["verdict"] == verdict and content["cells"] == 1 and content["steps"] == 20
    assert {"class", "name", "attack_success_rate", "score"} <= content["classes"][3].keys()
    assert content["classes"][4]["attack_success_rate"] is None  # not searched
    assert {"path", "sha256", "arch"} <= content["model"].keys()
    assert content["data"]["search"] == 225 and content["data"]["held_out"] == 75
    assert {"compile", "run", "total"} == content["seconds"].keys()
    shown = capsys.readouterr().out
    assert (
        verdict.upper() in shown
        and "patches of 3x3 pixels" in shown
        and "are not ruled out" in shown
    )


@pytest.mark.slow
def test_a_scan_in_bfloat16_ends_as_in_float32(victim, tmp_path):
    flags = [
        "--method",
        "mesa",
        "--steps",
        "150",
        "--levels",
        "0.9",
        "--mesa.hidden",
        "16",
        "--targets",
        "3",
        "5",
    ]
    flags += ["--mesa.learning-rate", "3e-3", "--detection.threshold", "0.6"]
    found, triggers = {}, []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        code = main(
            ["scan", str(victim), *DATA, *flags, "--compute-dtype", dtype, "--out", str(out)]
        )
        found[dtype] = {**read(out / "scan.json"), "code": code}
        triggers.append(sorted((out / "triggers").glob("*.npz"))[0].read_bytes())
    one, other = found["float32"], found["bfloat16"]
    assert other["compute_dtype"] == "bfloat16"
    assert (one["verdict"], one["targets"], one["code"]) == (
        other["verdict"],
        other["targets"],
        other["code"],
    )
    assert (one["verdict"], one["targets"]) == ("backdoored", [3])
    rates = [
        [content["classes"][k]["attack_success_rate"] for k in (3, 5)] for content in (one, other)
    ]
    assert triggers[0] != triggers[1], "the flag changed nothing"
    np.testing.assert_allclose(rates[1], rates[0], atol=0.1)


@pytest.mark.parametrize("method", ["auto", "neural-cleanse"])
def test_scan_by_masks_and_its_page(victim, tmp_path, method):
    out, page = tmp_path / "scan.json", tmp_path / "report.html"
    flags = [
        "--method",
        method,
        "--locate-steps",
        "20",
        "--steps",
        "20",
        "--levels",
        "0.9",
        "--mesa.hidden",
        "16",
    ]
    command = ["scan", str(victim), *DATA, *flags, "--targets", "3"]
    code = main([*command, "--out", str(out), "--report", str(page)])
    content = read(out)
    assert code == {"clean": 0, "backdoored": 1, "inconclusive": 3}[content["verdict"]]
    if method == "neural-cleanse":
        assert "neural-cleanse" in content["decided_by"]
    else:
        assert "9 of 10 classes were not searched" in content["power_lacks"]
    assert content["classes"][3]["mask_norm"] > 0 and content["classes"][0]["mask_norm"] is None
    assert "<svg" in page.read_text() and content["model"]["sha256"] in page.read_text()
    assert files_in(tmp_path) == ["report.html", "scan.json"]


def test_repair_with_a_given_trigger_removes_it(victim, tmp_path, capsys):
    out = tmp_path / "repaired"
    trigger = ["--trigger", str(victim / "trigger.npz")]
    once = ["repair", str(victim), *ONCE, *DATA, "--steps", "200"]
    assert main([*once, "--out", str(out), *trigger]) == 0
    content = read(out / "repair.json")
    assert {"method", "before", "after", "config", "seconds"} <= content.keys()
    assert content["before"].keys() == RATES == content["after"].keys()
    before, after = (content[when]["attack_success_rate"] for when in ("before", "after"))
    assert before > 0.5 and after < 0.2
    assert content["after"]["clean_accuracy"] > content["before"]["clean_accuracy"] - 0.05
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "repair.json"}
    assert main(["evaluate", str(out), "--data", "digits", *trigger]) == 0


def test_repair_by_fine_tuning_needs_no_trigger(victim, tmp_path, capsys):
    """No scan is run; a given trigger is what is measured with."""
    out, trigger = tmp_path / "tuned", ["--trigger", str(victim / "trigger.npz")]
    command = ["repair", str(victim), *DATA, "--method", "finetune", "--out", str(out)]
    assert main([*command, "--target", "3"]) == 2 and "--trigger" in capsys.readouterr().err
    assert main([*command, *trigger, "--steps", "30", "--with.learning-rate", "0.02"]) == 0
    content = read(out / "repair.json")
    assert content["method"] == "finetune" and "scan" not in content
    assert (content["config"]["num_steps"], content["config"]["learning_rate"]) == (30, 0.02)
    assert content["trigger"]["target"] == 3 and content["evidence"] is None
    assert content["before"]["attack_success_rate"] > 0.5 and content["after"]["n_triggered"] > 0
    assert content["after"]["clean_accuracy"] > content["before"]["clean_accuracy"] - 0.1
    printed, change = capsys.readouterr().out, content["accuracy_change"]
    assert "Attack success rates use the given trigger" in printed
    before, after = (content[when]["clean_accuracy"] for when in ("before", "after"))
    assert change["change"] == pytest.approx(after - before) and before < 1
    assert change["low"] < change["change"] < change["high"]
    assert f"Clean accuracy changed by {100 * change['change']:+.1f} points" in printed
    steps = [json.loads(line)["step"] for line in metrics_of(out).read_text().splitlines()]
    assert steps[-1] == 30 and main(["evaluate", str(out), "--data", "digits", *trigger]) == 0


def metrics_of(out):
    return out.with_name(f"{out.name}.metrics.jsonl")


def test_repair_recovers_the_trigger_of_a_named_class_and_keeps_the_format(victim, tmp_path):
    foreign, out = tmp_path / "victim.pth", tmp_path / "repaired.safetensors"
    assert main(["convert", str(victim), "--out", str(foreign)]) == 0
    flags = [*DATA, "--image-shape", "8", "8", "1", *TINY, "--target", "3", "--steps", "5"]
    assert main(["repair", str(foreign), *ONCE, *flags, "--out", str(out)]) == 0
    metrics = "repaired.safetensors.metrics.jsonl"
    written = ["repaired.repair.json", "repaired.safetensors", metrics, "victim.pth"]
    assert files_in(tmp_path) == written
    content = read(tmp_path / "repaired.repair.json")
    assert (
        content["target"] == 3
        and content["evidence"] == "mixture"
        and content["scan"]["steps"] == 20
    )


def test_repair_takes_the_targets_of_an_earlier_scan(victim, tmp_path):
    earlier, out = tmp_path / "scan.json", tmp_path / "repaired"
    earlier.write_text(json.dumps({"targets": [3]}))
    flags = [*TINY, "--search.detection.threshold", "1e-6", "--search.detection.doubt", "1e-6"]
    command = ["repair", str(victim), *ONCE, *DATA, *flags, "--steps", "5", "--scan", str(earlier)]
    assert main([*command, "--evidence", "level", "--level", "0.9", "--out", str(out)]) == 0
    content = read(out / "repair.json")
    assert [row["class"] for row in content["classes"]] == [3]
    assert content["evidence"] == "level"
    assert (
        content["scan"]["config"]["targets"] == [3]
        and "only classes 3" in content["scan"]["searched"]
    )


def test_repair_with_one_reversed_trigger(victim, tmp_path):
    out = tmp_path / "repaired"
    flags = [*ONCE, *DATA, *TINY[:-1], "pixel", "--target", "3"]
    command = ["repair", str(victim), *flags]
    assert main([*command, "--steps", "5", "--out", str(out)]) == 0
    assert read(out / "repair.json")["scan"]["config"]["method"] == "pixel"


def test_repair_of_a_clean_model_writes_nothing(victim, tmp_path, capsys):
    rule = ["--search.detection.threshold", "1", "--search.detection.doubt", "1"]
    command = ["repair", str(victim), *ONCE, *DATA, *TINY, *rule, "--search.targets", "5"]
    assert main([*command, "--out", str(tmp_path / "repaired")]) == 0
    assert "nothing to repair" in capsys.readouterr().out and files_in(tmp_path) == []


def test_evaluate_says_how_soon_a_backdoor_is_back(victim, tmp_path, capsys):
    out, trigger = tmp_path / "evaluate.json", ["--trigger", str(victim / "trigger.npz")]
    command = ["evaluate", str(victim), *DATA, "--relearn", "--out", str(out)]
    assert main(command) == 2 and "--relearn teaches a trigger" in capsys.readouterr().err
    assert main([*command, *trigger]) == 0
    found = read(out)["relearn"]
    # it works as it is
    assert found["steps"] == 0 and found["course"][0][1] > 0.5 and found["poisoned"] == 2
    assert "back after 0 steps on 2 poisoned images of 225" in capsys.readouterr().out


@pytest.fixture
def short_rounds(monkeypatch):
    """Rounds whose searches take a second."""
    search = fresh.Config(steps=20, patch_steps=4, additive_steps=4, batch_size=16, compared=3)
    make = lambda args: hold.Config(max_drop=args.max_drop, rounds=args.rounds or 2, search=search)
    monkeypatch.setattr(holding, "configure", make)


def test_repair_checks_itself_and_says_which_end_it_was(victim, tmp_path, capsys, short_rounds):
    out, trigger = tmp_path / "held", ["--trigger", str(victim / "trigger.npz")]
    flags = [*DATA, "--steps", "60", "--max-drop", "0.5", *trigger]
    assert main(["repair", str(victim), *flags, "--out", str(out)]) == 0
    content, text = read(out / "repair.json"), capsys.readouterr().out
    checked = content["checked"]
    assert content["method"] == "unlearn" and checked["end"] in ("nothing left", "rounds")
    begun, *rounds = checked["rounds"]
    assert 1 <= len(rounds) <= 2 and begun["known"][0]["rate"] > 0.5
    assert {one["kind"] for one in begun["found"]} == {"mask", "patch", "additive"}
    # the first trigger known is the given one, of those that check
    assert rounds[-1]["known"][0]["rate"] < 0.3 and checked["checked_on"] == 75
    assert f"On {checked['checked_on']} images that the repair did not train on" in text
    still = [one for one in rounds[-1]["found"] if one["left"]]
    assert ("Still working" in text) == bool(still)
    assert ("no rounds are left" in text) == (checked["end"] == "rounds")


def test_auto_clips_where_an_inconclusive_scan_recovered_nothing(victim, tmp_path, capsys):
    """A doubt of nearly 0 makes every scan inconclusive, a threshold of 1 recovers nothing."""
    out = tmp_path / "clipped"
    rule = ["--search.detection.threshold", "1", "--search.detection.doubt", "1e-6"]
    command = ["repair", str(victim), *DATA, *TINY, *rule, "--search.targets", "5"]
    assert main([*command, "--out", str(out)]) == 0
    content = read(out / "repair.json")
    assert content["method"] == "clip" and content["trigger"] is content["checked"] is None
    assert content["config"]["max_drop"] == 0.02
    assert "repairing with clip instead" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "finetune", "--rounds", "2"], "finetune does not, leave --rounds out"),
        (["--rounds", "0"], "rounds and most_held must be at least 1"),
        (["--method", "unlearn", "--max-drop", "0.1"], "--max-drop is for --method auto"),
        (["--max-drop", "2"], "max_drop must be a share"),
    ],
)
def test_rounds_that_cannot_be_are_refused_before_anything_is_read(flags, words, capsys):
    assert main(["repair", "nothing.pth", "--data", "none", *flags, "--out", "o.pth"]) == 2
    assert words in capsys.readouterr().err


# guarded models, and scans over pairs of classes


@pytest.fixture(scope="module")
def guarded(victim, tmp_path_factory):
    """The victim with a guard for its target, corrected with the trigger that was planted."""
    path = tmp_path_factory.mktemp("guarded") / "guarded"
    flags = [
        "--trigger",
        str(victim / "trigger.npz"),
        "--target",
        "3",
        "--steps",
        "40",
    ]
    assert main(["repair", "--method", "bna", str(victim), *DATA, *flags, "--out", str(path)]) == 0
    return path


def verdict_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_repair_by_correction_writes_a_guarded_model(victim, guarded):
    names = {"model.safetensors", "guard.safetensors", "config.json", "repair.json"}
    assert {path.name for path in guarded.iterdir()} == names
    content = read(guarded / "repair.json")
    assert content["method"] == "bna" and content["targets"] == [3] and content["target"] == 3
    assert content["before"].keys() == RATES == content["after"].keys()
    assert content["after"]["attack_success_rate"] < content["before"]["attack_success_rate"] - 0.1
    assert (
        content["after"]["source_inference_accuracy"]
        > content["before"]["source_inference_accuracy"]
    )
    assert content["after"]["clean_accuracy"] > content["before"]["clean_accuracy"] - 0.05
    found = content["detection"]
    assert found["true_positive_rate"] > found["false_positive_rate_all"] and found["n_clean"] == 75
    assert (
        content["classes"][0]["sources"] == [k for k in range(10) if k != 3]
        and content["trigger"]["target"] == 3
    )
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (victim, guarded))
    assert first == second  # no weight was touched


def test_evaluate_and_inspect_take_a_guarded_model(victim, guarded, tmp_path, capsys):
    rates = {}
    for model in (victim, guarded):
        command = [
            "evaluate",
            str(model),
            "--data",
            "digits",
            "--trigger",
            str(victim / "trigger.npz"),
        ]
        assert main([*command, "--out", str(tmp_path / "e.json"), "--force"]) == 0
        rates[model] = read(tmp_path / "e.json")
    assert rates[guarded]["attack_success_rate"] < rates[victim]["attack_success_rate"]
    assert rates[guarded]["n_triggered"] == rates[victim]["n_triggered"]
    assert main(["inspect", str(guarded)]) == 0
    assert "answers 3 are checked by corrected nets" in capsys.readouterr().out
    main(["guard", str(guarded), "--data", "digits"])
    lines = verdict_lines(capsys.readouterr().out)
    right = np.mean([line["label"] == line["true_label"] for line in lines])
    assert right == pytest.approx(rates[guarded]["clean_accuracy"], abs=2 / 1797)


def test_guard_says_a_line_for_each_image_and_sums_up(guarded, tmp_path, capsys):
    capsys.readouterr()
    assert main(["guard", str(guarded), *DATA]) == 0
    shown = capsys.readouterr()
    lines = verdict_lines(shown.out)
    assert [line["index"] for line in lines] == list(range(300))
    for line in lines:
        assert set(line) == {"index", "label", "suspect_label", "flagged", "asked", "true_label"}
        assert line["asked"] == (line["suspect_label"] == 3)
        assert line["flagged"] == (line["label"] != line["suspect_label"]) and (
            line["asked"] or not line["flagged"]
        )
    asked, flagged = (sum(line[field] for line in lines) for field in ("asked", "flagged"))
    assert (
        f"300 images of digits: {asked} checked by a corrected net, {flagged} flagged" in shown.err
    )
    assert "Correct by the true labels" in shown.err
    assert (
        main(
            ["guard", str(guarded), *DATA, "--out", str(tmp_path / "v.jsonl"), "--batch-size", "7"]
        )
        == 0
    )
    assert f"{flagged} flagged" in capsys.readouterr().out
    assert verdict_lines((tmp_path / "v.jsonl").read_text()) == lines


def test_guard_takes_images_without_labels(guarded, tmp_path, capsys):
    from PIL import Image

    from jaxbd.data import digits

    pictures = digits.load(8).images[:5]
    (tmp_path / "d").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture[..., 0]).save(tmp_path / "d" / f"{number}.png")
    np.savez(tmp_path / "d.npz", images=pictures)
    np.savez(tmp_path / "l.npz", images=pictures, labels=np.arange(5))
    said = {}
    for name in ("d", "d/3.png", "d.npz", "l.npz"):
        capsys.readouterr()
        assert main(["guard", str(guarded), "--data", str(tmp_path / name)]) == 0
        shown = capsys.readouterr()
        said[name] = verdict_lines(shown.out)
        assert ("Correct by" in shown.err) == (name == "l.npz")
    assert [line.pop("file") for line in said["d"]] == [f"{number}.png" for number in range(5)]
    assert [line.pop("true_label") for line in said["l.npz"]] == list(range(5))
    assert said["d"] == said["d.npz"] == said["l.npz"]
    (single,) = said["d/3.png"]
    assert single == {**said["d"][3], "index": 0, "file": "3.png"}


def test_guard_beside_strip(guarded, tmp_path, capsys):
    flags = ["--strip", "digits", "--overlays", "4", "--false-positive-rate", "0.25"]
    assert main(["guard", str(guarded), *DATA, *flags, "--out", str(tmp_path / "v.jsonl")]) == 0
    lines = verdict_lines((tmp_path / "v.jsonl").read_text())
    assert all(0 <= line["strip_entropy"] <= np.log2(10) + 1e-4 for line in lines)
    highest = max(line["strip_entropy"] for line in lines if line["strip_flagged"])
    assert highest < min(line["strip_entropy"] for line in lines if not line["strip_flagged"])
    share = np.mean([line["strip_flagged"] for line in lines])
    assert 0.15 < share < 0.35 and "STRIP flags" in capsys.readouterr().out


def test_a_guarded_folder_is_copied_whole(guarded, tmp_path):
    assert main(["convert", str(guarded), "--out", str(tmp_path / "copy")]) == 0
    for name in ("guard.safetensors", "model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (guarded / name).read_bytes()


@pytest.fixture
def pair_scan(victim, monkeypatch):
    """Lets scans over pairs find what is given, with the planted trigger; returns the settings they
    ran with."""
    from jaxbd.attacks import given
    from jaxbd.base import Evidence
    from jaxbd.interop import trigger
    from jaxbd.pipelines import pair_scan

    ran = []

    def install(verdict: str, targets: list[int]) -> list:
        def scan(run, key, suspect, search, held_out, config):
            ran.append(config)
            loaded = trigger.load(str(victim / "trigger.npz"))
            settings = given.Config(target=3, place="random")
            attack, pixels = given.make(suspect.image_shape, suspect.classes, settings, loaded)
            scores = np.arange(100.0).reshape(10, 10)
            np.fill_diagonal(scores, np.nan)
            sources = tuple(k for k in range(10) if k != 3)
            triggers = {
                t: pair_scan.Estimate(
                    "neural-cleanse", Evidence(t, sources, attack.stamp, pixels), 9.0, 0.75
                )
                for t in targets
            }
            by_method = dict.fromkeys(config.methods, scores)
            return pair_scan.PairScan(
                verdict=verdict,
                targets=targets,
                leads=[3] if verdict == "inconclusive" else [],
                pairs=[(s, t) for t in targets for s in sources],
                setting="all-to-one" if targets else None,
                decided_by="a rule",
                statistics=by_method,
                scores=by_method,
                triggers=triggers,
                others={},
                missing=(),
                steps=dict.fromkeys(config.methods, 7),
                image_steps=70,
                seconds=Seconds(1.0, 2.0),
            )

        monkeypatch.setattr(pair_scan, "scan", scan)
        return ran

    return install


@pytest.mark.parametrize(
    ("flags", "ran", "verdict", "code"),
    [
        (["--method", "pairs"], ("neural-cleanse", "pt-red"), "backdoored", 1),
        (["--method", "pt-red"], ("pt-red",), "clean", 0),
        (["--method=neural-cleanse-pairs"], ("neural-cleanse",), "inconclusive", 3),
    ],
)
def test_scan_over_pairs(victim, tmp_path, capsys, pair_scan, flags, ran, verdict, code):
    configs = pair_scan(verdict, [3] if verdict == "backdoored" else [])
    out, report = tmp_path / "scan.json", tmp_path / "page.html"
    assert (
        main(["scan", str(victim), *DATA, *flags, "--out", str(out), "--report", str(report)])
        == code
    )
    content, page = read(out), report.read_text()
    assert 'id="pairs"' in page and ("BACKDOORED: 9 pairs of classes" in page) == (
        verdict == "backdoored"
    )
    assert page.count("Anomaly score of every pair") == len(ran) and ("Example 6:" in page) == bool(
        content["targets"]
    )
    assert (
        tuple(configs[0].methods) == ran == tuple(content["scores"]) == tuple(content["statistics"])
    )
    wanted = (
        "schema verdict targets pairs setting decided_by classes statistics scores triggers method"
        " config model data"
    )
    assert (
        set(wanted.split()) | {"seed", "cells", "steps", "seconds", "device", "versions"}
        <= content.keys()
    )
    scores = content["scores"][ran[0]]
    assert scores[2][2] is None and scores[2][3] == 23 and content["cells"] == 90 * len(ran)
    assert content["classes"][4]["score"] == 94 and content["verdict"] == verdict
    assert content["data"]["search"] == 225 and content["data"]["held_out"] == 75
    shown = capsys.readouterr().out
    assert verdict.upper() in shown and "are not ruled out" in shown
    if verdict == "backdoored":
        assert (
            content["triggers"]["3"]["attack_success_rate"] == 0.75 and [0, 3] in content["pairs"]
        )
        assert "9 pairs of classes are attacked (all lead to one class); to class 3" in shown


def test_a_short_scan_over_pairs_in_earnest(victim, tmp_path):
    flags = [
        "--method",
        "pairs",
        "--targets",
        "3",
        "--steps",
        "4",
        "--perturbation-steps",
        "4",
        "--joint-steps",
        "4",
    ]
    code = main(["scan", str(victim), *DATA, *flags, "--out", str(tmp_path / "scan.json")])
    content = read(tmp_path / "scan.json")
    assert (
        code == {"clean": 0, "backdoored": 1, "inconclusive": 3}[content["verdict"]]
        and content["cells"] == 18
    )
    assert (
        content["statistics"]["pt-red"][0][3] is not None
        and content["statistics"]["pt-red"][0][4] is None
    )


def test_repair_by_correction_with_what_a_scan_recovers(victim, tmp_path, pair_scan):
    out, ran = tmp_path / "guarded", pair_scan("backdoored", [3])
    flags = ["--steps", "20", "--search.method", "neural-cleanse-pairs", "--with.rounds", "1"]
    flags += ["--search.joint-steps", "4"]
    assert main(["repair", str(victim), "--method=bna", *DATA, *flags, "--out", str(out)]) == 0
    content = read(out / "repair.json")
    assert content["trigger"] == "recovered" and content["scan"]["pairs"][0] == [0, 3]
    assert content["scan"]["triggers"]["3"]["method"] == "neural-cleanse" and ran[0].methods == (
        "neural-cleanse",
    )
    assert read(out / "config.json")["guard"]["targets"] == [3]


def test_repair_by_correction_of_a_clean_model_writes_nothing(victim, tmp_path, capsys, pair_scan):
    pair_scan("clean", [])
    assert (
        main(["repair", str(victim), "--method", "bna", *DATA, "--out", str(tmp_path / "guarded")])
        == 0
    )
    assert "nothing to repair" in capsys.readouterr().out and files_in(tmp_path) == []


@pytest.mark.parametrize("verb, method", [("scan", "pairs"), ("scan", "pt-red"), ("repair", "bna")])
def test_methods_with_flags_of_their_own_explain_them(verb, method, capsys):
    assert main([verb, "--method", method, "--help"]) == 0
    shown = capsys.readouterr().out
    own = "--with.correction.divergence" if verb == "repair" else "--pt-red.rule"
    assert own in shown and "stamp-rate" not in shown


def test_the_preset_of_the_correction():
    from jaxbd.cli import parse
    from jaxbd.cli.commands import repair
    from jaxbd.repairs import bna

    argv = ["m", "--data", "d", "--out", "o", "--method", "bna", "--preset", "released"]
    argv += ["--with.correction.tau", "20"]
    kind, default = repair.choose(argv)
    parsed = parse.parse(kind, argv, "jaxbd repair", default).settings.correction
    assert parsed == bna.released(tau=20.0)


def test_convert_there_and_back_keeps_every_weight(victim, tmp_path, capsys):
    from safetensors.numpy import load_file

    there, back = tmp_path / "model.safetensors", tmp_path / "back"
    assert main(["convert", str(victim), "--out", str(there)]) == 0
    shape = ["--image-shape", "8", "8", "1"]
    assert main(["convert", str(there), "--out", str(back), *shape]) == 2
    assert "--normalisation" in capsys.readouterr().err
    assert main(["convert", str(there), "--out", str(back), *shape, "--normalisation", "none"]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (victim, back))
    assert first.keys() == second.keys() and all(
        (first[name] == second[name]).all() for name in first
    )


def test_inspect_prints_and_refuses(victim, tmp_path, capsys):
    assert main(["inspect", str(victim), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] > 0 and facts["sha256"] == read(victim / "attack.json").get(
        "sha256", facts["sha256"]
    )
    assert main(["inspect", str(victim)]) == 0
    assert "params/conv0/kernel" in capsys.readouterr().out
    (tmp_path / "model.pth").write_bytes(b"\x80\x04cos\nsystem\n")
    assert main(["inspect", str(tmp_path / "model.pth")]) == 2
    shown = capsys.readouterr()
    assert (
        shown.err.startswith("jaxbd: refused")
        and shown.err.count("\n") == 1
        and "sha256" in shown.out
    )


def test_methods_lists_every_method_with_its_paper(capsys):
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"badnets", "mesa", "neural-cleanse", "pixel", "unlearn"} <= {
        row["method"] for row in rows
    }
    assert all(
        row["paper"].startswith("https://") and row["what it is"].endswith(".") for row in rows
    )
    known = {row["method"]: row for row in rows if row["kind"] == "repair"}
    assert (known["bna"]["needs"], known["bna"]["guards"]) == (["clean", "trigger"], True)
    assert (known["dhbe"]["needs"], known["dhbe"]["guards"]) == ([], False)
    assert known["finetune"]["needs"] == ["clean"] and "quick" in known["unlearn"]["presets"]
    assert main(["methods"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "https://arxiv.org/abs/1910.04749" in shown and "\\x0a" not in shown
    assert "Needs clean images and a trigger." in shown and "Needs nothing but the model." in shown


def test_progress_tells_the_first_and_last_step_at_least():
    stream = io.StringIO()
    with Progress(stream) as progress:
        for done in range(6):
            progress("mesa", done, 5)
    lines = stream.getvalue().splitlines()
    assert (
        len(lines) == 2
        and lines[0].endswith("mesa: 5 steps, compiling …")
        and lines[1].endswith("step 5 of 5")
    )


def test_progress_estimates_what_is_left_without_the_compile(monkeypatch):
    clock, stream = [0.0], io.StringIO()
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    with Progress(stream) as progress:
        for done, now in ((40, 0.0), (41, 100.0), (42, 103.0), (1041, 4100.0), (2000, 9000.0)):
            clock[0] = now
            progress("dhbe", done, 2000)
        clock[0] = 9001.0
        progress("next", 0, 10)
        clock[0] = 9004.0
        progress("next", 1, 10)
    told = [line.split("] ")[1] for line in stream.getvalue().splitlines()]
    assert told == [
        "dhbe: step 40 of 2000",
        "dhbe: step 41 of 2000",
        "dhbe: step 42 of 2000, about 1 h 38 min left",
        "dhbe: step 1041 of 2000, about 64 min left",
        "dhbe: step 2000 of 2000",
        "next: 10 steps, compiling …",
        "next: step 1 of 10",
    ]


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
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_run", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "jaxbd: interrupted; no file was left half-written\n"


def test_a_crash_is_no_verdict(monkeypatch, capsys):
    def crash(*args):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.delenv("JAXBD_DEBUG", raising=False)
    monkeypatch.setattr(entry, "_run", crash)
    assert main(["scan"]) == 2
    assert capsys.readouterr().err.startswith(
        "jaxbd: internal error, ZeroDivisionError: division by zero;"
    )


def test_out_of_memory_is_no_internal_error(monkeypatch, capsys):
    def full(*args):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes."
        )

    monkeypatch.setattr(entry, "_run", full)
    assert main(["scan"]) == 2
    assert capsys.readouterr().err.startswith(
        "jaxbd: the device ran out of memory; use smaller batches"
    )


def test_a_given_trigger_changes_its_own_pixels_only(tmp_path):
    import jax
    from PIL import Image

    from jaxbd.attacks import given
    from jaxbd.interop import trigger

    pixels = np.array(
        [[[255, 0, 0, 255], [0, 255, 0, 0]], [[0, 0, 255, 51], [9, 9, 9, 0]]], np.uint8
    )
    Image.fromarray(pixels).save(tmp_path / "trigger.png")
    loaded = trigger.load(str(tmp_path / "trigger.png"))
    images = jax.random.uniform(jax.random.key(0), (2, 5, 5, 3))
    attack, planted = given.make((5, 5, 3), 10, given.Config(row=1, column=3), loaded)
    stamped, before = np.array(attack.stamp(jax.random.key(1), planted, images)), np.asarray(images)
    np.testing.assert_array_equal(stamped[:, 1, 3], [[1, 0, 0]] * 2)  # opaque
    np.testing.assert_allclose(
        stamped[:, 2, 3], 0.8 * before[:, 2, 3] + [0, 0, 0.2], rtol=1e-6
    )  # one fifth
    stamped[:, 1:3, 3] = before[:, 1:3, 3]
    np.testing.assert_array_equal(
        stamped, before
    )  # the transparent pixels and all others, bit for bit


def test_an_added_trigger_is_clipped_and_a_random_place_varies(tmp_path):
    import jax

    from jaxbd.attacks import given
    from jaxbd.interop import trigger

    np.savez(
        tmp_path / "t.npz",
        pattern=np.full((5, 5, 1), -0.25, np.float32),
        application=np.asarray("add"),
    )
    loaded = trigger.load(str(tmp_path / "t.npz"))
    images = jax.numpy.linspace(0, 1, 75).reshape(1, 5, 5, 3)
    attack, planted = given.make((5, 5, 3), 10, given.Config(apply=loaded.apply), loaded)
    stamped = attack.stamp(jax.random.key(0), planted, images)
    np.testing.assert_allclose(stamped, np.clip(np.asarray(images) - 0.25, 0, 1), atol=1e-6)
    config = given.Config(place="random", target=2, poison_rate=1.0)
    attack, planted = given.make((5, 5, 3), 10, config, trigger.load("white:1x1"))
    black = attack.poison(
        jax.random.key(0), planted, Batch(jax.numpy.zeros((30, 5, 5, 3)), jax.numpy.arange(30) % 10)
    )
    assert (np.asarray(black.images).sum((1, 2, 3)) == 3).all() and (
        np.asarray(black.labels) == 2
    ).all()
    assert (
        len({int(where) for where in np.asarray(black.images)[..., 0].reshape(30, -1).argmax(1)})
        > 5
    )


def test_the_compile_cache_has_a_home_of_its_own_unless_told(tmp_path):
    code = (
        "import jax; from jaxbd.cli import common; common.start();"
        " print(jax.config.jax_compilation_cache_dir)"
    )
    known = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    }
    for extra, wanted in (
        ({}, tmp_path / "jaxbd" / "xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "/dev/null/x"}, "/dev/null/x"),
    ):
        environment = {**known, "XDG_CACHE_HOME": str(tmp_path), **extra}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        assert done.stdout.strip() == str(wanted)


def test_the_demo_writes_all_it_names(tmp_path, monkeypatch, capsys):
    """So few steps find nothing, so the verdict is given; exit code 1, since the twin is accused
    too."""
    from jaxbd.detection import verdict
    from jaxbd.pipelines import locate

    accused = verdict.Judgement("backdoored", [7], [], [], [])
    monkeypatch.setattr(verdict, "judge", lambda signs, power: accused)
    monkeypatch.setattr(locate, "candidates", lambda found, config: [7])
    few = [word for what in ("train", "scan", "repair") for word in (f"--{what}-steps", "2")]
    place = tmp_path / "demo"
    assert main(["demo", *few, "--out", str(place)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("After ") and lines[0].endswith("the suspect: backdoored, class 7.")
    assert "in fact class 7 was attacked and the twin is clean" in lines[-3]
    assert lines[-2].startswith("Repaired: attack success")
    assert lines[-1] == f"open {place / 'report.html'}"
    written = "repair.json repaired report.html scan-twin.json scan.json suspect twin"
    assert files_in(place, "*") == written.split()
    found = read(place / "repair.json")
    assert (found["method"], found["config"]["num_steps"]) == ("unlearn", 2)
    assert found["before"].keys() == found["after"].keys() == found["ideal"].keys() == RATES
    assert {"search", "held_out"} < read(place / "scan.json")["data"].keys()
    page = (place / "report.html").read_text()
    assert "MESA mixture" in page and "ideal (true trigger)" in page
    assert "--method bna" in page and "Planted trigger" in page
    assert main(["inspect", str(place / "repaired")]) == 0
