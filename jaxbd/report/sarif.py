"""A scan's result in SARIF 2.1.0, for code scanning (OASIS, errata 01)."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxbd.report import advice

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
RULES = {
    "backdoor": (
        "A backdoor leads to a class",
        "Small triggers, recovered by search, send images of other classes to one class. Do not"
        " deploy the model; `jaxbd repair` removes the backdoor.",
        "error",
    ),
    "suspicious": (
        "A class shows one sign of a backdoor",
        "One of several searches points to a class, which sometimes happens with clean models too."
        " Scan with more images and steps before you use the model.",
        "warning",
    ),
    "undecided": (
        "The scan could not decide",
        "Nothing was found, but the scan could not have found a backdoor, so it is inconclusive.",
        "note",
    ),
}
"""Rule -> short text, full text, level. A clean scan has no results."""


def describe(content: dict[str, Any]) -> dict[str, Any]:
    """The SARIF log of one scan; `content` is its scan.json."""
    versions = content["versions"]
    rules = [
        {
            "id": rule,
            "shortDescription": {"text": short},
            "fullDescription": {"text": full},
            "help": {"text": full},
            "defaultConfiguration": {"level": level},
            "properties": {"tags": ["security", "machine-learning"]},
        }
        for rule, (short, full, level) in RULES.items()
    ]
    driver = {"name": "jaxbd", "rules": rules}
    # in a source tree, files.versions reports "not installed"
    if versions["jaxbd"][:1].isdigit():
        driver["semanticVersion"] = versions["jaxbd"]
    run = {
        "tool": {"driver": driver},
        "artifacts": [_artifact(content["model"])],
        "results": [_result(content, *found) for found in list_results(content)],
        "columnKind": "unicodeCodePoints",
        "properties": {
            "verdict": content["verdict"],
            "decidedBy": content["decided_by"],
            "versions": versions,
        },
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def list_results(content: dict[str, Any]) -> list[tuple[str, int | None, str]]:
    """(rule, class, message) for everything a scan has to report."""
    names = {row["class"]: row for row in content["classes"]}
    label = lambda number: name_class(names[number])
    found = []
    for target in content["targets"]:
        rate = advice.highest_rate(names[target])
        works = "" if rate is None else f" They work on {100 * rate:.1f} % of held-out images."
        found.append(
            ("backdoor", target, f"Triggers lead to class {label(target)}: a backdoor.{works}")
        )
    margin = content.get("margin") or {}
    # without data there are only the margins; with data they are one sign among the leads
    leads = content.get("leads") or ([] if content.get("data") else margin.get("classes") or [])
    found += [
        ("suspicious", lead, f"Class {label(lead)} shows one sign of a backdoor.")
        for lead in leads
        if lead not in content["targets"]
    ]
    if content["verdict"] == "inconclusive" and not found:
        why = content["decided_by"] if content.get("data") else "it had no images to search with"
        found.append(("undecided", None, f"The scan is inconclusive: {why}."))
    return found


def _artifact(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "location": {"uri": _uri(model["path"])},
        "roles": ["analysisTarget"],
        "hashes": {"sha-256": model["sha256"]},
    }


def _result(content: dict[str, Any], rule: str, number: int | None, message: str) -> dict[str, Any]:
    model = content["model"]
    where = {
        "artifactLocation": {"uri": _uri(model["path"]), "index": 0},
        # a model has no lines, but code scanning does not list a result without one
        "region": {"startLine": 1},
    }
    return {
        "ruleId": rule,
        "ruleIndex": list(RULES).index(rule),
        "level": RULES[rule][2],
        "message": {"text": message},
        "locations": [{"physicalLocation": where}],
        "partialFingerprints": {"jaxbd/v1": f"{model['sha256']}:{rule}:{number}"},
        "properties": {} if number is None else {"class": number},
    }


def _uri(path: str) -> str:
    """A path inside the working folder is relative, as code scanning requires; any other is a full
    file URI."""
    place = pathlib.Path(path).expanduser().absolute()
    here = pathlib.Path.cwd()
    if not place.is_relative_to(here):
        return place.as_uri()
    root = here.as_uri().rstrip("/") + "/"
    return place.as_uri().removeprefix(root)


def name_class(row: Mapping[str, Any]) -> str:
    """`8 (ship)`, or only the number if the name is the number; `row` is one of a record's
    classes."""
    number, name = str(row["class"]), str(row["name"])
    return number if name == number else f"{number} ({name})"
