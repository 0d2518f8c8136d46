"""The scan over pairs of classes, for `scan` and `repair`: its record, printed summary and page."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Batch, Evidence, Key
from jaxbd.cli import common, show
from jaxbd.images import to_float
from jaxbd.metrics import evaluate
from jaxbd.pipelines import pair_scan as pairwise
from jaxbd.pipelines.pair_scan import Config, PairScan
from jaxbd.report import results
from jaxbd.training.run import Run

SAVE_EVERY = 100_000
"""Default steps, summed over all pairs, between two checkpoints."""
LISTED = 12
"""Most pairs listed, highest scores first."""
IMAGES = 6
"""Images on a page, each with and without a trigger."""


def default(preset: str | None = None) -> Config:
    """The default settings; there are no presets."""
    del preset
    return Config()


def search(run: Run, key: Key, material: common.Material, config: Config) -> PairScan:
    """Runs the scan."""
    return pairwise.scan(run, key, material.suspect, material.search, material.held_out, config)


def verdict_of(found: PairScan) -> str:
    """clean, backdoored or inconclusive."""
    return found.verdict


def targets_of(found: PairScan) -> list[int]:
    """The target classes of the attacked pairs."""
    return found.targets


def evidence_of(found: PairScan, target: int) -> list[Evidence]:
    """Every trigger estimated for one target."""
    return [each.evidence for each in pairwise.estimates(found, target)]


def evidence_of_leads(found: PairScan) -> list[Evidence]:
    """What the scan recovered for the classes with one sign."""
    leads = [target for target in found.leads if target in found.triggers]
    return [each for target in leads for each in evidence_of(found, target)]


def as_record(
    found: PairScan, material: common.Material, config: Config, reading: common.Reading
) -> dict[str, Any]:
    """The content of scan.json."""
    return results.pair_scan(found, config, **common.describe(material, reading))


def summary(found: PairScan, config: Config) -> dict[str, Any]:
    """What repair.json says about the scan it is based on."""
    return {
        "verdict": found.verdict,
        "targets": found.targets,
        "pairs": [list(pair) for pair in found.pairs],
        "setting": found.setting,
        "decided_by": found.decided_by,
        "triggers": results.estimates(found),
        "config": results.settings(config),
        "steps": found.steps,
        "seconds": results.seconds(found.seconds),
    }


def explain_clean(found: PairScan, config: Config, names: tuple[str, ...]) -> str:
    """What a clean or inconclusive scan means for a repair."""
    del config, names
    return (
        f"(Verdict {found.verdict}, decided by {found.decided_by}; if you have the trigger, give it"
        " with --trigger.)"
    )


def say(content: dict[str, Any], config: Config) -> None:
    """Prints the pairs with the highest scores, the verdict, the triggers found, and the time."""
    del config
    names = tuple(row["name"] for row in content["classes"])
    for method in content["scores"]:
        rows = sorted(_rank_pairs(content, method), reverse=True)[:LISTED]
        body = [
            (
                common.class_label(s, names),
                common.class_label(t, names),
                f"{score:.2f}",
                f"{size:.3g}",
                "yes" if [s, t] in content["pairs"] else "",
            )
            for score, s, t, size in rows
        ]
        title = f"{method}: the {len(body)} pairs with the highest scores"
        show.table(
            ("source", "target", "score", "trigger size", "attacked"),
            body,
            title=title,
            left=2,
        )
    show.say(verdict(content), f"Decided by {content['decided_by']}.")
    for target, trigger in content["triggers"].items():
        label, sources = (
            common.class_label(int(target), names),
            ", ".join(map(str, trigger["sources"])),
        )
        size = "unknown" if trigger["norm"] is None else f"{trigger['norm']:.3g}"
        show.say(
            f"Trigger to class {label}, found by {trigger['method']} from source classes {sources}:"
            f" size {size}, works on {show.percent(trigger['attack_success_rate'])} of held-out"
            " images."
        )
    show.say(
        "Other kinds of backdoor are not ruled out. “Clean” means that no trigger of the searched"
        " kind stands out."
    )
    steps = ", ".join(f"{count} steps of {method}" for method, count in content["steps"].items())
    show.say(
        f"{content['cells']} searches, {steps}, {show.seconds(content['seconds'])},"
        f" {content['device']}."
    )


def _rank_pairs(content: dict[str, Any], method: str) -> list[tuple[float, int, int, float]]:
    """(score, source, target, trigger size) of every searched pair; score and size may be
    infinite."""
    tables = content["scores"][method], content["statistics"][method]
    cells = [
        (s, t, *(table[s][t] for table in tables))
        for s, row in enumerate(tables[0])
        for t in range(len(row))
    ]
    return [
        (math.inf if score is None else score, s, t, 1 / size if size else math.inf)
        for s, t, score, size in cells
        if size is not None
    ]


def verdict(content: dict[str, Any]) -> str:
    """The verdict of a scan over pairs in one sentence."""
    names = tuple(row["name"] for row in content["classes"])
    if content["verdict"] == "backdoored":
        targets = ", ".join(common.class_label(target, names) for target in content["targets"])
        kinds = {
            "all-to-one": "all lead to one class",
            "all-to-all": "every class leads to another",
        }
        kind = kinds.get(content["setting"], "of a mixed kind")
        count = len(content["pairs"])
        pairs = (
            "1 pair of classes is attacked"
            if count == 1
            else f"{count} pairs of classes are attacked"
        )
        return f"BACKDOORED: {pairs} ({kind}); to class {targets}."
    if content["verdict"] == "clean":
        return "CLEAN: no pair of classes and no margin stands out."
    if content["leads"]:
        labels = ", ".join(common.class_label(k, names) for k in content["leads"])
        return (
            f"INCONCLUSIVE: class {labels} shows one of two signs of a backdoor, as clean models"
            " sometimes do; `--method auto` looks for more signs."
        )
    return (
        "INCONCLUSIVE: the trigger sizes do not decide it; try more images of every class, or more"
        " --steps."
    )


def write_page(
    path: pathlib.Path,
    content: dict[str, Any],
    found: PairScan,
    material: common.Material,
    config: Config,
) -> None:
    """Writes the page of one scan; `content` is its scan.json."""
    from jaxbd.report import content as parts
    from jaxbd.report import page

    name = pathlib.Path(content["model"]["path"]).name
    names = [row["name"] for row in content["classes"]]
    summary = parts.Scan(
        name=name,
        verdict=content["verdict"],
        targets=content["targets"],
        classes=[row for row in content["classes"] if row["attack_success_rate"] is not None],
        sha256=content["model"]["sha256"],
        seconds=content["seconds"],
        n_images=len(material.held_out.labels),
        searched=f"a trigger for every pair of classes ({', '.join(found.scores)})",
        leads=content["leads"],
        decided_by=content["decided_by"],
        remedy=verdict(content).removeprefix("INCONCLUSIVE: ").removesuffix("."),
        repair=f"`jaxbd repair {name} --data … --method bna --out …`",
    )
    matrices = [
        parts.PairScores(
            search=method,
            scores=scores,
            names=names,
            detected=found.pairs,
            threshold=config.threshold,
        )
        for method, scores in found.scores.items()
    ]
    triggers = _draw_triggers(found, material, tuple(names))
    text = parts.Content(
        title=f"Backdoor scan of {name}",
        scans=[summary],
        pairs=matrices,
        triggers=None if triggers is None else parts.Triggers(**triggers),
        settings={"scan": content["config"], "model": content["model"], "data": content["data"]},
        seeds={"scan": content["seed"]},
        versions=content["versions"],
        device=content["device"],
        notes=[verdict(content)],
    )
    page.write(path, text)


def _draw_triggers(
    found: PairScan, material: common.Material, names: tuple[str, ...]
) -> dict[str, Any] | None:
    """A few images with and without the trigger that works best, from its source classes, and the
    suspect's answers; None if no trigger was found."""
    if not found.triggers:
        return None
    candidates = [found.triggers[k] for k in found.targets] or list(found.triggers.values())
    best = max(candidates, key=lambda each: each.attack_success_rate).evidence
    labels = np.asarray(material.held_out.labels)
    rows = np.flatnonzero(np.isin(labels, best.sources))[:IMAGES]
    clean = to_float(material.held_out.images[rows])
    stamped = best.stamp(jax.random.key(0), best.trigger_params, clean)
    suspect = material.suspect
    data = Batch(stamped, jnp.asarray(labels[rows]))
    answers = evaluate.logits(suspect.net, suspect.variables, data).argmax(-1)
    return dict(
        clean=np.asarray(clean),
        stamped=np.asarray(stamped),
        captions=[(names[t], names[int(a)]) for t, a in zip(labels[rows], answers, strict=True)],
        target=f"class {common.class_label(best.target, names)}",
    )
