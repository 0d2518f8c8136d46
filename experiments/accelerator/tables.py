"""Tables and words for the pages, from the committed records of accelerators.

Records of a CPU, of toy runs and of items that did not come to an end give no row.
"""

from typing import Any

from experiments import units
from experiments.accelerator import records

NOTHING = "not measured on a GPU"
Rows = list[dict[str, Any]]
SIDES = {
    "loop": "jaxbd, one cell after another",
    "torch": "PyTorch eager",
    "torch_channels_last": "PyTorch, channels last",
    "torch_compiled": "PyTorch, compiled net",
}


def measured(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> content of what an accelerator brought to an end."""
    return {
        name: record["content"]
        for name, record in found.items()
        if records.is_of_accelerator(record) and record["status"] == "done" and record["content"]
    }


def devices(found: dict[str, dict[str, Any]]) -> str:
    """The devices that records name, and the versions of JAX, in words."""
    real = [found[name] for name in measured(found)]
    named = sorted({f"{r['device']}, jax {r['versions']['jax']}" for r in real})
    return "; ".join(named)


def peaks(done: dict[str, Any]) -> Rows:
    """Matrix products of the device."""
    if "device" not in done:
        return []
    return [
        {
            "matrix product": name,
            "TFLOP/s": f"{figures['operations_per_second'] / 1e12:.0f}",
            "relative error": f"{figures['relative_error']:.1e}",
        }
        for name, figures in done["device"]["peaks"].items()
    ]


def sweeps(done: dict[str, Any]) -> Rows:
    """Images per second of every case of `bench_scale`, beside PyTorch's."""
    rows = []
    for name, content in done.items():
        for row in (
            content.get("rows", []) if content.get("schema") == "jaxbd/1/bench-scale" else []
        ):
            rate = lambda side, row=row: f"{row[side]['images_per_second']:.0f}"
            share = row["jaxbd"]["share_of_peak"]
            rows.append(
                {
                    "what": name,
                    "jaxbd, images/s": rate("jaxbd"),
                    **{title: rate(side) for side, title in SIDES.items() if side in row},
                    "jaxbd / PyTorch eager": f"{row['torch_over_jaxbd']['median']:.2f}",
                    "share of the matrix peak": "" if share is None else f"{share:.0%}",
                    "seconds to compile": f"{row['jaxbd']['seconds_compile']:.1f}",
                }
            )
    return rows


def scans(done: dict[str, Any]) -> Rows:
    """Scans of published models, in a first and a second process."""
    rows = []
    for name, content in done.items():
        for way in ("cold", "warm"):
            if way not in content:
                continue
            one = content[way]
            rows.append(
                {
                    "scan": name,
                    "compile cache": "empty" if way == "cold" else "filled",
                    "verdict": " ".join([one["verdict"], *map(str, one["targets"])]),
                    "seconds in all": f"{one['process_seconds']:.1f}",
                    "of them in the compiler": f"{one['compiling']['backend']:.1f}",
                    "of them searching": f"{one['seconds']['run']:.1f}",
                }
            )
    return rows


TABLES = {"peaks": peaks, "sweeps": sweeps, "scans": scans}


def filled(name: str, found: dict[str, dict[str, Any]] | None = None) -> str:
    """What stands in a page's block: `words` for a half-sentence, else a table of `TABLES`; the
    words of `NOTHING` where there is nothing. Raises: KeyError for an unknown name."""
    found = records.committed() if found is None else found
    if name == "words":
        where = devices(found)
        return f"measured on {where}" if where else NOTHING
    rows = TABLES[name](measured(found))
    return f"{units.table(rows)}\n\n<sub>{devices(found)}</sub>" if rows else NOTHING
