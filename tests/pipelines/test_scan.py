"""Scans as a whole: nets of one's own, every method, and the candidates that are handed from one to
the next."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd.attacks import badnets
from jaxbd.base import Batch, Suspect, UserError
from jaxbd.data import digits, draw
from jaxbd.detection import detect
from jaxbd.inversion import mesa, neural_cleanse
from jaxbd.models import build
from jaxbd.pipelines import (
    auto_scan,
    class_scan,
    compare,
    evidence,
    locate,
    margin_scan,
    plant,
)
from jaxbd.pipelines import scan as scanning
from jaxbd.training import supervised
from jaxbd.training.run import Run

SHAPE = (16, 16, 1)
QUICK = scanning.ScanConfig(
    method="mesa",
    levels=(0.9,),
    steps=60,
    batch_size=32,
    locate_steps=60,
    mesa=mesa.Config(place="image", hidden=16, learning_rate=3e-3),
)
FEW = margin_scan.Config(starts=1, steps=5)


class Foreign(nn.Module):
    """A net that jaxbd does not know; without BatchNorm."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3))(x)))
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(32, (3, 3), 2)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def parts():
    return draw.divide(digits.load(16), 997, 400)


@pytest.fixture(scope="module")
def planted(parts):
    """A backdoored foreign net: net, variables, target."""
    net = build.from_flax(Foreign(), SHAPE)
    attack = badnets.make(
        SHAPE, 10, badnets.Config(target=3, poison_rate=0.15, pattern="checkerboard")
    )
    trigger = attack.init(jax.random.key(1))
    config = supervised.Config(
        num_steps=400, optimiser="adam", learning_rate=1e-2, weight_decay=0.0
    )
    case = planted_case(net, parts, config, attack, trigger, 3)
    assert compare.judge(case, case.victim.variables).attack_success_rate > 0.9
    return case


def planted_case(net, parts, config, attack, trigger, target):
    """A victim trained on poisoned digits."""
    poisoning = (attack, trigger)
    trained = plant.train(
        Run(), "train", jax.random.key(0), net, parts.train, config, attack=poisoning
    )
    victim = Suspect(net, trained.variables, SHAPE, 10)
    return compare.Case(victim, attack, trigger, target, parts.defence, parts.test)


def scan(case, parts, **changes):
    config = dataclasses.replace(QUICK, **changes)
    key = jax.random.key(2)
    return scanning.scan(Run(), key, case.victim, parts.defence, parts.test, config)


def test_mesa_scans_a_foreign_flax_module(planted, parts):
    """One line makes anyone's net a Net; the scan names the planted class and no other."""
    found = scan(planted, parts)
    assert found.decision.targets == [3]
    assert found.decision.verdict == "backdoored"
    assert found.rates.shape == (10,) and found.steps == 60


def test_pixel_scans_too(planted, parts):
    assert scan(planted, parts, method="pixel").decision.targets == [3]


def test_pure_apply_is_a_net(planted, parts):
    """A bare apply function scans to the same rates as the module it wraps."""
    module = planted.victim.net
    bare = build.from_apply(lambda variables, images: module.apply(variables, images)[0])
    case = planted._replace(victim=planted.victim._replace(net=bare))
    found = scan(case, parts, method="pixel", targets=(3, 4), steps=10)
    same = scan(planted, parts, method="pixel", targets=(3, 4), steps=10)
    np.testing.assert_allclose(found.rates, same.rates, atol=1e-6)


def test_targets_restrict_the_scan(planted, parts):
    found = scan(planted, parts, targets=(5,), steps=5)
    assert np.isnan(found.rates[[0, 1, 2, 3]]).all() and not np.isnan(found.rates[5])
    assert found.cells.target.tolist() == [5]


def test_mixtures_weigh_sub_models_as_the_paper_says(planted, parts):
    """1/N over the levels that were reached; Algorithm 1 weights them by exp(entropy); the others
    have weight 0."""
    found = scan(planted, parts, targets=(3,), levels=(0.5, 0.8, 0.9), steps=1)
    entropy = np.broadcast_to([0.1, 0.7, 0.3], (30, 3))
    rates = np.full((10, 3), np.nan)
    rates[3] = [0.6, 0.7, 0.95]
    found = found._replace(level_rates=rates, infos=found.infos._replace(entropy=entropy))
    assert evidence.has_reached(found, 3).tolist() == [True, False, True]
    equal = evidence.mix_equally(found, 3)
    assert (equal.target, equal.sources) == (3, ())
    np.testing.assert_allclose(equal.trigger_params.weights, [0.5, 0.5])
    expected = np.exp([0.1, 0.3]) / np.exp([0.1, 0.3]).sum()
    weighted = evidence.mix_by_entropy(found, 3).trigger_params
    np.testing.assert_allclose(weighted.weights, expected, rtol=1e-6)
    assert jax.tree.leaves(weighted.models)[0].shape[0] == 2
    assert set(evidence.list_mixtures(found, 3, (0.5, 0.8, 0.9))) == {
        "level 0.5",
        "level 0.8",
        "level 0.9",
        "mixture",
    }


def test_too_few_images(planted, parts):
    few = Batch(parts.defence.images[:10], parts.defence.labels[:10])
    with pytest.raises(UserError, match="at least a batch of 32 images, got 10"):
        scan(planted, parts._replace(defence=few))


def test_candidates_are_smallest_masks_and_outliers():
    found = scanning.Located(
        norms=np.array([30.0, 4.0, 28.0, np.nan, 29.0]),
        scores=np.array([0.0, 4.0, 0.5, 0.0, 0.2]),
        places=np.zeros((5, 2), int),
        share=np.ones(5),
        states=None,
    )
    assert scanning.candidates(found, dataclasses.replace(QUICK, candidates=1)) == [1]
    assert scanning.candidates(found, dataclasses.replace(QUICK, candidates=2)) == [1, 2]


def test_auto_does_not_call_an_unexplained_small_mask_clean(planted, parts, monkeypatch):
    """A mask far smaller than the others, where no patch works, is no clean verdict."""
    real = locate.compare

    def shrunk(*arguments):
        norms = np.where(np.arange(10) == 7, 1.0, 30.0 + np.arange(10))
        return real(*arguments)._replace(norms=norms, scores=-detect.mad_scores(norms))

    monkeypatch.setattr(locate, "compare", shrunk)
    monkeypatch.setattr(auto_scan, "_judge_masks", lambda *_: np.ones(10))
    found = scan(planted, parts, method="auto", margin=FEW, locate_steps=1, steps=1)
    assert found.decision.verdict == "inconclusive" and not found.decision.targets
    assert found.judgement.leads == [7] and "class 7" in found.decided_by


def test_auto_calls_no_search_of_one_class_or_of_two_steps_clean(planted, parts):
    """Neither finds the planted class, and neither may say that there is none."""
    one = scan(planted, parts, method="auto", margin=FEW, targets=(5,), steps=2, locate_steps=2)
    assert one.decision.verdict == "inconclusive"
    assert "9 of 10 classes were not searched" in one.judgement.lacks[0]
    assert scan(planted, parts, method="mesa", targets=(5,)).decision.verdict == "inconclusive"
    short = scan(planted, parts, method="neural-cleanse", locate_steps=2).decision
    assert short.verdict == "inconclusive" and not short.targets


def test_a_search_that_halts_goes_on_to_the_same_masks(planted, parts):
    """The steps after the halt draw what they would have drawn without it."""
    config = dataclasses.replace(QUICK, first_masks=(0.1, 1.0), batch_size=8)
    images = Batch(jnp.asarray(parts.defence.images), jnp.asarray(parts.defence.labels))
    task = class_scan.Task(Run(), jax.random.key(1), planted.victim, images, parts.test, config)
    at_once = locate.search(task, 12, config.first_masks)
    halted = locate.go_on(task, locate.search(task, 5, config.first_masks), 12)
    assert halted.infos.loss.shape == at_once.infos.loss.shape == (12, 20)
    np.testing.assert_allclose(halted.infos.loss, at_once.infos.loss, rtol=1e-5)
    np.testing.assert_allclose(halted.states.best_mask, at_once.states.best_mask, atol=1e-5)


def test_the_smallest_working_mask_of_all_starts_counts(planted, parts):
    """Two starts per class: one where the other found nothing, the smaller one else."""
    config = dataclasses.replace(QUICK, first_masks=(0.1, 1.0), batch_size=8)
    images = Batch(jnp.asarray(parts.defence.images), jnp.asarray(parts.defence.labels))
    task = class_scan.Task(Run(), jax.random.key(1), planted.victim, images, parts.test, config)
    masks = locate.search(task, 1, config.first_masks)
    norms = np.full(20, np.inf)
    norms[[0, 1]], norms[3], norms[4] = [9, 5], 7, 3
    masks = masks._replace(states=masks.states._replace(best_norm=norms))
    found = locate.compare(task, masks)
    np.testing.assert_array_equal(found.norms[:4], [5, 7, 3, np.nan])
    np.testing.assert_array_equal(found.states.best_norm[:3], [5, 7, 3])


def test_masks_that_cannot_be_compared_give_no_clean_verdict(planted, parts):
    """An anomaly index needs peers: with fewer than three working masks Neural Cleanse leaves the
    verdict open."""
    found = scan(planted, parts, method="neural-cleanse", targets=(3, 5), locate_steps=30)
    assert found.decision.verdict == "inconclusive" and "fewer than 3" in found.decided_by


def test_auto_takes_no_place():
    with pytest.raises(UserError, match="method mesa"):
        dataclasses.replace(QUICK, method="auto", mesa=mesa.Config(place="fixed"))


def test_locate_finds_the_window():
    """The place is the window with most of the mask in it, the share what lies inside."""
    masks = jnp.zeros((1, 8, 8, 1)).at[0, 4:6, 2:5, 0].set(1.0).at[0, 0, 0, 0].set(0.5)
    places, share = neural_cleanse.locate(masks, 3)
    assert places.tolist()[0][1] == 2 and places.tolist()[0][0] in (3, 4)
    assert float(share[0]) == pytest.approx(6 / 6.5)


def test_auto_finds_a_trigger_at_one_place(parts):
    """A net that knows its trigger at one place only: the place is located, MESA confirms, nothing
    else is named."""
    attack = badnets.make(
        SHAPE, 10, badnets.Config(target=4, poison_rate=0.1, pattern="white", place="fixed")
    )
    trigger = attack.init(jax.random.key(1))

    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool):
            x = nn.relu(nn.Conv(8, (3, 3), 2)(x)).reshape(x.shape[0], -1)
            return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))

    net = build.from_flax(Flat(), SHAPE)
    config = supervised.Config(
        num_steps=400, optimiser="adam", learning_rate=3e-3, weight_decay=0.0
    )
    case = planted_case(net, parts, config, attack, trigger, 4)
    found = scan(case, parts, method="auto", margin=FEW, locate_steps=150)
    assert found.decision.targets == [4]
    row, column = found.located.places[4]
    assert row >= 12 and column >= 12
    assert found.anywhere[4] < 0.5 < found.rates[4]  # and so it is unlearned at its place
    model = jax.tree.map(lambda leaf: leaf[0], evidence.states_of(found, 4))
    again = found.inversion.stamp(jax.random.key(0), model, parts.test.images[:1] / 255)
    assert (np.asarray(again)[:, :10] == np.asarray(parts.test.images[:1, :10] / 255)).all()


@pytest.mark.parametrize(
    "found, alarmed, tried, chosen",
    [
        ([6, 8], [8], set(), [8]),
        ([6], [8], set(), []),
        ([6, 8], [], set(), [6]),
        ([6, 8], [8], {8}, []),
        ([6, 8], [], {6}, []),
        ([], [8], set(), []),
    ],
)
def test_classes_that_end_a_scan_early_stand_out_in_both_families(
    monkeypatch, found, alarmed, tried, chosen
):
    """A mask that is small by chance costs a model of patches; without an alarm of the margins it
    is the only clue."""
    monkeypatch.setattr(locate, "early_outliers", lambda located, config: found)
    located: Any = None
    assert auto_scan._clear(located, QUICK, alarmed, tried) == chosen
