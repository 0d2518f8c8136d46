"""The MESA section: five digit seeds, the 51 triggers, target detection, alpha and beta,
distribution maps.
"""

from experiments import units
from experiments.mesa import (
    alpha_beta,
    defence_triggers,
    detect_targets,
    digits_five_seeds,
    distribution_maps,
    released,
)
from experiments.reproduce import Check

TIME = (
    "about 75 minutes on 2 cores, most of it on CIFAR-10 images where there are some; finished"
    " parts are kept, interrupt and start again as you like"
)
QUICK_TIME = (
    "about 4 minutes on 2 cores: one digit seed, 3 of the 51 triggers, detection of one trigger"
)
CPU_TRIGGERS, CPU_PATTERNS = 4, (170, 16, 94)
PARTS = ("digits", "shape", "presets", "cifar")


def run(quick: bool, parts: tuple[str, ...] = PARTS):
    """(tables by title, checks, details)."""
    tables: dict = {}
    checked: list[Check] = []
    details: dict = {}
    if quick or "digits" in parts:
        checked = _digits(quick, tables, details)
    if quick:
        return tables, checked, details
    if "shape" in parts:
        shape, maps = alpha_beta.run("digits"), distribution_maps.run("digits")
        _add_shape("Handwritten digits", tables, shape)
        tables["Handwritten digits: the recovered distribution (Figs. 1b, 5)"] = maps["rows"]
        details |= {"alpha_beta_digits": shape, "distribution_maps_digits": maps}
    if "presets" in parts:
        tables["Handwritten digits: the released settings"] = released.run()
    if "cifar" in parts:
        _cifar(tables, details)
    return tables, checked, details


def _digits(quick: bool, tables: dict, details: dict) -> list[Check]:
    """Five seeds, the 51 triggers, and detection; returns what is checked."""
    seeds = digits_five_seeds.run(1 if quick else 5)
    defence = defence_triggers.run("digits", 3 if quick else 51)
    detection = detect_targets.run("digits", (170,) if quick else (170, 16, 94))
    tables |= {
        "Handwritten digits, random 3x3 triggers: repair": seeds["rows"],
        "Handwritten digits, binary 3x3 triggers (Fig. 4): ASR after repair": defence["rows"],
        "Handwritten digits: recovered triggers per class at level 0.8 (section 4.3)": drop_lists(
            detection["rows"]
        ),
    }
    details |= {
        "digits_five_seeds": seeds,
        "defence_triggers_digits": defence,
        "detect_targets_digits": detection,
    }
    return checks(seeds)


def _add_shape(title: str, tables: dict, shape: dict) -> None:
    """The two tables of Fig. 3: over seeds, and of differences within a seed."""
    tables[f"{title}: alpha and beta (Fig. 3)"] = shape["rows"]
    tables[f"{title}: what raising alpha and beta does (Fig. 3)"] = shape["differences"]


def _cifar(tables: dict, details: dict) -> None:
    """The same at CPU size on CIFAR-10 images, where there are some."""
    if not (units.SHARED / "data" / "cifar10").is_dir():
        units.say("no CIFAR-10 images beside the repository: the CIFAR-10 tables are left out")
        return
    detection = detect_targets.run("cpu", CPU_PATTERNS)
    defence = defence_triggers.run("cpu", CPU_TRIGGERS)
    shape = alpha_beta.run("cpu", steps=800)
    maps = distribution_maps.run("cpu", patterns=(170,), steps=500)
    tables["CIFAR-10, small CNN: recovered triggers per class at level 0.8 (section 4.3)"] = (
        drop_lists(detection["rows"])
    )
    tables["CIFAR-10, small CNN: ASR after repair (Fig. 4)"] = defence["rows"]
    _add_shape("CIFAR-10, small CNN", tables, shape)
    tables["CIFAR-10, small CNN: the recovered distribution (Figs. 1b, 5)"] = maps["rows"]
    details |= {
        "detect_targets_cpu": detection,
        "defence_triggers_cpu": defence,
        "alpha_beta_cpu": shape,
        "distribution_maps_cpu": maps,
    }


def drop_lists(rows: list[dict]) -> list[dict]:
    """Rows without their lists."""
    return [
        {name: value for name, value in row.items() if not isinstance(value, list)} for row in rows
    ]


def checks(seeds: dict) -> list[Check]:
    """The figures that are stated for the digits."""
    count = len(seeds["seeds"])
    return [
        Check(
            "seeds with the right target and no other class",
            seeds["right_target"],
            count,
            "exactly",
        ),
        Check("clean twins called clean", seeds["clean_twins"], count, "exactly"),
        Check(
            "mean ASR after unlearning at level 0.9", seeds["asr_mean_level_0.9"], 0.05, "at most"
        ),
        Check(
            "worst ASR after unlearning at level 0.9", seeds["asr_worst_level_0.9"], 0.10, "at most"
        ),
        Check(
            "mean clean accuracy drop at level 0.9",
            seeds["mean_accuracy_drop_level_0.9"],
            0.02,
            "at most",
        ),
    ]
