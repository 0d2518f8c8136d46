"""All triggers of a class that a scan holds, as evidence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.base import Cell, UserError
from jaxbd.detection import detect
from jaxbd.detection.verdict import Judgement
from jaxbd.inversion import neural_cleanse
from jaxbd.pipelines import evidence, scan
from jaxbd.training.program import Seconds

KEY = jax.random.key(0)
CLEANSE = neural_cleanse.make(toys.NET, toys.SHAPE, neural_cleanse.Config())


def states(numbers) -> Any:
    """States of Neural Cleanse; the best mask of number n is n / 10 everywhere, its pattern 1."""
    each = jax.vmap(CLEANSE.init)(jax.random.split(KEY, len(numbers)))
    of = lambda value: jnp.broadcast_to(value, (len(numbers), *toys.SHAPE))
    masks = of(jnp.array(numbers)[:, None, None, None] / 10)
    return each._replace(best_mask=masks, best_pattern=of(1.0))


def located(norms, searched):
    """What Neural Cleanse found for the classes `searched` of four."""
    places = np.full((4, 2), -1)
    places[searched] = 0
    nothing = np.zeros(4)
    return scan.Located(np.array(norms), nothing, places, nothing, states(searched))


def make_scan(found, modelled, rates, own=None):
    """A scan whose second stage modelled the classes `modelled` at one level."""
    target = np.array(modelled, np.int32)
    cells = Cell(target, np.full_like(target, -1), np.full(len(target), 0.9, np.float32))
    rates = np.array(rates)
    return scan.Scan(
        decision=detect.Decision("backdoored", [2], []),
        decided_by="",
        rates=rates,
        level_rates=rates[:, None],
        baseline=np.zeros(4),
        inversion=CLEANSE,
        cells=cells,
        states=states(modelled) if own is None else own,
        infos=None,
        located=found,
        steps=1,
        image_steps=1,
        seconds=Seconds(0, 0),
    )


def shades(known):
    """What each trigger makes of black images."""
    images = jnp.zeros((3, *toys.SHAPE))
    stamped = [each.stamp(KEY, each.trigger_params, images) for each in known]
    return [round(float(each.mean()), 3) for each in stamped]


def test_the_mask_comes_before_what_was_modelled():
    norms = [np.nan, 9, 12, 20]
    found = make_scan(located(norms, [1, 2, 3]), [2, 3], [np.nan, np.nan, 0.9, 0.1])
    both = evidence.every_trigger(found, 2)
    assert shades(both) == [0.2, 0.2] and both[0].stamp is evidence.stamp_mask
    assert [(each.target, each.sources) for each in both] == [(2, ())] * 2
    # patches of class 3 work on a tenth, and class 1 has none
    assert shades(evidence.every_trigger(found, 3)) == [0.3]
    assert shades(evidence.every_trigger(found, 1)) == [0.1]


def test_of_classes_with_one_sign_what_works_is_taken():
    found = make_scan(located([np.nan, 9, 12, 20], [1, 2, 3]), [2], [np.nan, np.nan, 0.9, np.nan])
    assert evidence.of_leads(found) == []
    doubt = lambda *leads: found._replace(judgement=Judgement("inconclusive", [], [*leads], [], []))
    assert shades(evidence.of_leads(doubt(1, 2))) == [0.1, 0.2, 0.2]
    assert evidence.of_leads(doubt(0)) == [], "nothing leads there"


def test_where_no_mask_worked_what_was_modelled_stands_alone():
    found = make_scan(located([np.nan] * 4, [0, 1, 2, 3]), [2], [np.nan, np.nan, 0.1, np.nan])
    (only,) = evidence.every_trigger(found, 2)
    assert only.stamp is not evidence.stamp_mask
    with pytest.raises(UserError, match="did not model triggers for class 0"):
        evidence.every_trigger(found, 0)


def test_a_scan_by_masks_alone_gives_each_once():
    masks = located([9.0, 8, 12, 20], [0, 1, 2, 3])
    found = make_scan(masks, [0, 1, 2, 3], [1.0, 1, 1, 1], own=masks.states)
    assert shades(evidence.every_trigger(found, 2)) == [0.2]


def test_a_scan_without_masks_gives_what_it_modelled():
    found = make_scan(None, [2], [np.nan, np.nan, 0.3, np.nan])
    assert shades(evidence.every_trigger(found, 2)) == [0.2]
