"""BNA on planted victims: pairs found, correction with known and estimated triggers, test-time detection.

Claims (Li et al. 2023): the pairs of an attack stand out by the anomaly score of their triggers' size (Figs. 4-5);
after correction with the estimated trigger triggered images are classified as what they are (Table 1), those that are
not can be told apart at test time (Table 5), and activations of triggered images are close to clean ones (Table 9).

    python -m experiments.bna_rows                          # digits, one victim of each attack
    python -m experiments.bna_rows --size narrow            # CIFAR-10 images, ResNet-18 of width 8
    python -m experiments.bna_rows --smoke                  # checks that it runs, not the claims

No trigger is known to the scan. "known" rows are corrected with the attacker's own trigger, for reference.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bna_cases, units
from experiments.bna_cases import Planting
from jaxbd import correct, evaluate, pairs, results, strip, study
from jaxbd.base import Batch
from jaxbd.repair import bna, guard

NAME = "bna/rows"
PATCHES, PERTURBATIONS = pairs.Config(methods=("neural-cleanse",)), pairs.Config(methods=("pt-red",))
WARPS = pairs.Config(methods=("neural-cleanse",), threshold=3.0)
BY_ATTACK = {"badnets": PATCHES, "chessboard": PERTURBATIONS, "l2-inv": PERTURBATIONS, "wanet": WARPS}
"""The search and threshold that suit the attack, as the paper chooses them (5.2, appendix C); for CIFAR-10 images,
where a search takes minutes."""
STEPS, ROUNDS = {"all-to-one": 300, "all-to-all": 200}, {"all-to-one": 2, "all-to-all": 0}
"""Of the correction on digits: for ten targets fewer. Chosen on victims of seeds 100, 101 and 103."""
STRIP, STRIPPED = strip.Config(), 500
"""STRIP's settings, and the test images it is judged on: each costs a hundred passes, twice."""


class Settings(NamedTuple):
    """How a victim is scanned and corrected."""

    scan: pairs.Config
    correction: bna.Config
    comparison: strip.Config = STRIP
    rounds: int = 2


def divided(case: study.Case) -> tuple[Batch, Batch]:
    """The defender's images: those triggers are searched on (7 of 10), and those they are judged on."""
    cut = len(case.defence.labels) * 7 // 10
    images, labels = map(np.asarray, case.defence)
    return Batch(images[:cut], labels[:cut]), Batch(images[cut:], labels[cut:])


def corrected_for(
    case: study.Case, found: pairs.PairScan, settings: "Settings", seed: int
) -> tuple[dict[int, Any], float]:
    """One corrected net for each detected target, and the seconds it took."""
    suspect, nets, seconds = correct.Suspect(case.net, case.variables, case.image_shape, 10), {}, 0.0
    for target in found.targets:
        images = len(correct.of_classes(case.defence, found.triggers[target].sources).labels)
        repaired = correct.detected(
            jax.random.fold_in(jax.random.key(7 + seed), target), suspect, found, target, case.defence,
            settings.correction, settings.scan, rounds=settings.rounds, batch_size=min(64, images),
            progress=units.progress(NAME), label=f"correct for class {target}",
        )  # fmt: skip
        nets[target], seconds = repaired.variables, seconds + sum(repaired.seconds)
    return nets, seconds


def corrected(case: study.Case, triggers: dict[int, Any], config: bna.Config) -> tuple[dict[int, Any], float]:
    """One corrected net for each target of `triggers` {target: (stamp, model, sources)}, and the seconds it took."""
    nets, seconds = {}, 0.0
    for target, (stamp, model, sources) in triggers.items():
        data, kept = (correct.of_classes(case.defence, classes) for classes in (sources, (target,)))
        repaired = correct.trigger(
            jax.random.key(7 + target), case.net, case.variables, stamp, model, data, config,
            kept=kept, batch_size=min(64, len(data.labels)), progress=units.progress(NAME),
            label=f"correct for class {target}",
        )  # fmt: skip
        nets[target], seconds = repaired.variables, seconds + sum(repaired.seconds)
    return nets, seconds


def judged(case: study.Case, nets: dict[int, Any]) -> dict[str, Any]:
    """ACC, ASR and SIA of the guarded net, its TPR and FPR, all on the test images under the attacker's trigger."""
    targets = tuple(nets)
    net = guard.make(case.net, targets)
    variables = guard.pack(case.variables, list(nets.values()))
    key = jax.random.key(0)
    rates = evaluate.rates(key, net, variables, case.test, case.attack, case.trigger)
    told = evaluate.detection(key, guard.flag(case.net, targets), variables, case.test, case.attack, case.trigger)
    return {**dataclasses.asdict(rates), **dataclasses.asdict(told)}


def known_triggers(case: study.Case, all_to_all: bool) -> dict[int, Any]:
    """The attacker's own trigger for every target, in the form of `corrected`."""
    sources = {t: ((t - 1) % 10,) if all_to_all else tuple(k for k in range(10) if k != t) for t in range(10)}
    targets = range(10) if all_to_all else (case.target,)
    return {t: (case.attack.stamp, case.trigger, sources[t]) for t in targets}


def stripped(case: study.Case, config: strip.Config) -> dict[str, Any]:
    """TPR and FPR of STRIP, its overlays and its threshold those of the defender's images."""
    overlays = jnp.asarray(case.defence.images)
    flag, measure = strip.flag(case.net, config), strip.entropy(case.net, config)
    entropies = evaluate.per_image(
        jax.random.key(1), lambda key, known, images: measure(key, *known[:1], images, known[1]),
        (case.variables, overlays), case.defence,
    )  # fmt: skip
    limit = jnp.float32(strip.threshold(entropies, config.false_positive_rate))
    known, test = (case.variables, overlays, limit), jax.tree.map(lambda leaf: leaf[:STRIPPED], case.test)
    return dataclasses.asdict(evaluate.detection(jax.random.key(2), flag, known, test, case.attack, case.trigger))


def divergence(case: study.Case, variables: Any) -> dict[str, Any]:
    """Mean divergences of triggered from clean activations, penultimate layer and all layers (Tables 9 and 10)."""
    others = correct.of_classes(case.test, [k for k in range(10) if k != case.target])
    data = jax.tree.map(lambda leaf: leaf[:500], others)
    found = correct.divergences(case.net, case.variables, variables, case.attack.stamp, case.trigger, data)
    penultimate, every = found.values()
    return {"penultimate": penultimate._asdict(), "all layers": every._asdict()}


def one_victim(planting: Planting, settings: Settings) -> dict[str, Any]:
    """Everything about one planted victim, as JSON."""
    case = bna_cases.victim(planting)
    return examined(case, planting.name, planting.all_to_all, planted_pairs(planting), planting.seed, settings)


def examined(
    case: study.Case, name: str, all_to_all: bool, planted: list[tuple[int, int]], seed: int, settings: Settings
) -> dict[str, Any]:
    """A victim scanned, corrected with the known and the estimated triggers, judged; of a clean net the scan alone."""
    search, held = divided(case)
    found = pairs.scan(
        jax.random.key(11 + seed), case.net, case.variables, case.image_shape, 10, search, held, settings.scan,
        units.progress(NAME),
    )  # fmt: skip
    planted = [(source, target) for source, target in planted if source != target]
    result = {
        "name": name,
        "target": None if all_to_all else case.target,
        "planted": planted,
        "before": dataclasses.asdict(study.judge(case, case.variables)),
        "scan": as_record(found),
    }
    if not planted:
        return result
    work = {
        "known": lambda: corrected(case, known_triggers(case, all_to_all), settings.correction),
        "estimated": lambda: corrected_for(case, found, settings, seed),
    }
    for which, correction in work.items():
        nets, seconds = correction()
        if not nets:
            result[which] = None
            continue
        result[which] = {**judged(case, nets), "seconds": seconds}
        if case.target in nets and not all_to_all:
            result[which]["divergence"] = divergence(case, nets[case.target])
    result["divergence"] = divergence(case, case.variables)
    result["strip"] = stripped(case, settings.comparison)
    return result


def planted_pairs(planting: Planting) -> list[tuple[int, int]]:
    """(source, target) of every pair that the attack connects."""
    if planting.attack is None:
        return []
    if planting.all_to_all:
        return [(k, (k + 1) % 10) for k in range(10)]
    return [(k, planting.target) for k in range(10) if k != planting.target]


def as_record(found: pairs.PairScan) -> dict[str, Any]:
    """A pair scan without its trigger models."""
    return {
        "verdict": found.verdict,
        "targets": found.targets,
        "pairs": found.pairs,
        "setting": found.setting,
        "statistics": found.statistics,
        "scores": found.scores,
        "triggers": results.estimates(found),
        "steps": found.steps,
        "image_steps": found.image_steps,
        "seconds": found.seconds._asdict(),
    }


def settings_for(planting: Planting) -> Settings:
    """Both searches and a longer correction on digits; on CIFAR-10 images the search that suits the attack."""
    if planting.size == "digits":
        kind = "all-to-all" if planting.all_to_all else "all-to-one"
        return Settings(pairs.Config(), bna.Config(num_steps=STEPS[kind]), rounds=ROUNDS[kind])
    return Settings(BY_ATTACK[planting.attack], bna.Config())


def as_settings(settings: Settings) -> list[Any]:
    """For units and records."""
    return [*map(units.settings_of, settings[:3]), settings.rounds]


def unit(planting: Planting, settings: Settings | None = None, folder: str = NAME) -> dict[str, Any]:
    """`one_victim`, kept in a folder under `runs/`."""
    settings = settings or settings_for(planting)
    wanted = [bna_cases.settings(planting), *as_settings(settings)]
    return units.unit(folder, planting.name, wanted, lambda: one_victim(planting, settings))


def detection_row(result: dict[str, Any]) -> dict[str, Any]:
    """One line of the detection table."""
    found, planted = result["scan"], {tuple(pair) for pair in result["planted"]}
    named = {tuple(pair) for pair in found["pairs"]}
    scores = {m: np.array(s, float) for m, s in found["scores"].items()}
    best = np.fmax.reduce(list(scores.values()))  # nan where neither search has a score
    is_planted = np.zeros_like(best, bool)
    for pair in planted:
        is_planted[pair] = True
    off = ~np.eye(len(best), dtype=bool)
    return {
        "victim": result["name"],
        "verdict": found["verdict"],
        "setting": found["setting"] or "",
        "targets": " ".join(map(str, found["targets"])) or "none",
        "true": "none" if not planted else "all" if result["target"] is None else str(result["target"]),
        "pairs right": f"{len(named & planted)} of {len(planted)}",
        "pairs wrong": len(named - planted),
        "lowest score planted": float(best[is_planted].min()) if planted else "",
        "highest score other": float(np.nanmax(best[off & ~is_planted])),
        "image-steps": found["image_steps"],
        "seconds": sum(found["seconds"].values()),
    }


def correction_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of Table 1 for one victim: before, and corrected with the known and the estimated trigger."""
    rows = []
    for name in ("before", "known", "estimated"):
        if result.get(name) is None:
            continue
        one = result[name]
        rows.append(
            {
                "victim": result["name"],
                "trigger": "" if name == "before" else name,
                "ACC": one["clean_accuracy"],
                "ASR": one["attack_success_rate"],
                "SIA": one["source_inference_accuracy"],
                "TPR": one.get("true_positive_rate", ""),
                "FPR": one.get("false_positive_rate", ""),
            }
        )
    return rows


def strip_row(result: dict[str, Any]) -> dict[str, Any]:
    """One line of Table 5."""
    ours, other = result["estimated"] or {}, result["strip"]
    return {
        "victim": result["name"],
        "BNA TPR": ours.get("true_positive_rate", "not found"),
        "BNA FPR": ours.get("false_positive_rate", ""),
        "STRIP TPR": other["true_positive_rate"],
        "STRIP FPR": other["false_positive_rate"],
    }


def divergence_rows(result: dict[str, Any], layer: str = "penultimate") -> list[dict[str, Any]]:
    """Lines of Table 9: the victim before, and after correction with the known and the estimated trigger."""
    rows = [("before", result["divergence"])]
    rows += [(w, result[w]["divergence"]) for w in ("known", "estimated") if (result[w] or {}).get("divergence")]
    label = {"before": "poisoned net", "known": "BNA, known trigger", "estimated": "BNA, estimated trigger"}
    return [{"victim": result["name"], "net": label[which], **found[layer]} for which, found in rows]


SMOKE = Settings(pairs.Config(steps=6), bna.Config(num_steps=2), strip.Config(overlays=2))


def main(size: Literal["digits", "narrow"] = "digits", smoke: bool = False) -> None:
    """Runs the experiment and prints its tables."""
    units.use_cache()
    if smoke:
        victims = [one_victim(Planting(), SMOKE)]
    else:
        attacks = ("badnets", "chessboard") if size == "digits" else ("badnets", "chessboard", "l2-inv", "wanet")
        victims = [unit(Planting(size=size, attack=attack)) for attack in attacks]
    print(units.table([detection_row(one) for one in victims]), "\n")
    print(units.table([row for one in victims for row in correction_rows(one)]), "\n")
    print(units.table([strip_row(one) for one in victims]), "\n")
    print(units.table([row for one in victims for row in divergence_rows(one)]))


if __name__ == "__main__":
    units.cli(main)
