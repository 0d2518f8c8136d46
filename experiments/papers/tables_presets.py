"""Every repair at the settings of its paper and of its released code: those of BNA and MESA on a
victim of that paper, all others on DHBE's BadNets."""

from experiments.papers import defences
from experiments.papers.sizes import SizeName
from experiments.papers.tables import Line, Table
from experiments.papers.victim import Victim

OWN = ("paper", "released", "compared")
"""Presets that are not this project's."""
VICTIMS = {"bna": "bna-badnets", "unlearn": "mesa-170"}
"""Repair -> attack; all others are shown on DHBE's BadNets."""


def build(size: SizeName) -> list[Table]:
    """The table at a size. Repairs that need a trigger get the attacked class told, BNA the
    attacker's own trigger."""
    rows: dict[str, list[str]] = {}
    for name, each in defences.table().items():
        source = "known" if each.method == "bna" else "told"
        if each.preset in OWN and each.source in ("none", source):
            rows.setdefault(VICTIMS.get(each.method, "dhbe-badnets-3"), []).append(name)
    return [
        Table(
            f"presets-{number}",
            f"Settings of papers and of released code: {attack}",
            {"none": None, **{name: name for name in names}},
            ("ACC", "ASR", "SIA"),
            [Line({"attack": attack}, Victim(attack=attack, size=size))],
        )
        for number, (attack, names) in enumerate(rows.items(), start=1)
    ]
