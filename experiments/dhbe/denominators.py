"""ASR by the two denominators in use: all images of other classes than the target, and those among
them that the net under test classifies correctly without the trigger, as in the released code of
Yan et al. 2023 (their eq. 9 asks the backdoored net).
"""

from typing import Any

OURS, PAPERS = "ASR", "ASR, eq. 9"


def both(rates: dict[str, Any], which: str = "") -> dict[str, Any]:
    """The two columns of one net's `evaluate.Rates`, their names followed by `which`."""
    return {
        OURS + which: rates["attack_success_rate"],
        PAPERS + which: rates["attack_success_rate_correct_only"],
    }


def table(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The digit victims of a record of the section dhbe, after erasure, by both denominators."""
    rows = []
    for part, erasure in (("digits", "DHBE"), ("pure", "pure distillation")):
        for result in record["details"][part]:
            first = {"erasure": erasure, "victim": result["name"]}
            rows.append({**first, **both(result["after"])})
    return rows
