"""What `repair --method dhbe` adds to a repair: warnings before it starts and after it, and a page
with the generated images."""

import contextlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxbd.attacks import given
from jaxbd.base import Attack, Key, Suspect, UserError
from jaxbd.cli import common, outcome, show, triggers
from jaxbd.data import load
from jaxbd.metrics.evaluate import Rates
from jaxbd.pipelines import erase
from jaxbd.pipelines.repair import Repaired
from jaxbd.repairs import dhbe
from jaxbd.report.content import Moment
from jaxbd.training import checkpoint
from jaxbd.training.run import Run

COPIES = (1, 4, 9)
"""Copies of the trigger per image when checking for remains of a backdoor, see
`attacks.amplified`."""
CURVE = 200
"""Most points of a curve; the metrics file has all of them."""
ONE_ANSWER = 0.85
"""Warn if at least this share of untrained generators' images get the same answer. It lies between
nets that were erased successfully and a published one that was not (docs/results.md)."""
RUINED = 0.97
"""Warn if at least this share of images of noise get the same answer from the repaired net, and
fewer from the suspect."""


def repair_key(seed: int) -> Key:
    """The key of a repair for a given --seed."""
    return jax.random.fold_in(jax.random.key(seed), 10)


class Watch:
    """Watches one erasure: the suspect's answers to generated images, and pictures over time.

    Attributes:
      facts: for repair.json: `one_answer`, the most frequent answer to generated images; after
        `check`, `noise`, the most frequent answers to images of noise before and after the repair.
    """

    def __init__(self, run: Run, suspect: Suspect, config: dhbe.Config, seed: int, pictures: bool):
        key = jax.random.key(seed)
        self.suspect, self.noise_key = suspect, jax.random.fold_in(key, 4)
        answers = erase.ask_untrained(jax.random.fold_in(key, 3), suspect, config)
        label, share = erase.most_frequent(answers)
        self.facts: dict[str, Any] = {"one_answer": {"class": label, "share": share}}
        if share >= ONE_ANSWER:
            show.note(
                f"warning: the model answers {share:.0%} of untrained generators' images with"
                f" class {label}; such images reveal little about it, and erasing without data is"
                " likely to fail"
            )
        self.album = erase.Album(jax.random.fold_in(key, 2), suspect, config)
        if pictures:
            saving = run.checkpoints
            if saving is None or not checkpoint.is_started(saving.folder):
                self.album.add(0, erase.start(repair_key(seed), suspect, config))
            run.observers = (*run.observers, self.album.observe)

    def check(self, repaired: Repaired) -> None:
        """Asks suspect and repaired net about noise, and warns if the repair has left only one
        answer."""
        after = self.suspect._replace(variables=repaired.variables)
        asked = {"before": self.suspect, "after": after}
        found = {
            when: erase.most_frequent(erase.ask_noise(self.noise_key, net))
            for when, net in asked.items()
        }
        self.facts["noise"] = {
            when: {"class": label, "share": share} for when, (label, share) in found.items()
        }
        (_, before), (label, share) = found["before"], found["after"]
        if share >= RUINED > before:
            show.note(
                f"warning: the repaired model answers {share:.0%} of images of noise with class"
                f" {label}, the model before the repair {before:.0%} with one class; the repair has"
                " probably ruined it. Measure it with --test-data, or repair with clean images"
            )

    def write_page(self, path: pathlib.Path, content: dict[str, Any]) -> None:
        """Writes the page; `content` is the content of repair.json.

        Raises: UserError if it cannot be written.
        """
        from jaxbd.report import erased, page

        name = pathlib.Path(content["model"]["path"]).name
        moments = as_moments(self.album.pictures)
        rates = {int(copies): pair for copies, pair in (content["amplified"] or {}).items()}
        page.write(path, erased.content(content, name=name, moments=moments, amplified=rates))


def measure_copies(
    suspect: Suspect,
    repaired: Repaired,
    opened: common.Opened,
    flags: triggers.Trigger,
    loaded: given.Loaded,
    seed: int,
) -> dict[int, tuple[float | None, float | None]] | None:
    """`compare_copies` for the given trigger, with as many copies as fit; None if the trigger is
    not a patch that can be repeated."""
    config = triggers.settle(opened, flags, loaded, all_to_all=True)
    attacks: dict[int, tuple[Attack, Any]] = {1: triggers.make_attack(opened, config, loaded)}
    for copies in COPIES[1:]:
        with contextlib.suppress(UserError):
            attacks[copies] = triggers.amplify(opened, config, loaded, copies)
    if len(attacks) == 1:
        return None
    data = load.as_batch(opened.dataset)
    rows = {
        copies: outcome.measure_attack(suspect, repaired, attack, data, seed)
        for copies, attack in attacks.items()
    }
    before, after = (
        {copies: getattr(row, when) for copies, row in rows.items()} for when in ("before", "after")
    )
    return compare_copies(before, after)


def compare_copies(
    before: Mapping[int, Rates], after: Mapping[int, Rates]
) -> dict[int, tuple[float | None, float | None]]:
    """{copies of the trigger on an image: attack success rate in [0, 1] (before, after)}."""
    return {
        copies: (before[copies].attack_success_rate, after[copies].attack_success_rate)
        for copies in before
    }


def as_moments(pictures: Iterable[erase.Picture]) -> list[Moment]:
    """An album's pictures in the form a page needs."""
    return [Moment(**picture._asdict()) for picture in pictures]


def curves(infos: dhbe.Info) -> dict[str, list[float]]:
    """Every field of infos [steps], averaged over at most `CURVE` intervals; `step` is the last
    iteration of each."""
    steps = np.arange(1, len(infos.discrepancy) + 1)
    parts = np.array_split(steps, min(CURVE, len(steps)))
    means = {
        name: [float(values[part - 1].mean()) for part in parts]
        for name, values in infos._asdict().items()
    }
    return {"step": [int(part[-1]) for part in parts], **means}
