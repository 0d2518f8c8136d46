"""Which files decide what a model computes, and whether they are still the recorded ones."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jaxbd.base import UserError
from jaxbd.cli import main
from jaxbd.detection import guard
from jaxbd.interop import folder, guarded, inspect, load, manifest
from jaxbd.limits import Refusal
from jaxbd.models import build

SPEC = build.Spec(arch="cnn", classes=3, image_shape=(8, 8, 3), options={"width": 4, "stages": 2})


@pytest.fixture(scope="module")
def variables():
    return build.net(SPEC).init(jax.random.key(1))


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_bounds(variables):
    clipped = {"lower": np.zeros(4, np.float32), "upper": np.ones(4, np.float32)}
    return {**variables, "bounds": {"norm0": clipped}}


def test_the_statement_is_that_of_model_signing():
    """The hash of the whole is that of the raw digests in the order of the names."""
    files = {"b": "02" * 32, "a": "01" * 32}
    made = manifest.statement("m", files)
    whole = hashlib.sha256(bytes([1] * 32 + [2] * 32)).hexdigest()
    assert made["_type"] == "https://in-toto.io/Statement/v1"
    assert made["predicateType"] == "https://model_signing/signature/v1.0"
    assert made["subject"] == [{"name": "m", "digest": {"sha256": whole}}]
    assert [each["name"] for each in made["predicate"]["resources"]] == ["a", "b"]
    assert {each["algorithm"] for each in made["predicate"]["resources"]} == {"sha256"}
    assert made["predicate"]["serialization"]["method"] == "files"
    assert manifest.parse(json.loads(json.dumps(made))) == files


def test_external_data_counts_where_a_record_names_it(tmp_path):
    """One name in two folders is two files; what the record names elsewhere is not looked for."""
    (tmp_path / "m.onnx").write_bytes(b"m")
    (tmp_path / "x.bin").write_bytes(b"x")
    for place in "ab":
        (tmp_path / place).mkdir()
        (tmp_path / place / "w.bin").write_bytes(place.encode())
    named = ["m.onnx", "a/w.bin", "b/w.bin", "gone.bin"]
    found = manifest.of(tmp_path / "m.onnx", named=named)
    assert found == {name: digest(tmp_path / name) for name in named[:3]}


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_the_hub_is_its_weights_and_both_settings(tmp_path, weights):
    for name in (weights, "config.json", "preprocessor_config.json", "README.md"):
        (tmp_path / name).write_text('{"architecture": "resnet18"}')
    found = manifest.of(tmp_path)
    assert sorted(found) == sorted([weights, "config.json", "preprocessor_config.json"])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: m["predicate"]["resources"].pop(), "total hash"),
        (lambda m: m["predicate"]["resources"][0].update(digest="0" * 64), "total hash"),
        (lambda m: m["predicate"]["resources"][0].update(digest="0"), "the hash '0'"),
        (lambda m: m["predicate"]["resources"][0].update(name="../x"), "a file '../x'"),
        (lambda m: m["predicate"]["resources"][0].update(name="b"), "model signing"),
        (lambda m: m["predicate"]["resources"][0].update(algorithm="md5"), "model signing"),
        (lambda m: m.update(predicateType="x"), "model signing"),
        (lambda m: m.pop("subject"), "model signing"),
    ],
)
def test_a_changed_statement_is_refused(change, said):
    made = manifest.statement("m", {"b": "02" * 32, "a": "01" * 32})
    change(made)
    with pytest.raises(Refusal, match=said):
        manifest.parse(made)


def test_every_file_that_decides_is_in_it(tmp_path, variables):
    """What reading hashed is what lies there: weights, settings, bounds, guard."""
    folder.save(tmp_path / "m", SPEC, variables)
    model = load.open_model(tmp_path / "m")
    names = {"model.safetensors", "config.json"}
    assert model.files == manifest.of(tmp_path / "m") and set(model.files) == names
    assert model.files["config.json"] == digest(tmp_path / "m" / "config.json")
    load.save_model(tmp_path / "r.pth", model, with_bounds(variables))
    again = load.open_model(tmp_path / "r.pth", image_shape=(8, 8, 3))
    assert again.files == manifest.of(tmp_path / "r.pth")
    assert set(again.files) == {"r.pth", "r.bounds.safetensors"}
    packed = guard.pack(variables, [variables])
    guarded.save(tmp_path / "g", SPEC, packed, [1])
    whole = load.open_model(tmp_path / "g")
    assert whole.files == manifest.of(tmp_path / "g")
    assert set(whole.files) == names | {"guard.safetensors"}
    for path in ("m", "r.pth", "g"):
        stated = inspect.describe(tmp_path / path)["manifest"]
        assert manifest.parse(stated) == manifest.of(tmp_path / path)


def test_weights_that_config_does_not_name_are_refused(tmp_path, variables):
    for name, factor in (("a", 1.0), ("b", 2.0)):
        folder.save(tmp_path / name, SPEC, jax.tree.map(lambda x: factor * x, variables))  # noqa: B023
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that config\.json na"):
        load.open_model(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config.pop("sha256")  # as folders were written before
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert load.open_model(tmp_path / "a").spec.arch == "cnn"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"class_names": ["cat", "dog"]}, "gives 2 class_names to 3 classes"),
        ({"class_names": ["a", "b", "c\x1b[2J"]}, "class_names is"),
        ({"mean": [1e300]}, "mean is"),
        ({"std": [0]}, "std is"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, variables, change, said):
    folder.save(tmp_path / "m", SPEC, variables)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=said):
        load.open_model(tmp_path / "m")


def test_settings_that_are_read_in_two_ways_are_refused(tmp_path, variables):
    folder.save(tmp_path / "m", SPEC, variables)
    path = tmp_path / "m" / "config.json"
    good = path.read_text()
    path.write_text(good.replace("{", '{"classes": 2, ', 1))
    with pytest.raises(UserError, match=r"config\.json names 'classes' twice"):
        load.open_model(tmp_path / "m")
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        load.open_model(tmp_path / "m")


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("batch_stats/norm0/var", -1e-3, "a negative variance or standard deviation"),
        ("params/head/kernel", 1e30, "holds values of 1e\\+30"),
        ("params/head/kernel", np.nan, "NaN or infinite"),
    ],
)
def test_values_that_no_net_holds_are_refused(tmp_path, variables, name, value, said):
    tensors = folder.flatten(variables)
    tensors[name] = np.array(tensors[name])
    tensors[name].flat[0] = value
    folder.save(tmp_path / "m", SPEC, folder.unflatten(tensors))
    with pytest.raises(UserError, match=said):
        load.open_model(tmp_path / "m")
    assert load.open_model(tmp_path / "m", allow_nonfinite=True).spec.arch == "cnn"


# jaxbd verify


@pytest.fixture
def case(tmp_path, variables, monkeypatch):
    """A model file with bounds, and a record of it, as the verbs write one."""
    monkeypatch.chdir(tmp_path)
    folder.save(tmp_path / "m", SPEC, variables)
    load.save_model("r.pth", load.open_model("m"), with_bounds(variables))
    files = load.open_model("r.pth", image_shape=(8, 8, 3)).files
    record = {"model": {"path": "r.pth", "manifest": manifest.statement("r.pth", files)}}
    (tmp_path / "scan.json").write_text(json.dumps(record))
    return tmp_path


def verify(capsys, *words) -> tuple[int, str]:
    code = main.main(["verify", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_files_that_are_the_recorded_ones(case, capsys):
    code, said = verify(capsys, "scan.json")
    assert code == 0 and "2 of 2 files match the record" in said
    assert "r.bounds.safetensors" in said


@pytest.mark.parametrize("name", ["r.pth", "r.bounds.safetensors"])
def test_a_file_that_changed_is_named(case, capsys, name):
    (case / name).write_bytes((case / name).read_bytes() + b"x")
    code, said = verify(capsys, "scan.json")
    line = next(line for line in said.splitlines() if line.split()[1:2] == [str(case / name)])
    assert code == 1 and line.startswith("differs") and "1 of 2 files" in said


def test_files_that_went_or_came_are_named(case, capsys):
    (case / "r.bounds.safetensors").unlink()
    code, said = verify(capsys, "scan.json")
    assert code == 1 and "missing" in said
    (case / "moved").mkdir()
    (case / "r.pth").rename(case / "moved" / "r.pth")
    assert verify(capsys, "scan.json")[0] == 1
    assert verify(capsys, "scan.json", "--model", "moved/r.pth")[1].count("same") == 1
    record = json.loads((case / "scan.json").read_text())
    stated = {"r.pth": digest(case / "moved" / "r.pth")}
    record["model"]["manifest"] = manifest.statement("r.pth", stated)
    (case / "moved" / "scan.json").write_text(json.dumps(record))
    assert verify(capsys, "moved")[0] == 0  # beside the record
    (case / "moved" / "r.bounds.safetensors").write_bytes(b"x")
    code, said = verify(capsys, "moved")
    assert code == 1 and "new" in said


def test_what_a_repair_wrote_is_looked_for_beside_its_record_alone(case, capsys, monkeypatch):
    """Pristine copies in the working folder, or at an absolute path, are other files."""
    stated = manifest.statement("clean.pth", {"clean.pth": digest(case / "r.pth")})
    for name in ("arch", "desk"):
        (case / name).mkdir()
        shutil.copy(case / "r.pth", case / name / "clean.pth")
    for place in ("clean.pth", str(case / "desk" / "clean.pth")):
        record = {"repaired": {"path": place, "manifest": stated}}
        (case / "arch" / "clean.repair.json").write_text(json.dumps(record))
        monkeypatch.chdir(case / "desk")
        assert verify(capsys, "../arch/clean.repair.json")[0] == 0
        (case / "arch" / "clean.pth").write_bytes(b"tampered")
        code, said = verify(capsys, "../arch/clean.repair.json")
        assert code == 1 and f"differs  {case}" in said and "arch/clean.pth" in said
        shutil.copy(case / "r.pth", case / "arch" / "clean.pth")


def test_the_model_is_found_from_any_working_folder(case, capsys, monkeypatch):
    """At its absolute path, beside the record, beside the case, and only then in the folder at
    hand, whose file of that name may be another."""
    record = json.loads((case / "scan.json").read_text())
    record["model"]["path"] = "models/r.pth"  # as it was given, from a folder that is not known
    places = [case / "models", case / "out" / "CASE", case / "out", case / "desk" / "models"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for name in ("r.pth", "r.bounds.safetensors"):
            shutil.copy(case / name, place / name)
    (places[1] / "triggers").mkdir()
    record["inputs"] = {"model": {"given": "models/r.pth", "absolute": str(places[0] / "r.pth")}}
    (places[1] / "scan.json").write_text(json.dumps(record))
    monkeypatch.chdir(case / "desk")
    for place in places:
        code, said = verify(capsys, places[1])
        assert code == 0 and f"{place / 'r.pth'} (" in said, said
        for name in ("r.pth", "r.bounds.safetensors"):
            (place / name).unlink()
    code, said = verify(capsys, places[1])
    assert code == 1 and f"missing  {places[0] / 'r.pth'} (" in said


def test_another_path_is_that_of_the_scanned_model_alone(case, capsys):
    """Not of the repaired model, nor of a rescan's."""
    scanned, repaired = json.loads((case / "scan.json").read_text()), case / "c.pth"
    load.save_model(repaired, load.open_model("m"), load.open_model("m").variables)
    stated = manifest.statement("c.pth", {"c.pth": digest(repaired)})
    own = {"path": "c.pth", "manifest": stated}
    (case / "c.repair.json").write_text(json.dumps(scanned | {"repaired": own}))
    (case / "c.rescan.json").write_text(json.dumps({"model": own}))
    (case / "moved").mkdir()
    for name in ("r.pth", "r.bounds.safetensors"):
        (case / name).rename(case / "moved" / name)
    assert verify(capsys, case)[0] == 1
    code, said = verify(capsys, case, "--model", "moved/r.pth")
    assert code == 0 and "6 of 6 files match" in said
    code, said = verify(capsys, "c.rescan.json", "--model", "moved/r.pth")
    assert code == 2 and "leave --model out" in said


def test_files_that_are_no_records_are_passed_over_by_name(case, capsys):
    (case / "notes.json").write_text("remember the milk")
    code, said = verify(capsys, case)
    assert code == 0 and "passed over notes.json, which is no record" in said
    assert verify(capsys, "notes.json")[0] == 2
    (case / "c.repair.json").write_text("{")  # the name says what it is: a damaged record
    assert verify(capsys, case)[0] == 2


def test_a_model_folder_is_held_against_its_own_settings(case, capsys):
    assert verify(capsys, "m")[0] == 0
    with (case / "m" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    code, said = verify(capsys, "m")
    assert code == 1 and "differs" in said


def test_a_record_that_was_changed_or_says_nothing_is_an_error(case, capsys):
    record = json.loads((case / "scan.json").read_text())
    record["model"]["manifest"]["predicate"]["resources"][0]["digest"] = "0" * 64
    (case / "scan.json").write_text(json.dumps(record))
    code, said = verify(capsys, "scan.json")
    assert code == 2 and "was changed" in said and len(said.splitlines()) == 1
    (case / "other.json").write_text("{}")
    assert verify(capsys, "other.json")[0] == verify(capsys, "nowhere")[0] == 2
    (case / "other.json").write_text("[" * 100_000)
    code, said = verify(capsys, "other.json")
    assert code == 2 and "not valid JSON" in said


def test_a_record_cannot_name_files_elsewhere(case, capsys):
    stated = manifest.statement("r.pth", {"r.pth": "0" * 64})
    stated["predicate"]["resources"][0]["name"] = "../../etc/passwd"
    record = {"model": {"path": "r.pth", "manifest": stated}}
    (case / "scan.json").write_text(json.dumps(record))
    assert verify(capsys, "scan.json")[0] == 2
