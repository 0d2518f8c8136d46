"""The papers' experiments at full size, in units by priority; finished units are stored.

python -m experiments.accelerator.papers --unit NAME --out FILE --shared FOLDER --runs FOLDER

Nets are ResNet-18 at full width on CIFAR-10. The clean net trains for 30 epochs ("short" in
`experiments.scale.bench`) where the papers train for 200, so that a GPU needs minutes.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments import units
from experiments.accelerator.needs import Need
from jaxbd import files


class Unit(NamedTuple):
    """One experiment.

    Attributes:
      run: whether at toy size -> its JSON.
      seconds: the most it may take.
      needs: what must be there.
      resumes: whether it is stopped and goes on in a later run; what it stores comes back.
    """

    run: Callable[[bool], dict[str, Any]]
    seconds: int
    needs: tuple[Need, ...] = ("data",)
    resumes: bool = False


def size_of(toy: bool) -> Any:
    """The experiments' size: full nets, or digits."""
    return "digits" if toy else "short"


def shrink() -> None:
    """Makes the digit experiments so small that they only show that they run."""
    from experiments.bna import bna_cases
    from experiments.scale import bench

    small = lambda spec: dataclasses.replace(spec, arch="cnn", options={"width": 2})
    short = lambda config: dataclasses.replace(config, num_steps=2)
    size = bench.SIZES["digits"]
    bench.SIZES["digits"] = dataclasses.replace(
        size, spec=small(size.spec), base=short(size.base), attack=short(size.attack)
    )
    bna_cases.DIGITS = small(bna_cases.DIGITS)
    bna_cases.TRAINING["digits"] = short(bna_cases.TRAINING["digits"])


def base(toy: bool) -> dict[str, Any]:
    """The clean net, from which the next units' victims are tuned."""
    from experiments.scale import bench
    from jaxbd.metrics import evaluate

    made = bench.make(size_of(toy))
    answers = evaluate.logits(made.net, made.base, made.test).argmax(-1)
    rate = float((answers == np.asarray(made.test.labels)).mean())
    return {"clean_accuracy": rate, "settings": units.settings_of(made.size)}


def detection(pattern: int) -> Callable[[bool], dict[str, Any]]:
    """MESA on every class of a victim of one binary trigger (Qiao et al. 2019, section 4.3)."""

    def run(toy: bool) -> dict[str, Any]:
        from experiments.mesa import detect_targets

        if toy:
            from experiments.scale import bench

            return detect_targets.one_trigger(bench.make("digits"), pattern, 1, 0, steps=3)
        return detect_targets.run(size_of(toy), (pattern,))

    return run


def unlearning(count: int) -> Callable[[bool], dict[str, Any]]:
    """Unlearning victims of `count` binary triggers in every way (Qiao et al. 2019, Fig. 4)."""

    def run(toy: bool) -> dict[str, Any]:
        from experiments.mesa import defence_triggers

        if toy:
            from experiments.scale import bench

            return defence_triggers.one_trigger(bench.make("digits"), 170, 0, 1, steps=3)
        return defence_triggers.run(size_of(toy), count, baseline_runs=1)

    return run


def correction(toy: bool) -> dict[str, Any]:
    """A BadNets victim, scanned over pairs and corrected by BNA (Li et al. 2023, Table 1)."""
    from experiments.bna import bna_rows
    from experiments.bna.bna_cases import Planting

    if toy:
        settings = bna_rows.settings_for(Planting())
        scan = dataclasses.replace(settings.scan, steps=2)
        short = settings._replace(
            scan=scan, correction=dataclasses.replace(settings.correction, num_steps=2), rounds=0
        )
        return bna_rows.unit(Planting(), short, "bna/toy")
    return bna_rows.unit(Planting(size=size_of(toy), attack="badnets"))


def erasure(toy: bool) -> dict[str, Any]:
    """DHBE's released schedule on a published model, by `jaxbd repair`, which saves where it is
    stopped and goes on there (Yan et al. 2023)."""
    from jaxbd.cli import main as cli

    model = units.SHARED / "models" / "ibau" / "badnets_8_02_ckpt.pth"
    out = units.RUNS / "erased.pth"
    words = ["repair", str(model), "--method", "dhbe", "--normalisation", "none", "--out", str(out)]
    words += ["--preset", "released", "--resume", "--save-every", "200"]
    if toy:
        words += ["--with.num-steps", "1", "--with.batch-size", "4", "--with.inner-steps", "1"]
        words += ["--with.width", "4", "--with.noise-dim", "8"]
    code = cli.main(words)
    if code:
        raise SystemExit(code)
    return files.read_json(out.with_suffix(".repair.json"))


UNITS: dict[str, Unit] = {
    "base": Unit(base, 300),
    "detect-170": Unit(detection(170), 300),
    "unlearn-1": Unit(unlearning(1), 300),
    "detect-16": Unit(detection(16), 300),
    "bna-badnets": Unit(correction, 600),  # two searches
    "detect-94": Unit(detection(94), 300),
    "unlearn-4": Unit(unlearning(4), 600),
    "dhbe-released": Unit(erasure, 600, ("models",), resumes=True),
}
"""By priority."""


def main() -> None:
    """Runs one unit and writes its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unit", choices=tuple(UNITS), required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shared", type=pathlib.Path, required=True)
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    units.SHARED, units.RUNS = given.shared, given.runs
    units.use_cache()
    if given.toy:
        shrink()
    found = UNITS[given.unit].run(given.toy)
    record = {"toy": given.toy, "result": found, "unit_seconds": units.SECONDS}
    files.write_json(given.out, json.loads(json.dumps(files.plain(record))))


if __name__ == "__main__":
    sys.exit(main())
