"""Does the correction hold against an attack that adapts to it? (Li et al. 2023, section 5.4).

The attacker trains the victim together with a generator of triggers and keeps the features of
triggered images close to those of clean ones (Doan et al. 2021), so that less is left to correct.
Claim of the paper (CIFAR-10, ResNet-18): the total variation averaged over all neurons falls from
8067 to 2789 (as counts); ACC / ASR are 0.9162 / 0.9978 before and 0.8906 / 0.0072 after the
mitigation, with an SIA of 0.8496.

    python -m experiments.bna.adaptive --size digits     # a few minutes on 2 cores
    python -m experiments.bna.adaptive --size narrow
    python -m experiments.bna.adaptive --smoke
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import units
from experiments.scale import bench
from jaxbd import losses
from jaxbd.attacks import latent
from jaxbd.base import Batch, Evidence, Key, Net, Variables
from jaxbd.data import draw
from jaxbd.detection import guard
from jaxbd.metrics import activations, evaluate
from jaxbd.pipelines import compare, correct, pair_scan, plant
from jaxbd.repairs import bna

NAME = "bna/adaptive"
SizeName = Literal["digits", "narrow"]
TARGET = 9
IMAGES = 1000
"""Test images behind a divergence, at most."""
# triggered images weigh less than the half of the attack's own code: fine-tuning is short, and
# clean accuracy suffers
_COMMON = latent.Config(
    target=TARGET, eight_bit=True, width=8, latent_weight=1.0, stamped_weight=0.3
)
ATTACKS = {
    "digits": dataclasses.replace(_COMMON, first_steps=300, second_steps=600),
    "narrow": dataclasses.replace(
        _COMMON, first_steps=390, second_steps=780, learning_rate=0.02, generator_learning_rate=1e-3
    ),
}
CORRECTIONS = {"digits": bna.Config(), "narrow": bna.Config()}
SCANS = {"digits": pair_scan.Config(), "narrow": pair_scan.Config()}


class Defence(NamedTuple):
    """Settings of the correction and of the scan before it."""

    correction: bna.Config
    scan: pair_scan.Config


def victim(setting: bench.Bench, key: Key, config: latent.Config) -> compare.Case:
    """The clean base net, fine-tuned together with its generator."""
    size = setting.size
    adapted = plant.train_adaptive(
        units.start_run("adaptive"),
        "train",
        key,
        setting.net,
        setting.train,
        size.spec.classes,
        config,
        batching=draw.Batching(size.batch_size, size.crop_padding, size.flip),
        variables=setting.base,
    )
    attack = latent.attack(size.spec.image_shape, size.spec.classes, config)
    suspect = bench.suspect_of(size.spec, adapted.variables)
    return compare.Case(
        suspect, attack, adapted.trigger, config.target, setting.defence, setting.test
    )


def latent_distance(case: compare.Case) -> float:
    """Of triggered and clean test images on the last layer's rows: on its outputs, whose biases
    cancel."""
    net, variables = case.victim.net, case.victim.variables
    clean = evaluate.logits(net, variables, case.test)
    stamped = evaluate.triggered_logits(
        jax.random.key(0), net, variables, case.attack.stamp, case.trigger, case.test
    )
    return float(
        losses.sliced_wasserstein(jnp.asarray(stamped), jnp.asarray(clean), jnp.eye(clean.shape[1]))
    )


def judge(case: compare.Case, answering: Net, variables: Variables, corrected: Variables) -> dict:
    """Rates of the net that answers, and how far triggered activations of `corrected` are from the
    victim's clean ones.

    Judged with the attacker's own trigger on test images.
    """
    key = jax.random.key(0)
    rates = evaluate.rates(key, answering, variables, case.test, case.attack, case.trigger)
    others = draw.of_classes(
        case.test, sorted({*np.asarray(case.test.labels).tolist()} - {case.target})
    )
    data = jax.tree.map(lambda leaf: leaf[:IMAGES], others)
    net, clean = case.victim.net, case.victim.variables
    apart = activations.divergences(net, clean, corrected, case.attack.stamp, case.trigger, data)
    return {
        "clean accuracy": rates.clean_accuracy,
        "ASR": rates.attack_success_rate,
        "SIA": rates.source_inference_accuracy,
        "TV features": apart["features"].tv,
        "TV all": apart["all"].tv,
    }


def judge_guarded(case: compare.Case, by_target: dict[int, Variables]) -> dict:
    """The guarded net's figures; the divergence is that of the true target's correction, if there
    is one."""
    net, clean = case.victim.net, case.victim.variables
    corrected = by_target.get(case.target, clean)
    if not by_target:
        return judge(case, net, clean, corrected)
    targets, variables = tuple(by_target), guard.pack(clean, list(by_target.values()))
    flagged = evaluate.detection(
        jax.random.key(1),
        guard.flag(net, targets),
        variables,
        case.test,
        case.attack,
        case.trigger,
    )
    rates = judge(case, guard.make(net, targets), variables, corrected)
    return {**rates, "TPR": flagged.true_positive_rate, "FPR": flagged.false_positive_rate}


def correct_known(
    setting: bench.Bench, key: Key, case: compare.Case, config: bna.Config
) -> Variables:
    """The victim corrected for the attacker's own trigger, on the defender's images."""
    known = Evidence(case.target, (), case.attack.stamp, case.trigger)
    sources = draw.of_classes(case.defence, known.all_sources(case.victim.classes))
    repaired = correct.repair(
        units.start_run("adaptive"),
        key,
        case.victim,
        case.defence,
        [known],
        "bna",
        correct.Config(correction=config),
        batch_size=min(setting.size.batch_size, len(sources.labels)),
    )
    return guard.corrected(repaired.variables, 0)


def correct_found(
    setting: bench.Bench, key: Key, case: compare.Case, defence: Defence
) -> dict[int, Variables]:
    """Corrections by detected target, after a scan over pairs with three quarters of the defender's
    images."""
    data, cut = case.defence, len(case.defence.labels) * 3 // 4
    search, held_out = (
        Batch(data.images[rows], data.labels[rows]) for rows in (slice(cut), slice(cut, None))
    )
    run, scan_key = units.start_run("adaptive"), jax.random.fold_in(key, 0)
    found = pair_scan.scan(run, scan_key, case.victim, search, held_out, defence.scan)
    corrections = {}
    for target in found.targets:
        repaired = correct.repair(
            run,
            jax.random.fold_in(key, 1 + target),
            case.victim,
            data,
            [each.evidence for each in pair_scan.estimates(found, target)],
            "bna",
            correct.Config(correction=defence.correction),
            batch_size=setting.size.batch_size,
            search_again=correct.search_pairs(found, data, defence.scan),
        )
        corrections[target] = guard.corrected(repaired.variables, 0)
    return corrections


def one_weight(
    setting: bench.Bench, weight: float, attack: latent.Config, defence: Defence, seed: int
) -> list[dict]:
    """A victim trained at one weight of the latent term: as it is, and guarded after its
    correction."""
    key = jax.random.fold_in(jax.random.key(seed), 54)
    weighted = dataclasses.replace(attack, latent_weight=weight)
    case = victim(setting, jax.random.fold_in(key, 1), weighted)
    known = correct_known(setting, jax.random.fold_in(key, 2), case, defence.correction)
    by_target = correct_found(setting, jax.random.fold_in(key, 3), case, defence)
    variables, targets = case.victim.variables, " ".join(map(str, by_target)) or "none found"
    rows = {
        "none": judge(case, case.victim.net, variables, variables),
        "known trigger": judge_guarded(case, {case.target: known}),
        f"estimated, targets: {targets}": judge_guarded(case, by_target),
    }
    distance = latent_distance(case)
    return [
        {"latent weight": weight, "latent distance": distance, "BNA": name, **row}
        for name, row in rows.items()
    ]


def run(size: SizeName, data: str | None = None, seed: int = 0) -> dict:
    """The attack without and with its latent term; resumable."""
    setting, attack = bench.make(size, data, seed), ATTACKS[size]
    defence = Defence(CORRECTIONS[size], SCANS[size])
    settings = [units.settings_of(part) for part in (setting.size, attack, *defence)]
    rows = []
    for weight in (0.0, attack.latent_weight):
        found = units.unit(
            f"{NAME}-{size}",
            f"weight{weight:g}-seed{seed}",
            [settings, weight, seed],
            lambda weight=weight: {"rows": one_weight(setting, weight, attack, defence, seed)},
        )
        rows += found["rows"]
    return {"size": size, "seed": seed, "settings": settings, "rows": rows}


def main(
    size: SizeName = "digits", data: str | None = None, seed: int = 0, smoke: bool = False
) -> None:
    """Runs the experiment and prints its table."""
    units.use_cache()
    if smoke:
        attack = dataclasses.replace(ATTACKS["digits"], first_steps=3, second_steps=2)
        scan = pair_scan.Config(method="pt-red", perturbation_steps=2, joint_steps=2, batch_size=4)
        defence = Defence(bna.Config(num_steps=2), scan)
        rows = one_weight(bench.make("digits", seed=seed), 1.0, attack, defence, seed)
    else:
        rows = run(size, data, seed)["rows"]
    print(units.table(rows))


if __name__ == "__main__":
    units.cli(main)
