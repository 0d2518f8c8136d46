"""The case file: what a scan leaves, what a repair makes of it, and who may overwrite what."""

import json
import pathlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import toys

from jaxbd.base import UserError
from jaxbd.cli import case as cases
from jaxbd.cli import common, first_answer, from_case, holding, job, known, pre_commit
from jaxbd.cli.commands import repair
from jaxbd.cli.main import main
from jaxbd.cli.rebuild import rebuild
from jaxbd.files import plain
from jaxbd.interop import load, safetensors_file
from jaxbd.pipelines import margin_scan
from jaxbd.pipelines.pair_rules import Config as PairConfig
from jaxbd.pipelines.scan import PRESETS, ScanConfig
from jaxbd.report import results
from jaxbd.training.run import Run

DATA = ["--data", "digits", "--limit", "200"]
SURE = ["--detection.threshold", "1e-6", "--detection.doubt", "1e-6"]
"""Every scan is one that finds a backdoor."""
SCAN = ["--method", "mesa", "--levels", "0.9", "--steps", "20", "--mesa.hidden", "16"]
SCAN += ["--targets", "3", *SURE]
REPAIR = ["--method", "unlearn", "--steps", "3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """A folder with a small model and the case of its scan."""
    place = tmp_path_factory.mktemp("case")
    train = ["attack", "--data", "digits", "--width", "4", "--num-steps", "240"]
    train += ["--target", "3", "--poison-rate", "0.2"]
    assert main([*train, "--image-shape", "8", "8", "1", "--out", str(place / "model")]) == 0
    shutil.rmtree(place / "model.run", ignore_errors=True)
    (place / "model.metrics.jsonl").unlink(missing_ok=True)
    flags = ["--sarif", str(place / "found.sarif"), "--mlbom", str(place / "bom.json")]
    code = main(["scan", str(place / "model"), *DATA, *SCAN, "--out", str(place / "CASE"), *flags])
    assert code == 1
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> pathlib.Path:
    """A copy, whose case speaks of the model in it; searches for triggers fail."""
    shutil.copytree(made, tmp_path / "made")
    record = tmp_path / "made" / "CASE" / "scan.json"
    content = json.loads(record.read_text())
    content["inputs"]["model"]["absolute"] = str(tmp_path / "made" / "model")
    record.write_text(json.dumps(content))

    def search(*args, **others):
        raise AssertionError("a second search")

    monkeypatch.setattr(known, "search", search)
    return tmp_path / "made"


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def change(record: pathlib.Path, **fields) -> None:
    record.write_text(json.dumps(read(record) | fields))


def refusal(capsys, *words) -> str:
    """The one line with which a command was refused, exit code 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxbd: ")]
    assert len(lines) == 1 and "internal" not in lines[0], lines
    return lines[0]


def test_after_an_inconclusive_scan_classes_with_one_sign_are_repaired(place, monkeypatch, capsys):
    """By the repair that checks itself; other methods want a class that is named."""
    case, asked = place / "CASE", []
    change(case / "scan.json", verdict="inconclusive", targets=[], leads=[3])

    def repair(run, key, suspect, images, found, settings, args):
        asked.extend(each.target for each in found.evidence)
        raise UserError("enough is seen")

    monkeypatch.setattr(holding, "repair", repair)
    assert main(["repair", str(case), "--no-rescan"]) == 2
    out, err = capsys.readouterr()
    assert "enough is seen" in err and asked == [3]
    assert "The scan is inconclusive; repairing class 3, which shows one sign of a backdoor." in out
    assert main(["repair", str(case), *REPAIR, "--no-rescan", "--force"]) == 0
    assert "inconclusive and names no class: nothing to repair" in capsys.readouterr().out
    assert not (case / "repair.json").exists()


def test_a_scan_writes_a_case(made):
    case = made / "CASE"
    names = {path.relative_to(case).as_posix() for path in case.rglob("*") if path.is_file()}
    trigger = "triggers/class3-distribution"
    assert names == {"scan.json", "report.html", f"{trigger}.npz", f"{trigger}.png"}
    content = read(case / "scan.json")
    (row,) = content["trigger_files"]
    assert row["file"] == f"{trigger}.npz" and (row["class"], row["size"]) == (3, 3.0)
    assert row["rate"] == content["classes"][3]["attack_success_rate"]
    assert content["files"].keys() == names - {"scan.json"}
    inputs = content["inputs"]
    assert inputs["model"]["absolute"] == str(made / "model") and inputs["data"]["absolute"] is None
    assert inputs["reading"]["limit"] == 200 and "download" not in inputs["reading"]
    assert (case / f"{trigger}.png").read_bytes().startswith(b"\x89PNG")
    assert read(made / "found.sarif")["runs"][0]["results"][0]["ruleId"] == "backdoor"
    assert (
        read(made / "bom.json")["components"][0]["hashes"][0]["content"]
        == (content["model"]["sha256"])
    )
    assert not list(made.glob("CASE.run")) and not list(made.glob(".CASE*"))


def test_repair_of_a_case_needs_no_other_flag(place, capsys):
    """Model, data and triggers are the scan's; all goes into the case, whose files are verified."""
    case = place / "CASE"
    assert main(["repair", str(case), *REPAIR]) == 0
    text = capsys.readouterr().out
    content, scanned = read(case / "repair.json"), read(case / "rescan.json")
    assert content["trigger"] == "recovered" and content["evidence"] == "case"
    assert content["targets"] == [3] and content["scan"]["verdict"] == "backdoored"
    assert content["model"]["manifest"] == read(case / "scan.json")["model"]["manifest"]
    assert (case / "repaired" / "model.safetensors").exists()  # a folder, as the model is
    assert scanned["config"] == read(case / "scan.json")["config"]
    assert (
        scanned["model"]["path"] == str(case / "repaired")
        and "Rescan of the repaired model" in text
    )
    assert main(["verify", str(case)]) == 0
    for name in ("triggers/class3-distribution.npz", "scan.json", "repaired/model.safetensors"):
        known = (case / name).read_bytes()
        (case / name).write_bytes(known + b"\n")
        capsys.readouterr()
        assert main(["verify", str(case)]) == 1
        assert f"differs  {case / name}" in capsys.readouterr().out.replace("\n", "")
        (case / name).write_bytes(known)
    (case / "triggers" / "other.npz").write_bytes(b"1")
    assert main(["verify", str(case)]) == 1
    assert "already exists" in refusal(capsys, "repair", case, *REPAIR)


def test_a_rescan_that_was_not_done_is_done_by_resume(place, capsys):
    case = place / "CASE"
    assert main(["repair", str(case), *REPAIR, "--no-rescan"]) == 0
    assert not (case / "rescan.json").exists()
    known = (case / "repair.json").read_bytes()
    assert main(["repair", str(case), *REPAIR, "--resume"]) == 0
    assert (case / "rescan.json").exists() and (case / "repair.json").read_bytes() == known


def test_repair_of_a_model_takes_the_triggers_of_a_case(place, tmp_path):
    out = tmp_path / "fixed.pth"
    for number, earlier in enumerate((place / "CASE", place / "CASE" / "scan.json")):
        flags = ["--scan", str(earlier), "--out", str(out), *(["--force"] if number else [])]
        assert main(["repair", str(place / "model"), *DATA, *flags, *REPAIR]) == 0
        content = read(tmp_path / "fixed.repair.json")
        assert content["evidence"] == "case" and [c["class"] for c in content["classes"]] == [3]
    assert not (tmp_path / "rescan.json").exists()


def test_a_model_or_images_that_changed_are_refused(place, capsys):
    case, config = place / "CASE", place / "model" / "config.json"
    known = config.read_text()
    config.write_text(known + "\n")
    line = refusal(capsys, "repair", case, *REPAIR)
    assert "config.json was changed" in line and "scan it again" in line
    line = refusal(
        capsys, "repair", place / "model", *DATA, *REPAIR, "--scan", case, "--out", place / "o.pth"
    )
    assert "config.json was changed" in line
    config.write_text(known)
    inputs = read(case / "scan.json")["inputs"]
    inputs["data"]["sha256"] = "0" * 64
    change(case / "scan.json", inputs=inputs)
    assert "not the images of" in refusal(capsys, "repair", case, *REPAIR)
    # both were moved: the model lies beside the case
    inputs["model"] = {"given": "elsewhere/model", "absolute": None}
    change(case / "scan.json", inputs=inputs)
    assert "not the images of" in refusal(capsys, "repair", case, *REPAIR)
    shutil.rmtree(place / "model")
    assert "cannot be found" in refusal(capsys, "repair", case, *REPAIR)


def test_a_trigger_that_changed_or_lies_elsewhere_is_refused(place, capsys):
    case = place / "CASE"
    content = read(case / "scan.json")
    (row,) = content["trigger_files"]
    for name in ("../model/trigger.npz", "/etc/passwd", "triggers/../../x.npz", 3, None):
        change(case / "scan.json", trigger_files=[row | {"file": name}])
        assert "is not a trigger of the case" in refusal(capsys, "repair", case, *REPAIR)
    change(case / "scan.json", trigger_files=[row], files={row["file"]: "0" * 64})
    assert "was changed since the scan" in refusal(capsys, "repair", case, *REPAIR)
    change(case / "scan.json", trigger_files=[])
    assert "has no trigger for class 3" in refusal(capsys, "repair", case, *REPAIR)
    change(case / "scan.json", targets=[], verdict="clean")
    assert main(["repair", str(case), *REPAIR]) == 0
    assert "nothing to repair" in capsys.readouterr().out and not (case / "repaired").exists()


def test_a_case_imports_no_code_and_knows_its_fields(place, capsys):
    case = place / "CASE"
    inputs = read(case / "scan.json")["inputs"]
    known = inputs["reading"]
    for changes, words in (
        ({"arch": "os:system"}, "your own architecture"),
        ({"limit": "many"}, "reading.limit is 'many'"),
        ({"seed": -1}, "--seed -1 is out of range"),
        ({"shell": "rm"}, "has 'shell'"),
    ):
        inputs["reading"] = known | changes
        change(case / "scan.json", inputs=inputs)
        assert words in refusal(capsys, "repair", case, *REPAIR)


def test_a_case_of_a_first_answer_has_no_triggers(made, tmp_path, capsys):
    case, flags = tmp_path / "first", ["--margin.starts", "1", "--margin.steps", "5"]
    assert main(["scan", str(made / "model"), *flags, "--out", str(case)]) == 3
    assert read(case / "scan.json")["trigger_files"] == [] and cases.is_case(case)
    assert read(case / "scan.json")["inputs"]["data"] is None
    assert main(["verify", str(case)]) == 0
    assert "needs clean images; give --data" in refusal(capsys, "repair", case, *REPAIR)


def test_masks_are_triggers_for_evaluate(made, tmp_path, capsys):
    case = tmp_path / "masks"
    flags = ["--method", "neural-cleanse", "--locate-steps", "10", "--anomaly-threshold", "0.1"]
    flags += ["--neural-cleanse.attack-threshold", "0.01", *SURE]
    assert main(["scan", str(made / "model"), *DATA, *flags, "--out", str(case)]) == 1
    rows = read(case / "scan.json")["trigger_files"]
    assert {row["kind"] for row in rows} == {"mask"} and rows
    trigger = ["--trigger", str(case / rows[0]["file"]), "--out", str(tmp_path / "rates.json")]
    assert main(["evaluate", str(made / "model"), *DATA, *trigger]) == 0
    assert read(tmp_path / "rates.json")["trigger"]["target"] == rows[0]["class"]


# Cases that were edited, broken off, or repaired elsewhere: a toy, which nobody has scanned.


@pytest.fixture
def toy(tmp_path) -> pathlib.Path:
    """A case with a trigger for no class."""
    case, model = tmp_path / "toy", toys.save(tmp_path / "net")
    (case / "triggers").mkdir(parents=True)
    content = {
        "verdict": "backdoored",
        "targets": [3],
        "leads": [],
        "classes": [{"class": k, "name": str(k)} for k in range(10)],
        "config": plain(results.settings(ScanConfig())),
        "compute_dtype": "stored",
        "model": {"image_shape": [8, 8, 1], "normalisation": {"mean": [0.0], "std": [1.0]}},
        "data": {"source": "digits"},
        "inputs": {
            "model": {"given": "net", "absolute": str(model)},
            "data": {"given": "digits", "absolute": None, "sha256": "0" * 64},
            "reading": {},
        },
        "trigger_files": [],
        "files": {},
    }
    (case / "scan.json").write_text(json.dumps(content))
    return case


@pytest.fixture
def opened(monkeypatch) -> list:
    """What `repair` would search for once it reads the model, which it does not here."""
    asked = []

    def fail(args, method, *, searches):
        asked.append((searches, args.search.targets, args.scan))
        raise UserError("nothing is read here")

    monkeypatch.setattr(repair, "_open", fail)
    return asked


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": [{}]},
        {"targets": [[3]]},
        {"targets": [3.0]},
        {"targets": ["a"]},
        {"targets": [True]},
        {"targets": [10]},
        {"targets": [-1]},
        {"targets": []},
        {"targets": [], "verdict": "inconclusive", "leads": [{}]},
        {"targets": [], "verdict": "inconclusive", "leads": 3},
        {"verdict": "evil"},
        {"verdict": ["clean"]},
        {"verdict": None},
        {"compute_dtype": "evil"},
        {"compute_dtype": ["float32"]},
        {"config": {"method": "auto", "steps": "many"}},
        {"config": {"method": "auto", "targets": [10]}},
    ],
)
def test_an_edited_case_is_refused_before_anything_is_read(toy, opened, capsys, fields):
    change(toy / "scan.json", **fields)
    line = refusal(capsys, "repair", toy, *REPAIR)
    assert not opened and ("scan.json" in line or "target 10 is out of range" in line)


def test_the_rescan_of_a_model_elsewhere_lies_beside_it(toy, opened, tmp_path, capsys):
    """And takes no other scan's place: the case's rescan is of the case's model."""
    assert from_case.place_rescan(toy / "repaired.pth") == toy / "rescan.json"
    for name, beside in (("c.pth", "c.rescan.json"), ("c", "c.rescan.json")):
        assert from_case.place_rescan(tmp_path / name) == tmp_path / beside
    for out, other in ((toy / "r.pth", toy / "rescan.json"), (tmp_path / "c.pth", None)):
        other = other or tmp_path / "c.rescan.json"
        other.write_text("mine")
        line = refusal(capsys, "repair", toy, *REPAIR, "--out", out)
        assert f"{other} already exists" in line and not opened and other.read_text() == "mine"
        for flag in ("--no-rescan", "--force"):
            assert "nothing is read" in refusal(capsys, "repair", toy, *REPAIR, "--out", out, flag)
            assert opened.pop()
        other.unlink()
    out = tmp_path / "c.pth"  # its figures are beside it, not in the case
    args = SimpleNamespace(out=out, stopping=job.Flags(resume=True))
    out.write_text("repaired")
    assert not from_case.is_repaired(args)
    (tmp_path / "c.repair.json").write_text("{}")
    assert from_case.is_repaired(args)
    (tmp_path / "c.rescan.json").write_text("{}")
    assert not from_case.is_repaired(args)


@pytest.mark.parametrize(("name", "shape"), [("c.pth", (8, 8, 1)), ("c", None), ("c.onnx", None)])
def test_a_file_of_weights_is_scanned_as_the_folder_it_was_said(toy, tmp_path, name, shape):
    """A folder or a graph says its images' size and normalisation itself."""
    reading, known = common.Reading(), from_case.Past(cases.read(toy), is_own=True)
    args = SimpleNamespace(model=tmp_path / "net", out=tmp_path / name, data="digits")
    args.stopping, args.reading, args.test_data = job.Flags(), reading, None
    found = from_case._configure_rescan(args, known).reading
    assert found.image_shape == shape and found.mean == ((0.0,) if shape else ())


def test_a_class_without_a_trigger_is_searched_if_named(toy, opened, tmp_path, capsys):
    """With the case as the model, or as its earlier scan."""
    words = ["repair", tmp_path / "net", *DATA, "--scan", toy, "--out", tmp_path / "o.pth", *REPAIR]
    for command in (["repair", toy, *REPAIR], words):
        refusal(capsys, *command, "--target", 5)
        assert opened.pop()[:2] == (True, (5,))
        refusal(capsys, *command)
        assert opened.pop()[:2] == (False, ())
    change(toy / "scan.json", trigger_files=[{"class": 5}])
    refusal(capsys, "repair", toy, *REPAIR, "--target", 5)
    assert opened.pop()[:2] == (False, ())


def test_an_earlier_first_answer_is_searched_anew(toy, opened, tmp_path, capsys):
    """It found nothing because it had no images to search with."""
    change(toy / "scan.json", data=None, verdict="inconclusive", targets=[], method="margin")
    content = read(toy / "scan.json")
    del content["leads"]
    (toy / "scan.json").write_text(json.dumps(content))
    command = ["repair", tmp_path / "net", *DATA, "--scan", toy, "--out", tmp_path / "o.pth"]
    for method in ([], REPAIR):
        refusal(capsys, *command, *method)
        assert opened.pop() == (True, (), None)


def test_what_a_broken_off_rescan_left_is_the_cases_own(toy):
    (toy / "rescan.json.run").mkdir()
    for name in (".rescan.json.run.lock", "rescan.json.metrics.jsonl", ".repaired.run.lock"):
        (toy / name).write_text("")
    cases.check(toy, job.Flags(force=True))
    (toy / ".notes.lock").write_text("mine")
    with pytest.raises(UserError, match=r"it contains \.notes\.lock"):
        cases.check(toy, job.Flags(force=True))


# Who may overwrite what.


def test_outputs_that_are_there_stay(made, tmp_path, capsys):
    model = pathlib.Path(shutil.copytree(made / "model", tmp_path / "model"))
    other, known = tmp_path / "there.json", {each: each.read_bytes() for each in model.iterdir()}
    other.write_text("mine")
    for verb in (
        ["convert", model, "--out", model],
        ["repair", model, *DATA, *REPAIR, "--out", model],
        ["scan", model, *DATA, "--out", other],
        ["scan", model, *DATA, "--sarif", other],
        ["scan", model, *DATA, "--mlbom", other],
        ["scan", model, *DATA, "--out", model],
        ["evaluate", model, *DATA, "--out", other],
        ["attack", "--data", "digits", "--out", model],
    ):
        line = refusal(capsys, *verb)
        named = other if other in verb else model
        assert str(named) in line and "choose another" in line, line
    assert other.read_text() == "mine"
    assert known == {each: each.read_bytes() for each in model.iterdir()}
    assert main(["evaluate", str(model), *DATA, "--out", str(other), "--force"]) == 0
    assert read(other)["n_clean"] == 200


def test_force_replaces_a_case_and_nothing_else(made, tmp_path, capsys):
    case = pathlib.Path(shutil.copytree(made / "CASE", tmp_path / "CASE"))
    command = ["scan", made / "model", "--margin.starts", "1", "--margin.steps", "5", "--out", case]
    assert "already exists" in refusal(capsys, *command)
    (case / "notes.txt").write_text("mine")
    assert "it contains notes.txt" in refusal(capsys, *command, "--force")
    (case / "notes.txt").unlink()
    assert main([*map(str, command), "--force"]) == 3
    assert read(case / "scan.json")["trigger_files"] == [] and not (case / "report.html").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "found.txt"], "--out found.txt has no known ending; use .json, or no"),
        (["--report", "found.pdf"], "use .html or .htm"),
        (["--sarif", "found"], "use .sarif or .json"),
        (["--mlbom", "found.xml"], "use .json"),
        (["--sarif", "a.json", "--mlbom", "a.json"], "is also another input or output"),
    ],
)
def test_unknown_endings_are_refused_naming_the_known_ones(
    tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(capsys, "scan", "never-read.pth", *flags)


def test_repair_of_a_model_needs_an_output(capsys):
    assert "missing: --out" in refusal(capsys, "repair", "never-read.pth", *DATA)


# Settings from a record.


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), PairConfig(), common.Reading(mean=(0.5,), std=(0.25,))]
)
def test_settings_come_back_from_their_record(config):
    written = json.loads(json.dumps(plain(results.settings(config))))
    assert rebuild(type(config), written, "scan.json") == config


@pytest.mark.parametrize(
    "content",
    [
        {"steps": "9"},
        {"steps": True},
        {"levels": [0.5, "x"]},
        {"method": "magic"},
        {"mesa": {"patch": [3]}},
        {"with_margin": 1},
        {"evil": 1},
        [],
    ],
)
def test_settings_of_a_wrong_type_are_refused(content):
    with pytest.raises(UserError):
        rebuild(ScanConfig, content, "scan.json: config")


# The hook for commits.


def test_the_hook_answers_for_each_model_once(made, tmp_path, monkeypatch, capsys):
    model, answers = made / "model", []

    def answer(path):
        answers.append(path)
        if path.suffix == ".pth":
            raise UserError(f"{path}: no model")
        margin = {"p_value": 0.01, "classes": [0] if path == model else []}
        return {"classes": [{"name": "cat"}], "margin": margin, "decided_by": ""}

    monkeypatch.setattr(pre_commit, "answer", answer)
    files = [model / "model.safetensors", model / "config.json"]
    assert pre_commit.main([str(each) for each in files]) == 1 and answers == [model]
    assert "SUSPICIOUS: class 0 (cat)" in capsys.readouterr().out
    assert pre_commit.main([str(tmp_path / "quiet.onnx"), "a.bounds.safetensors"]) == 0
    assert pre_commit.main([str(tmp_path / "bad.pth")]) == 2
    assert pre_commit.main([str(tmp_path / "bad.pth"), "--pass-unreadable"]) == 0
    assert pre_commit.main([]) == 0


def test_the_hook_opens_each_file_that_is_not_one_of_a_folders_own(tmp_path, monkeypatch, capsys):
    """Whatever it is called: a name proves nothing."""
    model, opened = toys.save(tmp_path / "m"), []

    def answer(path):
        opened.append(path)
        raise UserError("no model")

    monkeypatch.setattr(pre_commit, "answer", answer)
    names = ["evil.pth", "xguard.safetensors", "x.bounds.safetensors"]
    others = [model / name for name in names] + [tmp_path / "guard.safetensors"]
    for path in others:
        path.write_bytes(b"PK")
    assert pre_commit.main([str(path) for path in others]) == 2 and opened == others
    opened.clear()
    (model / "guard.safetensors").write_bytes(b"PK")
    assert pre_commit.main([str(model / "guard.safetensors")]) == 2 and opened == [model]
    opened.clear()
    capsys.readouterr()
    bounds = tmp_path / "r.bounds.safetensors"
    safetensors_file.write(bounds, {"bounds/norm0/upper": np.ones(4, np.float32)}, {})
    assert pre_commit.main([str(bounds)]) == 0 and not opened
    assert f"{bounds}: activation bounds" in capsys.readouterr().out


def test_the_hook_passes_no_model_that_could_not_be_checked(tmp_path, monkeypatch, capsys):
    """A crash is no "stands out", which is Python's own exit code for one."""

    def answer(path):
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr(pre_commit, "answer", answer)
    assert pre_commit.main(["m.pth", "--pass-unreadable"]) == 2
    assert "m.pth: could not be checked, ZeroDivisionError: by chance" in capsys.readouterr().out


def test_logits_that_overflow_are_no_first_answer(tmp_path, monkeypatch):
    """For a black image, or only where the search went; the hook and `scan` say the same."""
    steep = toys.save(tmp_path / "steep", scale=1e15)
    config = margin_scan.Config(starts=1, steps=2)
    with pytest.raises(FloatingPointError, match=r"steep: its logits are not finite on some"):
        first_answer.search(Run(), load.open_model(steep), common.Reading(), config)
    model = load.open_model(toys.save(tmp_path / "m"))
    logits = lambda net, variables, batch: np.full((1, 10), np.inf)
    monkeypatch.setattr(common.evaluate, "logits", logits)
    with pytest.raises(UserError, match="not finite, even for a black image"):
        first_answer.open_suspect(model.path, common.Reading())
