"""Corrections of several targets: retries, rounds, and the guarded net they become."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.base import Batch, Evidence, RepairData, Suspect, UserError
from jaxbd.detection import guard
from jaxbd.models import build
from jaxbd.pipelines import correct, repair
from jaxbd.pipelines.repair import Repaired
from jaxbd.repairs import bna
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run

NET = build.net(
    build.Spec(arch="cnn", classes=3, image_shape=(4, 4, 1), options={"width": 2, "stages": 1})
)
SECONDS = Seconds(1.0, 2.0)
KEY = jax.random.key(0)


def darker(key, amount, images):
    return images - amount


def threshold_net(variables, images, *, train):
    """Answers with class 0 below a brightness and with class 2 from it on."""
    del train
    label = jnp.where(images[:, 0, 0, 0] < variables["from"], 0, 2)
    return jax.nn.one_hot(label, 3), {}


def numbered_images():
    """Twelve images whose brightness is 0, 0, 0, 1, 1, 1, … and whose labels are 0, 1, 2, 0, …"""
    images = np.repeat(np.arange(4), 3).reshape(12, 1, 1, 1) * np.ones((1, 2, 2, 1))
    return Batch(images.astype(np.float32), np.arange(12) % 3)


def run_rounds(monkeypatch, lost, **settings):
    """`correct.repair` for two pieces of evidence of class 2, with corrections and searches that
    only note what they were asked for.

    Of 4 images of the target the suspect recognises all, correction number n all but `lost[n - 1]`.
    """
    corrections, searches, names = [], [], []

    def note_correction(task, key, known, data, label):
        labels = sorted({*data.clean_sources.labels.tolist()})
        of_target = sorted({*data.clean_target.labels.tolist()})
        corrections.append((float(task.suspect.variables["from"]), known, labels, of_target))
        names.append(label)
        number = len(corrections) - 1
        variables = {"params": {}, "from": jnp.float32(lost[number]), "bounds": {"n": jnp.ones(1)}}
        return Repaired(variables, {"bna": bna.Info(jnp.zeros(1), {})}, SECONDS)

    def search_again(run, key, suspect, first, name):
        searches.append((float(suspect.variables["from"]), first.trigger_params, first.target))
        names.append(name)
        return first._replace(trigger_params=f"again {len(searches)}"), Seconds(0.5, 0.5)

    monkeypatch.setattr(correct, "correct", note_correction)
    monkeypatch.setattr(guard, "pack", lambda suspect, corrected: corrected)
    monkeypatch.setattr(repair, "select", select_as_is)
    known = [Evidence(2, (0, 1), darker, "first"), Evidence(2, (0, 1), darker, "other")]
    suspect = Suspect(
        toys.NET._replace(apply=threshold_net),
        {"params": {}, "from": jnp.float32(0)},
        (2, 2, 1),
        3,
    )
    result = correct.repair(
        Run(),
        KEY,
        suspect,
        numbered_images(),
        known,
        "bna",
        correct.Config(**settings),
        search_again=search_again,
    )
    assert len({*names}) == len(names) == len(corrections) + len(searches), "stages of one name"
    return corrections, searches, result


def select_as_is(suspect, clean, evidence):
    """Rows by class, with parameters of a trigger that are no arrays."""
    part = lambda classes: Batch(*(leaf[np.isin(clean.labels, classes)] for leaf in clean))
    return RepairData(clean, part([0, 1]), part([2]), evidence.trigger_params)


def params(known):
    return known.trigger_params


def test_a_target_is_corrected_in_rounds(monkeypatch):
    """Each round corrects the net as it came, for all triggers so far, and the next trigger is
    sought in its result."""
    corrections, searches, result = run_rounds(monkeypatch, [3, 1, 2], rounds=2, false_alarms=0.5)
    assert [params(known) for _, known, _, _ in corrections] == [
        ("first", "other"),
        ("first", "other", "again 1"),
        ("first", "other", "again 1", "again 2"),
    ]
    for begin, _, labels, of_target in corrections:
        assert (begin, labels, of_target) == (0, [0, 1], [2])
    assert searches == [(3, "first", 2), (1, "first", 2)]
    assert (result.variables[0]["from"], result.seconds) == (2, Seconds(4.0, 7.0))
    assert result.guarded == (2,)


def test_a_round_that_costs_too_many_clean_images_of_the_target_is_undone_and_the_last(monkeypatch):
    corrections, searches, result = run_rounds(monkeypatch, [1, 3, 0], rounds=2, false_alarms=0.5)
    assert (len(corrections), len(searches)) == (2, 1)
    assert (result.variables[0]["from"], result.seconds) == (1, Seconds(2.5, 4.5))


def test_the_first_correction_stays_whatever_it_costs(monkeypatch):
    corrections, _, result = run_rounds(monkeypatch, [4], rounds=0, false_alarms=0.0)
    assert result.variables[0]["from"] == 4 and len(corrections) == 1


@pytest.mark.parametrize(
    "reaching, costs, weights, best",
    [
        ([0.5, 0.04, 0.03], [False, False], [0.8, 0.4, 0.2], 3),
        ([0.9] * 4, [False, False], [0.8, 0.4, 0.2], 3),
        ([0.03], [], [0.8], 1),
        ([0.5, 0.5], [False, True], [0.8, 0.4, 0.2], 2),
        ([0.5], [True], [0.8, 0.4], 1),
    ],
)
def test_the_target_class_weighs_half_as_much_where_the_trigger_still_works(
    reaching, costs, weights, best, monkeypatch
):
    """While more than 3 % reach the target, twice at most; the last correction that does not cost
    too much of the class is the result. One compiled step serves all."""
    steps, tried, reaching, costs = set(), [], iter(reaching), iter(costs)

    def fit(run, key, made, data, state, batch_size, label):
        tried.append(float(state.keep))
        steps.add(made.phases[0].step)
        return state, {"bna": len(tried)}, SECONDS

    monkeypatch.setattr(repair, "fit", fit)
    monkeypatch.setattr(correct, "_share_reaching", lambda *known: next(reaching))
    monkeypatch.setattr(correct, "_costs_too_much", lambda *known: next(costs))
    result = correct_once(keep=0.8)
    assert tried == pytest.approx(weights) and result.infos["bna"] == best
    assert result.seconds == Seconds(len(weights), 2 * len(weights))
    assert len(steps) == 1


def correct_once(keep, of_target=5):
    """One target of a tiny net, with `of_target` clean images of its class."""
    rng = np.random.default_rng(0)
    labels = np.array([0] * 20 + [1] * of_target, np.int32)
    clean = Batch(rng.uniform(size=(len(labels), 4, 4, 1)).astype(np.float32), labels)
    suspect = Suspect(NET, jax.jit(NET.init)(KEY), (4, 4, 1), 3)
    known = Evidence(1, (), darker, jnp.float32(0.1))
    config = correct.Config(correction=bna.Config(keep=keep, num_steps=2))
    task = correct.Task(
        repair.methods.find("repair", "bna"), Run(), suspect, clean, config, batch_size=8
    )
    return correct.correct(task, KEY, known, repair.select(suspect, clean, known), "bna")


def test_without_images_of_the_target_there_is_nothing_to_weigh(monkeypatch):
    tried = []
    fit = repair.fit
    monkeypatch.setattr(
        repair,
        "fit",
        lambda run, key, made, data, state, *more: (
            tried.append((float(state.keep), state.clean_target))
            or fit(run, key, made, data, state, *more)
        ),
    )
    correct_once(keep=0.8, of_target=0)
    assert tried == [(0.0, None)]


def test_what_still_reaches_the_target_is_counted_among_images_the_net_does_not_give_it_anyway():
    """Of images 0 to 7 the net gives 6 and 7 to the target as they are; with a trigger that adds 2
    also 4 and 5, and after a correction fewer."""
    images = jnp.broadcast_to(jnp.arange(8.0)[:, None, None, None], (8, 2, 2, 1))
    data = RepairData(clean_sources=Batch(images, jnp.zeros(8, jnp.int32)))
    net = toys.NET._replace(apply=threshold_net)
    suspect = Suspect(net, {"from": jnp.float32(6)}, (2, 2, 1), 3)
    method = repair.methods.find("repair", "bna")
    task = correct.Task(method, Run(), suspect, None, correct.Config(), 8)
    known = Evidence(2, (), darker, jnp.float32(-2.0))

    def share(limit):
        repaired = Repaired({"from": jnp.float32(limit)}, {}, SECONDS)
        return correct._share_reaching(task, repaired, known, data)

    assert share(6) == pytest.approx(2 / 6) and share(7) == pytest.approx(1 / 6) and share(8) == 0


def test_every_target_becomes_a_correction_of_the_guarded_net():
    """The weights are the suspect's own, and each target has moments and bounds of its own."""
    rng = np.random.default_rng(0)
    clean = Batch(
        rng.uniform(size=(60, 4, 4, 1)).astype(np.float32), np.arange(60, dtype=np.int32) % 3
    )
    suspect = Suspect(NET, jax.jit(NET.init)(KEY), (4, 4, 1), 3)
    known = [Evidence(target, (), darker, jnp.float32(0.1 * target)) for target in (2, 1)]
    config = correct.Config(correction=bna.Config(num_steps=3, keep=0.0))
    result = correct.repair(Run(), KEY, suspect, clean, known, "bna", config, batch_size=8)
    assert result.guarded == (2, 1) and result.infos["bna"].loss.shape == (6,)
    one, two = (guard.corrected(result.variables, index) for index in (0, 1))
    upper = lambda variables: np.asarray(variables["bounds"]["norm0"]["upper"])
    assert (upper(one) != upper(two)).any()
    logits, _ = guard.make(NET, result.guarded).apply(result.variables, clean.images)
    assert logits.shape == (60, 3) and bool(jnp.isfinite(logits).all())


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="rounds must be at least 0, got -1"):
        correct.Config(rounds=-1)
    with pytest.raises(UserError, match=r"from 0 to 1, got 1\.5"):
        correct.Config(false_alarms=1.5)
