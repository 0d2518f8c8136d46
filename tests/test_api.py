"""The public face: open, scan, repair, evaluate, guard and save a small victim."""

import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxbd
from jaxbd import api, methods
from jaxbd.attacks import badnets
from jaxbd.data import digits, draw
from jaxbd.interop import folder
from jaxbd.metrics import batches
from jaxbd.models import build
from jaxbd.pipelines import checks, fresh, hold, plant
from jaxbd.pipelines import scan as scanning
from jaxbd.pipelines.repair import Repaired
from jaxbd.training import supervised
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
SHAPE, TARGET = (8, 8, 1), 3
SHORT = {"steps": 30, "locate_steps": 30, "levels": (0.9,), "targets": (3, 5)}


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """(model folder, images, labels): a CNN with a backdoor to class 3."""
    spec = build.Spec(arch="cnn", classes=10, image_shape=SHAPE, options={"width": 4})
    parts = draw.divide(digits.load(8), 1200, 300)
    attack = badnets.make(SHAPE, 10, badnets.Config(target=TARGET, poison_rate=0.2))
    trained = plant.train(
        Run(),
        "victim",
        jax.random.key(0),
        build.net(spec),
        parts.train,
        supervised.Config(num_steps=240),
        attack=(attack, attack.init(jax.random.key(1))),
    )
    path = tmp_path_factory.mktemp("api") / "victim"
    folder.save(path, spec, trained.variables, {})
    return path, np.asarray(parts.defence.images), np.asarray(parts.defence.labels)


@pytest.fixture(scope="module")
def suspect(victim):
    return jaxbd.open_model(*victim)


def test_importing_is_free_and_every_name_is_there():
    code = "import sys, jaxbd; sys.exit('jax' in sys.modules or len(dir(jaxbd)) < 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(callable(getattr(jaxbd, name)) for name in dir(jaxbd))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = jaxbd.absent


def test_functions_are_not_shadowed_by_packages():
    from jaxbd.repairs import bna  # noqa: F401

    assert jaxbd.repair.__module__ == jaxbd.evaluate.__module__ == "jaxbd.api"


def test_the_readme_s_lines(victim, monkeypatch):
    """The README's Python on the victim, with a shorter scan."""
    path, images, labels = victim
    code = README.read_text().split("```python\n")[1].split("```")[0]
    assert '"model.pth"' in code
    real_scan, real_repair = jaxbd.scan, jaxbd.repair
    short = fresh.Config(steps=30, patch_steps=0, additive_steps=0)
    config = hold.Config(rounds=1, max_drop=0.2, search=short)
    monkeypatch.setattr(jaxbd, "scan", lambda *args: real_scan(*args, **SHORT))
    monkeypatch.setattr(jaxbd, "repair", lambda *args: real_repair(*args, config=config))
    names = {"images": images, "labels": labels}
    exec(compile(code.replace('"model.pth"', repr(str(path))), "README.md", "exec"), names)
    found, repaired = names["found"], names["repaired"]
    assert (found.verdict, found.targets) == ("backdoored", [TARGET])
    assert repaired.before.attack_success_rate > 0.5 > 0.2 > repaired.after.attack_success_rate
    assert found.accuracy > 0.8 and found.baseline[TARGET] < 0.1
    assert isinstance(repaired.details, hold.Held) and repaired.details.checked_on == 75


@pytest.fixture
def asked(monkeypatch):
    """The arguments of each repair in rounds, which do nothing, and the names of the others."""
    found = []

    def hold_repair(run, key, suspect, clean, evidence, config, **others):
        found.append((len(clean.labels), evidence, config, others))
        nothing = Repaired(suspect.variables, {}, Seconds(0.0, 0.0))
        last = checks.Round(1.0, {}, ())
        return hold.Held(nothing, (last, last), "nothing left", False, checks.Limits(1, 1), 0)

    def other_repair(run, key, suspect, clean, evidence, method, config, **others):
        found.append((method, config.max_drop))
        return Repaired(suspect.variables, {}, Seconds(0.0, 0.0))

    monkeypatch.setattr(hold, "repair", hold_repair)
    monkeypatch.setattr(methods.find("repair", "clip").driver, "repair", other_repair)
    return found


def scanned(verdict, evidence, norms=None):
    located = None if norms is None else SimpleNamespace(norms=norms)
    details = SimpleNamespace(located=located)
    return api.Found(verdict, [], evidence, "", 0.9, np.zeros(10), details)


def test_a_repair_without_a_method_checks_itself_as_the_command_does(suspect, victim, asked):
    _, images, labels = victim
    norms, known = np.arange(10.0), [_door()]
    jaxbd.repair(suspect, images, labels, scanned("backdoored", known, norms), batch_size=32)
    ((count, evidence, config, others),) = asked
    assert (count, evidence, config) == (225, known, hold.Config())
    assert len(others["held"].labels) == 75 and others["batch_size"] == 32
    assert others["norms"] is norms
    jaxbd.repair(suspect, images, labels, known)
    assert asked[1][1] == known and asked[1][3]["norms"] is None


def test_without_a_trigger_an_open_verdict_is_repaired_by_clip(suspect, victim, asked):
    _, images, labels = victim
    jaxbd.repair(suspect, images, labels, scanned("inconclusive", []))
    config = hold.Config(max_drop=0.07)
    jaxbd.repair(suspect, images, labels, scanned("inconclusive", []), config=config)
    assert asked == [("clip", hold.Config().max_drop), ("clip", 0.07)], "with the same budget"
    with pytest.raises(jaxbd.UserError, match="found no backdoor, so there is nothing to repair"):
        jaxbd.repair(suspect, images, labels, scanned("clean", []))
    with pytest.raises(jaxbd.UserError, match="auto needs clean images; give images and labels"):
        jaxbd.repair(suspect, evidence=[_door()])


def test_after_an_open_verdict_triggers_of_classes_with_one_sign_are_unlearned(
    suspect, victim, asked, monkeypatch
):
    _, images, labels = victim
    scan = scanning.Scan(**dict.fromkeys(scanning.Scan._fields))
    monkeypatch.setattr(api.evidences, "of_leads", lambda found: [_door()] if found is scan else [])
    jaxbd.repair(suspect, images, labels, scanned("inconclusive", [])._replace(details=scan))
    ((_, evidence, _, _),) = asked
    assert [each.target for each in evidence] == [TARGET]


def _door():
    attack = badnets.make(SHAPE, 10, badnets.Config(target=TARGET))
    return jaxbd.Evidence(TARGET, (), attack.stamp, attack.init(jax.random.key(1)))


def test_save_and_open_again(suspect, victim, tmp_path):
    _, images, labels = victim
    jaxbd.save_model(tmp_path / "copy", suspect)
    again = jaxbd.open_model(tmp_path / "copy")
    one, other = (jaxbd.evaluate(each, images, labels) for each in (suspect, again))
    assert one == other and one.attack_success_rate is None


def test_a_net_that_classifies_nothing_is_not_scanned(suspect, victim):
    """An untrained net has rates near 1 for any trigger; that is no backdoor."""
    _, images, labels = victim
    untrained = suspect._replace(variables=suspect.net.init(jax.random.key(5)))
    with pytest.raises(jaxbd.UserError, match="no better than chance"):
        jaxbd.scan(untrained, images, labels)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i, n: (i[:, :4], n), r"images must be \[N, 8, 8, 1\], got \[300, 4, 8, 1\]"),
        (lambda i, n: (i, n[:5]), "300 images need as many labels"),
        (lambda i, n: (i, n + 5), r"labels must be 0\.\.9, got up to 14"),
        (lambda i, n: (i.astype(float), n), r"float images must lie in \[0, 1\]"),
    ],
)
def test_images_that_do_not_fit_are_named(suspect, victim, change, message):
    _, images, labels = victim
    with pytest.raises(jaxbd.UserError, match=message):
        jaxbd.scan(suspect, *change(images, labels))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A net of 3 classes with a guard for class 1."""
    from jaxbd.detection import guard
    from jaxbd.interop import guarded

    path = tmp_path_factory.mktemp("api") / "untrained"
    spec = build.Spec(arch="cnn", classes=3, image_shape=SHAPE, options={"width": 2})
    variables = build.net(spec).init(jax.random.key(0))
    guarded.save(path, spec, guard.pack(variables, [variables]), [1])
    return jaxbd.open_model(path)


SOME = np.arange(4 * 64, dtype=np.uint8).reshape(4, *SHAPE)


@pytest.mark.parametrize("kind", [np.int64, np.uint16, np.int32])
def test_whole_numbers_of_any_type_are_pixels(untrained, kind):
    for function, others in ((jaxbd.guard, ()), (jaxbd.evaluate, ([0, 1, 2, 0],))):
        found = function(untrained, SOME.astype(kind), *others)
        wanted = function(untrained, SOME, *others)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    "images, message",
    [
        (SOME.astype(float), r"float images must lie in \[0, 1\], got 0 to 255"),
        (SOME[:, :4], r"images must be \[N, 8, 8, 1\], got \[4, 4, 8, 1\]"),
        (SOME[:0], "there are no images; give at least one"),
        (SOME.astype(int) + 1, r"whole-number images must lie in 0\.\.255, got 1 to 256"),
        (SOME.astype(int) % 2, "int64 with only 0 and 1; give uint8 or floats"),
    ],
)
def test_pixels_that_do_not_fit_are_named(untrained, images, message):
    with pytest.raises(jaxbd.UserError, match=message):
        jaxbd.guard(untrained, images)
    with pytest.raises(jaxbd.UserError, match=message):
        jaxbd.evaluate(untrained, images, np.zeros(len(images), int))


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 1, 0.7, 2], "labels must be whole class numbers, got 0.7"),
        ([0, 1, np.nan, 2], "labels must be whole class numbers, got nan"),
        (["0", "1", "0", "2"], "labels must be class numbers, got <U1"),
        ([0, 1, 2**32, 2], r"labels must be 0\.\.2, got up to 4294967296"),
    ],
)
def test_labels_that_are_no_classes_are_named(untrained, labels, message):
    with pytest.raises(jaxbd.UserError, match=message):
        jaxbd.evaluate(untrained, SOME, labels)


def test_floats_and_booleans_may_hold_labels_and_pixels(untrained):
    wanted = jaxbd.evaluate(untrained, (SOME > 99).astype(np.float32), [0, 1, 0, 1])
    for labels in ([0.0, 1.0, 0.0, 1.0], [False, True, False, True]):
        assert jaxbd.evaluate(untrained, SOME > 99, labels) == wanted


def test_a_repair_says_what_it_lacks(suspect, victim):
    _, images, labels = victim
    with pytest.raises(jaxbd.UserError, match="auto needs a trigger; give the result of scan"):
        jaxbd.repair(suspect, images, labels)
    with pytest.raises(jaxbd.UserError, match="unlearn needs a trigger"):
        jaxbd.repair(suspect, images, labels, method="unlearn")
    with pytest.raises(jaxbd.UserError, match="unknown repair 'pray'"):
        jaxbd.repair(suspect, images, labels, method="pray")


def test_a_guarded_net_flags(suspect, victim):
    """BNA by the true trigger; the guard answers for clean images."""
    _, images, labels = victim
    attack = badnets.make(SHAPE, 10, badnets.Config(target=TARGET))
    known = jaxbd.Evidence(TARGET, (), attack.stamp, attack.init(jax.random.key(1)))
    from jaxbd.pipelines import correct
    from jaxbd.repairs import bna

    config = correct.Config(correction=bna.Config(num_steps=40))
    repaired = jaxbd.repair(suspect, images, labels, [known], method="bna", config=config)
    assert repaired.after.attack_success_rate < repaired.before.attack_success_rate - 0.1
    verdicts = jaxbd.guard(repaired.suspect, images)
    assert verdicts.label.shape == verdicts.flagged.shape == labels.shape
    assert (verdicts.flagged == (verdicts.label != verdicts.suspect_label)).all()
    compiled = batches._programs.cache_info().currsize
    jaxbd.guard(repaired.suspect, images)
    assert batches._programs.cache_info().currsize == compiled, "the same programs serve again"
    with pytest.raises(jaxbd.UserError, match="has no guard"):
        jaxbd.guard(suspect, images)


def test_one_image_is_too_few():
    one = jaxbd.Batch(np.zeros((1, *SHAPE), np.float32), np.zeros(1, np.int32))
    with pytest.raises(jaxbd.UserError, match="1 images are too few"):
        api._divide(one, 0)
