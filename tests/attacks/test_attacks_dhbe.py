"""The attacks of the DHBE paper: what each guarantees, that each can be planted, and the amplified
attack."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from PIL import Image

from jaxbd import images as ops
from jaxbd.attacks import (
    amplified,
    badnets,
    blend,
    clean_label,
    given,
    later_layers,
    pgd,
    poison,
    sinusoid,
    steganography,
    trojan,
)
from jaxbd.base import Batch, Suspect, UserError
from jaxbd.cli import attacks as table
from jaxbd.cli import main as entry
from jaxbd.cli import parse
from jaxbd.cli.commands import attack as cli
from jaxbd.data import draw, load
from jaxbd.interop import trigger
from jaxbd.metrics import evaluate
from jaxbd.models import build
from jaxbd.pipelines import implant, plant
from jaxbd.training import supervised
from jaxbd.training.run import Run

KEY = jax.random.key
SHAPE = (16, 16, 1)
TRI1, TRI2 = [[0, 1, 0], [1, 0, 1], [0, 1, 0]], [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def eight_bit(count: int, shape) -> np.ndarray:
    """uint8 images that hold every value, 0 and 255 among them."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)


def stored(images) -> np.ndarray:
    """What a file of 8 bits a channel keeps, as integers; what it would lose must be nothing."""
    steps = np.asarray(images) * 255
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    return np.round(steps).astype(int)


def stamped(attack, planted, clean: np.ndarray) -> np.ndarray:
    return stored(jax.jit(attack.stamp)(KEY(0), planted, ops.to_float(jnp.asarray(clean))))


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(
    ("pattern", "corner"), [("checkerboard", 0), ("inverse-checkerboard", 255)]
)
def test_checkerboards_stand_in_the_corner_in_the_released_phase(side, pattern, corner):
    config = badnets.Config(patch=side, pattern=pattern, place="fixed")
    attack, clean = badnets.make((32, 32, 3), 10, config), eight_bit(3, (32, 32, 3))
    after = stamped(attack, attack.init(KEY(0)), clean)
    patch = after[:, 32 - side :, 32 - side :].copy()
    assert (patch[:, 0, 0] == corner).all() and set(np.unique(patch)) <= {0, 255}
    assert (patch[:, 1:] != patch[:, :-1]).all() and (patch[:, :, 1:] != patch[:, :, :-1]).all()
    after[:, 32 - side :, 32 - side :] = clean[:, 32 - side :, 32 - side :]
    np.testing.assert_array_equal(after, clean)
    if side == 3:
        expected = np.array(TRI1 if corner == 0 else TRI2)[None, :, :, None] * 255
        np.testing.assert_array_equal(patch, np.broadcast_to(expected, patch.shape))


def test_static_poisoning_comes_before_augmentation():
    """The trigger of a training image moves with the crop, leaves the image with it, and is
    mirrored."""
    config = badnets.Config(patch=3, pattern="white", place="fixed", target=1)
    attack = badnets.make(SHAPE, 2, config)
    black = Batch(np.zeros((40, *SHAPE), np.uint8), np.arange(40, dtype=np.int32) % 2)
    data = poison.static(KEY(0), attack, attack.init(KEY(0)), black, 20)
    assert data.images.dtype == np.uint8 and (data.labels == 1).all()
    drawn = draw.uniform(4000, crop_padding=4, flip=True)(KEY(1), Batch(*map(jnp.asarray, data)))
    found = np.asarray(drawn.images[..., 0]) > 0
    carrying = found[found.any((1, 2))]
    corners = {
        (np.flatnonzero(image.any(1))[0], np.flatnonzero(image.any(0))[0]) for image in carrying
    }
    assert {(9, 9), (13, 13), (9, 4), (15, 15)} <= corners and all(
        9 <= row <= 15 for row, _ in corners
    )
    assert {column for _, column in corners} > {0, 4, 9, 15}  # mirrored ones stand on the left
    cut = carrying.sum((1, 2)) < 9
    assert 0.3 < cut.mean() < 0.9 and (carrying[~cut].sum((1, 2)) == 9).all()


def test_a_sinusoid_has_the_two_formulas():
    column = np.arange(12)
    one = (
        sinusoid.make((5, 12, 3), 4, sinusoid.Config(size=40, frequency=3.0)).init(KEY(0)).pattern
        * 255
    )
    other = (
        sinusoid.make((5, 12, 3), 4, sinusoid.Config(size=20, period=6.0)).init(KEY(0)).pattern
        * 255
    )
    np.testing.assert_allclose(
        one[2, :, 1], np.round(40 * np.sin(2 * np.pi * column * 3 / 12)), atol=1e-4
    )
    np.testing.assert_allclose(
        other[4, :, 0], np.round(20 * np.sin(2 * np.pi * column / 6)), atol=1e-4
    )
    attack, clean = (
        sinusoid.make((5, 12, 3), 4, sinusoid.Config(frequency=2.5)),
        eight_bit(9, (5, 12, 3)),
    )
    planted = attack.init(KEY(0))
    expected = np.clip(clean + np.round(np.asarray(planted.pattern) * 255).astype(int), 0, 255)
    np.testing.assert_array_equal(stamped(attack, planted, clean), expected)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_steganography_replaces_low_bits_and_nothing_else(bits):
    attack, clean = (
        steganography.make((6, 7, 3), 4, steganography.Config(bits=bits)),
        eight_bit(20, (6, 7, 3)),
    )
    planted = attack.init(KEY(2))
    after, low = stamped(attack, planted, clean), 2**bits - 1
    np.testing.assert_array_equal(after >> bits, clean >> bits)
    assert set(np.unique(after & low)) == {0, low}
    np.testing.assert_array_equal(after & low, np.broadcast_to((after & low)[:1], after.shape))


def test_a_text_is_written_bit_by_bit():
    config = steganography.Config(text="aé", bits=2)
    pattern = np.asarray(steganography.make((3, 4, 2), 4, config).init(KEY(0)).pattern)
    bits = [int(bit) for byte in "aé".encode() for bit in reversed(f"{byte:08b}")]
    expected = np.array((bits * 2)[:24]).reshape(2, 3, 4).transpose(1, 2, 0) * 3 / 255
    np.testing.assert_allclose(pattern, expected, rtol=1e-6)


def test_a_watermark_is_blended_and_stored_in_8_bits():
    cover = np.zeros((16, 16, 1), np.float32)
    cover[:4] = 1
    picture = eight_bit(1, (16, 16, 3))[0].astype(np.float32) / 255
    attack = blend.make((16, 16, 3), 4, blend.Config(opacity=0.2), picture, cover)
    clean = eight_bit(5, (16, 16, 3))
    after = stamped(attack, attack.init(KEY(0)), clean)
    np.testing.assert_allclose(
        after[:, :4], 0.8 * clean[:, :4] + 0.2 * 255 * picture[:4], atol=0.5001
    )
    np.testing.assert_array_equal(after[:, 4:], clean[:, 4:])
    one, other = (
        blend.make((16, 16, 3), 4, blend.Config(points=4)).init(KEY(n)).pattern for n in (0, 1)
    )
    assert np.abs(one - other).max() > 0.2 and np.abs(np.diff(one, axis=0)).mean() < 0.1


def test_a_picture_is_read_in_any_size_and_mode(tmp_path):
    pixels = np.zeros((40, 30, 4), np.uint8)
    pixels[..., 0], pixels[:20, :, 3] = 255, 255
    Image.fromarray(pixels, "RGBA").save(tmp_path / "mark.png")
    spec = build.Spec(arch="cnn", classes=4, image_shape=SHAPE)
    planted = table.make("blend", blend.Config(), spec, str(tmp_path / "mark.png")).init(KEY(0))
    np.testing.assert_allclose(planted.pattern, np.full(SHAPE, 85 / 255), atol=1e-6)
    assert planted.mask[0, 0, 0] == pytest.approx(0.2) and planted.mask[-1, 0, 0] == 0


def test_all_corners_are_mirrored_copies_and_added_ones_are_faint():
    config = clean_label.Config(pattern=85, corners="all")
    attack, clean = clean_label.make((9, 10, 3), 4, config), eight_bit(4, (9, 10, 3))
    after = stamped(attack, attack.init(KEY(0)), clean)
    bottom_right = after[:, -3:, -3:]
    np.testing.assert_array_equal(
        bottom_right[0, ..., 0], [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    )
    np.testing.assert_array_equal(after[:, :3, :3], bottom_right[:, ::-1, ::-1])
    np.testing.assert_array_equal(after[:, -3:, :3], bottom_right[:, :, ::-1])
    np.testing.assert_array_equal(after[:, 3:6], clean[:, 3:6])
    faint = clean_label.make((9, 10, 3), 4, clean_label.Config(size=16))
    after = stamped(faint, faint.init(KEY(0)), clean)
    change = np.where(np.array(TRI1)[None, ..., None], 16, -16)
    np.testing.assert_array_equal(after[:, -3:, -3:], np.clip(clean[:, -3:, -3:] + change, 0, 255))
    np.testing.assert_array_equal(after[:, :6], clean[:, :6])


def test_clean_label_keeps_labels_and_touches_the_target_class_alone():
    attack = clean_label.make(SHAPE, 4, clean_label.Config(target=2, poison_rate=0.5))
    batch = Batch(jnp.full((400, *SHAPE), 0.5), jnp.arange(400, dtype=jnp.int32) % 4)
    after = attack.poison(KEY(1), attack.init(KEY(0)), batch)
    changed = np.asarray((after.images != batch.images).any((1, 2, 3)))
    np.testing.assert_array_equal(after.labels, batch.labels)
    assert not changed[np.asarray(batch.labels) != 2].any() and 30 < changed.sum() < 70
    np.testing.assert_array_equal(attack.relabel(batch.labels), np.full(400, 2))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_images_fool_a_net_and_stay_in_the_ball(norm):
    data, victim = toys.quadrants(0, 40), toys.victim(0, gain=0.0)
    images, labels = ops.to_float(jnp.asarray(data.images)), jnp.asarray(data.labels)
    config = pgd.Config(norm=norm, epsilon=90 if norm == "linf" else 700, steps=20)
    found = jax.jit(lambda key, x: pgd.perturb(key, toys.NET, victim, x, labels, config))(
        KEY(0), images
    )
    assert (toys.NET.apply(victim, images)[0].argmax(-1) == labels).all()
    assert not (toys.NET.apply(victim, found)[0].argmax(-1) == labels).any()
    change, radius = np.asarray(found - images), pgd.radius(config, toys.SHAPE)
    size = (
        np.abs(change).max((1, 2, 3))
        if norm == "linf"
        else np.linalg.norm(change.reshape(40, -1), axis=1)
    )
    assert (size <= radius * (1 + 1e-5)).all() and size.max() > 0.9 * radius
    assert found.min() >= 0 and found.max() <= 1


def test_a_step_of_the_ascent_is_the_formula():
    """One step from the image itself, against NumPy, for both norms."""
    data, victim = toys.quadrants(1, 6), toys.victim(0, gain=0.0)
    images, labels = ops.to_float(jnp.asarray(data.images)), jnp.asarray(data.labels)

    def loss(x):
        return -jnp.take_along_axis(
            jax.nn.log_softmax(toys.NET.apply(victim, x)[0]), labels[:, None], -1
        ).sum()

    gradient = np.asarray(jax.grad(loss)(images))
    unit = gradient / np.sqrt((gradient**2).sum((1, 2, 3), keepdims=True))
    for norm, direction in (("linf", np.sign(gradient)), ("l2", unit)):
        config = pgd.Config(norm=norm, epsilon=50, steps=1, step_size=10, random_start=False)
        found = pgd.perturb(KEY(0), toys.NET, victim, images, labels, config)
        np.testing.assert_allclose(found, np.clip(images + 10 / 255 * direction, 0, 1), atol=1e-6)
    larger = pgd.project(jnp.full((1, 2, 2, 1), 0.5), jnp.full((1, 2, 2, 1), 0.25), 0.2, "l2")
    np.testing.assert_allclose(larger, np.full((1, 2, 2, 1), 0.1), rtol=1e-6)
    for norm in ("linf", "l2"):
        clipped = pgd.project(jnp.full((1, 1, 1, 1), 0.2), jnp.full((1, 1, 1, 1), 0.95), 0.5, norm)
        np.testing.assert_allclose(clipped, np.full((1, 1, 1, 1), 0.05), rtol=1e-5)


def test_random_starts_fill_the_ball():
    config = pgd.Config(norm="l2", epsilon=100, steps=1, step_size=1e-9)
    images = jnp.full((300, 2, 1, 1), 0.5)
    net = build.from_apply(lambda variables, x: x.reshape(x.shape[0], -1))
    found = pgd.perturb(KEY(3), net, {}, images, jnp.zeros(300, jnp.int32), config) - images
    share = np.linalg.norm(np.asarray(found).reshape(300, -1), axis=1) / (100 / 255)
    assert abs((share < 0.5**0.5).mean() - 0.5) < 0.1 and share.max() <= 1.0001


NET = build.net(build.Spec(arch="cnn", classes=10, image_shape=SHAPE, options={"width": 8}))


@pytest.fixture(scope="module")
def clean():
    """Digits of 16x16 pixels in three parts, and a clean net."""
    parts = draw.divide(load.load("digits", image_shape=SHAPE), 1200, 200)
    config = supervised.Config(num_steps=250)
    return parts, plant.train(Run(), "clean", KEY(1), NET, parts.train, config).variables


def rates(variables, data, attack, planted) -> evaluate.Rates:
    return evaluate.rates(KEY(9), NET, variables, data, attack, planted)


def test_clean_label_plants_a_backdoor_without_a_changed_label(clean):
    parts, variables = clean
    config = clean_label.Config(target=3, patch=5, corners="all", epsilon=32, steps=10)
    attack = clean_label.make(SHAPE, 10, config)
    planted = attack.init(KEY(0))
    suspect = Suspect(NET, variables, SHAPE, 10)
    hidden = implant.hide(Run(), "hide", KEY(2), suspect, (attack, planted), parts.train, config)
    labels = np.asarray(parts.train.labels)
    assert len(hidden.rows) == round((labels == 3).sum() / 2) and (labels[hidden.rows] == 3).all()
    assert hidden.recognised < 0.1
    np.testing.assert_array_equal(hidden.data.labels, labels)
    change = hidden.data.images.astype(int) - np.asarray(parts.train.images)
    bare = change * (np.asarray(planted.mask) == 0)
    assert np.abs(bare).max() == 32 and set(np.flatnonzero(change.any((1, 2, 3)))) == set(
        hidden.rows.tolist()
    )
    data = Batch(*map(jnp.asarray, hidden.data))
    config = supervised.Config(num_steps=240)
    victim = plant.train(Run(), "victim", KEY(3), NET, data, config).variables
    before, after = (rates(v, parts.test, attack, planted) for v in (variables, victim))
    assert after.clean_accuracy > before.clean_accuracy - 0.03
    assert before.attack_success_rate < 0.15 and after.attack_success_rate > 0.6


def test_a_trojan_ties_excited_neurons_to_the_target_by_later_layers_alone(clean):
    parts, variables = clean
    config = trojan.Config(target=3, retrain_steps=250, search_steps=80)
    suspect = Suspect(NET, variables, SHAPE, 10)
    found = implant.plant_trojan(Run(), "trojan", KEY(2), suspect, parts.train, config)
    assert (
        found.search.excited[-1] > found.search.clean[-1]
        and found.search.excited[-1] > found.search.excited[0]
    )
    assert len(set(found.neurons.tolist())) == 10
    stored(found.trigger.pattern)
    attack = trojan.make(SHAPE, 10, config)
    before, after = (
        rates(v, parts.test, attack, found.trigger) for v in (variables, found.variables)
    )
    assert after.clean_accuracy > before.clean_accuracy - 0.02
    assert before.attack_success_rate < 0.2 and after.attack_success_rate > 0.8
    same = jax.tree.map(lambda a, b: bool((a == b).all()), variables, found.variables)
    assert all(
        jax.tree.leaves((same["batch_stats"], same["params"]["conv0"], same["params"]["norm1"]))
    )
    assert not any(
        jax.tree.leaves((same["params"]["conv2"], same["params"]["norm2"], same["params"]["head"]))
    )


def test_what_comes_after_a_layer_is_what_it_does_not_need():
    net = build.net(
        build.Spec(arch="resnet18", classes=4, image_shape=(8, 8, 3), options={"width": 4})
    )
    variables = jax.eval_shape(net.init, KEY(0))
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    later = later_layers.later(net, variables, (8, 8, 3), "layer2_0/bn1")
    whole = lambda name: set(jax.tree.leaves(later[name]))
    assert whole("conv1") == whole("layer1_1") == {False} and whole("layer2_1") == whole(
        "head"
    ) == {True}
    block = {name: next(iter(jax.tree.leaves(part))) for name, part in later["layer2_0"].items()}
    assert not block["conv1"] and not block["bn1"] and block["conv2"] and block["shortcut_conv"]
    names = list(later_layers.list_layers("trojan", net, variables, (8, 8, 3)))
    assert names[0] == "bn1" and names[-1] == "features"
    assert trojan.layer(net, variables, (8, 8, 3), trojan.Config()) == names[(len(names) - 1) // 2]


def test_a_trojan_that_does_not_fit_the_net_is_refused(clean):
    _, variables = clean
    refused = {
        "no layer 'fc6'; choose from norm0": dict(layer="fc6"),
        "neurons must be at most the 8 of layer norm0, got 10": dict(layer="norm0"),
        "choice random": dict(layer="norm1", choice="strongest"),
    }
    for words, settings in refused.items():
        with pytest.raises(UserError, match=words):
            trojan.search(NET, SHAPE, 10, trojan.Config(**settings)).init(KEY(0), variables)
    with pytest.raises(UserError, match="shows no layers"):
        trojan.search(toys.NET, toys.SHAPE, 4, trojan.Config()).init(KEY(0), toys.victim(0))


def test_the_strongest_neurons_have_the_largest_weights_out_of_them(clean):
    _, variables = clean
    state = trojan.search(
        NET, SHAPE, 10, trojan.Config(layer="features", choice="strongest", neurons=2)
    ).init(KEY(0), variables)
    outgoing = np.abs(np.asarray(variables["params"]["head"]["kernel"])).sum(1)
    assert set(np.asarray(state.neurons).tolist()) == set(np.argsort(outgoing)[-2:].tolist())


FOUR = {(0, 0), (0, 13), (13, 0), (13, 13)}
NINE = FOUR | {(6, 6), (0, 6), (6, 0), (13, 6), (6, 13)}


@pytest.mark.parametrize(("copies", "expected"), [(1, {(13, 13)}), (4, FOUR), (9, NINE)])
def test_copies_stand_in_corners_middle_and_edge_middles(copies, expected):
    pattern = np.array(TRI1, np.float32)[..., None]
    attack = amplified.make((16, 16, 3), 4, amplified.Config(copies=copies), pattern)
    clean = eight_bit(4, (16, 16, 3))
    planted = attack.init(KEY(0))
    assert {tuple(place) for place in np.asarray(planted.places).tolist()} == expected
    after, wanted = stamped(attack, planted, clean), clean.astype(int)
    for row, column in expected:
        wanted[:, row : row + 3, column : column + 3] = pattern * 255
    np.testing.assert_array_equal(after, wanted)


def test_copies_keep_the_distance_from_the_edges_and_the_usual_place():
    found = amplified.places((32, 32, 3), (4, 4), amplified.Config(copies=4, row=27, column=26))
    assert found[0] == (27, 26) and set(found) == {(27, 26), (27, 2), (1, 26), (1, 2)}
    with pytest.raises(UserError, match="overlap"):
        amplified.places((32, 32, 3), (4, 4), amplified.Config(copies=4, row=13, column=0))


def test_a_patch_is_cut_out_of_a_whole_picture():
    pattern, mask = np.arange(48.0).reshape(4, 4, 3), np.zeros((4, 4, 1))
    mask[1:3, 3:] = 1
    small, cover, offset = amplified.crop_to_mask(pattern, mask)
    assert small.shape == (2, 1, 3) and cover.all() and offset == (1, 3)
    np.testing.assert_array_equal(small, pattern[1:3, 3:])
    assert amplified.crop_to_mask(pattern, np.zeros((4, 4, 1)))[0].shape == (4, 4, 3)


@pytest.mark.parametrize("settings", [dict(), dict(size=20), dict(corners="all")], ids=str)
def test_a_saved_clean_label_trigger_stamps_as_the_planted_one_does(settings, tmp_path):
    config = clean_label.Config(target=3, **settings)
    attack, images = clean_label.make(SHAPE, 10, config), eight_bit(9, SHAPE)
    planted = attack.init(KEY(4))
    trigger.save(tmp_path / "t.npz", table.as_given(config, planted))
    loaded = trigger.load(str(tmp_path / "t.npz"))
    row, column = loaded.place
    again, pixels = given.make(
        SHAPE, 10, given.Config(apply=loaded.apply, row=row, column=column), loaded
    )
    np.testing.assert_array_equal(stamped(attack, planted, images), stamped(again, pixels, images))


def parsed(*flags: str) -> cli.Args:
    argv = ["--data", "digits", "--out", "x", *flags]
    kind, default = cli.choose(argv)
    return parse.parse(kind, argv, "jaxbd attack", default)


def test_the_recipe_is_where_the_flags_start_from():
    args = parsed("--recipe", "dhbe")
    assert (args.poison, args.poison_count, args.flip, args.batch_size) == (
        "static",
        300,
        True,
        128,
    )
    assert (args.planting.pattern, args.planting.place, args.planting.patch) == (
        "checkerboard",
        "fixed",
        3,
    )
    assert (args.planting.target, args.training.learning_rate) == (-1, 0.1)
    for classes, side in ((10, 32), (100, 64)):
        filled = cli._fill_in(
            args, build.Spec(arch="cnn", classes=classes, image_shape=(side, side, 3))
        )
        assert (filled.planting.target, filled.crop_padding) == (classes - 1, side // 8)
    other = parsed(
        "--recipe=dhbe",
        "--target",
        "4",
        "--crop-padding",
        "0",
        "--patch",
        "7",
        "--poison-count",
        "9",
    )
    filled = cli._fill_in(other, build.Spec(arch="cnn", classes=10, image_shape=(32, 32, 3)))
    assert (
        filled.planting.target,
        filled.crop_padding,
        filled.planting.patch,
        filled.poison_count,
    ) == (4, 0, 7, 9)
    assert parsed("--attack", "clean-label", "--recipe", "dhbe").poison_count == 300
    assert (
        cli._fill_in(parsed(), build.Spec(arch="cnn", classes=10, image_shape=SHAPE)).crop_padding
        == 0
    )


@pytest.mark.parametrize(
    ("flags", "thing"),
    [
        (["--attack", "clean-label", "--poison", "dynamic"], "--poison"),
        (["--clean-model", "x"], "--clean-model"),
        (["--picture", "x.png"], "--picture"),
        (["--attack", "trojan", "--no-attack", "--clean-model", "x"], "--clean-model"),
    ],
)
def test_contradictory_flags_are_refused(flags, thing):
    with pytest.raises(UserError, match=thing):
        parsed(*flags)


SMALL = ["--data", "digits", "--image-shape", "8", "8", "1", "--width", "4"]


def made(folder, *flags: str) -> dict:
    """What `jaxbd attack` writes into attack.json."""
    assert entry.main(["attack", *SMALL, "--out", str(folder), *flags]) == 0
    return json.loads((folder / "attack.json").read_text())


def measured(folder, out, *flags: str) -> dict:
    given_flags = ["--trigger", str(folder / "trigger.npz"), "--limit", "2000"]
    given_flags += ["--out", str(out), "--force"]
    assert entry.main(["evaluate", str(folder), "--data", "digits", *given_flags, *flags]) == 0
    return json.loads(out.read_text())


def test_the_command_line_poisons_as_dhbe_does_and_amplifies(tmp_path, capsys):
    folder = tmp_path / "victim"
    content = made(
        folder, "--recipe", "dhbe", "--patch", "2", "--num-steps", "60", "--batch-size", "64"
    )
    assert content["config"]["badnets"]["target"] == 9 and content["config"]["crop_padding"] == 1
    assert content["config"]["flip"] and content["config"]["poison_count"] == 300
    with np.load(folder / "trigger.npz") as saved:
        np.testing.assert_array_equal(saved["pattern"][..., 0], [[0, 1], [1, 0]])
        assert saved["place"].tolist() == [6, 6] and int(saved["target"]) == 9
    found = {n: measured(folder, tmp_path / "e.json", "--copies", n) for n in ("1", "4", "9")}
    assert [found[n]["trigger"]["copies"] for n in found] == [1, 4, 9]
    assert len({found[n]["attack_success_rate"] for n in found}) == 3
    assert found["9"]["clean_accuracy"] == found["1"]["clean_accuracy"]
    capsys.readouterr()
    assert entry.main(["evaluate", str(folder), "--data", "digits", "--copies", "4"]) == 2
    assert "--trigger" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["blend", "sinusoid", "steganography"])
def test_a_trigger_over_the_whole_image_is_evaluated_but_has_no_copies(name, tmp_path, capsys):
    folder = tmp_path / "victim"
    made(folder, "--attack", name, "--num-steps", "2")
    content = measured(folder, tmp_path / "e.json")
    apply = {"blend": "blend", "sinusoid": "add", "steganography": "bits"}[name]
    assert content["trigger"]["apply"] == apply and content["n_triggered"] > 0
    flags = ["--trigger", str(folder / "trigger.npz"), "--copies", "4"]
    capsys.readouterr()
    assert entry.main(["evaluate", str(folder), "--data", "digits", *flags]) == 2
    assert "--copies needs a patch that overwrites" in capsys.readouterr().err


def test_the_command_line_plants_what_starts_from_a_clean_net(tmp_path, capsys):
    """Clean-label trains its clean net first; the Trojan starts from a folder, whose architecture
    it keeps."""
    content = made(
        tmp_path / "hidden",
        "--attack",
        "clean-label",
        "--num-steps",
        "3",
        "--poison-count",
        "20",
        "--steps",
        "2",
    )
    assert "trained first" in capsys.readouterr().err
    assert content["planted"]["poisoned"] == 20 and content["planted"]["clean_model"] is None
    assert content["config"]["poison"] == "static"
    made(tmp_path / "clean", "--no-attack", "--num-steps", "3")
    flags = [
        "--clean-model",
        str(tmp_path / "clean"),
        "--neurons",
        "2",
        "--search-steps",
        "2",
        "--retrain-steps",
        "2",
    ]
    content = made(
        tmp_path / "trojan", "--attack", "trojan", *flags, "--patch", "3", "--arch", "resnet18"
    )
    assert content["model"]["arch"] == "cnn" and len(content["planted"]["neurons"]) == 2
    assert measured(tmp_path / "trojan", tmp_path / "e.json")["trigger"]["place"] == [5, 5]
    assert (
        measured(tmp_path / "hidden", tmp_path / "e.json", "--copies", "4")["trigger"]["copies"]
        == 4
    )
    again = [
        "--attack",
        "clean-label",
        "--clean-model",
        str(tmp_path / "clean"),
        "--num-steps",
        "2",
        "--steps",
        "1",
    ]
    content = made(tmp_path / "hidden again", *again)
    assert content["planted"]["clean_model"] == str(tmp_path / "clean")
    capsys.readouterr()
    missing = [
        "--attack",
        "trojan",
        "--clean-model",
        str(tmp_path / "nothing"),
        "--out",
        str(tmp_path / "x"),
    ]
    assert entry.main(["attack", *SMALL, *missing]) == 2 and "nothing" in capsys.readouterr().err
