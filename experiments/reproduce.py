"""`./scripts/reproduce SECTION`: runs a section's experiments, prints tables, checks figures, writes the record.

Every unit of work is kept under `runs/`: an interrupted run goes on where it stopped. The record is
`experiments/results/SECTION.json`, `SECTION-quick.json` with `--quick`, `SECTION-PART-PART.json` with `--parts PART
PART`; exit code 1 names missed figures.
"""

import importlib
import json
from typing import Any, Literal, NamedTuple

from experiments import units
from jaxbd import record, results
from jaxbd.base import UserError

SECTIONS = {
    "mesa": "experiments.reproduce_mesa",
    "import": "experiments.reproduce_import",
    "bna": "experiments.reproduce_bna",
    "dhbe": "experiments.reproduce_dhbe",
    "scale": "experiments.reproduce_scale",
}


class Check(NamedTuple):
    """A stated figure: name, what was measured, the limit, and whether it has to stay at most or at least there."""

    name: str
    value: float
    limit: float
    kind: Literal["at most", "at least", "exactly"]

    def met(self) -> bool:
        """Whether the figure was reached."""
        if self.kind == "exactly":
            return self.value == self.limit
        return self.value <= self.limit if self.kind == "at most" else self.value >= self.limit


def main(
    section: Literal["mesa", "import", "bna", "dhbe", "scale"], /, quick: bool = False, parts: tuple[str, ...] = ()
) -> int:
    """Reproduces one section.

    Args:
      section: mesa (detection, unlearning and maps), import (foreign model files), bna (class pairs, correction and
        test-time detection), dhbe (erasure without data) or scale (speed, memory, start-up).
      quick: a smaller honest version, in under 5 minutes.
      parts: only these parts of a long section, which get a record of their own; bna: digits, variations, published,
        cifar, adaptive; dhbe: digits, attacks, sweeps, distances, cifar, published; scale: bench, retire, race,
        executors, memory, startup.
    """
    units.use_cache()
    module = importlib.import_module(SECTIONS[section])
    known = getattr(module, "PARTS", ())
    if not set(parts) <= set(known) or (parts and quick):
        raise UserError(f"section {section} has parts {', '.join(known) or 'none'}, and no choice of them with --quick")
    parts = tuple(part for part in known if part in parts)
    units.say(module.QUICK_TIME if quick else module.TIME)
    tables, checks, details = module.run(quick, parts) if parts else module.run(quick)
    for title, rows in tables.items():
        print(f"\n{title}\n\n{units.table(rows)}")
    print("\nStated figures\n")
    print(units.table([{**check._asdict(), "met": "yes" if check.met() else "NO"} for check in checks]))
    path = units.RESULTS / f"{'-'.join([section, *(['quick'] if quick else parts)])}.json"
    flags = ["--quick"] if quick else ["--parts", *parts] if parts else []
    command = " ".join(["./scripts/reproduce", section, *flags])
    record.write_json(path, _record(section, command, tables, checks, details))
    print(f"\nwritten to {path.relative_to(units.RESULTS.parents[1])}")
    missed = [check.name for check in checks if not check.met()]
    if missed:
        units.say("missed: " + "; ".join(missed))
    return 1 if missed else 0


def _record(section, command, tables, checks, details) -> dict[str, Any]:
    """What is kept of a run: tables, checks, details, and what they were measured on."""
    whole = {
        "schema": f"{results.SCHEMA}/reproduce",
        "section": section,
        "command": command,
        "tables": tables,
        "checks": [{**check._asdict(), "met": check.met()} for check in checks],
        "details": details,
        "unit_seconds": units.SECONDS,
        "unit_settings": units.SETTINGS,
        **{k: v for k, v in results.provenance(0).items() if k != "seed"},
    }
    # where the optional data lies on this machine is nobody's business
    return json.loads(json.dumps(record.plain(whole)).replace(f"{units.SHARED}/", "shared/"))


if __name__ == "__main__":
    units.cli(main, "./scripts/reproduce")
