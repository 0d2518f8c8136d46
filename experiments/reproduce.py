"""`./scripts/reproduce SECTION`: runs a section's experiments, prints tables, checks figures,
writes the record.

Every unit of work is stored under `runs/`: an interrupted run goes on where it stopped. The record
is `experiments/results/SECTION.json`, `SECTION-quick.json` with `--quick`,
`SECTION-PART-PART.json` with `--parts PART PART`; exit code 1 names missed figures.
"""

import importlib
import json
from typing import Any, Literal, NamedTuple

from experiments import units
from jaxbd import files
from jaxbd.base import UserError
from jaxbd.report import results

SECTIONS = {
    "mesa": "experiments.mesa.reproduce_mesa",
    "import": "experiments.reproduce_import",
    "bna": "experiments.bna.reproduce_bna",
    "dhbe": "experiments.dhbe.reproduce_dhbe",
    "scale": "experiments.scale.reproduce_scale",
    "reader": "experiments.reader.reproduce_reader",
    "verdict": "experiments.verdict.reproduce_verdict",
    "papers": "experiments.papers.reproduce_papers",
}


class Check(NamedTuple):
    """A stated figure: name, what was measured, the limit, and whether it has to stay at most or at
    least there."""

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
    section: Literal["mesa", "import", "bna", "dhbe", "scale", "reader", "verdict", "papers"],
    /,
    quick: bool = False,
    parts: tuple[str, ...] = (),
    kept: bool = False,
) -> int:
    """Reproduces one section.

    Args:
      section: mesa (detection, unlearning and maps), import (foreign model files), bna (class
        pairs, correction and test-time detection), dhbe (erasure without data), scale (speed,
        memory, start-up), reader (mutated model files against PyTorch and safetensors), verdict
        (scans of published and of digit models, repaired ones judged by the true triggers) or
        papers (every table of the three papers, from the units that were measured; says what is
        missing).
      quick: a smaller honest version, in under 5 minutes.
      parts: only these parts of a long section, which get a record of their own; bna: digits,
        variations, presets, published, cifar, adaptive; dhbe: digits, attacks, sweeps, distances,
        presets, cifar, published; mesa: digits, shape, presets, cifar; scale: bench, retire, race,
        executors, memory, startup; reader: done; import: published, families, exports, large,
        cases, reader; verdict: scans, repairs; papers: full, small, digits, the sizes to print.
      kept: the record of an import or a verdict section of which some units have not run: takes
        what earlier runs stored, runs nothing, and names what is missing.
    """
    if kept and section not in ("import", "verdict"):
        raise UserError(f"--kept is of the sections import and verdict, got {section}")
    units.KEPT_ONLY[0] = kept
    units.use_cache()
    module = importlib.import_module(SECTIONS[section])
    known = getattr(module, "PARTS", ())
    if not set(parts) <= set(known) or (parts and quick):
        raise UserError(
            f"section {section} has parts {', '.join(known) or 'none'}, and no choice of them with"
            " --quick"
        )
    parts = tuple(part for part in known if part in parts)
    units.say(module.QUICK_TIME if quick else module.TIME)
    tables, checks, details = module.run(quick, parts) if parts else module.run(quick)
    _print(tables, checks)
    path = units.RESULTS / f"{'-'.join([section, *(['quick'] if quick else parts)])}.json"
    flags = ["--quick"] if quick else ["--parts", *parts] if parts else []
    flags += ["--kept"] if kept else []
    command = " ".join(["./scripts/reproduce", section, *flags])
    files.write_json(path, _record(section, command, tables, checks, details))
    print(f"\nwritten to {path.relative_to(units.RESULTS.parents[1])}")
    missed = [check.name for check in checks if not check.met()] + units.MISSING
    if missed:
        units.say("missed: " + "; ".join(missed))
    return 1 if missed else 0


def _print(tables: dict[str, Any], checks: list[Check]) -> None:
    """The tables, the stated figures last."""
    for title, rows in tables.items():
        print(f"\n{title}\n\n{units.table(rows)}")
    figures = [{**check._asdict(), "met": "yes" if check.met() else "NO"} for check in checks]
    if figures:
        print(f"\nStated figures\n\n{units.table(figures)}")


def _record(section, command, tables, checks, details) -> dict[str, Any]:
    """What is recorded of a run: tables, checks, details, and what they were measured on."""
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
    return json.loads(json.dumps(files.plain(whole)).replace(f"{units.SHARED}/", "shared/"))


if __name__ == "__main__":
    units.cli(main, "./scripts/reproduce")
