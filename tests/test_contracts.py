"""What every method promises, tested on every method of the table: see `jaxbd.testing`."""

import pathlib

import jax
import numpy as np
import pytest

import jaxbd
from jaxbd import methods, testing
from jaxbd.attacks import (
    amplified,
    badnets,
    blend,
    chessboard,
    clean_label,
    given,
    l0_inv,
    l2_inv,
    latent,
    single_pixel,
    sinusoid,
    steganography,
    trojan,
    wanet,
)
from jaxbd.base import UserError
from jaxbd.inversion import margin, mesa, neural_cleanse, pixel, pt_red
from jaxbd.pipelines import pair_scan
from jaxbd.repairs import (
    anp,
    argd,
    bna,
    clip,
    dhbe,
    fine_pruning,
    finetune,
    ft_sam,
    ibau,
    mcr,
    nad,
    nc_unlearn,
    unlearn,
)
from jaxbd.training import supervised

SHAPE, NET = testing.IMAGE_SHAPE, testing.NET
SMALL = {"hidden": 16, "noise_dim": 8}
TINY = {"batch_size": 6, "width": 2, "noise_dim": 8, "trigger_size": 3}
CHECKERED = {"pattern": "checkerboard", "place": "fixed"}
INVERSE = {"pattern": "inverse-checkerboard", "patch": 5, "place": "fixed"}
SETTINGS = {
    ("attack", "badnets"): [
        badnets.Config(),
        badnets.Config(pattern="binary", patch=2),
        badnets.Config(**CHECKERED),
        badnets.Config(pattern="white", place="fixed", row=0, column=2),
        badnets.Config(pattern=170, target=3, poison_rate=0.5),
        badnets.Config(all_to_all=True, poison_rate=1.0),
        badnets.Config(place="drawn", poison_rate=0.5),
        badnets.Config(**INVERSE),
    ],
    ("attack", "blend"): [
        blend.Config(poison_rate=0.5),
        blend.Config(points=3, opacity=0.1, all_to_all=True),
    ],
    ("attack", "chessboard"): [chessboard.Config(poison_rate=0.5)],
    ("attack", "clean-label"): [
        clean_label.Config(),
        clean_label.Config(corners="all", size=32, target=2),
    ],
    ("attack", "l0-inv"): [l0_inv.Config(poison_rate=0.5)],
    ("attack", "l2-inv"): [
        l2_inv.Config(poison_rate=0.5),
        l2_inv.Config(norm=2.0, points=4, all_to_all=True),
    ],
    ("attack", "single-pixel"): [
        single_pixel.Config(poison_rate=0.5),
        single_pixel.Config(sign="drawn", channels="one", all_to_all=True),
    ],
    ("attack", "sinusoid"): [sinusoid.Config(poison_rate=0.5, frequency=2.0)],
    ("attack", "steganography"): [
        steganography.Config(poison_rate=0.5),
        steganography.Config(bits=3, all_to_all=True),
    ],
    ("attack", "trojan"): [trojan.Config(poison_rate=0.5)],
    ("attack", "wanet"): [
        wanet.Config(poison_rate=0.3),
        wanet.Config(cross_ratio=0.0, poison_rate=0.5, all_to_all=True),
    ],
    ("inversion", "mesa"): [
        mesa.Config(**SMALL),
        mesa.paper(**SMALL),
        mesa.Config(generator="conv", patch=6, **SMALL),
        mesa.Config(place="searched", **SMALL),
        mesa.Config(place="fixed", row=5, column=5, **SMALL),
    ],
    ("inversion", "pixel"): [
        pixel.Config(),
        pixel.Config(place="image", patch=2),
        pixel.Config(place="fixed", row=1),
    ],
    ("inversion", "neural-cleanse"): [neural_cleanse.Config(), neural_cleanse.for_pairs()],
    ("inversion", "pt-red"): [pt_red.Config(), pt_red.released()],
    ("repair", "argd"): [
        argd.Config(embedding_dim=4, weights=(0.1,)),
        argd.Config(embedding="learned", embedding_dim=4, flip=True),
    ],
    ("repair", "fine-pruning"): [
        fine_pruning.Config(ratio_step=0.25),
        fine_pruning.Config(ratio=0.5, schedule="steps", milestones=(0.5,), flip=True),
    ],
    ("repair", "ft-sam"): [
        ft_sam.Config(),
        ft_sam.Config(adaptive=False, schedule="waves", crop_padding=1),
    ],
    ("repair", "nad"): [
        nad.Config(weights=(1.0, 1.0)),
        nad.Config(weights=(1.0,), power=3.0, crop_padding=1),
    ],
    ("repair", "anp"): [
        anp.Config(points=3, batch_size=6),
        anp.paper(by="number", points=3, ascent_steps=2, batch_size=6),
    ],
    ("repair", "ibau"): [
        ibau.Config(rounds=1, fixed_points=2),
        ibau.paper(rounds=2, fixed_points=1, fixed_point_images=5),
    ],
    ("repair", "mcr"): [
        mcr.Config(points=3, batch_size=6),
        mcr.Config(other="suspect", points=4, batch_size=6),
    ],
    ("repair", "unlearn"): [
        unlearn.Config(stamp_rate=0.5),
        unlearn.Config(mixing="epoch", epoch_steps=1, weight_decay=5e-4),
    ],
    ("repair", "dhbe"): [
        dhbe.released(inner_steps=1, **TINY),
        dhbe.paper(**TINY, inner="scan", place="image"),
        dhbe.Config(pure=True, inner_steps=1, **TINY),
        dhbe.Config(average=0.5, inner_steps=1, **TINY),
    ],
    ("repair", "bna"): [
        bna.Config(),
        bna.paper(divergence="js", epochs=None, num_steps=420),
        bna.released(divergence="kl", epochs=None, num_steps=2),
    ],
}
"""Settings of the table's methods to check; those that are not here are checked with their
defaults. The first of a method are also run eagerly,
unless that takes minutes."""
OTHERWISE = {("attack", "amplified"), ("attack", "latent")}
"""Attacks that need more than images to be made; checked below."""
SLOW_EAGERLY = {("repair", "dhbe"), ("repair", "bna")}
"""Methods of which a step takes minutes without compilation."""
CASES = [
    pytest.param(
        method,
        config,
        number == 0 and (method.kind, method.name) not in SLOW_EAGERLY,
        id=f"{method.kind}-{method.name}" + f"-{number}" * (number > 0),
    )
    for method in methods.TABLE
    if (method.kind, method.name) not in OTHERWISE
    for number, config in enumerate(SETTINGS.get((method.kind, method.name), [None]))
]


@pytest.mark.parametrize("method, config, eagerly", CASES)
def test_a_method_keeps_its_contract(method, config, eagerly):
    testing.check_method(method.module, config, kind=method.kind, eagerly=eagerly)


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", sorted(SLOW_EAGERLY))
def test_a_method_gives_the_same_without_compilation(kind, name):
    config = SETTINGS[kind, name][0]
    testing.check_method(methods.find(kind, name).module, config, kind=kind, eagerly=True)


PATCH = np.full((2, 2, 3), 0.5, np.float32)
GRID = np.random.default_rng(0).uniform(-1, 1, (*SHAPE[:2], 2)).astype(np.float32)
LOADED = given.Loaded(np.full((2, 3, 3), 0.5, np.float32), np.full((2, 3, 1), 0.7, np.float32))


@pytest.mark.parametrize(
    "module, config, more",
    [
        (amplified, amplified.Config(poison_rate=0.5), PATCH),
        (amplified, amplified.Config(copies=9, all_to_all=True), PATCH),
        (given, given.Config(poison_rate=0.5), LOADED),
        (given, given.Config(apply="add", place="random", target=2), LOADED),
        (given, given.Config(apply="blend", row=2), LOADED),
        (given, given.Config(apply="bits", column=4), LOADED),
        (given, given.Config(apply="warp", all_to_all=True), given.Loaded(grid=GRID)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_attack_made_of_a_given_trigger_keeps_the_contract(module, config, more):
    made = module.make(SHAPE, 4, config, more)
    testing.check_config(config)
    testing.check_attack(made[0] if module is given else made)


@pytest.mark.parametrize(
    "config",
    [latent.Config(width=4), latent.Config(all_to_all=True, directions="unit", width=4)],
    ids=["same-label", "all-to-all"],
)
def test_the_adaptive_attack_keeps_the_contract(config):
    """A victim and its trigger generator, trained together."""
    trainer = latent.make(NET, latent.penultimate(NET), SHAPE, 4, config)

    def step(key, state, batch, variables):
        del variables
        new, info = trainer.step(key, state, batch)
        return new, (info, trainer.extract(new))

    testing.check_config(config)
    testing.check_steps(testing.Stepping(trainer.init, step), eagerly=not config.all_to_all)
    testing.check_attack(latent.attack(SHAPE, 4, config), eagerly=not config.all_to_all)


def test_the_search_for_a_trojan_keeps_the_contract():
    search = trojan.search(NET, SHAPE, 4, trojan.Config(neurons=3))

    def step(key, state, batch, variables):
        new, info = search.step(key, state, batch, variables)
        return new, (info, search.extract(new))

    init = lambda key, variables: search.init(key, variables)
    testing.check_steps(testing.Stepping(init, step))


@pytest.mark.parametrize(
    "config",
    [supervised.Config(), supervised.Config(optimiser="adam", schedule="steps")],
    ids=["sgd", "adam"],
)
def test_a_trainer_keeps_the_contract(config):
    trainer = supervised.make(NET, config)
    init = lambda key, variables: trainer.init(variables)
    step = lambda key, state, batch, _: trainer.step(key, state, batch)
    testing.check_config(config)
    testing.check_steps(testing.Stepping(init, step))


BAD = [
    (badnets.Config, dict(poison_rate=1.5)),
    (badnets.Config, dict(poison_rate=float("nan"))),
    (badnets.Config, dict(patch=0)),
    (badnets.Config, dict(pattern=512)),
    (badnets.Config, dict(pattern=-1)),
    (given.Config, dict(poison_rate=-0.1)),
    (chessboard.Config, dict(poison_rate=1.5)),
    (chessboard.Config, dict(size=0)),
    (single_pixel.Config, dict(size=0)),
    (l0_inv.Config, dict(poison_rate=-0.1)),
    (l2_inv.Config, dict(norm=0.0)),
    (l2_inv.Config, dict(points=1)),
    (wanet.Config, dict(cross_ratio=-1.0)),
    (wanet.Config, dict(poison_rate=0.5)),
    (wanet.Config, dict(strength=float("nan"))),
    (amplified.Config, dict(copies=5)),
    (blend.Config, dict(opacity=0.0)),
    (blend.Config, dict(points=1)),
    (sinusoid.Config, dict(size=0)),
    (sinusoid.Config, dict(period=float("nan"))),
    (steganography.Config, dict(bits=9)),
    (steganography.Config, dict(text="")),
    (clean_label.Config, dict(epsilon=0.0)),
    (clean_label.Config, dict(steps=0)),
    (clean_label.Config, dict(size=256)),
    (clean_label.Config, dict(pattern=512)),
    (clean_label.Config, dict(poison_rate=1.5)),
    (trojan.Config, dict(neurons=0)),
    (trojan.Config, dict(value=float("nan"))),
    (trojan.Config, dict(search_learning_rate=0.0)),
    (trojan.Config, dict(retrain_momentum=1.0)),
    (latent.Config, dict(epsilon=0.0)),
    (latent.Config, dict(second_epsilon=1.5)),
    (latent.Config, dict(stamped_weight=1.0)),
    (latent.Config, dict(latent_weight=float("nan"))),
    (latent.Config, dict(generator_learning_rate=0.0)),
    (latent.Config, dict(momentum=1.0)),
    (latent.Config, dict(first_steps=0)),
    (margin.Config, dict(learning_rate=0.0)),
    (margin.Config, dict(learning_rate=float("nan"))),
    (margin.Config, dict(stop_change=1.0)),
    (mesa.Config, dict(patch=0)),
    (mesa.Config, dict(noise_dim=63)),
    (mesa.Config, dict(noise_dim=0)),
    (mesa.Config, dict(hidden=0)),
    (mesa.Config, dict(generator="conv", patch=3)),
    (mesa.Config, dict(generator="conv", patch=9)),
    (mesa.Config, dict(generator="conv", patch=20)),
    (mesa.Config, dict(entropy_weight=-0.1)),
    (mesa.Config, dict(entropy_weight=float("nan"))),
    (mesa.Config, dict(trigger_noise=-1.0)),
    (mesa.Config, dict(learning_rate=0.0)),
    (mesa.Config, dict(debias_rate=2.0)),
    (mesa.Config, dict(place_temperature=0.0)),
    (mesa.Config, dict(b1=1.0)),
    (pixel.Config, dict(patch=0)),
    (pixel.Config, dict(clip_every=0)),
    (pixel.Config, dict(learning_rate=float("nan"))),
    (pixel.Config, dict(momentum=1.0)),
    (neural_cleanse.Config, dict(attack_threshold=0.0)),
    (neural_cleanse.Config, dict(patience=0)),
    (neural_cleanse.Config, dict(memory=1.0)),
    (neural_cleanse.Config, dict(first_mask=0.0)),
    (neural_cleanse.Config, dict(stop_patience=-1)),
    (neural_cleanse.Config, dict(stop_ratio=float("nan"))),
    (pt_red.Config, dict(success_rate=0.0)),
    (pt_red.Config, dict(step_size=float("nan"))),
    (pt_red.Config, dict(step_noise=1.0)),
    (pt_red.Config, dict(patience=0)),
    (pair_scan.Config, dict(method="mesa")),
    (pair_scan.Config, dict(steps=0)),
    (pair_scan.Config, dict(threshold=0.0)),
    (pair_scan.Config, dict(working_rate=1.5)),
    (pair_scan.Config, dict(joint_rate=0.0)),
    (pair_scan.Config, dict(group=1)),
    (pair_scan.Config, dict(coverage=0.0)),
    (pair_scan.Config, dict(lone_factor=0.5)),
    (pair_scan.Config, dict(intrinsic_factor=0.5)),
    (unlearn.Config, dict(stamp_rate=0.0)),
    (unlearn.Config, dict(stamp_rate=1.1)),
    (unlearn.Config, dict(learning_rate=float("nan"))),
    (unlearn.Config, dict(num_steps=0)),
    (unlearn.Config, dict(epoch_steps=0)),
    (anp.Config, dict(epsilon=0.0)),
    (anp.Config, dict(ascent_steps=0)),
    (anp.Config, dict(clean_weight=1.5)),
    (anp.Config, dict(learning_rate=float("nan"))),
    (anp.Config, dict(momentum=1.0)),
    (anp.Config, dict(most=0.0)),
    (anp.Config, dict(points=1)),
    (anp.Config, dict(max_drop=1.0)),
    (anp.Config, dict(held_share=0.0)),
    (anp.Config, dict(most_held=0)),
    (ibau.Config, dict(rounds=0)),
    (ibau.Config, dict(fixed_points=0)),
    (ibau.Config, dict(inner_learning_rate=float("nan"))),
    (ibau.Config, dict(bound=-1.0)),
    (ibau.Config, dict(penalty=float("nan"))),
    (ibau.Config, dict(stamp_share=0.0)),
    (mcr.Config, dict(points=2)),
    (mcr.Config, dict(learning_rate=0.0)),
    (mcr.Config, dict(weight_decay=-1.0)),
    (mcr.Config, dict(finetune_steps=0)),
    (mcr.Config, dict(max_drop=float("nan"))),
    (nc_unlearn.Config, dict(stamp_rate=0.0)),
    (nc_unlearn.Config, dict(learning_rate=float("nan"))),
    (nc_unlearn.Config, dict(epochs=0)),
    (nc_unlearn.Config, dict(momentum=1.0)),
    (nc_unlearn.Config, dict(num_steps=0)),
    (clip.Config, dict(max_drop=1.0)),
    (clip.Config, dict(first_reach=0.0)),
    (clip.Config, dict(held_share=float("nan"))),
    (clip.Config, dict(num_steps=0)),
    (finetune.Config, dict(learning_rate=0.0)),
    (finetune.Config, dict(num_steps=0)),
    (finetune.Config, dict(weight_decay=-1.0)),
    (bna.Config, dict(learning_rate=0.0)),
    (bna.Config, dict(num_steps=0)),
    (bna.Config, dict(epochs=0)),
    (bna.Config, dict(tau=float("nan"))),
    (bna.Config, dict(tau=5.0)),
    (bna.Config, dict(width=-0.1)),
    (bna.Config, dict(bins=1)),
    (supervised.Config, dict(learning_rate=-1.0)),
    (supervised.Config, dict(num_steps=0)),
    (supervised.Config, dict(weight_decay=-1.0)),
]


@pytest.mark.parametrize(
    "config, change",
    BAD,
    ids=[f"{c.__module__.split('.')[-1]}-{next(iter(d))}-{n}" for n, (c, d) in enumerate(BAD)],
)
def test_bad_values_are_refused_in_one_line(config, change):
    with pytest.raises(UserError) as caught:
        config(**change)
    assert "\n" not in str(caught.value)


UNFIT = [
    (lambda: badnets.make(SHAPE, 4, badnets.Config(target=4)), "target 4"),
    (lambda: badnets.make(SHAPE, 4, badnets.Config(target=-1)), "target -1"),
    (lambda: badnets.make(SHAPE, 4, badnets.Config(patch=9)), "9x9"),
    (lambda: badnets.make(SHAPE, 4, badnets.Config(place="fixed", row=6)), "outside"),
    (lambda: clean_label.make(SHAPE, 4, clean_label.Config(target=4)), "target 4"),
    (lambda: clean_label.make(SHAPE, 4, clean_label.Config(patch=5, corners="all")), "overlap"),
    (lambda: trojan.make(SHAPE, 4, trojan.Config(patch=9)), "9x9"),
    (lambda: amplified.make(SHAPE, 4, amplified.Config(copies=9), np.ones((3, 3, 1))), "overlap"),
    (lambda: amplified.make(SHAPE, 4, amplified.Config(row=7), np.ones((3, 3, 1))), "outside"),
    (lambda: blend.make(SHAPE, 4, blend.Config(), np.ones((8, 8, 1))), "picture"),
    (lambda: sinusoid.make(SHAPE, 4, sinusoid.Config(period=1.0)), "0 at every pixel"),
    (lambda: latent.attack(SHAPE, 4, latent.Config(target=4)), "target 4"),
    (lambda: mesa.make(NET, SHAPE, mesa.Config(patch=9)), "9x9"),
    (lambda: mesa.make(NET, SHAPE, mesa.Config(place="fixed", row=6)), "outside"),
    (lambda: mesa.make(NET, SHAPE, mesa.Config(place="fixed", column=-1)), "outside"),
    (lambda: pixel.make(NET, SHAPE, pixel.Config(patch=9)), "9x9"),
    (lambda: pixel.make(NET, SHAPE, pixel.Config(place="fixed", column=6)), "outside"),
]


@pytest.mark.parametrize("make, words", UNFIT, ids=[str(n) for n in range(len(UNFIT))])
def test_what_does_not_fit_the_images_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_every_method_file_is_in_the_table():
    """A file with `make` and `Config` in a folder of methods is one."""
    root = pathlib.Path(jaxbd.__file__).parent
    known = {method.path for method in methods.TABLE}
    for folder in ("attacks", "inversion", "repairs"):
        for file in (root / folder).glob("*.py"):
            text = file.read_text()
            if "\ndef make(" in text and "Config" in text and file.stem != "given":
                assert f"jaxbd.{folder}.{file.stem}" in known, file.name


def broken(**changes):
    """A repair that breaks its contract in one way."""
    made = finetune.make(testing.problem(), finetune.Config())
    phase = made.phases[0]
    phase = phase._replace(**changes.pop("phase", {}))
    return made._replace(phases=(phase,), **changes)


def test_checks_catch_what_breaks_the_contract():
    """Otherwise they prove nothing."""
    good = broken()
    testing.check_repair(good, eagerly=False)
    step = good.phases[0].step
    info = finetune.Info(np.float32(0), np.float32(0))
    forgetful = lambda key, state, batch: (step(key, state, batch)[0]._replace(opt=()), info)
    wrong = {
        "state's tree": broken(phase={"step": forgetful}),
        "must return its info": broken(phase={"info": unlearn.Info}),
        "extract gives no": broken(extract=lambda state, dial=None: {}),
        "unknown needs": broken(needs=frozenset({"luck"})),
        "distinct names": good._replace(phases=good.phases * 2),
        "NaN": broken(
            extract=lambda state, dial=None: jax.tree.map(lambda x: x * np.nan, state.variables)
        ),
        "shares memory": broken(
            init=lambda key, variables, data: good.init(key, variables, data)._replace(
                variables=variables
            )
        ),
    }
    for words, repair in wrong.items():
        with pytest.raises(AssertionError, match=words):
            testing.check_repair(repair, eagerly="memory" in words)
