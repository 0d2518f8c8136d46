"""Fig. 1 of BNA: activations of one penultimate neuron, clean and triggered, in three nets.

Claim (Li et al. 2023, Fig. 1): in a clean net a trigger hardly moves the distribution, in a
backdoored one it does, and after the correction the two agree again.

    python -m experiments.bna.activation_histograms --out figure1.png     # digits
    python -m experiments.bna.activation_histograms --smoke

The neuron shown is the one whose distribution the trigger moves most in the backdoored net, by
total variation.
"""

import pathlib
from typing import Any

import numpy as np

from experiments import units
from experiments.bna import bna_cases, bna_rows
from experiments.bna.bna_cases import Planting
from jaxbd.data import draw
from jaxbd.metrics import activations
from jaxbd.repairs import bna

NETS: tuple[str, ...] = ("clean net", "backdoored net", "corrected net")
VICTIM = Planting()


def measure(planting: Planting, config: bna.Config) -> dict[str, Any]:
    """Values [N] of the neuron, {net: {"clean", "triggered"}}, their total variation, and which
    neuron it is."""
    case = bna_cases.victim(planting)
    twin = bna_cases.victim(Planting(size=planting.size, attack=None, seed=planting.seed))
    known = bna_rows.true_triggers(case, all_to_all=False)
    nets, _ = bna_rows.correct_known(case, known, config)
    victim = case.victim
    three = (twin.victim.variables, victim.variables, nets[case.target])
    variables = dict(zip(NETS, three, strict=True))
    data = draw.of_classes(case.test, tuple(k for k in range(10) if k != case.target))
    layer = list(activations.layers(victim.net, victim.variables, data))[-1]

    def values(name: str, triggered: bool) -> np.ndarray:
        stamp: dict[str, Any] = (
            {"stamp": case.attack.stamp, "model": case.trigger} if triggered else {}
        )
        return activations.activations(victim.net, variables[name], data, layer=layer, **stamp)

    found = {name: {"clean": values(name, False), "triggered": values(name, True)} for name in NETS}
    # what clean images are in the net as it came is what the corrected net's triggered ones are
    # compared with
    found[NETS[2]]["clean"] = found[NETS[1]]["clean"]
    moved = {
        n: activations.total_variations(v["clean"], v["triggered"], config.width, config.bins)
        for n, v in found.items()
    }
    chosen = int(np.argmax(moved[NETS[1]]))
    neuron = {
        name: {what: v[:, chosen] for what, v in values.items()} for name, values in found.items()
    }
    rows = [{"net": name, "total variation": float(moved[name][chosen])} for name in NETS]
    return {"layer": layer, "channel": chosen, "rows": rows, "values": neuron}


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    """The three histograms side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for axes, (name, values) in zip(
        figure.subplots(1, 3, sharex=True), found["values"].items(), strict=True
    ):
        both = np.concatenate(list(values.values()))
        edges = np.linspace(both.min(), both.max(), 41)
        for label, one in values.items():
            axes.hist(one, edges, density=True, alpha=0.55, label=label)
        axes.set_title(name)
        axes.legend()
    figure.savefig(path, dpi=120)


def run(planting: Planting = VICTIM) -> list[dict[str, Any]]:
    """The table, kept under `runs/`."""
    config = bna_rows.settings_for(VICTIM).correction
    wanted = [bna_cases.settings(planting), units.settings_of(config)]

    def work() -> dict[str, Any]:
        found = measure(planting, config)
        return {
            "rows": [
                {**row, "neuron": f"{found['layer']}[{found['channel']}]"} for row in found["rows"]
            ]
        }

    return units.unit("bna/histograms", planting.name, wanted, work)["rows"]


def main(out: pathlib.Path | None = None, smoke: bool = False) -> None:
    """Prints the total variation in the three nets; draws them with --out."""
    units.use_cache()
    config = bna.Config(num_steps=2) if smoke else bna_rows.settings_for(VICTIM).correction
    found = measure(VICTIM, config)
    print(f"{found['layer']}, channel {found['channel']}\n\n{units.table(found['rows'])}")
    if out is not None:
        plot(found, out)


if __name__ == "__main__":
    units.cli(main)
