"""A bill of materials for a scanned model: CycloneDX 1.6 (ECMA-424), with a model card."""

import datetime
import uuid
from typing import Any

from jaxbd.report import sarif

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
SEVERITIES = {"backdoor": "critical", "suspicious": "medium"}
"""Rule in `sarif` -> severity of the vulnerability it is listed as."""


def describe(content: dict[str, Any], now: datetime.datetime | None = None) -> dict[str, Any]:
    """The bill of materials of one scanned model; `content` is its scan.json.

    Args:
      now: timestamp to write; by default the current time.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    model, versions = content["model"], content["versions"]
    ref = f"model:{model['sha256']}"
    stamp = now.isoformat(timespec="seconds").replace("+00:00", "Z")
    tool = {"type": "application", "name": "jaxbd", "version": versions["jaxbd"]}
    return {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # the same scan at the same time is the same document
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{ref} {stamp}')}",
        "version": 1,
        "metadata": {"timestamp": stamp, "tools": {"components": [tool]}},
        "components": [_component(content, ref)],
        "vulnerabilities": [
            _vulnerability(content, ref, *found)
            for found in sarif.list_results(content)
            if found[0] in SEVERITIES
        ],
    }


def _component(content: dict[str, Any], ref: str) -> dict[str, Any]:
    model = content["model"]
    facts = {
        "verdict": content["verdict"],
        "decided-by": content["decided_by"],
        "targets": ",".join(map(str, content["targets"])),
        "method": content["method"],
        "classes": model["classes"],
        "image-shape": "x".join(map(str, model["image_shape"])),
        "seed": content["seed"],
    }
    (subject,) = model["manifest"]["subject"]
    parts = [
        {
            "type": "file",
            "bom-ref": f"{ref}/{number}",
            "name": each["name"],
            "hashes": [{"alg": "SHA-256", "content": each["digest"]}],
        }
        for number, each in enumerate(model["manifest"]["predicate"]["resources"])
    ]
    return {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": subject["name"],
        "hashes": [{"alg": "SHA-256", "content": model["sha256"]}],
        "modelCard": _card(content),
        "components": parts,
        "properties": [
            {"name": f"jaxbd:scan:{name}", "value": str(value)} for name, value in facts.items()
        ],
    }


def _card(content: dict[str, Any]) -> dict[str, Any]:
    """The model card: the scan's findings, without the accuracy on clean images, which a scan does
    not measure."""
    metrics = [
        {
            "type": "attack success rate of recovered triggers",
            "value": f"{row['attack_success_rate']:.4f}",
            "slice": f"class {sarif.name_class(row)}",
        }
        for row in content["classes"]
        if row.get("attack_success_rate") is not None
    ]
    return {
        "modelParameters": {
            "task": "image-classification",
            "modelArchitecture": content["model"]["arch"],
            "inputs": [{"format": "image"}],
            "outputs": [{"format": "class"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {
            "technicalLimitations": [
                "A scan without a finding does not show that the model has no backdoor."
            ]
        },
    }


def _vulnerability(
    content: dict[str, Any], ref: str, rule: str, number: int | None, message: str
) -> dict[str, Any]:
    advice = sarif.RULES[rule][1]
    return {
        "bom-ref": f"{ref}#{rule}-{number}",
        "id": f"jaxbd-{rule}-{number}",
        "source": {"name": "jaxbd"},
        "ratings": [{"source": {"name": "jaxbd"}, "severity": SEVERITIES[rule], "method": "other"}],
        "description": message,
        "recommendation": advice,
        "affects": [{"ref": ref}],
        "properties": [{"name": "jaxbd:scan:verdict", "value": content["verdict"]}],
    }
