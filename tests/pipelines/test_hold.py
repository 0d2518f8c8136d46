"""The repair that checks itself: its rounds, its three ends, what counts as small, resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.base import Batch, Evidence, Suspect, UserError
from jaxbd.models import build
from jaxbd.pipelines import checks, fresh, hold
from jaxbd.pipelines import repair as repairs
from jaxbd.pipelines.evidence import Mask, stamp_mask
from jaxbd.pipelines.repair import Repaired
from jaxbd.repairs import unlearn
from jaxbd.training.loop import NotFinite
from jaxbd.training.program import Seconds
from jaxbd.training.run import Checkpoints, Run, Stopped

KEY = jax.random.key(0)
CLEAN = toys.quadrants(0, 120)
TARGET, CORNER, MIDDLE = 2, (0, 0), (5, 2)
SHORT = fresh.Config(steps=80, patch_steps=0, additive_steps=0, batch_size=16)
UNLEARN = ("unlearn", unlearn.Config(stamp_rate=0.5, learning_rate=0.3, num_steps=40))


def two_doors(variables, images):
    """The brightest quadrant, unless a bright pixel pair at one of two places leads to `TARGET`."""
    params = variables["params"]
    quarters = images.reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, toys.CLASSES)
    pairs = [images[:, r, c, 0] * (1 - images[:, r, c + 1, 0]) for r, c in (CORNER, MIDDLE)]
    # squares, so that what images show by chance opens nothing
    opened = sum(gain * pair**4 for gain, pair in zip(params["gain"], pairs, strict=True))
    # unlearning closes doors, and does not outshout them
    scale = jax.lax.stop_gradient(params["scale"])
    return scale * quarters + opened[:, None] * jax.nn.one_hot(TARGET, toys.CLASSES)[None]


NET = build.from_apply(two_doors)


def suspect(*gain: float) -> Suspect:
    params = {"gain": jnp.array(gain, jnp.float32), "scale": jnp.float32(20)}
    return Suspect(NET, {"params": params}, toys.SHAPE, toys.CLASSES)


def door(place: tuple[int, int]) -> Evidence:
    """The trigger that opens one door."""
    row, column = place
    mask, pattern = np.zeros((2, *toys.SHAPE), np.float32)
    mask[row, column : column + 2] = 1
    pattern[row, column] = 1
    return Evidence(TARGET, (), stamp_mask, Mask(jnp.asarray(mask), jnp.asarray(pattern)))


def rate(variables, place) -> float:
    others = CLEAN.images[CLEAN.labels != TARGET] / np.float32(255)
    known = door(place)
    stamped = known.stamp(KEY, known.trigger_params, jnp.asarray(others))
    return float((NET.apply(variables, stamped)[0].argmax(-1) == TARGET).mean())


def test_a_door_that_nobody_knew_is_no_end_of_the_repair():
    """The trigger that is known closes its door only. The fresh search finds that small ones still
    work, goes on with them, and says what is left when the rounds are over."""
    victim = suspect(30, 30)
    assert rate(victim.variables, CORNER) == rate(victim.variables, MIDDLE) == 1
    config = hold.Config(rounds=2, search=SHORT)
    once = repairs.repair(Run(), KEY, victim, CLEAN, [door(CORNER)], *UNLEARN)
    assert rate(once.variables, CORNER) == 0 and rate(once.variables, MIDDLE) == 1
    held = hold.repair(Run(), KEY, victim, CLEAN, [door(CORNER)], config, UNLEARN)
    assert held.end == "rounds" and held.last.left and not held.undone
    assert all(each.size <= held.limits.mask for each in held.last.left)
    assert held.last.accuracy >= held.rounds[0].accuracy - 0.02
    assert held.rounds[0].left and held.rounds[0].rates == ((TARGET, 1.0),)
    assert len(held.last.rates) > 1, "what the search found is judged with the rest"


class Scripted:
    """`hold.repair` whose repairs and searches only note what they were asked for.

    Repair number n makes a net of accuracy `accuracy[n]`, in which a mask of size `sizes[n]` works
    at `rates[n]`; number 0 is the suspect. Triggers that were repaired keep the rate `remains[n]`.
    """

    def __init__(self, monkeypatch, accuracy, sizes, rates, remains=(), held=None, **settings):
        self.script, self.asked, self.begun = (accuracy, sizes, rates), [], []
        self.remains, self.labs, self.clean = remains, [], []
        monkeypatch.setattr(repairs, "repair", self.repair)
        monkeypatch.setattr(fresh, "search", self.search)
        monkeypatch.setattr(checks, "measure", self.measure)
        norms = np.array([30.0, 28.0, np.nan, 33.0])
        self.held = hold.repair(
            Run(),
            KEY,
            Suspect(NET, self.net(0), toys.SHAPE, toys.CLASSES),
            CLEAN,
            [door(CORNER)],
            hold.Config(search=SHORT, vary=False, **settings),
            UNLEARN,
            held=held,
            norms=norms,
        )

    def net(self, number):
        return {"params": {}, "number": jnp.int32(number)}

    def repair(self, run, key, suspect, clean, evidence, method, settings, **others):
        self.begun.append(int(suspect.variables["number"]))
        self.asked.append(tuple(each.trigger_params for each in evidence))
        self.clean.append(clean)
        number = len(self.asked)
        infos = {"unlearn": unlearn.Info(*np.zeros((3, 1)))}
        return Repaired(self.net(number), infos, Seconds(1.0, 1.0))

    def search(self, lab, key, variables, targets, label):
        _, sizes, rates = self.script
        number = int(variables["number"])
        self.labs.append(lab)
        known = door(MIDDLE)._replace(trigger_params=f"found {number}")
        found = fresh.Trigger("mask", sizes[number], rates[number], known)
        return [found], Seconds(0.0, 1.0)

    def measure(self, lab, key, variables, known):
        number = int(variables["number"])
        rate = self.remains[number] if self.remains else 0.1
        accuracy = self.script[0][number]
        return checks.Round(accuracy, {TARGET: 0.1}, tuple((TARGET, rate) for _ in known))


def test_rounds_go_on_from_the_net_before_with_all_that_works(monkeypatch):
    ran = Scripted(monkeypatch, [0.9] * 4, [5, 9, 11, 29], [1, 0.9, 0.4, 0.99])
    assert ran.begun == [0, 1, 2] and ran.held.end == "nothing left"
    assert [len(asked) for asked in ran.asked] == [2, 3, 4]
    assert ran.asked[-1][1:] == ("found 0", "found 1", "found 2")
    assert ran.held.repaired.seconds == Seconds(3.0, 7.0)
    assert len(ran.held.rounds) == 4 and not ran.held.last.left


def test_a_repaired_trigger_that_still_works_a_little_calls_for_another_round(monkeypatch):
    """Beyond the 10 % of images that go to the target anyway, 6 % is too much and 4 % is not."""
    ran = Scripted(monkeypatch, [0.9] * 3, [29] * 3, [0.1] * 3, [1.0, 0.16, 0.14])
    assert ran.held.end == "nothing left" and len(ran.begun) == 2


@pytest.mark.parametrize(
    "sizes, rounds",
    [((5, 29, 29), 3), ((29, 29, 29), 1), ((29, 5, 29), 2)],
    ids=["the suspect's own", "large", "of a repaired net"],
)
def test_of_what_a_search_found_only_the_suspect_s_own_must_be_gone(monkeypatch, sizes, rounds):
    """Any net has large triggers, and a repaired one has others that are weak."""
    rates = [1.0, 1.0, 0.1, 0.1]

    def measure(self, lab, key, variables, known):
        # the given trigger is gone after one round, what was found stays at 6 % beyond the rest
        shares = [(TARGET, 0.1), *[(TARGET, 0.16)] * (len(known) - 1)]
        return checks.Round(0.9, {TARGET: 0.1}, tuple(shares[: len(known)]))

    monkeypatch.setattr(Scripted, "measure", measure)
    ran = Scripted(monkeypatch, [0.9] * 4, [*sizes, 29], rates, rounds=3)
    assert len(ran.begun) == rounds


def test_given_images_check_the_repair_and_all_others_make_it(monkeypatch):
    other = toys.quadrants(1, 40)
    ran = Scripted(monkeypatch, [0.9] * 2, [29] * 2, [0.1] * 2, held=other, most_held=30)
    assert all(len(clean.labels) == len(CLEAN.labels) for clean in ran.clean)
    assert all(np.array_equal(lab.held.images, other.images[:30]) for lab in ran.labs)
    assert ran.held.checked_on == 30
    divided = Scripted(monkeypatch, [0.9] * 2, [29] * 2, [0.1] * 2)
    assert len(divided.clean[0].labels) == 0.75 * len(CLEAN.labels)


def test_a_scan_of_the_target_alone_leaves_sizes_to_a_search(monkeypatch):
    """Without another class's size every working trigger would count as unusually small."""
    calls = []

    def search_masks(lab, key, variables, targets, label):
        calls.append(targets)
        found = [door(MIDDLE)._replace(target=target) for target in targets]
        return [fresh.Trigger("mask", 40.0, 1.0, each) for each in found], Seconds(0.0, 0.0)

    monkeypatch.setattr(fresh, "search_masks", search_masks)
    lab = fresh.Lab(Run(), suspect(30, 30), CLEAN, CLEAN, SHORT)
    sizes = np.full(toys.CLASSES, np.nan)
    for found in (np.where(np.arange(toys.CLASSES) == TARGET, 20.0, sizes), None):
        limits, _ = checks.compare(lab, KEY, [TARGET], found, "")
        assert limits.mask == 40.0
    assert calls == [[0, 1, 3]] * 2
    sizes[0] = 30.0
    limits, _ = checks.compare(lab, KEY, [TARGET], sizes, "")
    assert limits.mask == 15.0 and len(calls) == 2


def test_a_round_that_diverges_is_tried_with_smaller_steps(monkeypatch):
    """And so are the rounds after it; the third failure is the last."""
    tried = []

    def diverge_above(limit):
        def repair(self, run, key, suspect, clean, evidence, method, settings, **others):
            tried.append((settings.learning_rate, others["label"].rpartition(", ")[2]))
            if settings.learning_rate > limit:
                raise NotFinite(3, ())
            self.asked.append(None)
            infos = {"unlearn": unlearn.Info(*np.zeros((3, 1)))}
            return Repaired(self.net(len(self.asked)), infos, Seconds(1.0, 1.0))

        monkeypatch.setattr(Scripted, "repair", repair)

    diverge_above(0.1)
    with pytest.warns(UserWarning, match=r"round 1 of 4 diverged; trying learning rate 0\.06"):
        Scripted(monkeypatch, [0.9] * 3, [5, 9, 29], [1, 0.9, 0.99])
    assert [rate for rate, _ in tried] == pytest.approx([0.3, 0.06, 0.06])
    assert tried[1][1] == "rate 0.06" and tried[2][1] == "round 2 of 4"
    diverge_above(0.0)
    with pytest.warns(UserWarning, match="diverged"), pytest.raises(NotFinite):
        Scripted(monkeypatch, [0.9] * 2, [5, 29], [1, 0.99])
    assert len(tried) == 6


def test_what_hardly_works_is_no_reason_to_go_on(monkeypatch):
    """Beyond the 10 % of images that go to the target anyway."""
    ran = Scripted(monkeypatch, [0.9] * 3, [5, 5, 5], [1, 0.31, 0.29])
    assert ran.held.end == "nothing left" and len(ran.begun) == 2
    assert [len(r.left) for r in ran.held.rounds] == [1, 1, 0]


def test_a_round_beyond_the_budget_is_undone_and_the_last(monkeypatch):
    ran = Scripted(monkeypatch, [0.9, 0.89, 0.87], [5, 5, 5], [1, 1, 1])
    assert (ran.held.end, ran.held.undone) == ("budget", True)
    assert int(ran.held.repaired.variables["number"]) == 1
    assert ran.held.last.accuracy == 0.89 and len(ran.held.rounds) == 3


def test_a_first_round_beyond_the_budget_leaves_the_suspect_as_it_came(monkeypatch):
    ran = Scripted(monkeypatch, [0.9, 0.5], [5, 29], [1, 1])
    assert (ran.held.end, ran.held.undone) == ("budget", True)
    assert int(ran.held.repaired.variables["number"]) == 0 and ran.held.last.accuracy == 0.9
    assert ran.held.rounds[1].accuracy == 0.5 and ran.held.rounds[1].kept == 0


@pytest.mark.parametrize("scale, share", [(15, 1.0), (-4, 0.75), (-20, 0.25), (-200, 0.0)])
def test_of_a_costly_change_as_much_is_kept_as_the_budget_bears(scale, share):
    """The toy is right as long as `scale` is above 0."""
    before = suspect(30, 30)
    after = {"params": {**before.variables["params"], "scale": jnp.float32(scale)}}
    lab = fresh.Lab(Run(), before, CLEAN, CLEAN, SHORT)
    kept, found = checks.keep_within(lab, before.variables, after, 0.99)
    assert found == share
    assert float(kept["params"]["scale"]) == pytest.approx(20 + share * (scale - 20))


def test_moments_move_with_the_weights_and_bounds_stay():
    before = {"params": {"w": jnp.zeros(2)}, "batch_stats": {"m": jnp.ones(2)}}
    after = {"params": {"w": jnp.ones(2)}, "batch_stats": {"m": jnp.zeros(2)}, "bounds": "new"}
    between = checks.move(before, after, 0.25)
    np.testing.assert_allclose(between["params"]["w"], 0.25)
    np.testing.assert_allclose(between["batch_stats"]["m"], 0.75)
    assert between["bounds"] == "new" and checks.move(before, after, 1.0) is after


def test_rounds_can_be_over_with_something_left(monkeypatch):
    ran = Scripted(monkeypatch, [0.9] * 3, [5] * 3, [1] * 3, rounds=2)
    assert ran.held.end == "rounds" and ran.held.last.left and len(ran.begun) == 2


@pytest.mark.parametrize(
    "sizes, limit",
    [
        ([], np.inf),
        ([np.nan, np.nan], np.inf),
        ([30.0, 20.0], 12.5),
        ([28.0, 30.0, 32.0, np.nan], 30 - 2 * 1.4826 * 2),
        ([10.0, 30.0, 60.0], 10.0),
        ([30.0, 30.0, 30.0, 29.0], 29.0),
        ([20.0, 30.0, 40.0], 15.0),
    ],
)
def test_what_is_unusually_small(sizes, limit):
    assert checks.usual_limit(np.array(sizes), 2.0) == pytest.approx(limit)


def test_small_and_large_first_masks_are_cells_of_one_search():
    """The first look sees the mask that the level asks for."""
    inversion = fresh.make_masks(NET, toys.SHAPE, fresh.neural_cleanse.Config())
    state = inversion.init(KEY)
    batch = Batch(jnp.asarray(CLEAN.images[:8] / np.float32(255)), jnp.asarray(CLEAN.labels[:8]))
    variables = suspect(30, 30).variables
    norms = []
    for level in (1.0, 0.1):
        cell = fresh.Cell(jnp.int32(TARGET), jnp.int32(-1), jnp.float32(level))
        after, info = inversion.step(KEY, state, batch, cell, variables)
        norms.append(float(info.mask_norm))
        # only the first step starts anew
        _, later = inversion.step(KEY, after, batch, cell, variables)
        assert float(later.mask_norm) > 0.5 * norms[-1]
    assert norms[1] == pytest.approx(0.1 * norms[0], rel=0.02)


def test_it_is_deterministic_and_resumes(tmp_path):
    config = hold.Config(rounds=1, search=fresh.Config(steps=12, patch_steps=6, additive_steps=6))
    settings = (KEY, suspect(30, 30), CLEAN, [door(CORNER)], config, UNLEARN)
    names = []
    whole = hold.repair(Run(progress=lambda name, *_: names.append(name)), *settings)
    stages = list(dict.fromkeys(names))
    assert len(stages) == 9, stages  # other classes 2, before 3, unlearning, check 3
    asked = []

    def stop_once():
        asked.append(1)
        return 15 if len(asked) == 9 else None

    saved = Checkpoints(tmp_path / "run", {"method": "hold"}, every=1)
    with pytest.raises(Stopped):
        hold.repair(Run(checkpoints=saved, stop_requested=stop_once), *settings)
    resumed = Run(checkpoints=saved)
    rest = hold.repair(resumed, *settings)
    assert resumed.resumed is not None
    same = jax.tree.map(np.array_equal, whole.repaired.variables, rest.repaired.variables)
    assert all(jax.tree.leaves(same)) and whole.rounds[1].rates == rest.rounds[1].rates


@pytest.mark.parametrize(
    "clean, known, base, words",
    [
        (CLEAN, [], ("unlearn", None), "unlearn needs a trigger"),
        (CLEAN, [door(CORNER)], ("bna", None), "bna changes no weights"),
        (Batch(CLEAN.images[:1], CLEAN.labels[:1]), [door(CORNER)], UNLEARN, "1 clean images"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(clean, known, base, words):
    with pytest.raises(UserError, match=words):
        hold.repair(Run(), KEY, suspect(30, 0), clean, known, hold.Config(), base)


def test_settings_are_checked():
    for wrong in (
        {"max_drop": 1.0},
        {"rounds": 0},
        {"working": 0.0},
        {"remaining": 1.0},
        {"held_share": 1.0},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            hold.Config(**wrong)
    with pytest.raises(UserError, match="first_masks"):
        fresh.Config(first_masks=(2.0,))
