"""Writes `tests/slow.txt`, which only `./scripts/test --slow` runs, from the times of a run.

    ./scripts/test --slow --junitxml=suite.xml
    python scripts/list_slow_tests.py suite.xml --least 1.5

What says most about the whole in little time is never listed: see KEPT. A test may also be marked
`slow` where it stands; the list is for those that are slow because of what they compile.
"""

import argparse
import pathlib
import xml.etree.ElementTree

LIST = pathlib.Path(__file__).resolve().parents[1] / "tests" / "slow.txt"
KEPT = (
    "tests/test_api.py::test_the_readme_s_lines",
    "tests/test_oracles.py::test_an_inversion_finds_the_target_and_no_other_class[mesa-fixed",
    "tests/test_oracles.py::test_repairing_with_the_true_trigger_removes_the_backdoor[unlearn]",
    "tests/test_recorded_goldens.py::test_golden[bna]",
    "tests/test_recorded_goldens.py::test_golden[dhbe]",
    "tests/test_recorded_goldens.py::test_golden[scan-auto]",
    "tests/test_recorded_goldens.py::test_golden[unlearn]",
)
"""How the ids of tests begin that always run: each of the three systems from end to end."""


def read_times(path: pathlib.Path) -> dict[str, float]:
    """Seconds of every test that ran, by its id."""
    found = {}
    for case in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        module = case.get("classname", "").replace(".", "/") + ".py"
        if case.find("skipped") is None:
            found[f"{module}::{case.get('name')}"] = float(case.get("time", 0))
    return found


def main() -> None:
    """Keeps what the list has of tests that did not run, and times the others anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("times", type=pathlib.Path)
    parser.add_argument("--least", type=float, default=1.5, help="seconds from which one is slow")
    args = parser.parse_args()
    times = read_times(args.times)
    before = set(LIST.read_text().splitlines()) if LIST.exists() else set()
    slow = {name for name, seconds in times.items() if seconds >= args.least}
    names = sorted(name for name in slow | (before - set(times)) if not name.startswith(KEPT))
    LIST.write_text("\n".join(names) + "\n")
    rest = sum(seconds for name, seconds in times.items() if name not in names)
    print(f"{len(names)} slow tests; the others took {rest:.0f} s of {sum(times.values()):.0f} s")


if __name__ == "__main__":
    main()
