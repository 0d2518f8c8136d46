"""One victim of the papers' tables: what it is called, is made of, and depends on."""

import dataclasses
from typing import Any

from experiments import units
from experiments.papers import attacks, ledger
from experiments.papers.sizes import DATASETS, SIZES, Size, SizeName, spec
from jaxbd import files
from jaxbd.models import build

JUDGE = "experiments.papers.judge"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Victim:
    """One victim.

    Attributes:
      attack: of `attacks.names`.
      size: of `sizes.SIZES`.
      seed: of data division, trigger and training.
      target: class of an all-to-one attack; the data set's own by default.
      dataset, arch: others than the size's own (BNA Table 3, DHBE Tables 4 and 8).
      changes: (field, value) of the attack's Config, or "count", that differ from the size's own
        (BNA Table 2).
    """

    attack: str
    size: SizeName = "small"
    seed: int = 0
    target: int | None = None
    dataset: str | None = None
    arch: str | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    def with_seed(self, seed: int) -> "Victim":
        """The same of another seed."""
        return dataclasses.replace(self, seed=seed)

    @property
    def made_of(self) -> Size:
        """The row of the table of sizes."""
        return SIZES[self.size]

    @property
    def data(self) -> str:
        """The data set's name."""
        return self.dataset or self.made_of.dataset

    @property
    def aim(self) -> int:
        """The class of an all-to-one attack."""
        return DATASETS[self.data][3] if self.target is None else self.target

    @property
    def is_all_to_all(self) -> bool:
        """Whether every class leads to the next."""
        return self.attack.endswith("-a2a")

    @property
    def spec(self) -> build.Spec:
        """Of the net."""
        return spec(self.made_of, self.data, self.arch)

    @property
    def plan(self) -> attacks.Plan:
        """How it is made."""
        own = {**self.made_of.attacks}
        if self.changes:
            # the longest name that fits counts, so what the size says goes in here
            fits = [n for n in own if self.attack == n or self.attack.startswith(f"{n}-")]
            usual = own[max(fits, key=len)] if fits else {}
            own[self.attack] = {**usual, **dict(self.changes)}
        return attacks.plan(self.attack, self.aim, self.data, own)

    @property
    def name(self) -> str:
        """First part of file names."""
        parts = [self.attack]
        parts += [f"target{self.target}"] if self.target is not None else []
        parts += [each for each in (self.dataset, self.arch) if each is not None]
        parts += [f"{name}{value:g}" for name, value in self.changes]
        return "-".join([*parts, f"seed{self.seed}"])


def settings(victim: Victim) -> dict[str, Any]:
    """Everything a victim depends on, as JSON types."""
    size, plan = victim.made_of, victim.plan
    return files.plain(
        {
            "attack": victim.attack,
            "seed": victim.seed,
            "dataset": victim.data,
            "net": dataclasses.asdict(victim.spec),
            "images": [size.train, size.held, size.tested],
            "plan": {**plan._asdict(), "config": plan.config and units.settings_of(plan.config)},
            "recipes": {
                name: dataclasses.asdict(size.recipes[name]) for name in {plan.recipe, "dhbe"}
            },
        }
    )


def modules(victim: Victim) -> tuple[str, ...]:
    """Whose code decides a victim and its figures."""
    kind = victim.plan.kind or "badnets"
    return "experiments.papers.victims", attacks.module(kind).__name__


def unit(victim: Victim) -> ledger.Unit:
    """The unit of a victim's figures."""
    return ledger.Unit(f"{victim.size}/victim", victim.name, settings(victim), modules(victim))


def identify(victim: Victim) -> str:
    """The hash of all that the weights depend on; how they are judged does not count."""
    own = ledger.code_hash(modules(victim), (JUDGE,))
    return ledger.digest(ledger.settings_hash(unit(victim)), own)
