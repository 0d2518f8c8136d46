"""Triggers on disk: read back they stamp as before, and hostile files are one line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import CLASSES, NET, SHAPE, quadrants, victim

from jaxbd.attacks import given
from jaxbd.base import Evidence, Suspect, UserError
from jaxbd.cli import recovered
from jaxbd.interop import evidence_file, trigger
from jaxbd.inversion import mesa, neural_cleanse, plain, pt_red
from jaxbd.pipelines import evidence as evidences
from jaxbd.repairs import mixture

SUSPECT = Suspect(NET, victim(1), SHAPE, CLASSES)
KEY = jax.random.key(3)
IMAGES = jnp.asarray(quadrants(0, 5).images / np.float32(255))
SETTINGS = mesa.Config(place="fixed", hidden=8, noise_dim=4)


def stamped(known: Evidence) -> np.ndarray:
    return np.asarray(known.stamp(KEY, known.trigger_params, IMAGES))


def through_file(tmp_path, saved: evidence_file.Saved) -> evidence_file.Saved:
    path = tmp_path / "trigger.npz"
    evidence_file.save(path, saved, SHAPE)
    return evidence_file.load(path, SUSPECT)


def random_pixels(seed: int, *shape: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), shape)


def cleanse() -> Evidence:
    made = neural_cleanse.make(NET, SHAPE, neural_cleanse.Config())
    return Evidence(1, (0, 2), made.stamp, made.init(KEY))


def perturb() -> Evidence:
    made = pt_red.make(NET, SHAPE, pt_red.Config())
    # beyond [-1, 1] at some places, as long searches end
    state = made.init(KEY)._replace(perturbation=3 * random_pixels(1, *SHAPE) - 1.5)
    return Evidence(2, (), made.stamp, state)


def paint() -> Evidence:
    made = plain.make(NET, SHAPE, plain.Config())
    state = made.init(KEY)._replace(box=jnp.array([2, 3, 5, 6], jnp.int32))
    return Evidence(1, (), made.stamp, state)


def overlay() -> Evidence:
    shown = evidences.Mask(random_pixels(1, 8, 8, 1), random_pixels(2, *SHAPE))
    return Evidence(3, (), evidences.stamp_mask, shown)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(cleanse, "mask"), (perturb, "additive"), (paint, "mask"), (overlay, "mask")],
)
def test_a_fixed_trigger_stamps_as_before(tmp_path, make, kind):
    known = make()
    (saved,) = recovered.as_saved(known, SHAPE)
    found = through_file(tmp_path, saved)
    assert (found.kind, found.target, found.sources) == (kind, known.target, known.sources)
    again = evidence_file.to_evidence(found, SUSPECT)
    np.testing.assert_allclose(stamped(again), stamped(known), atol=1e-6)
    assert np.abs(stamped(known) - IMAGES).max() > 0.1


def test_a_fixed_trigger_is_one_for_evaluate(tmp_path):
    """The same file, read by what reads the triggers that people bring."""
    known = overlay()
    (saved,) = recovered.as_saved(known, SHAPE)
    through_file(tmp_path, saved)
    loaded = trigger.load(str(tmp_path / "trigger.npz"))
    assert (loaded.target, loaded.place, loaded.apply) == (3, (0, 0), "overwrite")
    config = given.Config(target=3, apply="overwrite")
    attack, pixels = given.make(SHAPE, CLASSES, config, loaded)
    np.testing.assert_allclose(attack.stamp(KEY, pixels, IMAGES), stamped(known), atol=1e-6)


def distribution(place: str = "fixed") -> tuple[Evidence, evidence_file.Saved]:
    """Two models of patches, the second three times as likely."""
    settings = dataclasses.replace(SETTINGS, place=place)
    made = mesa.make(NET, SHAPE, settings)
    states = jax.vmap(made.init)(jax.random.split(KEY, 2))
    states = states._replace(place=jnp.array([[1, 2], [4, 5]], jnp.int32))
    mixed = mixture.Mixture(states, jnp.array([0.25, 0.75]))
    known = Evidence(2, (), mixture.mix(made.stamp), mixed)
    assert evidence_file.settings_of(made.stamp) == settings
    kept = evidence_file.shrink(mixed)
    return known, evidence_file.Saved("distribution", 2, models=kept, settings=settings)


@pytest.mark.parametrize("place", ["fixed", "image", "searched"])
def test_a_distribution_stamps_as_before(tmp_path, place):
    known, saved = distribution(place)
    found = through_file(tmp_path, saved)
    again = evidence_file.to_evidence(found, SUSPECT)
    np.testing.assert_allclose(stamped(again), stamped(known), atol=1e-6)
    with np.load(tmp_path / "trigger.npz") as file:
        assert file["samples"].shape == (evidence_file.SAMPLES, 3, 3, 1)
        # the optimisers and the statistics network stay behind
        assert {name.split("/")[0] for name in file.files} == {
            "generator",
            "kind",
            "sources",
            "target",
            "weights",
            "places",
            "place_logits",
            "settings",
            "samples",
        }


def test_samples_follow_the_weights():
    _, saved = distribution()
    assert saved.models is not None
    drawn = evidence_file.draw(saved, SHAPE, 8)
    only = saved.models._replace(weights=jnp.array([1.0, 0.0]))
    first = evidence_file.draw(saved._replace(models=only), SHAPE, 2)
    np.testing.assert_array_equal(drawn[:2], first)
    assert drawn.shape == (8, 3, 3, 1) and np.abs(drawn[2] - first[0]).max() > 0


def change(path, **arrays) -> None:
    """Other arrays in place of some; None leaves one out."""
    with np.load(path) as file:
        known = {name: file[name] for name in file.files}
    known |= arrays
    np.savez(path, **{name: value for name, value in known.items() if value is not None})


def settings_text(**changes) -> np.ndarray:
    kept = {name: getattr(SETTINGS, name) for name in evidence_file.SETTINGS}
    return np.asarray(json.dumps(kept | changes))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (dict(kind="worm"), "kind is 'worm'"),
        (dict(kind=None), "kind is missing"),
        (dict(target=7), "target is outside the model's classes 0..3"),
        (dict(target=np.array([1, 2])), "target must be one class"),
        (dict(sources=np.array([2])), "is its target and one of its sources"),
        (dict(weights=np.array([1.0])), "its settings need"),
        (dict(weights=np.ones(99)), "1 to 64 numbers"),
        (dict(weights=np.array([np.nan, 1])), "finite"),
        (dict(places=None), "'places' is missing"),
        (dict(places=np.zeros((2, 2))), "'places' is float64"),
        (dict(place_logits=np.full((2, 1), np.inf)), "is not finite"),
        (dict(settings=settings_text(hidden=10**9)), "hidden must be 1 to 4096"),
        (dict(settings=settings_text(hidden=16)), "its settings need"),
        (dict(settings=settings_text(patch=9)), "does not fit 8x8 images"),
        (dict(settings=settings_text(generator="os.system")), "generator is 'os.system'"),
        (dict(settings=np.asarray("{" * 500)), "settings is not valid JSON"),
        (dict(settings=np.asarray('{"patch": 3}')), "settings must be"),
        (
            {"generator/extra": np.zeros(1, np.float32)},
            "'generator/extra' is missing or unexpected",
        ),
    ],
)
def test_a_damaged_distribution_is_one_line(tmp_path, arrays, words):
    _, saved = distribution()
    path = tmp_path / "trigger.npz"
    evidence_file.save(path, saved, SHAPE)
    evidence_file.load(path, SUSPECT)
    change(path, **arrays)
    with pytest.raises(UserError) as caught:
        evidence_file.load(path, SUSPECT)
    message = str(caught.value)
    assert words in message and str(path) in message and "\n" not in message


def test_a_trigger_that_claims_too_much_or_is_no_archive(tmp_path, monkeypatch):
    _, saved = distribution()
    path = tmp_path / "trigger.npz"
    evidence_file.save(path, saved, SHAPE)
    with monkeypatch.context() as patch:
        patch.setattr(evidence_file, "MOST_BYTES", 100)
        with pytest.raises(UserError, match="claim more than"):
            evidence_file.load(path, SUSPECT)
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UserError, match="not an intact"):
        evidence_file.load(path, SUSPECT)
    np.savez(path, allow_pickle=True, kind=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="never loaded"):
        evidence_file.load(path, SUSPECT)
