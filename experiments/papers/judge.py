"""What a net is worth on the judge's images: accuracy, attack success with every denominator in
use, source inference, several copies of the trigger. Nothing here chooses anything."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dhbe import dhbe_cases
from jaxbd.base import Batch, Net, UserError, Variables
from jaxbd.detection import guard
from jaxbd.metrics import evaluate
from jaxbd.pipelines import compare
from jaxbd.pipelines.repair import Repaired

COPIES = (4, 9)
"""Triggers of the amplified attack (Yan et al. 2023, section 5.3)."""


def judge(
    case: compare.Case, repaired: Repaired | None, *, patch: bool, test: Batch | None = None
) -> dict[str, Any]:
    """Rates of a repaired net, or of the victim itself where there is none.

    Returns: `accuracy`; `asr` over images of other classes than the attacker's; `asr_eq9` over
    those of them that the backdoored net gets right (Yan et al. 2023, eq. 9); `asr_released` over
    those that the judged net gets right (their released code); `asr_all` over all images; `sia`;
    `x4`, `x9` as `asr`; `tpr`, `fpr` of a net that guards itself.
    """
    test = case.test if test is None else test
    net, variables = open_repaired(case, repaired)
    labels = np.asarray(test.labels)
    wanted = np.asarray(case.attack.relabel(jnp.asarray(labels)))
    own = evaluate.logits(net, variables, test).argmax(-1)
    victim = own if repaired is None else _answer(case, test)
    hit = _stamped(net, variables, case, test)
    others = wanted != labels
    found = {
        "accuracy": float((own == labels).mean()),
        "asr": _share(hit == wanted, others),
        "asr_eq9": _share(hit == wanted, others & (victim == labels)),
        "asr_released": _share(hit == wanted, others & (own == labels)),
        "asr_all": float((hit == wanted).mean()),
        "sia": _share(hit == labels, others),
        "n_test": len(labels),
        "n_triggered": int(others.sum()),
    }
    found |= _copies(case, net, variables, test) if patch else {}
    if repaired is not None and repaired.guarded:
        flag = guard.flag(case.victim.net, repaired.guarded)
        seen = evaluate.detection(
            jax.random.key(0), flag, variables, test, case.attack, case.trigger
        )
        found |= {"tpr": seen.true_positive_rate, "fpr": seen.false_positive_rate}
    return found


def open_repaired(case: compare.Case, repaired: Repaired | None) -> tuple[Net, Variables]:
    """The net to judge and its variables."""
    if repaired is None:
        return case.victim.net, case.victim.variables
    if repaired.guarded:
        return guard.make(case.victim.net, repaired.guarded), repaired.variables
    return case.victim.net, repaired.variables


def _answer(case: compare.Case, test: Batch) -> np.ndarray:
    return evaluate.logits(case.victim.net, case.victim.variables, test).argmax(-1)


def _stamped(net: Net, variables: Variables, case: compare.Case, test: Batch) -> np.ndarray:
    key = jax.random.key(0)
    return evaluate.triggered_logits(
        key, net, variables, case.attack.stamp, case.trigger, test
    ).argmax(-1)


def _copies(
    case: compare.Case, net: Net, variables: Variables, test: Batch
) -> dict[str, float | None]:
    """ASR of 4 and of 9 copies; None where they overlap."""
    found: dict[str, float | None] = {}
    for number in COPIES:
        try:
            attack, trigger = dhbe_cases.copies(case, number)
        except UserError:
            found[f"x{number}"] = None
            continue
        rates = evaluate.rates(jax.random.key(0), net, variables, test, attack, trigger)
        found[f"x{number}"] = rates.attack_success_rate
    return found


def _share(hits: np.ndarray, among: np.ndarray) -> float | None:
    return float(hits[among].mean()) if among.any() else None
