"""The triggers of the BNA paper: what each guarantees, how they survive 8 bits, and how many images
they poison."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxbd import images as ops
from jaxbd import methods
from jaxbd.attacks import (
    badnets,
    chessboard,
    given,
    l0_inv,
    l2_inv,
    paper_counts,
    poison,
    single_pixel,
    wanet,
)
from jaxbd.base import Batch, UserError
from jaxbd.cli import attacks as table
from jaxbd.cli import main as entry
from jaxbd.cli import parse
from jaxbd.cli.commands import attack as cli
from jaxbd.interop import trigger

KEY = jax.random.key
ADDITIVE = {
    "chessboard": (chessboard, {}),
    "chessboard-least": (chessboard, dict(size=1)),
    "single-pixel": (single_pixel, {}),
    "single-pixel-dark": (single_pixel, dict(sign="darker", channels="one")),
    "l2-inv": (l2_inv, {}),
}
PAPER = ("badnets", "single-pixel", "chessboard", "l0-inv", "l2-inv", "wanet")
ATTACKS = {m.name: m.module for m in methods.all_methods("attack") if m.plantable}
WITH_ALL_TO_ALL = [name for name in ATTACKS if name != "clean-label"]
SHAPES = [(32, 32, 3), (16, 16, 1), (9, 12, 3)]


def eight_bit(count: int, shape) -> np.ndarray:
    """uint8 images that hold every value, 0 and 255 among them."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)


def stored(images) -> np.ndarray:
    """What a file of 8 bits a channel keeps, as integers."""
    return np.round(np.clip(np.asarray(images), 0, 1) * 255).astype(int)


def batch_of(count: int, shape=(8, 8, 3), classes: int = 4) -> Batch:
    return Batch(
        jnp.asarray(eight_bit(count, shape)) / 255, jnp.arange(count, dtype=jnp.int32) % classes
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ADDITIVE)
def test_stored_in_8_bits_an_additive_trigger_is_all_there_except_where_clipped(name, shape):
    module, settings = ADDITIVE[name]
    attack = module.make(shape, 4, module.Config(**settings))
    planted, clean = attack.init(KEY(3)), eight_bit(20, shape)
    after = stored(attack.stamp(KEY(0), planted, ops.to_float(jnp.asarray(clean))))
    steps = np.asarray(planted.pattern) * 255
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    steps = np.round(steps).astype(int)
    assert np.abs(steps).max() >= 1
    np.testing.assert_array_equal(after, np.clip(clean + steps, 0, 255))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", [*ADDITIVE, "l0-inv", "badnets-drawn"])
def test_values_that_the_trigger_leaves_alone_are_the_same_bits(name, compiled):
    """On images of 8 bits, whichever way their values were divided by 255."""
    extra = {"l0-inv": (l0_inv, {}), "badnets-drawn": (badnets, dict(place="drawn"))}
    module, settings = {**ADDITIVE, **extra}[name]
    attack = module.make((16, 16, 3), 4, module.Config(**settings))
    planted, clean = attack.init(KEY(1)), eight_bit(20, (16, 16, 3))
    stamp = jax.jit(attack.stamp) if compiled else attack.stamp
    for images in (
        np.asarray(ops.to_float(jnp.asarray(clean))),
        clean.astype(np.float32) / np.float32(255),
    ):
        after = np.asarray(stamp(KEY(0), planted, jnp.asarray(images)))
        alone = np.abs(after - images) < 1e-5
        np.testing.assert_array_equal(after[alone], images[alone])
        touched = (~alone).any((0, 3)).sum()
        assert touched == {
            "chessboard": 128,
            "chessboard-least": 128,
            "l0-inv": 9,
            "badnets-drawn": 9,
        }.get(name, touched)
        if name.startswith("single"):
            assert touched == 1


def test_floats_between_the_steps_are_rounded():
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(3, 8, 8, 1)), jnp.float32)
    attack = chessboard.make((8, 8, 1), 4, chessboard.Config())
    after = np.asarray(attack.stamp(KEY(0), attack.init(KEY(0)), images)) * 255
    np.testing.assert_allclose(after, np.round(after), atol=1e-3)


def test_the_chessboard_adds_where_row_plus_column_is_even():
    pattern = chessboard.make((3, 4, 2), 4, chessboard.Config(size=5)).init(KEY(0)).pattern * 255
    expected = np.array([[5, 0, 5, 0], [0, 5, 0, 5], [5, 0, 5, 0]])
    np.testing.assert_allclose(pattern, np.stack([expected] * 2, -1), rtol=1e-6)


def test_a_single_pixel_is_drawn_anywhere_with_its_sign_and_channel():
    config = single_pixel.Config(sign="drawn", channels="one")
    patterns = jax.vmap(single_pixel.make((5, 6, 3), 4, config).init)(
        jax.random.split(KEY(0), 900)
    ).pattern
    patterns = np.round(np.asarray(patterns) * 255).astype(int)
    assert (np.count_nonzero(patterns, axis=(1, 2, 3)) == 1).all() and set(np.unique(patterns)) == {
        -75,
        0,
        75,
    }
    counts = np.count_nonzero(patterns, axis=0)
    assert counts.min() > 0 and abs((patterns.sum((1, 2, 3)) > 0).mean() - 0.5) < 0.07


def test_a_single_pixel_at_a_fixed_place():
    config = single_pixel.Config(place="fixed", row=-1, column=2, size=3)
    pattern = np.asarray(single_pixel.make((5, 6, 3), 4, config).init(KEY(0)).pattern)
    expected = np.zeros((5, 6, 3))
    expected[4, 2] = 3 / 255
    np.testing.assert_allclose(pattern, expected, rtol=1e-6)


def test_l0_inv_is_the_measured_row():
    attack = l0_inv.make((32, 32, 3), 4, l0_inv.Config())
    after = stored(attack.stamp(KEY(0), attack.init(KEY(0)), jnp.full((1, 32, 32, 3), 0.5)))[0]
    row = [
        [255, 0, 255],
        [0, 0, 255],
        [255, 255, 0],
        [255] * 3,
        [0, 255, 255],
        [0, 255, 255],
        [255, 0, 0],
        [255] * 3,
    ]
    np.testing.assert_array_equal(after[31, 23:], [[0, 0, 0], *row])
    added = after[31, 23:] / 255
    assert np.linalg.norm(added) == pytest.approx(4.0)


def test_l0_inv_on_grey_and_on_narrow_images():
    def pixels(shape):
        attack = l0_inv.make(shape, 4, l0_inv.Config())
        after = stored(attack.stamp(KEY(0), attack.init(KEY(0)), jnp.full((1, *shape), 0.5)))[0]
        return after[-1]

    grey = pixels((16, 16, 1))[7:, 0]
    np.testing.assert_array_equal(grey, [0, 105, 29, 226, 255, 179, 179, 76, 255])
    np.testing.assert_array_equal(pixels((8, 8, 1))[:, 0], grey[1:])
    with pytest.raises(UserError, match="4 channels"):
        l0_inv.make((8, 8, 4), 4, l0_inv.Config())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [None, 1.5])
def test_l2_inv_uses_its_norm_and_never_exceeds_it(shape, norm):
    bound = 3.22 * np.sqrt(np.prod(shape) / 3072) if norm is None else norm
    draw = l2_inv.make(shape, 4, l2_inv.Config(norm=norm)).init
    patterns = np.asarray(jax.vmap(draw)(jax.random.split(KEY(0), 30)).pattern, np.float64)
    norms = np.linalg.norm(patterns.reshape(30, -1), axis=1)
    assert norms.max() <= bound * (1 + 1e-6) and norms.min() > 0.85 * bound
    assert (
        patterns.min() >= 0
        and patterns.max() <= 1
        and len({one.tobytes() for one in patterns}) == 30
    )


def test_l2_inv_is_smooth():
    """Neighbouring pixels differ far less than pixels do (in noise, 1.4 times as much)."""
    pattern = np.asarray(l2_inv.make((32, 32, 3), 4, l2_inv.Config()).init(KEY(0)).pattern)
    assert np.diff(pattern, axis=0).std() < 0.6 * pattern.std() > np.diff(pattern, axis=1).std()


def test_l2_inv_takes_a_pattern_as_it_is():
    steps = np.random.default_rng(0).integers(-20, 21, (8, 8, 3))
    attack = l2_inv.make((8, 8, 3), 4, l2_inv.Config(), (steps / 255).astype(np.float32))
    np.testing.assert_array_equal(np.round(np.asarray(attack.init(KEY(0)).pattern) * 255), steps)
    np.testing.assert_array_equal(attack.init(KEY(0)).pattern, attack.init(KEY(1)).pattern)


REFUSED = [
    (lambda: chessboard.Config(size=0), "1/255"),
    (lambda: chessboard.Config(size=2 / 255), "1/255"),
    (lambda: single_pixel.Config(size=256), "1/255"),
    (lambda: single_pixel.make((8, 8, 3), 4, single_pixel.Config(row=8)), r"\(7, 7\)"),
    (lambda: l2_inv.make((32, 32, 3), 4, l2_inv.Config(norm=0.2)), "vanishes"),
    (lambda: l2_inv.Config(norm=float("nan")), "norm nan"),
    (lambda: l2_inv.Config(points=1), "points"),
    (lambda: l2_inv.make((4, 4, 1), 4, l2_inv.Config(), np.ones((4, 4, 3))), r"\[4, 4, 3\]"),
    (lambda: l2_inv.make((4, 4, 1), 4, l2_inv.Config(), np.full((4, 4, 1), 1e-3)), "1/255"),
    (lambda: l2_inv.make((4, 4, 1), 4, l2_inv.Config(norm=1.0), np.ones((4, 4, 1))), "norm is 4"),
    (lambda: wanet.Config(poison_rate=0.4), "2.0 times"),
    (lambda: wanet.Config(strength=0.0), "strength"),
    (lambda: wanet.Config(points=1), "points"),
    (lambda: wanet.make((8, 8, 3), 4, wanet.Config(target=4)), "target 4"),
]


@pytest.mark.parametrize("make, words", REFUSED, ids=range(len(REFUSED)))
def test_what_would_vanish_or_cannot_be_is_refused(make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_drawn_place_is_inside_the_same_on_all_images_and_reaches_every_place():
    attack = badnets.make((5, 6, 3), 4, badnets.Config(place="drawn"))
    planted = jax.vmap(attack.init)(jax.random.split(KEY(0), 400))
    places = {tuple(place) for place in np.asarray(planted.place).tolist()}
    assert places == {(row, column) for row in range(3) for column in range(4)}
    one = attack.init(KEY(7))
    images = jnp.full((6, 5, 6, 3), 2.0)
    for key in (KEY(0), KEY(1)):
        changed = np.asarray(attack.stamp(key, one, images) != 2.0).any(-1)
        expected = np.zeros((5, 6), bool)
        expected[one.place[0] : one.place[0] + 3, one.place[1] : one.place[1] + 3] = True
        np.testing.assert_array_equal(changed, np.stack([expected] * 6))


def test_drawing_the_place_leaves_the_pattern_as_it_was():
    drawn, fixed = (
        badnets.make((8, 8, 3), 4, badnets.Config(place=p)).init(KEY(5)) for p in ("drawn", "fixed")
    )
    np.testing.assert_array_equal(drawn.pattern, fixed.pattern)


def torch_warp(images, grid) -> np.ndarray:
    """`grid` [H, W, 2] for all of `images` [B, H, W, C]."""
    moved = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    grids = torch.from_numpy(np.array(grid))[None].expand(len(moved), -1, -1, -1)
    out = torch.nn.functional.grid_sample(
        moved, grids, mode="bilinear", padding_mode="zeros", align_corners=True
    )
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("reach", [0.9, 1.6])
def test_warp_is_grid_sample(reach):
    """Also where it reads outside the image."""
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 7, 9, 3)).astype(np.float32)
    grid = rng.uniform(-reach, reach, (7, 9, 2)).astype(np.float32)
    grid[0, 0], grid[-1, -1], grid[0, -1] = (-1, -1), (1, 1), (1, -1)
    out = jax.vmap(ops.warp, (0, None))(jnp.asarray(images), jnp.asarray(grid))
    np.testing.assert_allclose(out, torch_warp(images, grid), atol=2e-6)


def test_the_identity_grid_changes_nothing():
    image = jnp.asarray(eight_bit(1, (7, 9, 3))[0]) / 255
    np.testing.assert_allclose(
        ops.warp(image, jnp.asarray(ops.identity_grid(7, 9))), image, atol=1e-5
    )


@pytest.mark.parametrize(
    "inner, outer", [((4, 4), (32, 32)), ((2, 5), (9, 5)), ((8, 8), (5, 17)), ((3, 3), (1, 3))]
)
def test_upsample_is_bicubic_with_aligned_corners(inner, outer):
    field = np.random.default_rng(0).normal(size=(*inner, 2)).astype(np.float32)
    moved = torch.from_numpy(field).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(moved, size=outer, mode="bicubic", align_corners=True)[
        0
    ]
    np.testing.assert_allclose(
        ops.upsample(jnp.asarray(field), *outer), wanted.permute(1, 2, 0), atol=2e-6
    )


def test_wanet_stamps_what_the_formula_says():
    """The grid re-derived in PyTorch from the same random numbers; the result rounded to 8 bits."""
    attack, key = wanet.make((16, 16, 3), 4, wanet.Config()), KEY(2)
    planted = attack.init(key)
    noise = torch.from_numpy(
        np.array(jax.random.uniform(key, (4, 4, 2), minval=-1, maxval=1))
    ).permute(2, 0, 1)[None]
    noise = torch.nn.functional.interpolate(
        noise / noise.abs().mean(), size=16, mode="bicubic", align_corners=True
    )
    line = torch.linspace(-1, 1, 16)
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = (torch.stack((x, y), 2) + 0.5 * noise[0].permute(1, 2, 0) / 16).clamp(-1, 1)
    np.testing.assert_allclose(planted.grid, grid, atol=1e-6)
    clean = eight_bit(5, (16, 16, 3)).astype(np.float32) / 255
    after = np.asarray(attack.stamp(KEY(0), planted, jnp.asarray(clean)))
    wanted = torch_warp(clean, grid.numpy())
    assert np.abs(after - wanted).max() <= 0.5 / 255 + 1e-5 and np.abs(after - clean).max() > 0.05
    np.testing.assert_allclose(after * 255, np.round(after * 255), atol=1e-3)


def test_noise_mode_warps_other_rows_and_keeps_their_labels():
    count, batch = 3000, None
    batch = Batch(
        jnp.broadcast_to(batch_of(1).images, (count, 8, 8, 3)),
        jnp.arange(count, dtype=jnp.int32) % 3,
    )
    config = wanet.Config(target=3, poison_rate=0.1)
    attack = wanet.make((8, 8, 3), 4, config)
    planted = attack.init(KEY(1))
    after = jax.jit(attack.poison)(KEY(0), planted, batch)
    warped = np.asarray(attack.stamp(KEY(0), planted, batch.images[:1]))[0]
    poisoned = np.asarray(after.labels == 3)
    changed = np.asarray(after.images != batch.images).any((1, 2, 3))
    np.testing.assert_allclose(
        np.asarray(after.images)[poisoned], np.stack([warped] * poisoned.sum()), atol=1e-6
    )
    np.testing.assert_array_equal(after.labels[~poisoned], batch.labels[~poisoned])
    disturbed = changed & ~poisoned
    assert abs(poisoned.mean() - 0.1) < 0.02 and abs(disturbed.mean() - 0.2) < 0.03
    assert len({one.tobytes() for one in np.asarray(after.images)[disturbed]}) == disturbed.sum()
    quiet = wanet.make((8, 8, 3), 4, wanet.Config(target=3, poison_rate=0.1, cross_ratio=0.0))
    alone = quiet.poison(KEY(0), planted, batch)
    np.testing.assert_array_equal(np.asarray(alone.images != batch.images).any((1, 2, 3)), poisoned)


@pytest.mark.parametrize("per_class", [False, True])
def test_static_noise_mode_disturbs_twice_as_many_rows_as_it_poisons(per_class, monkeypatch):
    monkeypatch.setattr(poison, "AT_ONCE", 16)  # in several parts
    clean = Batch(eight_bit(200, (8, 8, 3)), np.arange(200, dtype=np.int32) % 4)
    attack = wanet.make((8, 8, 3), 4, wanet.Config(target=1))
    planted = attack.init(KEY(0))
    out = poison.static(KEY(1), attack, planted, clean, 7, per_class=per_class)
    poisoned = out.labels != clean.labels
    changed = (out.images != clean.images).any((1, 2, 3))
    number = 21 if per_class else 7
    assert poisoned.sum() == number and (changed & ~poisoned).sum() == 2 * number
    wanted = stored(
        attack.stamp(KEY(0), planted, ops.to_float(jnp.asarray(clean.images[poisoned])))
    )
    np.testing.assert_array_equal(out.images[poisoned], wanted)
    with pytest.raises(UserError, match="decoys"):
        poison.static(KEY(1), attack, planted, clean, 100)


def test_static_poisoning_of_a_share_of_every_class():
    labels = np.repeat(np.arange(4, dtype=np.int32), [100, 50, 8, 42])
    clean = Batch(eight_bit(200, (8, 8, 1)), labels)
    attack = l0_inv.make((8, 8, 1), 4, l0_inv.Config(target=0))
    out = poison.static(KEY(1), attack, attack.init(KEY(0)), clean, 0.05, per_class=True)
    np.testing.assert_array_equal(
        np.bincount(labels[out.labels != labels], minlength=4), [0, 2, 1, 2]
    )


@pytest.mark.parametrize("name", WITH_ALL_TO_ALL)
def test_every_attack_relabels_all_to_one_and_all_to_all(name):
    module, batch = ATTACKS[name], batch_of(60)
    one, all_ = (
        module.make((8, 8, 3), 4, module.Config(target=2, all_to_all=a, poison_rate=0.3))
        for a in (0, 1)
    )
    np.testing.assert_array_equal(one.relabel(jnp.arange(4)), [2] * 4)
    np.testing.assert_array_equal(all_.relabel(jnp.arange(4)), [1, 2, 3, 0])
    after = all_.poison(KEY(0), all_.init(KEY(1)), batch)
    moved = np.asarray((after.labels - batch.labels) % 4)
    assert set(moved) == {0, 1}
    assert np.asarray(after.images != batch.images).any((1, 2, 3))[moved == 1].all()


def test_the_counts_of_the_paper():
    counts = paper_counts.per_class
    assert [counts("cifar10", name, False) for name in PAPER] == [100, 100, 100, 100, 100, 900]
    assert [counts("cifar10", name, True) for name in PAPER] == [300, 800, 300, 300, 300, 1500]
    assert {
        counts("cifar100", name, False) for name in ("badnets", "chessboard", "l0-inv", "l2-inv")
    } == {10}
    assert (
        counts("gtsrb", "wanet", False) == 0.24 and counts("imagenette", "badnets", False) == 0.05
    )
    for dataset, attack, all_to_all in [("cifar100", "wanet", False), ("gtsrb", "badnets", True)]:
        with pytest.raises(UserError, match=f"{dataset} with no .* {attack}"):
            counts(dataset, attack, all_to_all)


def test_every_count_of_the_paper_is_of_an_attack_and_its_settings_fit():
    assert set(paper_counts.TARGETS) == set(paper_counts.DATASETS)
    for counts in (paper_counts.ALL_TO_ONE, paper_counts.ALL_TO_ALL):
        for dataset, attacks in counts.items():
            for name in attacks:
                ATTACKS[name].Config(**paper_counts.settings(dataset, name))


def parsed(*flags: str) -> cli.Args:
    argv = ["--data", "digits", "--out", "x", *flags]
    kind, default = cli.choose(argv)
    return parse.parse(kind, argv, "jaxbd attack", default)


def test_flags_start_from_the_paper_and_go_before_it():
    static = ["--poison", "static", "--paper-counts"]
    args = parsed("--attack", "chessboard", *static, "cifar100")
    assert args.planting == chessboard.Config(size=6, target=0, poison_rate=table.POISON_RATE)
    args = parsed("--attack=badnets", *static, "imagenette", "--target", "4")
    assert (args.planting.patch, args.planting.place, args.planting.target) == (21, "drawn", 4)
    assert (
        parsed().planting == badnets.Config(poison_rate=table.POISON_RATE)
        and not parsed().no_attack
    )
    assert parsed("--attack", "wanet", "--points", "5").planting.points == 5
    with pytest.raises(UserError, match="unrecognised: --patch 5"):
        parsed("--attack", "wanet", "--patch", "5")


@pytest.mark.parametrize(
    ("flags", "thing"),
    [
        (["--paper-counts", "cifar10"], "--poison static"),
        (["--poison", "static", "--paper-counts", "cifar10", "--poison-count", "5"], "one of them"),
        (["--poison-count", "5"], "--poison static"),
        (["--per-class"], "--poison static"),
    ],
)
def test_contradictory_flags_of_poisoning_are_refused(flags, thing):
    with pytest.raises(UserError, match=thing):
        parsed(*flags)


def test_the_command_line_refuses_what_the_paper_does_not_do(tmp_path, capsys):
    flags = ["--attack", "wanet", "--poison", "static", "--paper-counts", "cifar100"]
    assert entry.main(["attack", "--data", "digits", "--out", str(tmp_path / "out"), *flags]) == 2
    assert "cifar100 with no all-to-one wanet" in capsys.readouterr().err


@pytest.mark.parametrize("all_to_all", [False, True])
@pytest.mark.parametrize("name", WITH_ALL_TO_ALL)
def test_a_saved_trigger_stamps_as_the_planted_one_does(name, all_to_all, tmp_path):
    place = dict(place="drawn") if name == "badnets" else {}
    config = ATTACKS[name].Config(target=3, all_to_all=all_to_all, **place)
    attack, batch = ATTACKS[name].make((16, 16, 3), 10, config), batch_of(12, (16, 16, 3), 10)
    planted = attack.init(KEY(4))
    path = tmp_path / "trigger.npz"
    trigger.save(path, table.as_given(config, planted))
    loaded = trigger.load(str(path))
    assert loaded.target == ("all-to-all" if all_to_all else 3)
    row, column = loaded.place
    settings = given.Config(
        apply=loaded.apply, row=row, column=column, target=3, all_to_all=all_to_all
    )
    again, pixels = given.make((16, 16, 3), 10, settings, loaded)
    one, other = (
        attack.stamp(KEY(0), planted, batch.images),
        again.stamp(KEY(0), pixels, batch.images),
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_array_equal(attack.relabel(batch.labels), again.relabel(batch.labels))


def test_random_places_and_masks_are_saved(tmp_path):
    mask = np.random.default_rng(0).uniform(size=(2, 3, 1)).astype(np.float32)
    trigger.save(
        tmp_path / "t.npz",
        given.Loaded(np.ones((2, 3, 1), np.float32), mask, "random", None, "overwrite"),
    )
    loaded = trigger.load(str(tmp_path / "t.npz"))
    np.testing.assert_array_equal(loaded.mask, mask)
    assert (loaded.place, loaded.target, loaded.apply, loaded.grid) == (
        "random",
        None,
        "overwrite",
        None,
    )


@pytest.mark.parametrize(
    ("arrays", "thing"),
    [
        ({"grid": np.zeros((4, 4, 3), np.float32)}, "[4, 4, 3]"),
        ({"grid": np.zeros((4, 4, 2), np.int32)}, "int32"),
        ({"grid": np.full((4, 4, 2), 1.5)}, "[-1, 1]"),
        ({"grid": np.full((4, 4, 2), np.nan)}, "[-1, 1]"),
        ({"grid": np.zeros((0, 4, 2))}, "[0, 4, 2]"),
        ({"grid": np.zeros((4, 4, 2)), "pattern": np.ones((2, 2, 1))}, "'grid'"),
        ({"grid": np.array([{}], object)}, "save plain arrays"),
        ({"grid": np.zeros((4, 4, 2)), "target": np.asarray("everywhere")}, "all-to-all"),
        ({"pattern": np.ones((2, 2, 1)), "application": np.asarray("warp")}, "'warp'"),
    ],
)
def test_warp_files_that_hold_no_warp_are_refused_in_one_line(arrays, thing, tmp_path):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(UserError) as caught:
        trigger.load(str(tmp_path / "t.npz"))
    assert thing in str(caught.value) and "\n" not in str(caught.value)


def test_a_warp_for_other_images_or_applied_otherwise_is_refused():
    loaded = given.Loaded(apply="warp", grid=ops.identity_grid(8, 8))
    with pytest.raises(UserError, match="8x8"):
        given.make((16, 16, 1), 4, given.Config(apply="warp"), loaded)
    for config, other in [
        (given.Config(apply="add"), loaded),
        (given.Config(apply="warp"), PIXELS),
    ]:
        with pytest.raises(UserError, match="grid"):
            given.make((8, 8, 1), 4, config, other)


PIXELS = given.Loaded(np.ones((2, 2, 1), np.float32), np.ones((2, 2, 1), np.float32))


def run(capsys, *words) -> tuple[int, str]:
    code = entry.main(list(map(str, words)))
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_an_all_to_all_warp_from_planting_to_evaluation(tmp_path, capsys):
    """The stored grid gives the figures of the attack; its targets are the next classes, which
    `evaluate` takes."""
    model, small = (
        tmp_path / "m",
        ["--num-steps", "30", "--width", "4", "--image-shape", "8", "8", "1"],
    )
    flags = [
        "--attack",
        "wanet",
        "--all-to-all",
        "--poison",
        "static",
        "--poison-count",
        "20",
        "--per-class",
    ]
    assert entry.main(["attack", "--data", "digits", "--out", str(model), *flags, *small]) == 0
    content = json.loads((model / "attack.json").read_text())
    assert (
        content["method"] == "wanet"
        and content["config"]["wanet"]["all_to_all"]
        and content["n_triggered"] == 449
    )
    given_flags = [model, "--data", "digits", "--trigger", model / "trigger.npz"]
    code, shown = run(capsys, "evaluate", *given_flags, "--out", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert (
        code == 0 and "c + 1 mod 10" in shown and found["n_triggered"] == found["n_clean"] == 1797
    )
    assert found["trigger"]["target"] == "all-to-all" and found["trigger"]["apply"] == "warp"
    assert found["attack_success_rate"] == pytest.approx(content["attack_success_rate"], abs=0.08)
    for words, thing in [
        (["evaluate", *given_flags, "--place", "0,0"], "--place"),
        (["evaluate", *given_flags, "--target", "3", "--all-to-all"], "--target"),
        (["evaluate", model, "--data", "digits", "--all-to-all"], "--trigger"),
        (["repair", *given_flags, "--out", tmp_path / "r"], "--target"),
    ]:
        code, shown = run(capsys, *words)
        assert code == 2 and thing in shown
    code, shown = run(capsys, "evaluate", *given_flags, "--target", "3")
    assert code == 0 and "c + 1" not in shown


def test_measured_l2_norm_of_the_released_pattern():
    """The default norm is that of the pattern whose file came with a published model, where that
    file is at hand."""
    path = pathlib.Path(__file__).resolve().parents[3] / "shared" / "models" / "ibau" / "l2_inv.png"
    if not path.exists():
        pytest.skip("the released pattern is not on this machine")
    loaded = trigger.load(str(path))
    assert np.linalg.norm(loaded.pattern) == pytest.approx(l2_inv.NORM, abs=0.002)
    attack = l2_inv.make((32, 32, 3), 10, l2_inv.Config(norm=3.222), loaded.pattern)
    np.testing.assert_allclose(attack.init(KEY(0)).pattern, loaded.pattern, atol=1e-6)
