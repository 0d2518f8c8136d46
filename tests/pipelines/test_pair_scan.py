"""Scans pair by pair: the searches, the rules that make one answer of them, and hand-built victims
end to end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.base import Batch, Cell, Suspect, UserError
from jaxbd.caching import cached
from jaxbd.data import draw
from jaxbd.detection import null
from jaxbd.inversion import neural_cleanse, pt_red
from jaxbd.models import build
from jaxbd.pipelines import margin_scan, pair_scan, pair_triggers, pair_verdict
from jaxbd.repairs import mixture
from jaxbd.training import slots, sweep
from jaxbd.training.program import Seconds
from jaxbd.training.run import Fitted, NoInfo, Run

CELL = Cell(jnp.int32(1), jnp.int32(0), jnp.float32(0))


def linear(variables, images):
    return images.reshape(len(images), -1) @ variables["params"]["kernel"]


LINEAR = build.from_apply(linear)


def linear_case(seed: int = 0, count: int = 5):
    """Variables, float images [count, 2, 2, 1] with values at both ends, batch, of a linear net of
    three classes."""
    rng = np.random.default_rng(seed)
    kernel, images = rng.normal(size=(4, 3)), rng.uniform(size=(count, 2, 2, 1))
    images[0, 0, 0], images[1, 1, 1] = 0.0, 1.0
    batch = Batch(jnp.asarray(images, jnp.float32), jnp.zeros(count, jnp.int32))
    return {"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}, images, kernel, batch


def gradient(images, kernel, perturbation, target):
    """Of the mean cross-entropy of clip(x + v) against `target`, with respect to v, in NumPy."""
    moved = images + perturbation
    logits = np.clip(moved, 0, 1).reshape(len(images), -1) @ kernel
    soft = np.exp(logits - logits.max(1, keepdims=True))
    soft /= soft.sum(1, keepdims=True)
    soft[:, target] -= 1
    inside = (moved > 0) & (moved < 1)
    return ((soft @ kernel.T).reshape(images.shape) * inside).mean(0)


@pytest.mark.parametrize("rule", ["sgd", "normalised"])
def test_one_step_of_pt_red_by_hand(rule):
    variables, images, kernel, batch = linear_case()
    method = pt_red.make(
        LINEAR, (2, 2, 1), pt_red.Config(rule=rule, step_size=0.07, success_rate=1.0)
    )
    start = np.random.default_rng(5).normal(size=(2, 2, 1)).astype(np.float32) * 0.1
    state = method.init(jax.random.key(0))._replace(perturbation=jnp.asarray(start))
    new, info = method.step(jax.random.key(1), state, batch, CELL, variables)
    slope = gradient(images, kernel, start, 1)
    length = 0.07 if rule == "sgd" else 0.07 / np.linalg.norm(slope)
    np.testing.assert_allclose(new.perturbation, start - length * slope, atol=1e-6)
    np.testing.assert_allclose(info.norm, np.linalg.norm(start), rtol=1e-6)
    np.testing.assert_allclose(
        method.stamp(None, new, batch.images),
        np.clip(images + np.asarray(new.perturbation), 0, 1),
        atol=1e-6,
    )


def test_the_released_step_is_as_noisy_as_it_says():
    variables, images, kernel, batch = linear_case()
    method = pt_red.make(LINEAR, (2, 2, 1), pt_red.released(success_rate=1.0))
    state = method.init(jax.random.key(0))
    slope = gradient(images, kernel, np.asarray(state.perturbation), 1)
    step = lambda key: (
        method.step(key, state, batch, CELL, variables)[0].perturbation - state.perturbation
    )
    lengths = -(jax.vmap(step)(jax.random.split(jax.random.key(2), 2000)) / slope[None]).mean(
        (1, 2, 3)
    )
    assert abs(lengths.mean() / 1e-2 - 1) < 0.02 and abs(lengths.std() / 1e-3 - 1) < 0.1


def test_pt_red_stops_where_it_was_judged():
    """At the first batch of which the share is reached, the perturbation stays and the search is
    settled."""
    variables, _, _, batch = linear_case(count=20)
    method = pt_red.make(LINEAR, (2, 2, 1), pt_red.Config(step_size=0.05, patience=2))
    state, seen = method.init(jax.random.key(0)), []
    for number in range(200):
        before = state
        state, info = method.step(jax.random.key(number), state, batch, CELL, variables)
        seen.append(float(info.attack_success_rate) >= 0.9)
        assert bool(method.converged(state)) == (seen[-2:] == [True, True])
        if method.converged(state):
            np.testing.assert_array_equal(state.perturbation, before.perturbation)
            return
    pytest.fail("it never settled")


def test_one_lucky_batch_does_not_end_pt_red():
    """Of settings as they are, a search has found nothing until three batches in a row say so."""
    variables, _, _, batch = linear_case(count=20)
    method = pt_red.make(LINEAR, (2, 2, 1), pt_red.Config(step_size=0.05))
    state, seen = method.init(jax.random.key(0)), []
    while seen[-3:] != [True] * 3:
        assert not method.converged(state) and not method.works(state)
        state, info = method.step(jax.random.key(len(seen)), state, batch, CELL, variables)
        seen.append(float(info.attack_success_rate) >= 0.9)
        assert len(seen) < 200
    assert method.converged(state) and method.works(state)


def test_pt_red_with_a_target_for_every_class():
    """Images of class 0 are pushed to 1 and images of class 2 to 0: the gradient is the mean of
    both."""
    variables, images, kernel, _ = linear_case()
    labels = np.array([0, 2, 0, 2, 2])
    batch = Batch(jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32))
    method = pt_red.make(
        LINEAR, (2, 2, 1), pt_red.Config(rule="sgd", step_size=1.0, success_rate=1.0)
    )
    state = method.init(jax.random.key(0))
    cell = CELL._replace(target=jnp.array([1, 9, 0], jnp.int32))
    new, _ = method.step(jax.random.key(1), state, batch, cell, variables)
    start = np.asarray(state.perturbation)
    parts = [
        gradient(images[labels == s], kernel, start, t) * (labels == s).mean()
        for s, t in ((0, 1), (2, 0))
    ]
    np.testing.assert_allclose(new.perturbation, start - sum(parts), atol=1e-6)


def cleanse(**over):
    """(inversion, run): `run(states, n)` goes on for n steps on one hand-built victim."""
    config = neural_cleanse.Config(**over)
    inversion = neural_cleanse.make(toys.NET, toys.SHAPE, config)
    data, victim = jax.tree.map(jnp.asarray, toys.quadrants(0, 100)), toys.victim(1)

    def run(state, steps):
        fitted = Run().fit(
            "cleanse",
            jax.random.key(1),
            inversion.step,
            draw.uniform(32),
            data,
            jax.tree.map(jnp.copy, state),
            CELL,
            victim,
            info=neural_cleanse.Info,
            num_steps=steps,
        )
        return fitted.state, fitted.infos

    return inversion, run


def test_neural_cleanse_stops_when_the_cost_went_up_and_down_and_no_smaller_mask_comes():
    inversion, run = cleanse(
        stop_patience=6, first_cost=0.01, first_mask=0.05
    )  # fails at first, while the cost is 0
    state, stopped = inversion.init(jax.random.key(0)), None
    costs, best = [], []
    for number in range(200):
        state, _ = run(state, 1)
        costs.append(float(state.cost))
        best.append(float(state.best_norm))
        settled = bool(inversion.converged(state))
        steps = [b / a for a, b in itertools.pairwise(costs) if a > 0]
        still = len(best) > 6 and best[-1] == best[-7]
        expected = max(steps, default=1) > 1 and min(steps, default=1) < 1 and still
        assert settled == expected, number
        stopped = stopped if stopped is not None or not settled else number
    assert stopped is not None and stopped > 20


def test_neural_cleanse_runs_its_full_length_unless_asked():
    inversion, _ = cleanse()
    assert inversion.converged is None


def test_the_rate_held_against_the_threshold_is_that_of_the_batch_and_a_running_mean():
    inversion, run = cleanse(memory=0.8, first_cost=0.1, attack_threshold=0.8)
    state, infos = run(inversion.init(jax.random.key(0)), 60)
    rate, best, either = 0.0, np.inf, 0
    for number, success in enumerate(infos.attack_success_rate):
        old = min(0.8, number / (number + 1))
        rate = old * rate + (1 - old) * float(success)
        either += rate >= 0.8 > success
        if min(rate, success) >= 0.8:
            best = min(best, infos.mask_norm[number])
    np.testing.assert_allclose(state.rate, rate, rtol=1e-5)
    np.testing.assert_allclose(state.best_norm, best, rtol=1e-6)
    assert either > 0
    plain, run = cleanse()
    state, infos = run(plain.init(jax.random.key(0)), 30)
    np.testing.assert_allclose(state.rate, infos.attack_success_rate[-1])


K = 6


class World:
    """Stands in for the searches: sizes of triggers by pair, and what a trigger for several pairs
    is and does."""

    def __init__(
        self,
        monkeypatch,
        norms,
        true=(),
        joint_norm=lambda wish: 0.5,
        rate=1.0,
        reached=True,
        others=(),
        margins=None,
    ):
        self.norms, self.rate, self.joint_norm, self.reached = norms, rate, joint_norm, reached
        self.true = [dict(true), *others]
        self.wishes = []
        # unless said otherwise the margins of all true targets stand out
        aims = {target for true in self.true for target in true.values()}
        self.margins = sorted(aims) if margins is None else list(margins)
        monkeypatch.setattr(margin_scan, "scan", self.margin_scan)
        for name in ("sweep_pairs", "measure_outcomes", "fit_joint"):
            monkeypatch.setattr(pair_triggers, name, getattr(self, name))
        monkeypatch.setattr(pair_triggers, "find_box", lambda state: None)

    def margin_scan(self, run, key, suspect, config):
        p_value = 0.01 if self.margins else 0.4
        outliers = null.Outliers(p_value, p_value, self.margins, [], np.zeros(K), 1.0, 1.0, K)
        every = np.ones(K)
        return margin_scan.MarginScan(every, outliers, every, every > 0, 6, Seconds(0.5, 0.5))

    def sweep_pairs(self, lab, method, searched, num_steps, batch_size, **settings):
        sizes = np.full((K, K), np.nan)
        for pair in searched:
            sizes[pair] = self.norms[method][pair]
        rows = {pair: row for row, pair in enumerate(searched)}
        scores = pair_triggers.detect.pair_scores(1 / sizes)
        steps = np.full(len(searched), 10)
        found = slots.Found((), (), steps, 10, 20, Seconds(1.0, 2.0), 1, None)
        return pair_triggers.Search(rows, np.array(searched), sizes, scores), found

    def fit_joint(self, lab, method, inversion, wish, effort, name):
        self.wishes.append((method, dict(wish)))
        return pair_triggers.Joint(
            dict(wish), self.joint_norm(wish), self.reached, Seconds(1.0, 2.0)
        )

    def measure_outcomes(self, lab, method, state, sources):
        """A trigger works for what it was made for; one for two pairs or more that are true for all
        that are true."""
        made = state if isinstance(state, dict) else {int(state[0]): int(state[1])}
        genuine = [true for true in self.true if len(made) >= 2 and made.items() <= true.items()]
        rate = self.rate[method] if isinstance(self.rate, dict) else self.rate
        shares = np.full((K, K), np.nan)
        for source in sources:
            to = {**(genuine[0] if genuine else {}), **made}.get(source, source)
            shares[source] = np.eye(K)[source] * (1 - rate)
            shares[source, to] = rate if to != source else 1.0
        return shares


def norms_with(small, seed=0, size=0.3):
    """[K, K] sizes of about 3, and of `size` for the pairs `small`."""
    norms = 3 + np.random.default_rng(seed).uniform(-0.3, 0.3, (K, K))
    for pair in small:
        norms[pair] = size
    return norms


def scan(config=None, labels=None, **over):
    labels = np.arange(60) % K if labels is None else labels
    batch = Batch(np.zeros((len(labels), *toys.SHAPE), np.uint8), labels)
    config = config or pair_scan.Config(**over)
    suspect = Suspect(toys.NET, toys.victim(0), toys.SHAPE, K)
    return pair_scan.scan(Run(), jax.random.key(0), suspect, batch, batch, config)


PLAIN = norms_with([])
TO_TWO = {s: 2 for s in range(K) if s != 2}
ROUND = {s: (s + 1) % K for s in range(K)}


def test_nothing_stands_out(monkeypatch):
    World(
        monkeypatch,
        {"neural-cleanse": PLAIN, "pt-red": norms_with([], 1)},
        joint_norm=lambda wish: 99.0,
    )
    found = scan()
    assert (found.verdict, found.targets, found.pairs, found.setting, found.triggers) == (
        "clean",
        [],
        [],
        None,
        {},
    )
    assert found.steps == {"neural-cleanse": 300, "pt-red": 300}
    assert np.isnan(np.diag(found.statistics["pt-red"])).all()


def test_the_other_search_s_trigger_is_kept_where_it_works_and_is_small(monkeypatch):
    sizes = {"neural-cleanse": norms_with(TO_TWO.items()), "pt-red": PLAIN}
    world = World(monkeypatch, sizes, TO_TWO)
    found = scan()
    assert {
        target: (each.method, each.evidence.sources) for target, each in found.others.items()
    } == {2: ("pt-red", (0, 1, 3, 4, 5))}
    world.rate = {"neural-cleanse": 1.0, "pt-red": 0.4}
    assert scan().others == {}
    World(monkeypatch, {**sizes, "pt-red": PLAIN / 99}, TO_TWO)  # the joint one is of size 0.5
    assert scan().others == {}


@pytest.mark.parametrize("without", [[(0, 2)], list(TO_TWO.items())])
def test_a_pair_without_a_trigger_of_its_own_excuses_no_large_joint_trigger(monkeypatch, without):
    missing = norms_with(without, size=np.inf) / 99
    sizes = {"neural-cleanse": norms_with(TO_TWO.items()), "pt-red": missing}
    World(monkeypatch, sizes, TO_TWO)
    assert scan().others == {}


def test_a_correction_works_from_every_trigger_estimated_for_its_target(monkeypatch):
    World(monkeypatch, {"neural-cleanse": norms_with(TO_TWO.items()), "pt-red": PLAIN}, TO_TWO)
    found = scan()
    assert pair_scan.estimates(found._replace(others={}), 2) == [found.triggers[2]]
    both = pair_scan.estimates(found, 2)
    assert [each.method for each in both] == ["neural-cleanse", "pt-red"]
    stamps = [lambda key, model, images: images + model for _ in both]
    known = [
        each.evidence._replace(stamp=stamp, trigger_params=model)
        for each, stamp, model in zip(both, stamps, (1.0, 2.0), strict=True)
    ]
    assert mixture.join(known[:1]) == known[0]
    joined = mixture.join(known)
    blank = jnp.zeros((400, 2, 2, 1))
    stamped = np.asarray(joined.stamp(jax.random.key(0), joined.trigger_params, blank))
    np.testing.assert_array_equal(
        stamped, np.broadcast_to(stamped[:, :1, :1], stamped.shape)
    )  # whole images
    assert set(np.unique(stamped)) == {1.0, 2.0} and 150 < (stamped[:, 0, 0, 0] == 1).sum() < 250
    assert mixture.join(known).stamp is joined.stamp


@pytest.mark.parametrize("rate, box, taken", [(1.0, 1, True), (0.7, 1, False), (1.0, 3, False)])
def test_a_patch_of_one_colour_is_taken_where_it_works_as_well_and_is_small(
    monkeypatch, rate, box, taken
):
    World(
        monkeypatch,
        {"neural-cleanse": norms_with(TO_TWO.items()), "pt-red": PLAIN},
        TO_TWO,
        rate=0.9,
    )
    box = np.array([2, 1, 2 + box, 1 + box], np.int32)
    made = pair_triggers.make_plain(toys.NET, toys.SHAPE, pair_triggers.plain.Config())
    monkeypatch.setattr(pair_triggers, "find_box", lambda state: box)
    fitted = Fitted({}, NoInfo(), Seconds(1.0, 2.0))
    monkeypatch.setattr(pair_triggers, "fit_plain_patch", lambda *given: (made, fitted))
    shares = np.where(np.eye(K, dtype=bool), 0, rate)
    monkeypatch.setattr(pair_triggers, "measure_shares", lambda lab, stamp, state, sources: shares)
    found = scan()
    if taken:
        estimate = found.triggers[2]
        assert (estimate.method, estimate.norm, estimate.attack_success_rate) == ("plain", 1.0, 1.0)
        assert estimate.evidence.sources == (0, 1, 3, 4, 5) and found.others == {}
    else:
        assert found.triggers[2].method == "neural-cleanse" and found.others[2].method == "pt-red"


@pytest.mark.parametrize(
    "method, other", [("neural-cleanse", "pt-red"), ("pt-red", "neural-cleanse")]
)
def test_all_to_one_is_found_by_the_search_that_sees_it(monkeypatch, method, other):
    """A lone pair elsewhere is an intrinsic backdoor; sources that the seeds leave out are found by
    the trigger."""
    seeds = [(0, 2), (1, 2), (3, 2), (5, 4)]
    world = World(monkeypatch, {method: norms_with(seeds), other: PLAIN}, TO_TWO)
    found = scan()
    assert (found.verdict, found.targets, found.setting) == ("backdoored", [2], "all-to-one")
    assert found.pairs == sorted(TO_TWO.items())
    estimate = found.triggers[2]
    assert (estimate.method, estimate.evidence.sources, estimate.attack_success_rate) == (
        method,
        (0, 1, 3, 4, 5),
        1.0,
    )
    assert method in found.decided_by and other not in found.decided_by
    assert world.wishes == [(method, {0: 2, 1: 2, 3: 2}), (method, TO_TWO), (other, TO_TWO)]


def test_of_two_searches_the_trigger_that_works_better_is_kept(monkeypatch):
    """Whatever the scores; and where each finds a target of its own, both are kept."""
    seeds = [(0, 2), (1, 2), (3, 2)]
    sizes = {"neural-cleanse": norms_with(seeds, size=0.2), "pt-red": norms_with(seeds, size=0.5)}
    world = World(monkeypatch, sizes, TO_TWO, rate={"neural-cleanse": 0.8, "pt-red": 0.9})
    assert scan().triggers[2].method == "pt-red"
    world.rate = {"neural-cleanse": 0.9, "pt-red": 0.8}
    assert scan().triggers[2].method == "neural-cleanse"
    sizes = {"neural-cleanse": norms_with(seeds), "pt-red": norms_with([(0, 4), (1, 4), (3, 4)])}
    World(monkeypatch, sizes, TO_TWO, others=[{s: 4 for s in range(K) if s != 4}])
    found = scan()
    assert {target: each.method for target, each in found.triggers.items()} == {
        2: "neural-cleanse",
        4: "pt-red",
    }
    assert found.setting == "mixed"


def test_a_trigger_that_works_for_few_classes_is_no_all_to_one_attack(monkeypatch):
    """Three similar classes lead to a fourth, alone or beside the attacker's target."""
    similar = [(0, 4), (1, 4), (3, 4)]
    World(monkeypatch, {"neural-cleanse": norms_with(similar), "pt-red": PLAIN})
    assert scan(lone_factor=1e6).verdict == "inconclusive"
    World(
        monkeypatch,
        {"neural-cleanse": norms_with([*similar, *TO_TWO.items()]), "pt-red": PLAIN},
        TO_TWO,
    )
    assert scan().targets == [2]


def test_all_to_all_is_found_though_some_pairs_do_not_stand_out(monkeypatch):
    weak = {pair: PLAIN[pair] for pair in [(4, 5), (5, 0)]}
    sizes = norms_with(ROUND.items(), size=1.0)
    for pair, size in weak.items():
        sizes[pair] = size
    World(monkeypatch, {"neural-cleanse": PLAIN, "pt-red": sizes}, ROUND)
    found = scan()
    assert (found.verdict, found.setting, found.pairs) == (
        "backdoored",
        "all-to-all",
        sorted(ROUND.items()),
    )
    assert all(
        each.method == "pt-red" and len(each.evidence.sources) == 1
        for each in found.triggers.values()
    )


def test_in_an_all_to_all_attack_no_two_sources_have_one_target(monkeypatch):
    """Class 5 goes where class 0 goes, so it is not counted in."""
    true = {**ROUND, 5: 1}
    World(
        monkeypatch, {"neural-cleanse": norms_with(list(ROUND.items())[:3]), "pt-red": PLAIN}, true
    )
    assert scan(lone_factor=1e6).pairs == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


@pytest.mark.parametrize(
    "true, joint_norm, reached", [({}, 0.5, True), (ROUND, 99.0, True), (ROUND, 0.5, False)]
)
def test_pairs_that_share_no_trigger_are_no_all_to_all_attack(
    monkeypatch, true, joint_norm, reached
):
    """The trigger for several works for no others, is much larger than theirs, or never reaches the
    rate."""
    sizes = norms_with(list(ROUND.items())[:3])
    World(
        monkeypatch,
        {"neural-cleanse": sizes, "pt-red": PLAIN},
        true,
        lambda wish: joint_norm,
        reached=reached,
        margins=(1, 2, 3),
    )
    found = scan()
    assert (found.verdict, found.setting) == ("backdoored", "all-to-all")
    assert found.pairs == [(0, 1), (1, 2), (2, 3)]


def test_small_triggers_without_an_unusual_margin_are_no_backdoor(monkeypatch):
    """A clean net too has a pattern that sends most images to one class; the trigger is kept."""
    sizes = {"neural-cleanse": PLAIN, "pt-red": norms_with(TO_TWO.items())}
    World(monkeypatch, sizes, TO_TWO, margins=[])
    found = scan()
    assert (found.verdict, found.targets, found.pairs) == ("inconclusive", [], [])
    assert found.leads == [2] and found.triggers[2].method == "pt-red"
    assert "largest margin does not stand out (p = 0.4)" in found.decided_by
    World(monkeypatch, sizes, TO_TWO)
    named = scan()
    assert (named.verdict, named.targets, named.leads) == ("backdoored", [2], [])
    assert "a margin that stands out, p = 0.01" in named.decided_by
    assert named.image_steps == found.image_steps and named.margin is not None


def test_an_unusual_margin_alone_leaves_the_verdict_open(monkeypatch):
    World(monkeypatch, {"pt-red": PLAIN}, joint_norm=lambda wish: 99.0, margins=[4])
    found = scan(method="pt-red")
    assert (found.verdict, found.leads) == ("inconclusive", [4])
    assert "margin of class 4 stands out" in found.decided_by
    assert scan(method="pt-red", targets=(0, 1)).leads == []  # it was not searched


def test_an_attack_of_many_targets_needs_no_unusual_margin(monkeypatch):
    """It lifts the margins of all classes alike; its trigger works for further pairs."""
    sizes = {"neural-cleanse": PLAIN, "pt-red": norms_with(list(ROUND.items())[:4], size=1.0)}
    World(monkeypatch, sizes, ROUND, margins=[])
    found = scan()
    assert (found.verdict, found.setting, len(found.pairs)) == ("backdoored", "all-to-all", K)


@pytest.mark.parametrize(
    "searched, p_value, words",
    [(range(3), 0.4, "only 3 of 6 classes"), (range(K), np.nan, "margins say nothing here")],
)
def test_a_scan_without_power_is_not_clean(searched, p_value, words):
    sized = pair_verdict.Sized([], False, "rule", [], K, searched)
    outliers = null.Outliers(p_value, p_value, [], [], np.zeros(K), 1.0, 1.0, K)
    weighed = pair_verdict.weigh(sized, outliers)
    assert weighed.verdict == "inconclusive" and words in weighed.words
    whole = sized._replace(searched=range(K))
    assert pair_verdict.weigh(whole, outliers._replace(p_value=0.4)).verdict == "clean"
    assert pair_verdict.weigh(whole, None).verdict == "inconclusive"


def test_few_seeds_are_enough_where_their_trigger_works_for_half_of_the_classes(monkeypatch):
    sizes = {"neural-cleanse": norms_with([(0, 2), (1, 2)]), "pt-red": PLAIN}
    World(monkeypatch, sizes, TO_TWO)
    found = scan()
    assert (found.targets, found.setting, len(found.pairs)) == ([2], "all-to-one", 5)
    World(monkeypatch, sizes, TO_TWO, lambda wish: 99.0)
    assert scan(lone_factor=1e6).verdict == "inconclusive"


def test_a_pair_that_stands_alone_needs_a_higher_score(monkeypatch):
    """Between one and two thresholds it is named, and the verdict is open."""
    sizes = {"neural-cleanse": norms_with([(5, 2)], size=1.7), "pt-red": PLAIN}
    World(monkeypatch, sizes, margins=[2])
    score = scan(threshold=1e6).scores["neural-cleanse"][5, 2]
    low, high = scan(threshold=score / 1.9), scan(threshold=score / 2.1)
    assert (low.verdict, low.pairs) == ("inconclusive", []) and "alone: 5 -> 2" in low.decided_by
    assert (high.verdict, high.pairs, high.setting) == ("backdoored", [(5, 2)], "mixed")


def test_an_intrinsic_backdoor_beside_the_attackers_is_rejected(monkeypatch):
    """Li et al. 2023, appendix C: 3.02 and 7.95 alone, 27.18 together."""
    sizes = norms_with([], size=1.0) * 20
    sizes[0, 1], sizes[5, 1] = 3.02, 7.95
    joint_norm = lambda wish: 27.18 if len(wish) > 1 else 3.02
    World(monkeypatch, {"neural-cleanse": sizes}, {}, joint_norm, margins=[1])
    found = scan(method="neural-cleanse-pairs", threshold=3.0)
    assert (
        found.pairs == [(0, 1)]
        and found.triggers[1].evidence.sources == (0,)
        and found.triggers[1].norm == 3.02
    )
    World(monkeypatch, {"neural-cleanse": sizes}, {}, lambda wish: 8.5, margins=[1])
    assert scan(method="neural-cleanse-pairs", threshold=3.0).pairs == [(0, 1), (5, 1)]


def test_triggers_that_do_not_work_on_held_out_images_leave_the_verdict_open(monkeypatch):
    World(
        monkeypatch,
        {"neural-cleanse": norms_with(TO_TWO.items()), "pt-red": PLAIN},
        TO_TWO,
        rate=0.4,
        margins=[],
    )
    found = scan()
    assert (found.verdict, found.pairs) == ("inconclusive", []) and "held-out" in found.decided_by


def test_triggers_for_too_few_pairs_leave_the_verdict_open(monkeypatch):
    sizes = np.full((K, K), np.inf)
    sizes[0, 1:] = 3
    World(monkeypatch, {"pt-red": sizes})
    found = scan(method="pt-red")
    assert found.verdict == "inconclusive" and "too few to compare" in found.decided_by
    assert (found.statistics["pt-red"][1, [0, 2]] == 0).all()


def test_classes_without_images_are_named_and_not_searched(monkeypatch):
    World(
        monkeypatch,
        {"neural-cleanse": norms_with([(0, 2), (1, 2), (3, 2)]), "pt-red": PLAIN},
        TO_TWO,
    )
    labels = np.arange(60) % K
    found = scan(labels=labels[labels != 4])
    assert found.missing == (4,) and "no images of class 4" in found.decided_by
    assert np.isnan(found.statistics["pt-red"][4]).all() and np.isfinite(
        found.statistics["pt-red"][0, 4]
    )
    assert found.pairs == [(s, 2) for s in (0, 1, 3, 5)]


def test_only_the_targets_asked_for_are_searched(monkeypatch):
    World(monkeypatch, {"neural-cleanse": norms_with(TO_TWO.items()), "pt-red": PLAIN}, TO_TWO)
    found = scan(targets=(3, 2, 1))
    assert found.targets == [2] and found.steps["pt-red"] == 150
    assert np.isnan(found.statistics["neural-cleanse"][:, 0]).all()


@pytest.mark.parametrize(
    "labels, over, words",
    [
        ([0] * 9 + [1] * 4 + [2] * 9, {}, "class 1 has 4 image"),
        ([], {}, "at least 5 of each class"),
        ([0] * 9, {"targets": (0,)}, "at least 5 of each class"),
        ([0] * 9, {"targets": (K,)}, "target 6 is out of range"),
    ],
)
def test_images_or_targets_that_do_not_do_are_refused(labels, over, words):
    with pytest.raises(UserError, match=words):
        scan(labels=np.array(labels, int), **over)


def shifting(variables, images):
    """Answers with the brightest quadrant; where the pattern lies at its place, with the next
    one."""
    quarters = images.reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, toys.CLASSES)
    kernel = (2 * toys.PATTERN - 1) / 9
    match = ((2 * images[:, 2:5, 2:5, 0] - 1) * kernel[None]).sum((1, 2))[:, None] ** 2
    return 8 * quarters + variables["params"]["gain"] * match * jnp.roll(8 * quarters, 1, axis=1)


SHIFTING = build.from_apply(shifting)
NEXT = [(s, (s + 1) % toys.CLASSES) for s in range(toys.CLASSES)]
VICTIMS = {
    "all-to-one": (toys.NET, toys.victim(2, (2, 2))),
    "all-to-all": (SHIFTING, {"params": {"gain": jnp.float32(4)}}),
    "clean": (toys.NET, toys.victim(2, gain=0.0)),
}


@cached(32)
def scanned(name: str) -> pair_scan.PairScan:
    net, victim = VICTIMS[name]
    config = pair_scan.Config(
        steps=100,
        joint_steps=100,
        threshold=5.0,
        pt_red=pt_red.Config(step_size=0.06),
        neural_cleanse=neural_cleanse.for_pairs(first_cost=1e-3),
    )
    search, held_out = toys.quadrants(0, 200), toys.quadrants(1, 100)
    suspect = Suspect(net, victim, toys.SHAPE, toys.CLASSES)
    return pair_scan.scan(Run(), jax.random.key(3), suspect, search, held_out, config)


def test_a_hand_built_all_to_one_victim_is_found():
    found = scanned("all-to-one")
    assert (found.verdict, found.targets, found.setting) == (
        "backdoored",
        [2],
        "all-to-one",
    ), found.scores
    assert found.pairs == [(s, 2) for s in (0, 1, 3)]
    assert found.triggers[2].attack_success_rate > 0.9


def test_a_hand_built_all_to_all_victim_is_found():
    found = scanned("all-to-all")
    assert (found.verdict, found.setting, found.pairs) == (
        "backdoored",
        "all-to-all",
        NEXT,
    ), found.scores
    assert min(each.attack_success_rate for each in found.triggers.values()) > 0.8


def test_the_hand_built_clean_twin_is_clean():
    found = scanned("clean")
    assert (found.verdict, found.pairs) == ("clean", []), found.scores


def test_the_estimated_trigger_works_through_the_result_alone():
    """The evidence is all that a repair needs."""
    found, held_out = scanned("all-to-one"), toys.quadrants(5, 80)
    known = found.triggers[2].evidence
    images = known.stamp(
        jax.random.key(0), known.trigger_params, jnp.asarray(held_out.images / 255.0, jnp.float32)
    )
    answers = np.asarray(toys.NET.apply(VICTIMS["all-to-one"][1], images)[0].argmax(-1))
    assert (answers[held_out.labels != 2] == 2).mean() > 0.9


def test_a_scan_is_the_same_whatever_the_slots():
    """Statistics of the search, up to float rounding."""
    net, victim = VICTIMS["all-to-one"]
    search = jax.tree.map(jnp.asarray, toys.quadrants(0, 200))
    inversion = pt_red.make(net, toys.SHAPE, pt_red.Config(step_size=0.06))
    grid = sweep.grid(range(4), source=range(4))
    narrow, wide = (
        sweep.search(
            Run(),
            "pairs",
            jax.random.key(3),
            inversion,
            draw.uniform(16),
            search,
            grid,
            victim,
            num_steps=60,
            slots=n,
        )
        for n in (3, 12)
    )
    np.testing.assert_array_equal(narrow.steps, wide.steps)
    np.testing.assert_allclose(
        jax.vmap(inversion.size)(narrow.states),
        jax.vmap(inversion.size)(wide.states),
        rtol=1e-3,
    )
