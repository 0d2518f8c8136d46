"""The pipeline of every repair: needs, several targets, phases, checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd import methods
from jaxbd.base import Batch, Evidence, Phase, Repair, Suspect, UserError
from jaxbd.models import build
from jaxbd.pipelines import repair
from jaxbd.repairs import finetune, mixture, unlearn
from jaxbd.training.run import Checkpoints, Run, Stopped

NET = build.net(
    build.Spec(
        arch="cnn", classes=toys.CLASSES, image_shape=toys.SHAPE, options={"width": 4, "stages": 1}
    )
)
KEY = jax.random.key(0)
CLEAN = toys.quadrants(0, 80)


def brighten(key, amount, images):
    return images + amount


KNOWN = Evidence(1, (0, 2), mixture.mix(brighten), mixture.single(jnp.float32(0.3)))


@pytest.fixture(scope="module")
def suspect():
    return Suspect(NET, jax.jit(NET.init)(KEY), toys.SHAPE, toys.CLASSES)


def same(one, other) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


@pytest.mark.parametrize(
    "method, clean, known, words",
    [
        ("unlearn", CLEAN, [], "unlearn needs a trigger: give --trigger, or let a scan find one"),
        ("unlearn", None, [KNOWN], "unlearn needs clean images: give --data"),
        ("finetune", None, [], "finetune needs clean images: give --data"),
        ("bna", CLEAN, [], "bna needs a trigger"),
        ("mend", CLEAN, [], "unknown repair 'mend'; choose from .*finetune, .*unlearn"),
    ],
)
def test_what_is_missing_is_said_in_one_line(suspect, method, clean, known, words):
    with pytest.raises(UserError, match=words):
        repair.repair(Run(), KEY, suspect, clean, known, method, None)


def test_too_few_images_are_refused(suspect):
    few = Batch(CLEAN.images[:20], CLEAN.labels[:20])
    with pytest.raises(UserError, match="20 images to repair with, fewer than a batch of 64"):
        repair.repair(Run(), KEY, suspect, few, [], "finetune", finetune.Config(num_steps=1))


def test_rows_are_selected_by_the_classes_of_the_trigger(suspect):
    data = repair.select(suspect, CLEAN, KNOWN)
    assert data.clean_sources is not None and data.clean_target is not None
    assert {*np.asarray(data.clean_sources.labels).tolist()} == {0, 2}
    assert {*np.asarray(data.clean_target.labels).tolist()} == {1}
    everywhere = repair.select(suspect, CLEAN, KNOWN._replace(sources=()))
    assert everywhere.clean_sources is not None
    assert {*np.asarray(everywhere.clean_sources.labels).tolist()} == {0, 2, 3}
    blind = Batch(*(leaf[CLEAN.labels != 1] for leaf in CLEAN))
    assert repair.select(suspect, blind, KNOWN).clean_target is None
    assert repair.select(suspect, CLEAN, None)[1:] == (None, None, None)


def test_several_targets_are_treated_one_after_the_other_on_one_net(suspect):
    config = unlearn.Config(num_steps=3, stamp_rate=0.5, learning_rate=0.01)
    other = KNOWN._replace(target=3)
    names = []
    run = Run(progress=lambda name, done, total: names.append(name))
    once = repair.repair(Run(), KEY, suspect, CLEAN, [KNOWN], "unlearn", config)
    both = repair.repair(run, KEY, suspect, CLEAN, [KNOWN, other], "unlearn", config)
    assert {*names} == {"unlearn: class 1", "unlearn: class 3"}
    loss = both.infos["unlearn"].loss
    assert loss.shape == (6,) and np.array_equal(loss[:3], once.infos["unlearn"].loss)
    assert not same(once.variables, both.variables)
    rest = repair.repair(
        Run(),
        jax.random.fold_in(KEY, 11),
        suspect._replace(variables=once.variables),
        CLEAN,
        [other],
        "unlearn",
        config,
    )
    assert same(rest.variables, both.variables)


def test_triggers_of_one_target_share_one_run(suspect):
    config = unlearn.Config(num_steps=3, stamp_rate=0.5, learning_rate=0.01)
    names = []
    run = Run(progress=lambda name, done, total: names.append(name))
    second = Evidence(1, (0, 2), lambda key, amount, images: images - amount, jnp.float32(0.3))
    both = repair.repair(run, KEY, suspect, CLEAN, [KNOWN, second], "unlearn", config)
    assert {*names} == {"unlearn"} and both.infos["unlearn"].loss.shape == (3,)
    joined = [mixture.join([KNOWN, second])]
    again = repair.repair(Run(), KEY, suspect, CLEAN, joined, "unlearn", config)
    assert same(both.variables, again.variables)


def test_evidence_is_ignored_by_methods_that_need_none(suspect):
    config = finetune.Config(num_steps=2)
    one = repair.repair(Run(), KEY, suspect, CLEAN, [], "finetune", config)
    two = repair.repair(Run(), KEY, suspect, CLEAN, [KNOWN, KNOWN], "finetune", config)
    assert same(one.variables, two.variables) and one.guarded == ()


def test_the_suspect_is_as_it_was_afterwards(suspect):
    before = jax.tree.map(np.array, suspect.variables)
    repair.repair(Run(), KEY, suspect, CLEAN, [], "finetune", finetune.Config(num_steps=2))
    assert same(before, suspect.variables)


class TwoStage:
    """A method of two stages: fine-tuning, then half of it again from a fresh count."""

    PAPER, Config, State, Info = "https://", finetune.Config, finetune.State, finetune.Info

    @staticmethod
    def make(problem, config) -> Repair:
        made = finetune.make(problem, config)
        first = made.phases[0]._replace(name="first")
        again = lambda state: state._replace(variables=jax.tree.map(lambda x: 1.5 * x, state[1]))
        second = first._replace(name="second", num_steps=3, begin=again)
        return made._replace(phases=(first, second))


@pytest.fixture
def two_stage(monkeypatch):
    method = methods.Method("repair", "two-stage", "", load=lambda: TwoStage)
    monkeypatch.setattr(methods, "TABLE", (*methods.TABLE, method))
    return finetune.Config(num_steps=4, learning_rate=0.1)


def test_phases_run_in_order_on_one_state(suspect, two_stage):
    seen = []
    run = Run(progress=lambda *now: seen.append(now))
    result = repair.repair(run, KEY, suspect, CLEAN, [], "two-stage", two_stage, label="mend")
    assert list(dict.fromkeys(seen)) == [
        ("mend, first", 0, 4),
        ("mend, first", 4, 4),
        ("mend, second", 0, 3),
        ("mend, second", 3, 3),
    ]
    assert [result.infos[name].loss.shape for name in ("first", "second")] == [(4,), (3,)]


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_resumed_repair_equals_an_uninterrupted_one(suspect, two_stage, stop_at, tmp_path):
    """Bit for bit, wherever it was stopped: within a phase or between two."""
    settings = (KEY, suspect, CLEAN, [], "two-stage", two_stage)
    whole = repair.repair(Run(), *settings)
    asked = []

    def stop_once():
        asked.append(1)
        return 15 if len(asked) == stop_at else None

    checkpoints = Checkpoints(tmp_path / "run", {"method": "two-stage"}, every=1)
    with short_chunks(), pytest.raises(Stopped):
        repair.repair(Run(checkpoints=checkpoints, stop_requested=stop_once), *settings)
    resumed = Run(checkpoints=checkpoints)
    with short_chunks():
        rest = repair.repair(resumed, *settings)
    assert resumed.resumed is not None
    assert same(whole.variables, rest.variables) and same(whole.infos, rest.infos)


def short_chunks():
    """Every phase looks for signals after two steps."""
    patch = pytest.MonkeyPatch()
    make = TwoStage.make

    def shorter(problem, config):
        made = make(problem, config)
        shortened: tuple[Phase, ...] = tuple(each._replace(chunk=2) for each in made.phases)
        return made._replace(phases=shortened)

    class Context:
        def __enter__(self):
            patch.setattr(TwoStage, "make", staticmethod(shorter))

        def __exit__(self, *error):
            patch.undo()

    return Context()
