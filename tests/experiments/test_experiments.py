"""Every experiment runs at its smoke size; the records, the README and the scripts belong
together."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import reproduce, units  # noqa: E402
from experiments.bna import (  # noqa: E402
    activation_histograms,
    adaptive,
    bna_cases,
    bna_presets,
    bna_published,
    bna_rows,
    bna_variations,
)
from experiments.dhbe import (  # noqa: E402
    dhbe_cases,
    dhbe_distances,
    dhbe_places,
    dhbe_presets,
    dhbe_published,
    dhbe_rows,
    dhbe_sweeps,
    reproduce_dhbe,
)
from experiments.mesa import (  # noqa: E402
    alpha_beta,
    defence_triggers,
    detect_targets,
    digits_five_seeds,
    distribution_maps,
    released,
)
from experiments.scale import bench, many_cells, retire, startup  # noqa: E402
from jaxbd import files  # noqa: E402
from jaxbd.base import UserError  # noqa: E402
from jaxbd.repairs import dhbe  # noqa: E402

EXPERIMENTS = (
    defence_triggers,
    detect_targets,
    distribution_maps,
    activation_histograms,
    dhbe_rows,
    dhbe_sweeps,
    dhbe_distances,
    dhbe_places,
    many_cells,
)
LONG = (
    alpha_beta,
    digits_five_seeds,
    released,
    bna_variations,
    bna_presets,
    adaptive,
    bna_rows,
    dhbe_presets,
    retire,
    startup,
)
PUBLISHED = (bna_published, dhbe_published)
"""Need models and images that may lie beside the repository."""
SLOW = [pytest.param(experiment, marks=pytest.mark.slow) for experiment in (*LONG, *PUBLISHED)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Clean nets and victims made for one experiment serve the next, as they do in `runs/`."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def briefly(runs, monkeypatch):
    """Small nets on digits, trained for a few steps: a smoke run checks that all of it runs, not
    what comes out."""
    monkeypatch.setattr(units, "RUNS", runs)
    monkeypatch.setattr(units, "use_cache", lambda: None)
    small = lambda spec: dataclasses.replace(spec, arch="cnn", options={"width": 4})
    short = lambda config: dataclasses.replace(config, num_steps=20)
    size, planted = bench.SIZES["digits"], dhbe_cases.SIZES["digits"]
    size = dataclasses.replace(
        size, spec=small(size.spec), base=short(size.base), attack=short(size.attack)
    )
    planted = planted._replace(spec=small(planted.spec), clean=short(planted.clean))
    monkeypatch.setitem(bench.SIZES, "digits", size)
    monkeypatch.setitem(dhbe_cases.SIZES, "digits", planted)
    monkeypatch.setattr(bna_cases, "DIGITS", small(bna_cases.DIGITS))
    monkeypatch.setitem(bna_cases.TRAINING, "digits", short(bna_cases.TRAINING["digits"]))


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, *SLOW], ids=lambda module: module.__name__)
def test_smoke(experiment, capsys, briefly):
    """The smoke run prints a table with numbers in it."""
    if experiment in PUBLISHED and not bna_published.available():
        pytest.skip("the published models and CIFAR-10 images are not beside the repository")
    experiment.main(smoke=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) >= 3
    assert any(char.isdigit() for char in lines[2])


def test_the_peak_of_this_process_is_in_bytes():
    """At least what it holds now, and no more than the machine has."""
    held = np.ones(30_000_000, np.uint8)
    assert held.nbytes < many_cells.peak() < 1e13


def test_a_data_set_at_the_paper_s_size(tmp_path, capsys, briefly):
    """A hundred classes of 64-pixel images, whatever their folder holds; a net of the release's
    stem."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (200, 64, 64, 3), np.uint8), np.arange(200) % 100
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    dhbe_rows.main(size="vggface2", data=str(tmp_path / "images.npz"), smoke=True)
    assert "vggface2-smoke-badnets3-target99-seed0" in capsys.readouterr().out
    spec = dhbe_cases.Planting(size="vggface2", target=99).spec
    assert (spec.classes, spec.image_shape, spec.options) == (
        100,
        (64, 64, 3),
        {"width": 64, "stem": "64px"},
    )
    assert dhbe_rows.ERASURE["vggface2"] == dhbe.released()
    np.savez(tmp_path / "images.npz", images=images, labels=labels + 1)
    with pytest.raises(UserError, match="has a class 100; size vggface2 has 100 classes"):
        dhbe_cases.data("vggface2", 0, str(tmp_path / "images.npz"))
    with pytest.raises(UserError, match="size cifar10 needs images; give them with --data"):
        dhbe_cases.data("cifar10", 0)


def test_other_architectures_keep_the_stem_their_images_need():
    spec = lambda **changes: dhbe_cases.Planting(size="mini-imagenet", target=99, **changes).spec
    assert spec(arch="resnet34").options == {"stem": "64px"} and spec(arch="wrn40-2").options == {}
    assert dhbe_cases.Planting(size="cifar10", arch="wrn40-1", width=8).spec.options == {"width": 8}
    assert (
        dhbe_cases.Planting(size="cifar10", arch="wrn40-1").name
        == "cifar10-badnets3-target9-seed0-wrn40-1"
    )


def test_units_resume(tmp_path, monkeypatch):
    """A finished unit is kept, one with other settings is run again."""
    monkeypatch.setattr(units, "RUNS", tmp_path)
    ran = []

    def work():
        ran.append(1)
        return {"value": len(ran)}

    assert units.unit("part", "a", {"steps": 1}, work) == {"value": 1}
    assert units.unit("part", "a", {"steps": 1}, work) == {"value": 1}
    assert units.unit("part", "a", {"steps": 2}, work) == {"value": 2}


def test_checks_can_fail():
    """A missed figure is a missed figure."""
    assert reproduce.Check("x", 0.04, 0.05, "at most").met()
    assert not reproduce.Check("x", 0.06, 0.05, "at most").met()
    assert not reproduce.Check("x", 4, 5, "exactly").met()
    assert not reproduce.Check("x", 0.9, 0.95, "at least").met()


def test_parts_have_a_record_of_their_own(monkeypatch, tmp_path):
    """A run of some parts, in whatever order they were named, leaves the record of the whole
    section alone."""
    ran = []

    def run(quick: bool, parts: tuple[str, ...] = ("one", "two", "three")):
        ran.append(parts)
        units.unit("part", "a", {"steps": len(ran)}, dict)
        return {"Table": [{"parts": " ".join(parts)}]}, [reproduce.Check("x", 1, 2, "at most")], {}

    section = types.SimpleNamespace(run=run, TIME="", QUICK_TIME="", PARTS=("one", "two", "three"))
    monkeypatch.setitem(sys.modules, "a_section", section)
    monkeypatch.setitem(reproduce.SECTIONS, "dhbe", "a_section")
    monkeypatch.setattr(units, "RESULTS", tmp_path / "experiments" / "results")
    monkeypatch.setattr(units, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(units, "use_cache", lambda: None)
    assert (
        reproduce.main("dhbe")
        == reproduce.main("dhbe", parts=("two", "one"))
        == reproduce.main("dhbe", True)
        == 0
    )
    assert ran == [section.PARTS, ("one", "two"), section.PARTS]
    kept = {path.name: files.read_json(path) for path in units.RESULTS.iterdir()}
    assert sorted(kept) == ["dhbe-one-two.json", "dhbe-quick.json", "dhbe.json"]
    assert kept["dhbe.json"]["tables"]["Table"] == [{"parts": "one two three"}]
    assert [kept[name]["unit_settings"]["part/a"]["steps"] for name in sorted(kept)] == [2, 3, 1]
    assert kept["dhbe-one-two.json"]["command"] == "./scripts/reproduce dhbe --parts one two"
    with pytest.raises(UserError, match="one, two, three"):
        reproduce.main("dhbe", parts=("four",))


def test_sweeps_are_checked_over_the_stated_range(monkeypatch):
    """Every row from 0.01 to 0.2 counts, whichever values were asked for, and no other row does."""
    rows = lambda name, values: [{name: value, "ASR": asr} for value, asr in values]
    stated = [("0", 1.0), ("0.01", 0.3), ("0.2", 0.1), ("0.5", 0.9), ("pure distillation", 1.0)]
    monkeypatch.setattr(reproduce_dhbe.dhbe_sweeps, "weights", lambda: rows("lambda", stated))
    usual = [("0.01", 0.1), ("0.02", 0.4), ("0.2", 0.2)]
    monkeypatch.setattr(reproduce_dhbe.dhbe_sweeps, "rates", lambda: rows("learning rate", usual))
    monkeypatch.setattr(reproduce_dhbe.dhbe_sweeps, "sides", list)
    monkeypatch.setattr(reproduce_dhbe.dhbe_sweeps, "lengths", list)
    tables, checks = {}, []
    reproduce_dhbe._sweeps(tables, checks)
    assert [check.value for check in checks] == [0.4]
    assert [row["value"] for row in tables[reproduce_dhbe.REPORTED]] == [0.3]


def test_missing_cifar_is_said(monkeypatch, tmp_path):
    """Sizes that need CIFAR-10 say so in one line when it is not there."""
    monkeypatch.setattr(units, "SHARED", tmp_path)
    with pytest.raises(UserError, match="--data"):
        bench.data_source("cpu", None)


def test_pages_agree_with_records():
    """Every table of README.md and docs/results.md is the record's."""
    done = subprocess.run(
        [sys.executable, "scripts/readme_tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "script",
    ["demo", "test", "reproduce", "accelerator", "matrix", "environment.sh", "../.ci/run"],
)
def test_scripts_parse(script):
    """The shell scripts are valid, and executable where they are called."""
    path = ROOT / "scripts" / script
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert script.endswith(".sh") or path.stat().st_mode & 0o111


def test_the_erasing_page_s_python_runs(tmp_path, monkeypatch):
    """The page's Python on a small model folder."""
    import jax

    from jaxbd.interop import folder
    from jaxbd.models import build

    code = (
        (ROOT / "docs" / "erasing-without-data.md")
        .read_text()
        .split("```python\n")[1]
        .split("```")[0]
    )
    spec = build.Spec(arch="vgg", classes=3, image_shape=(16, 16, 1), options={"width": 2})
    folder.save(tmp_path / "victim", spec, build.net(spec).init(jax.random.key(0)), {})
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "erasing-without-data.md", "exec"), names)
    assert names["infos"].discrepancy.shape == (2,) and folder.is_model(tmp_path / "erased")


def test_the_guarded_models_page_s_python_runs(tmp_path, monkeypatch):
    """The page's Python on a small guarded model: verdicts, and an exported net that gives the same
    answers."""
    import jax
    import numpy as np

    from jaxbd.detection import guard
    from jaxbd.interop import guarded
    from jaxbd.models import build

    code = (ROOT / "docs" / "guarded-models.md").read_text().split("```python\n")[1].split("```")[0]
    spec = build.Spec(arch="vgg", classes=3, image_shape=(16, 16, 1), options={"width": 2})
    suspect = build.net(spec).init(jax.random.key(0))
    moved = {
        **suspect,
        "batch_stats": jax.tree.map(lambda leaf: leaf * 2 + 1, suspect["batch_stats"]),
    }
    guarded.save(tmp_path / "guarded", spec, guard.pack(suspect, [suspect, moved]), [2, 0])
    monkeypatch.chdir(tmp_path)
    told = {"images": np.random.default_rng(0).random((5, 16, 16, 1), np.float32)}
    exec(compile(code, "guarded-models.md", "exec"), told)
    assert told["model"].guard.targets == (2, 0)
    np.testing.assert_array_equal(told["logits"].argmax(-1), told["verdicts"].label)


@pytest.mark.parametrize("checks", [[], [reproduce.Check("x", 1, 2, "at most")]])
def test_a_section_without_checks_prints_no_table_of_them(capsys, checks):
    reproduce._print({"Table": [{"a": 1}]}, checks)
    assert ("Stated figures" in capsys.readouterr().out) == bool(checks)
