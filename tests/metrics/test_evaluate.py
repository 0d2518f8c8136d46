"""Rates and their denominators, on victims and predictions worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.base import Attack, Batch, Inversion
from jaxbd.metrics import evaluate, sweep_rates
from jaxbd.models import build
from jaxbd.training import sweep

READS_PIXEL = build.from_apply(
    lambda variables, images: (
        jax.nn.one_hot(jnp.round(images[:, 0, 0, 0] * 255).astype(int), 4)
        + variables["params"]["bias"]
    )
)
"""Answers with the number in the first pixel."""
VARIABLES = {"params": {"bias": jnp.zeros((1, 4))}}


def answers(predicted, labels) -> Batch:
    """uint8 images [N, 1, 2, 1] that the net reads as `predicted`; the second pixel is what it
    reads when stamped."""
    images = np.zeros((len(labels), 1, 2, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = predicted
    return Batch(images, np.array(labels, np.int32))


def swap(key, trigger, images):
    return images[:, :, ::-1]


def to_class(target: int) -> Attack:
    return Attack(
        lambda key: (), swap, lambda *_: None, lambda labels: jnp.full_like(labels, target)
    )


# eight images: labels, what the net says clean, what it says stamped; the target is class 1
LABELS = [0, 0, 2, 2, 3, 1, 1, 3]
CLEAN = [0, 2, 2, 0, 3, 1, 0, 3]
STAMPED = [1, 1, 1, 2, 3, 1, 0, 1]


def test_rates_by_hand():
    """Six rows are not of class 1; four of them go there (1, 1, 1, 1), two keep their label (2, 3).

    The net is right on rows 0, 2, 4, 7 of those six, and three of the four go to class 1.
    """
    rates = evaluate.rates(
        jax.random.key(0),
        READS_PIXEL,
        VARIABLES,
        answers((CLEAN, STAMPED), LABELS),
        to_class(1),
        (),
    )
    assert rates == evaluate.Rates(
        clean_accuracy=5 / 8,
        attack_success_rate=4 / 6,
        source_inference_accuracy=2 / 6,
        attack_success_rate_correct_only=3 / 4,
        n_clean=8,
        n_triggered=6,
    )


def test_rows_of_the_target_do_not_count_whatever_the_net_says_about_them():
    of_target = np.array(LABELS) == 1
    scrambled = np.where(of_target, 3, STAMPED)
    one, other = (
        evaluate.rates(
            jax.random.key(0),
            READS_PIXEL,
            VARIABLES,
            answers((CLEAN, stamped), LABELS),
            to_class(1),
            (),
        )
        for stamped in (STAMPED, scrambled)
    )
    assert one == other


def test_all_to_all_counts_every_row():
    attack = Attack(lambda key: (), swap, lambda *_: None, lambda labels: (labels + 1) % 4)
    stamped = [1, 0, 3, 3, 0, 2, 2, 0]
    rates = evaluate.rates(
        jax.random.key(0), READS_PIXEL, VARIABLES, answers((CLEAN, stamped), LABELS), attack, ()
    )
    assert (
        rates.n_triggered == 8
        and rates.attack_success_rate == 7 / 8
        and rates.source_inference_accuracy == 1 / 8
    )


def test_without_an_attack_there_is_only_accuracy():
    rates = evaluate.rates(
        jax.random.key(0), READS_PIXEL, VARIABLES, answers((CLEAN, STAMPED), LABELS)
    )
    assert rates == evaluate.Rates(5 / 8, None, None, None, 8, 0)


def test_no_row_to_count_says_so_in_its_denominator():
    rates = evaluate.rates(
        jax.random.key(0),
        READS_PIXEL,
        VARIABLES,
        answers(([1, 1], [1, 0]), [1, 1]),
        to_class(1),
        (),
    )
    assert (rates.attack_success_rate, rates.source_inference_accuracy, rates.n_triggered) == (
        None,
        None,
        0,
    )


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_padding_of_the_last_batch_is_never_counted(count):
    """Row 0, which pads the last batch, is the only one that is right, or the only one that is
    wrong."""
    for first, others in ((1, 0), (0, 1)):
        predicted = np.full(count, others)
        predicted[0] = first
        data = answers((predicted, predicted), np.ones(count, int))
        out = evaluate.logits(READS_PIXEL, VARIABLES, data, batch_size=4)
        np.testing.assert_array_equal(out.argmax(-1), predicted)
        stamped = evaluate.triggered_logits(
            jax.random.key(0), READS_PIXEL, VARIABLES, swap, (), data, batch_size=4
        )
        np.testing.assert_array_equal(stamped.argmax(-1), predicted)


def test_float_images_and_bytes_give_the_same_logits():
    data = toys.quadrants(0, 10)
    floats = Batch((data.images / 255).astype(np.float32), data.labels)
    one, other = (
        evaluate.logits(toys.NET, toys.victim(1), each, batch_size=4) for each in (data, floats)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


FLIP = Inversion(lambda key: (), None, swap, None)


def success(data, targets, sources=None, batch_size=4):
    """Rates of cells whose trigger swaps the two pixels."""
    cells = sweep.grid(targets) if sources is None else sweep.grid(targets, source=sources)
    return sweep_rates.attack_success(
        jax.random.key(0), READS_PIXEL, FLIP, (), cells, VARIABLES, data, batch_size=batch_size
    )


def test_success_of_every_cell_leaves_out_its_own_target():
    """Class by class: rows not of that class, and how many of them the stamped net sends there."""
    rates = success(answers((CLEAN, STAMPED), LABELS), range(4))
    labels, stamped = np.array(LABELS), np.array(STAMPED)
    np.testing.assert_allclose(rates, [(stamped[labels != k] == k).mean() for k in range(4)])
    assert np.isclose(rates[1], 4 / 6)


def test_success_of_a_pair_counts_its_source_alone():
    rates = success(answers((CLEAN, STAMPED), LABELS), [1], sources=[0, 2, 3])
    np.testing.assert_allclose(rates, [2 / 2, 1 / 2, 1 / 2])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 100])
def test_success_does_not_depend_on_the_batch_size(batch_size):
    """Row 0 pads the last batch and is a hit: counting it would raise the rate."""
    rates = success(answers((CLEAN, STAMPED), LABELS), range(4), batch_size=batch_size)
    np.testing.assert_allclose(
        rates, success(answers((CLEAN, STAMPED), LABELS), range(4), batch_size=8)
    )


def test_success_of_a_class_that_all_images_have_is_zero():
    np.testing.assert_array_equal(success(answers(([1, 1], [1, 1]), [1, 1]), [1]), [0])
