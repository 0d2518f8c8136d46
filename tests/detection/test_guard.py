"""The guarded net against its definition, one image at a time; what it costs; its export; its rates
by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxbd.base import Attack, Batch, UserError
from jaxbd.detection import guard
from jaxbd.metrics import evaluate
from jaxbd.models import build

CLASSES = 5
SHAPE = (8, 8, 3)
NET = build.net(
    build.Spec(arch="cnn", classes=CLASSES, image_shape=SHAPE, options={"width": 4, "stages": 2})
)
TARGETS = (3, 0)


@pytest.fixture(scope="module")
def images():
    """Noise in many tints."""
    tint, noise = jax.random.split(jax.random.key(0))
    return jax.random.uniform(tint, (61, 1, 1, 3)) * jax.random.uniform(noise, (61, *SHAPE))


@pytest.fixture(scope="module")
def parts(images):
    """A suspect that uses several classes, and per target the same weights with other moments and
    with bounds."""
    suspect = NET.init(jax.random.key(1))
    suspect["params"]["head"]["kernel"] = 30 * jax.random.normal(jax.random.key(2), (8, CLASSES))
    suspect["params"]["head"]["bias"] = -NET.apply(suspect, images)[0].mean(0)
    corrected = []
    for number in range(len(TARGETS)):
        key = jax.random.key(10 + number)
        stats = jax.tree.map(
            lambda leaf, key=key: leaf * jax.random.uniform(key, leaf.shape), suspect["batch_stats"]
        )
        bounds = {
            name: {
                "lower": jnp.full(leaf["mean"].shape, -0.5),
                "upper": jnp.full(leaf["mean"].shape, 0.3 + number),
            }
            for name, leaf in stats.items()
        }
        corrected.append({**suspect, "batch_stats": stats, "bounds": bounds})
    return suspect, corrected


@pytest.fixture(scope="module")
def expected(parts, images):
    """Each image on its own, as in Fig. 2: (logits, suspect's label, asked, flagged)."""
    suspect, corrected = parts
    rows, ask = [], jax.jit(lambda variables, image: NET.apply(variables, image[None])[0][0])
    for image in images:
        logits = ask(suspect, image)
        said = int(logits.argmax())
        if said in TARGETS:
            logits = ask(corrected[TARGETS.index(said)], image)
        rows.append((logits, said, said in TARGETS, int(logits.argmax()) != said))
    return tuple(map(np.stack, zip(*rows, strict=True)))


@pytest.mark.parametrize("slots", [1, 7, 32, 500])
def test_answers_are_those_of_the_definition(parts, images, expected, slots):
    logits, said, asked, flagged = expected
    assert (
        len(set(said)) > 2
        and set(TARGETS) < set(said)
        and 0 < flagged.sum() < asked.sum() < len(images)
    )
    variables = guard.pack(*parts)
    found, stats = jax.jit(guard.make(NET, TARGETS, slots=slots).apply)(variables, images)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, stats, parts[0]["batch_stats"])
    verdicts = jax.jit(guard.verdicts(NET, TARGETS, slots=slots))(variables, images)
    np.testing.assert_array_equal(verdicts.label, logits.argmax(-1))
    for got, wanted in zip(verdicts[1:], (said, flagged, asked), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert verdicts.label.dtype == jnp.int32 and verdicts.flagged.dtype == bool


@pytest.mark.parametrize("count", [1, 2, 33])
def test_any_number_of_images(parts, images, expected, count):
    found, _ = guard.make(NET, TARGETS).apply(guard.pack(*parts), images[:count])
    np.testing.assert_allclose(found, expected[0][:count], rtol=1e-4, atol=1e-4)


class Counted:
    """A net that answers with the number in the first pixel and counts the images of every forward
    pass that runs."""

    def __init__(self):
        self.passes = []
        self.net = build.from_apply(self._apply)

    def _apply(self, variables, images):
        jax.debug.callback(lambda pixel: self.passes.append(pixel.shape[0]), images[:, 0, 0, 0])
        digit = jnp.round(images[:, 0, 0, 0]).astype(int) + variables["batch_stats"]["shift"]
        return jax.nn.one_hot(digit % CLASSES, CLASSES)


def reads(digits):
    return jnp.asarray(digits, jnp.float32)[:, None, None, None]


def shifted(amount: int):
    return {"params": {}, "batch_stats": {"shift": jnp.full((1,), amount)}}


@pytest.mark.parametrize(
    ("digits", "passes"),
    [
        ([1, 2, 4, 1, 2, 4], [6]),  # no suspect: the suspect's pass alone
        ([1, 2, 4, 1, 2, 3], [6, 2]),  # one image of target 3
        ([3, 3, 3, 1, 2, 4], [6, 2, 2]),  # three images in blocks of two
        ([3, 0, 3, 0, 3, 0], [6, 2, 2, 2, 2]),  # three of each target: two blocks each
        ([3], [1, 1]),
    ],
)
def test_the_corrected_nets_run_for_suspects_only(digits, passes):
    counted = Counted()
    guarded = guard.make(counted.net, TARGETS, slots=2)
    variables = guard.pack(shifted(0), [shifted(1), shifted(2)])
    logits, _ = jax.jit(guarded.apply)(variables, reads(digits))
    jax.effects_barrier()
    assert counted.passes == passes
    wanted = [{3: 4, 0: 2}.get(digit, digit) for digit in digits]
    np.testing.assert_array_equal(logits.argmax(-1), wanted)


@pytest.mark.parametrize("batch", [1, 9, "any"])
def test_it_is_exported_and_read_back(parts, images, expected, batch):
    variables, guarded = guard.pack(*parts), guard.make(NET, TARGETS, slots=4)
    size = export.symbolic_shape("batch")[0] if batch == "any" else batch
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    exported = export.export(jax.jit(lambda v, x: guarded.apply(v, x)[0]))(
        shapes, jax.ShapeDtypeStruct((size, *SHAPE), jnp.float32)
    )
    again = export.deserialize(exported.serialize())
    for count in (1, 20) if batch == "any" else (batch,):
        found = again.call(variables, images[:count])
        np.testing.assert_allclose(found, expected[0][:count], rtol=1e-4, atol=1e-4)


def test_a_fresh_guarded_net_is_its_suspect(images):
    guarded = guard.make(NET, TARGETS)
    variables = guarded.init(jax.random.key(3))
    assert jax.tree.leaves(variables["corrected"])[0].shape[0] == len(TARGETS)
    np.testing.assert_allclose(
        guarded.apply(variables, images)[0],
        NET.apply(variables["suspect"], images)[0],
        rtol=1e-5,
        atol=1e-5,
    )
    assert not guard.verdicts(NET, TARGETS)(variables, images).flagged.any()


def test_only_what_differs_is_stored_and_comes_back(parts):
    suspect, corrected = parts
    variables = guard.pack(suspect, corrected)
    assert set(variables["corrected"]) == {"batch_stats", "bounds"}
    for number, each in enumerate(corrected):
        jax.tree.map(np.testing.assert_array_equal, guard.corrected(variables, number), each)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda s, c: guard.make(NET, ()), "at least one"),
        (lambda s, c: guard.make(NET, (1, 1)), "each once"),
        (lambda s, c: guard.make(NET, (1,), slots=0), "slots is 0"),
        (lambda s, c: guard.pack(s, []), "no corrected net"),
        (lambda s, c: guard.pack(s, [c[0], s]), "different bounds"),
        (
            lambda s, c: guard.pack(
                s, [{**s, "params": jax.tree.map(lambda x: x + 1, s["params"])}]
            ),
            "weights differ",
        ),
        (
            lambda s, c: guard.make(NET, (5,)).apply(guard.pack(s, c[:1]), jnp.zeros((2, *SHAPE))),
            "target 5 is out",
        ),
        (
            lambda s, c: guard.make(NET, (1,)).apply(
                guard.pack(s, c[:1]), jnp.zeros((2, *SHAPE)), train=True
            ),
            "trained",
        ),
    ],
)
def test_what_cannot_be_guarded_is_refused(parts, what, words):
    with pytest.raises(UserError, match=words):
        what(*parts)


# rates of a detector


def reading(key, known, images):
    """Flags images whose first pixel is at least `known`."""
    return images[:, 0, 0, 0] >= known


def marks(labels, clean, stamped) -> Batch:
    """Images [N, 1, 2, 1] whose first pixel says whether they are flagged as they are, the second
    when stamped."""
    pixels = np.stack([clean, stamped], 1).astype(np.float32)
    return Batch(pixels[:, None, :, None], np.asarray(labels, np.int32))


def swap(key, trigger, images):
    return images[:, :, ::-1]


LABELS, CLEAN, STAMPED = (
    [0, 0, 2, 2, 3, 1, 1, 3],
    [1, 0, 0, 0, 1, 1, 0, 0],
    [1, 1, 0, 1, 1, 0, 0, 0],
)


def test_detection_rates_by_hand():
    """To class 1: four of the six rows of other classes are flagged; of the two of class 1 one is,
    of all three are."""
    attack = Attack(lambda key: (), swap, lambda *_: None, lambda labels: jnp.full_like(labels, 1))
    found = evaluate.detection(
        jax.random.key(0),
        reading,
        jnp.float32(0.5),
        marks(LABELS, CLEAN, STAMPED),
        attack,
        (),
        batch_size=3,
    )
    assert found == evaluate.Detection(4 / 6, 1 / 2, 3 / 8, 6, 2, 8)


def test_detection_of_an_all_to_all_attack_counts_every_class():
    attack = Attack(lambda key: (), swap, lambda *_: None, lambda labels: (labels + 1) % 4)
    found = evaluate.detection(
        jax.random.key(0), reading, jnp.float32(0.5), marks(LABELS, CLEAN, STAMPED), attack, ()
    )
    assert found == evaluate.Detection(4 / 8, 3 / 8, 3 / 8, 8, 8, 8)


def test_detection_without_a_row_to_count_has_no_rate():
    attack = Attack(lambda key: (), swap, lambda *_: None, lambda labels: jnp.full_like(labels, 1))
    found = evaluate.detection(
        jax.random.key(0), reading, jnp.float32(0.5), marks([1, 1], [1, 0], [1, 1]), attack, ()
    )
    assert found == evaluate.Detection(None, None, 1 / 2, 0, 0, 2)


def test_the_guard_as_a_detector(parts, images, expected):
    labels = np.arange(len(images)) % CLASSES
    attack = Attack(
        lambda key: (),
        lambda key, trigger, x: x[::-1],
        lambda *_: None,
        lambda y: jnp.full_like(y, 3),
    )
    data = Batch(np.asarray(images), labels.astype(np.int32))
    found = evaluate.detection(
        jax.random.key(0),
        guard.flag(NET, TARGETS),
        guard.pack(*parts),
        data,
        attack,
        (),
        batch_size=len(images),
    )
    *_, flagged = expected
    assert found.true_positive_rate == pytest.approx(flagged[::-1][labels != 3].mean())
    assert found.false_positive_rate == pytest.approx(flagged[labels == 3].mean())
    assert found.false_positive_rate_all == pytest.approx(flagged.mean())
