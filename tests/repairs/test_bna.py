"""BNA: known alterations are undone, a step is what the formulas say, presets are what they claim,
weights stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.attacks import badnets, poison
from jaxbd.base import Batch, Evidence, Problem, RepairData, Suspect, UserError
from jaxbd.data import draw
from jaxbd.metrics import activations as compare
from jaxbd.metrics import evaluate
from jaxbd.models import build
from jaxbd.pipelines import repair
from jaxbd.repairs import activations, bna, bna_layers, histogram
from jaxbd.training import supervised
from jaxbd.training.run import Run

SHAPE, TARGET = toys.SHAPE, 1
SPEC = build.Spec(
    arch="cnn", classes=toys.CLASSES, image_shape=SHAPE, options={"width": 8, "stages": 2}
)
NET = build.net(SPEC)
BARE = build.net(dataclasses.replace(SPEC, options={"width": 8, "stages": 2, "norm": False}))
PLANTED = badnets.make(
    SHAPE, toys.CLASSES, badnets.Config(target=TARGET, pattern=170, poison_rate=0.15)
)


def victim(net, **training):
    """A small CNN with a backdoor trained into it, and its trigger."""
    clean = jax.tree.map(jnp.asarray, toys.stripes(0, 400))
    trigger = PLANTED.init(jax.random.key(0))
    trainer = supervised.make(net, supervised.Config(num_steps=250, **training))
    state = trainer.init(jax.jit(net.init)(jax.random.key(1)))
    drawn = poison.dynamic(PLANTED, draw.uniform(64))
    fitted = Run().fit(
        "train",
        jax.random.key(2),
        trainer.step,
        drawn,
        (clean, trigger),
        state,
        info=supervised.Info,
        num_steps=250,
    )
    return fitted.state.variables, trigger


@pytest.fixture(scope="module")
def planted():
    return victim(NET, learning_rate=0.1)


@pytest.fixture(scope="module")
def sources():
    """Clean images of the classes the trigger works on."""
    data = toys.stripes(3, 320)
    return Batch(*(jnp.asarray(leaf[data.labels != TARGET]) for leaf in data))


def rates(net, variables, trigger) -> evaluate.Rates:
    return evaluate.rates(jax.random.key(5), net, variables, toys.stripes(1, 200), PLANTED, trigger)


def corrected(net, victim, data, config, trigger_params=None, stamp=PLANTED.stamp):
    """The variables after a correction for one trigger, without retries."""
    variables, trigger = victim
    known = Evidence(TARGET, (), stamp, trigger if trigger_params is None else trigger_params)
    suspect = Suspect(net, variables, SHAPE, toys.CLASSES)
    key = jax.random.key(6)
    return repair.repair(Run(), key, suspect, data, [known], "bna", config).variables


CONFIG = bna.Config()


def problem(net, stamp):
    return Problem(net, SHAPE, toys.CLASSES, stamp=stamp)


def data_of(sources, trigger_params):
    """What a correction is made of, without images of the target class."""
    return RepairData(sources, sources, None, trigger_params)


@pytest.fixture(scope="module")
def repaired(planted, sources):
    return corrected(NET, planted, sources, CONFIG)


def test_the_correction_disables_the_trigger_and_infers_the_source(planted, repaired):
    before, after = (rates(NET, v, planted[1]) for v in (planted[0], repaired))
    assert before.attack_success_rate > 0.95 and before.clean_accuracy > 0.95
    assert after.attack_success_rate < 0.05 and after.source_inference_accuracy > 0.9


def test_the_evidence_is_what_corrects(planted, sources):
    """Same images, same steps, a trigger that is none."""
    blank = planted[1]._replace(pattern=jnp.full((3, 3, 1), 0.5))
    after = rates(NET, corrected(NET, planted, sources, CONFIG, blank), planted[1])
    assert after.attack_success_rate > 0.5


def test_images_of_the_target_class_stay_where_the_evidence_brings_them(planted, repaired):
    variables, _ = planted
    everything = toys.stripes(3, 320)
    of_target = Batch(*(jnp.asarray(leaf[everything.labels == TARGET]) for leaf in everything))
    run = lambda config: corrected(NET, planted, everything, config)
    with_term = run(dataclasses.replace(CONFIG, keep=1.0))
    unchanged = lambda key, params, images: images
    moved = lambda corrected: compare.divergences(
        NET, variables, corrected, unchanged, None, of_target
    )["all"]
    assert moved(with_term).tv < 0.8 * moved(repaired).tv
    # a weight of 0 and evidence without such images are the same run, bit for bit
    same = run(dataclasses.replace(CONFIG, keep=0.0))
    for one, other in zip(*map(jax.tree.leaves, (same, repaired)), strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(UserError, match="got -1"):
        bna.Config(keep=-1.0)


def test_the_result_is_the_mean_of_the_second_half():
    _, state, _, _, batch = tiny()
    config = bna.Config(num_steps=6, tau=40.0, width=0.2, bins=30)
    method = bna.make(problem(TINY, lambda key, params, images: images), config)
    step, seen = jax.jit(method.phases[0].step), []
    for number in range(6):
        state, _ = step(jax.random.key(number), state, batch)
        seen.append(np.asarray(state.theta["norm0"].upper))
        if number < 3:
            np.testing.assert_array_equal(state.mean["norm0"].upper, seen[-1])
    assert not np.allclose(seen[-1], seen[3])
    mean = np.mean(seen[3:], 0)
    np.testing.assert_allclose(state.mean["norm0"].upper, mean, rtol=1e-6)
    np.testing.assert_allclose(method.extract(state)["bounds"]["norm0"]["upper"], mean, rtol=1e-6)


def test_no_weight_is_touched(planted, repaired):
    variables = planted[0]
    assert jax.tree.structure(repaired["params"]) == jax.tree.structure(variables["params"])
    for before, after in zip(
        *map(jax.tree.leaves, (variables["params"], repaired["params"])), strict=True
    ):
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    assert set(repaired["bounds"]) == {"norm0", "norm1", "features"}
    assert not np.array_equal(
        repaired["batch_stats"]["norm0"]["mean"],
        variables["batch_stats"]["norm0"]["mean"],
    )


def test_divergences_fall_and_the_clean_net_has_none_to_itself(planted, repaired, sources):
    variables, trigger = planted
    judge = lambda fixed, stamp: compare.divergences(NET, variables, fixed, stamp, trigger, sources)
    before, after = judge(variables, PLANTED.stamp), judge(repaired, PLANTED.stamp)
    assert list(before) == ["features", "all"]
    for one, other in zip(after["features"], before["features"], strict=True):
        assert one < 0.6 * other
    assert judge(variables, lambda key, model, images: images)["all"] == (0, 0, 0)


def test_activations_of_one_channel_are_those_the_net_shows(planted, sources):
    variables, trigger = planted
    images = sources.images[:70] / np.float32(255)
    values = compare.activations(
        NET, variables, sources, layer="norm1", channel=3, stamp=PLANTED.stamp, model=trigger
    )
    assert values.shape == (len(sources.labels) * 4 * 4,)
    clean = compare.activations(
        NET, variables, Batch(images, sources.labels[:70]), layer="features", channel=2
    )
    np.testing.assert_allclose(
        clean, NET.outputs(variables, images)[1]["features"][:, 2], rtol=1e-5, atol=1e-6
    )
    with pytest.raises(UserError, match="no layer 'norm9'; it shows norm0, norm1, features"):
        compare.activations(NET, variables, sources, layer="norm9", channel=0)
    with pytest.raises(UserError, match=r"channels 0\.\.15"):
        compare.activations(NET, variables, sources, layer="features", channel=16)


def test_a_net_without_batchnorm_is_corrected_too(sources):
    planted = victim(BARE, optimiser="adam", learning_rate=0.01)
    assert not planted[0]["batch_stats"]
    before = rates(BARE, planted[0], planted[1])
    after = rates(BARE, corrected(BARE, planted, sources, CONFIG), planted[1])
    assert (
        before.attack_success_rate > 0.9
        and after.attack_success_rate < 0.15 < after.source_inference_accuracy
    )


def test_one_shifted_channel_is_shifted_back(sources):
    """An oracle: the "trigger" adds what moves every activation of one layer by known amounts."""
    variables = jax.jit(NET.init)(jax.random.key(8))
    brighter = lambda key, amount, images: images + amount
    config = bna.Config(num_steps=400, layers="batchnorm", learning_rate=0.02)
    result = corrected(NET, (variables, jnp.float32(0.1)), sources, config, stamp=brighter)
    means = lambda v, images: NET.outputs(v, images)[1]["norm0"][:, 2:-2, 2:-2].mean((0, 1, 2))
    images = sources.images / np.float32(255)
    wanted, broken, fixed = (
        means(variables, images),
        means(variables, images + 0.1),
        means(result, images + 0.1),
    )
    assert np.abs(fixed - wanted).max() < 0.25 * np.abs(broken - wanted).max()


TINY = build.net(
    build.Spec(arch="cnn", classes=2, image_shape=(4, 4, 1), options={"width": 2, "stages": 1})
)
ADDED = 0.4


def tiny():
    """A net of two channels with a state of BNA whose parameters are not at their start, and a
    batch."""
    rng = np.random.default_rng(0)
    variables = TINY.init(jax.random.key(0))
    variables["batch_stats"]["norm0"] = {
        "mean": jnp.array([0.1, -0.2]),
        "var": jnp.array([0.5, 1.3]),
    }
    data = Batch(
        jnp.asarray(rng.uniform(size=(70, 4, 4, 1)), jnp.float32), jnp.zeros(70, jnp.int32)
    )
    stamp = lambda key, amount, images: images.at[:, :2, :2].add(amount)
    config = bna.Config(divergence="tv", tau=40.0, width=0.2, bins=30, learning_rate=0.01)
    method = bna.make(problem(TINY, stamp), config)
    known = data_of(data, jnp.float32(ADDED))
    state = jax.jit(method.init)(jax.random.key(1), variables, known)
    nudge = lambda t: t._replace(
        shift=t.shift + 0.3, log_scale=t.log_scale - 0.2, upper=t.upper - 0.3
    )
    state = state._replace(theta={name: nudge(theta) for name, theta in state.theta.items()})
    return method, state, variables, data, Batch(data.images[:9], data.labels[:9])


def forward(variables, theta, images, unit):
    """The tiny net in NumPy (float64), corrected by `theta`: activations of its two layers."""
    kernel = np.asarray(variables["params"]["conv0"]["kernel"], float)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    conv = np.stack(
        [
            [np.tensordot(padded[:, r : r + 3, c : c + 3], kernel, 3) for c in range(4)]
            for r in range(4)
        ]
    )
    conv = conv.transpose(2, 0, 1, 3)
    stats = {
        name: np.asarray(leaf, float) for name, leaf in variables["batch_stats"]["norm0"].items()
    }
    affine = {name: np.asarray(leaf, float) for name, leaf in variables["params"]["norm0"].items()}
    first, last = theta["norm0"], theta["features"]
    mean = stats["mean"] + np.sqrt(stats["var"] + 1e-5) * first["shift"]
    std = np.sqrt(stats["var"] * np.exp(2 * first["log_scale"]) + 1e-5)
    norm = (conv - mean) / std * affine["scale"] + affine["bias"]
    norm = np.maximum(np.minimum(norm, first["upper"]), first["lower"])
    pooled = np.maximum(norm, 0).mean((1, 2))
    pooled = (pooled - unit * last["shift"]) / np.exp(last["log_scale"])
    return {"norm0": norm, "features": np.maximum(np.minimum(pooled, last["upper"]), last["lower"])}


def intervals(values, low, high):
    """Edges b_1 … b_{M-1} of each channel, of `clean` activations."""
    return [
        lo + 0.2 * np.arange(1, max(1, int(np.ceil((hi - lo) / 0.2))))
        for lo, hi in zip(low, high, strict=True)
    ]


def numpy_loss(variables, theta, images, clean, unit):
    """Sum over layers and channels of the total variation between hard clean and soft triggered
    histograms."""
    shown, total = forward(variables, theta, images, unit), 0.0
    for name, values in shown.items():
        reference = clean[name].reshape(-1, 2)
        edges = intervals(values, reference.min(0), reference.max(0))
        for channel in range(2):
            p, _ = np.histogram(reference[:, channel], [-np.inf, *edges[channel], np.inf])
            above = 1 / (1 + np.exp(-40.0 * (values.reshape(-1, 2)[:, [channel]] - edges[channel])))
            above = np.concatenate([np.ones((len(above), 1)), above, np.zeros((len(above), 1))], 1)
            total += np.abs(p / p.sum() - (above[:, :-1] - above[:, 1:]).mean(0)).sum() / 2
    return total


def test_one_step_is_adam_on_the_papers_objective():
    """Loss and gradient by NumPy and finite differences; the step by the definition of Adam's first
    one."""
    method, state, variables, data, batch = tiny()
    after, info = jax.jit(method.phases[0].step)(jax.random.key(2), state, batch)
    identity = {
        n: dict(shift=0.0, log_scale=0.0, lower=-np.inf, upper=np.inf)
        for n in ("norm0", "features")
    }
    clean = forward(variables, identity, np.asarray(data.images, float), 1.0)
    unit = np.asarray(state.reference["features"].unit, float)
    np.testing.assert_allclose(unit, clean["features"].std(0), rtol=0.02)
    theta = {
        n: {k: np.asarray(v, float) for k, v in t._asdict().items()} for n, t in state.theta.items()
    }
    stamped = np.asarray(batch.images, float)
    stamped[:, :2, :2] += ADDED
    value = numpy_loss(variables, theta, stamped, clean, unit)
    np.testing.assert_allclose(info.loss, value, rtol=1e-4)
    checked = 0
    for name in theta:
        for field in theta[name]:
            for channel in range(2):
                moved = []
                for sign in (1, -1):
                    other = {n: {k: v.copy() for k, v in t.items()} for n, t in theta.items()}
                    other[name][field][channel] += sign * 1e-5
                    moved.append(numpy_loss(variables, other, stamped, clean, unit))
                slope = (moved[0] - moved[1]) / 2e-5
                step = float(
                    getattr(after.theta[name], field)[channel]
                    - getattr(state.theta[name], field)[channel]
                )
                if abs(slope) > 1e-3:
                    checked += 1
                    np.testing.assert_allclose(step, -0.01 * np.sign(slope), rtol=1e-2)
    assert checked >= 8 and after.step == 1


def test_the_reference_is_the_exact_histogram_of_the_clean_images():
    _, state, variables, data, _ = tiny()
    values = np.asarray(TINY.outputs(variables, data.images)[1]["norm0"])
    p, grid, unit = state.reference["norm0"]
    np.testing.assert_allclose(grid.low, values.min((0, 1, 2)), rtol=1e-6)
    counts = histogram.hard(jnp.asarray(values), grid, 30)
    np.testing.assert_allclose(p, counts / counts.sum(-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(unit, values.std((0, 1, 2)), rtol=1e-3)
    start = jax.tree.map(
        lambda nudged, by: nudged - by, state.theta["norm0"], bna_layers.Theta(0.3, -0.2, 0.0, -0.3)
    )
    np.testing.assert_allclose(start.upper, values.max((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(start.lower, values.min((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(start[:2], 0, atol=1e-6)


def test_presets():
    # the paper's objective has no second term, its rate is 0.01 (section 5.1), and the last
    # parameters count
    assert (
        bna.paper()
        == bna.Config(divergence="tv", epochs=30, learning_rate=0.01, keep=0.0, average=False)
        and bna.paper(tau=50.0).tau == 50
    )
    code = bna.released()
    assert (code.trained, code.order, code.moments, code.start_upper) == (
        "upper",
        "layerwise",
        "triggered",
        3.0,
    )
    assert code.divergence == "tv"
    # two BatchNorms, and 14 batches of 5 images an epoch
    suspect = Suspect(NET, jax.jit(NET.init)(jax.random.key(0)), SHAPE, toys.CLASSES)
    images = Batch(jnp.zeros((70, *SHAPE)), jnp.zeros(70, jnp.int32))
    adapt = lambda config: bna.adapt(config, suspect, data_of(images, None), 5)
    assert adapt(code) == dataclasses.replace(code, num_steps=10 * 14 * 2, epochs=None)
    assert adapt(bna.paper()).num_steps == 30 * 14
    assert adapt(bna.Config()) == bna.Config()


def test_released_replaces_the_moments_and_trains_upper_bounds_one_layer_after_the_other(
    planted, sources
):
    variables, trigger = planted
    config = bna.released(epochs=None, num_steps=8)
    method = bna.make(problem(NET, PLANTED.stamp), config)
    clean = Batch(sources.images[:64], sources.labels[:64])
    state = jax.jit(method.init)(jax.random.key(0), variables, data_of(clean, trigger))
    stamped = PLANTED.stamp(
        jax.random.fold_in(jax.random.key(0), 0), trigger, clean.images / np.float32(255)
    )
    batch_moments = NET.apply(
        {**variables, "batch_stats": jax.tree.map(jnp.zeros_like, variables["batch_stats"])},
        stamped,
        train=True,
    )[1]
    for ours, tenth in zip(
        *map(jax.tree.leaves, (state.variables["batch_stats"], batch_moments)), strict=True
    ):
        np.testing.assert_allclose(ours, 10 * tenth, rtol=1e-3, atol=1e-4)
    assert list(state.theta) == ["norm0", "norm1"]
    step, moved = jax.jit(method.phases[0].step), []
    for _ in range(8):
        before, (state, _) = (
            state,
            step(jax.random.key(1), state, clean._replace(images=stamped * 0 + stamped)),
        )
        moved.append(
            [
                bool((state.theta[n].upper != before.theta[n].upper).any())
                for n in ("norm0", "norm1")
            ]
        )
    assert not any(second for _, second in moved[:4]) and not any(first for first, _ in moved[4:])
    assert all(
        not theta.shift.any() and not theta.log_scale.any() for theta in state.theta.values()
    )
    assert all((theta.lower < -1e38).all() for theta in state.theta.values())


def test_chunks_do_not_change_what_is_measured(monkeypatch, planted, sources):
    show = lambda _, images: NET.outputs(planted[0], images)[1]
    whole = activations.ranges(show, sources.images)
    grids = {name: histogram.grid(r.low, r.high, 0.1, 50) for name, r in whole.items()}
    counts = activations.histograms(show, sources.images, grids, 50)
    monkeypatch.setattr(activations, "CHUNK", 37)
    again = activations.ranges(show, sources.images)
    for name, r in whole.items():
        np.testing.assert_allclose(again[name].low, r.low, atol=1e-5)
        np.testing.assert_allclose(again[name].high, r.high, atol=1e-5)
        np.testing.assert_allclose(again[name].std, r.std, rtol=1e-4)
    for name, p in activations.histograms(show, sources.images, grids, 50).items():
        np.testing.assert_allclose(p, counts[name], atol=2e-4)
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)


def test_memory_of_init_does_not_grow_with_the_images(planted):
    method = bna.make(problem(NET, PLANTED.stamp), bna.Config())

    def scratch(images: int) -> int:
        data = Batch(
            jax.ShapeDtypeStruct((images, *SHAPE), jnp.uint8),
            jax.ShapeDtypeStruct((images,), jnp.int32),
        )
        init = jax.jit(lambda v, e: method.init(jax.random.key(0), v, e))
        return (
            init.lower(planted[0], data_of(data, planted[1]))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    few, many = scratch(64 * 2), scratch(64 * 16)
    assert many - few < 0.2 * few + 64 * 14 * 8 * 8  # the images themselves are regrouped


def test_nets_that_show_no_layers_are_refused(sources):
    with pytest.raises(UserError, match="shows no layers"):
        bna.make(problem(toys.NET, PLANTED.stamp), CONFIG)
    with pytest.raises(UserError, match="no layer whose activations"):
        bna_layers.names(toys.NET, toys.victim(0), jnp.zeros((1, *SHAPE)), batchnorm_only=False)
    bare = BARE.init(jax.random.key(0)), PLANTED.init(jax.random.key(0))
    with pytest.raises(UserError, match="no layer whose activations"):
        corrected(BARE, bare, sources, bna.released())
    with pytest.raises(UserError, match="no stamp"):
        bna.make(problem(NET, None), CONFIG)


def test_outputs_are_those_of_apply_in_order_of_execution_inside_jit_too():
    net = build.net(
        build.Spec(arch="resnet18", classes=3, image_shape=(8, 8, 3), options={"width": 2})
    )
    variables, images = jax.jit(net.init)(jax.random.key(0)), jnp.full((2, 8, 8, 3), 0.3)
    seen = []

    def show(variables, images):
        logits, shown = net.outputs(variables, images)
        seen.extend(shown)
        return logits

    np.testing.assert_allclose(
        jax.jit(show)(variables, images), jax.jit(net.apply)(variables, images)[0], rtol=1e-5
    )
    assert (
        seen[:3] == ["bn1", "layer1_0/bn1", "layer1_0/bn2"]
        and seen[-1] == "features"
        and len(seen) == 21
    )
    assert (
        seen.index("layer2_0/bn2")
        < seen.index("layer2_0/shortcut_norm")
        < seen.index("layer2_1/bn1")
    )


def test_a_foreign_module_without_sown_outputs_shows_none():
    import flax.linen as nn

    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    net = build.from_flax(Foreign(), SHAPE)
    variables = net.init(jax.random.key(0))
    assert net.outputs(variables, jnp.zeros((2, *SHAPE)))[1] == {}


def test_total_variations_tells_moved_channels_apart():
    clean = np.random.default_rng(0).random((200, 3)).astype(np.float32)
    moved = clean + np.array([0, 9, 0], np.float32)
    moved[:50, 2] = 9  # a quarter of one channel's values
    found = compare.total_variations(clean, moved, 0.1, 100)
    assert (
        found[0] == 0 and 0.8 < found[1] < 1 and 0.15 < found[2] <= 0.25
    )  # the last interval holds clean ones too
