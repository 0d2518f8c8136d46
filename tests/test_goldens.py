"""The papers' formulas, worked out again in NumPy or PyTorch on small inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toys

from jaxbd import losses
from jaxbd.base import Batch, Cell, Problem, RepairData
from jaxbd.inversion import mesa, pixel
from jaxbd.models import build
from jaxbd.models.critic import StatisticsNetwork
from jaxbd.models.generators import ConvGenerator, PaperGenerator, ReleasedGenerator
from jaxbd.models.norm import BatchNorm, normalise
from jaxbd.repairs import mixture, unlearn
from jaxbd.training import supervised


@pytest.fixture
def normal():
    """Standard normal float32 arrays, the same in every test whatever ran before."""
    rng = np.random.default_rng(0)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


def test_cross_entropy_and_target_confidence(normal):
    logits, labels = normal(6, 4), np.array([0, 1, 2, 3, 0, 1])
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.isclose(
        losses.cross_entropy(logits, labels),
        -np.log(softmax[np.arange(6), labels]).mean(),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        losses.target_confidence(logits, jnp.int32(2)), softmax[:, 2], rtol=1e-5
    )


@pytest.mark.parametrize("level", [0.2, 0.5, 0.9])
def test_level_hinge_has_the_gradient_of_the_released_loss(level):
    """Qiao et al. 2019, eq. (4): max(0, beta - F); the released code maximises min(F, beta)."""
    confidence = jnp.linspace(0.01, 0.97, 13)
    assert np.isclose(
        losses.level_hinge(confidence, level), np.maximum(0, level - np.asarray(confidence)).mean()
    )
    released = jax.grad(lambda f: -jnp.minimum(f, level).mean())(confidence)
    np.testing.assert_allclose(jax.grad(losses.level_hinge)(confidence, level), released)
    assert (released != 0).any() and (level == 0.9 or (released == 0).any())


def test_donsker_varadhan_is_the_formula_and_stays_finite(normal):
    joint, marginal = normal(50), normal(50)
    expected = joint.mean() - np.log(np.exp(marginal).mean())
    assert np.isclose(losses.donsker_varadhan(joint, marginal), expected, rtol=1e-5)
    assert np.isclose(losses.donsker_varadhan(joint, marginal[::-1]), expected, rtol=1e-5)
    assert np.isclose(
        losses.donsker_varadhan(joint + 300, marginal + 300), expected, rtol=1e-3, atol=1e-3
    )


def test_donsker_varadhan_bounds_the_mutual_information_of_gaussians(normal):
    """At the optimal statistic log p(x, y) / p(x) p(y) the bound is tight: I = -log(1 - rho^2) /
    2."""
    rho, count = 0.6, 200_000
    rng = np.random.default_rng(1)
    x, noise, other = rng.normal(size=(3, count))
    y = rho * x + np.sqrt(1 - rho**2) * noise

    def statistic(x, y):
        return -0.5 * np.log(1 - rho**2) - (rho**2 * (x**2 + y**2) - 2 * rho * x * y) / (
            2 * (1 - rho**2)
        )

    bound = losses.donsker_varadhan(jnp.asarray(statistic(x, y)), jnp.asarray(statistic(x, other)))
    assert np.isclose(bound, -0.5 * np.log(1 - rho**2), atol=0.02)


def test_debiased_gradient_divides_by_the_moving_average(normal):
    """grad = E[dT] - E[e^T dT] / moving average, for T = features @ theta; Belghazi et al. 2018,
    section 3.2."""
    joint, marginal, theta, average = normal(20, 3), normal(20, 3), normal(3), 1.7

    def surrogate(theta):
        return losses.donsker_varadhan_debiased(
            jnp.asarray(joint) @ theta, jnp.asarray(marginal) @ theta, jnp.log(average)
        )

    weights = np.exp(marginal @ theta)[:, None]
    expected = joint.mean(0) - (weights * marginal).mean(0) / average
    np.testing.assert_allclose(
        jax.grad(surrogate)(jnp.asarray(theta)), expected, rtol=1e-4, atol=1e-6
    )


def test_debiased_gradient_is_the_plain_one_when_the_average_is_the_batch_mean(normal):
    joint, marginal = jnp.asarray(normal(20)), jnp.asarray(normal(20))
    mean = jax.nn.logsumexp(marginal) - jnp.log(20)
    plain = jax.grad(losses.donsker_varadhan, (0, 1))(joint, marginal)
    debiased = jax.grad(losses.donsker_varadhan_debiased, (0, 1))(joint, marginal, mean)
    toys.assert_close(debiased, plain, 1e-6)


def parameters(module, *inputs, **settings) -> int:
    shapes = jax.eval_shape(lambda key: module.init(key, *inputs, **settings), jax.random.key(0))
    return build.parameter_count(shapes)


def test_parameter_counts_of_the_released_networks():
    noise, triggers = jnp.zeros((2, 64)), jnp.zeros((2, 3, 3, 3))
    for hidden, generator, statistics in [(512, 567_755, 310_273), (2048, 8_561_099, 4_386_817)]:
        assert parameters(ReleasedGenerator((3, 3, 3), hidden), noise, train=True) == generator
        assert parameters(StatisticsNetwork(hidden), noise, triggers) == statistics


@pytest.mark.parametrize("module", [ReleasedGenerator, PaperGenerator, ConvGenerator])
@pytest.mark.parametrize("shape", [(4, 4, 1), (6, 6, 3)])
def test_generators_give_triggers_between_0_and_1(module, shape, normal):
    generator, noise = module(shape, 8), 5 * jax.random.normal(jax.random.key(0), (9, 8))
    triggers, _ = jax.jit(lambda key: generator.init_with_output(key, noise, train=True))(
        jax.random.key(1)
    )
    assert triggers.shape == (9, *shape) and triggers.min() >= 0 and triggers.max() <= 1
    assert triggers.std(0).max() > 1e-3


def torch_linear(layer: torch.nn.Linear, params) -> torch.nn.Linear:
    layer.weight.data = torch.tensor(np.array(params["kernel"]).T)
    if layer.bias is not None:
        layer.bias.data = torch.tensor(np.array(params["bias"]))
    return layer


def test_released_generator_forward_and_running_moments_equal_pytorch():
    """16 -> H, then (H + 16) -> H twice, then (H + 16) -> 27; BatchNorm1d and LeakyReLU(0.2) after
    the first three."""
    noise = np.random.default_rng(2).uniform(size=(10, 64)).astype(np.float32)
    module = ReleasedGenerator((3, 3, 3), 20)
    variables = jax.jit(lambda key: module.init(key, noise, train=True))(jax.random.key(0))
    trained, updates = module.apply(variables, noise, train=True, mutable=["batch_stats"])
    evaluated = module.apply({**variables, **updates}, noise, train=False)

    chunks, norms = torch.tensor(noise).chunk(4, 1), [torch.nn.BatchNorm1d(20) for _ in range(3)]
    sizes = [(16, 20), (36, 20), (36, 20), (36, 27)]
    layers = [
        torch_linear(torch.nn.Linear(*size), variables["params"][f"Dense_{i}"])
        for i, size in enumerate(sizes)
    ]

    def forward():
        x = torch.zeros(10, 0)
        for layer, norm, chunk in zip(layers, [*norms, None], chunks, strict=True):
            x = layer(torch.cat([x, chunk], 1))
            if norm is None:
                return torch.sigmoid(x).reshape(-1, 3, 3, 3).detach()
            x = torch.nn.functional.leaky_relu(norm(x), 0.2)

    np.testing.assert_allclose(trained, forward(), atol=1e-5)
    for number, norm in enumerate(norms):
        stats = updates["batch_stats"][f"BatchNorm_{number}"]
        np.testing.assert_allclose(stats["mean"], norm.running_mean, atol=1e-6)
        np.testing.assert_allclose(stats["var"], norm.running_var, atol=1e-6)
        norm.eval()
    np.testing.assert_allclose(evaluated, forward(), atol=1e-5)


@pytest.mark.parametrize("leaky_output", [True, False])
def test_statistics_network_is_the_formula(leaky_output, normal):
    """T = W3 . leaky(W2 . leaky(Wz z + Wx x + b)), leaky once more at the end as released."""
    noise, triggers = normal(7, 12), normal(7, 3, 3, 1)
    network = StatisticsNetwork(5, leaky_output)
    params = jax.jit(network.init)(jax.random.key(0), noise, triggers)["params"]
    leaky = lambda x: np.where(x > 0, x, 0.2 * x)
    w = jax.tree.map(np.asarray, params)
    assert (w["Dense_1"]["bias"] == 0).all() and "bias" not in w["Dense_0"]
    x = leaky(noise @ w["Dense_0"]["kernel"] + triggers.reshape(7, -1) @ w["Dense_1"]["kernel"])
    x = leaky(x @ w["Dense_2"]["kernel"] + w["Dense_2"]["bias"])
    x = (x @ w["Dense_3"]["kernel"] + w["Dense_3"]["bias"])[:, 0]
    actual = network.apply({"params": params}, noise, triggers)
    np.testing.assert_allclose(actual, leaky(x) if leaky_output else x, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (8, 3)])
def test_batch_norm_is_pytorchs_in_training_and_evaluation(shape, normal):
    """Biased variance to normalise, unbiased variance into the running one, over two different
    batches."""
    first, second = 2 * normal(*shape) + 3, normal(*shape)
    train, evaluate = BatchNorm(False), BatchNorm(True)
    affine = {"scale": jnp.asarray(normal(3)), "bias": jnp.asarray(normal(3))}
    variables = {**train.init(jax.random.key(0), first), "params": affine}
    norm = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(3)
    norm.weight.data, norm.bias.data = (
        torch.tensor(np.asarray(affine[name])) for name in ("scale", "bias")
    )
    there = lambda x: torch.tensor(np.moveaxis(x, -1, 1).copy())
    for batch in (first, second):
        out, updates = train.apply(variables, batch, mutable=["batch_stats"])
        variables = {**variables, **updates}
        np.testing.assert_allclose(
            np.moveaxis(np.asarray(out), -1, 1), norm(there(batch)).detach(), atol=1e-5
        )
    np.testing.assert_allclose(variables["batch_stats"]["mean"], norm.running_mean, atol=1e-6)
    np.testing.assert_allclose(variables["batch_stats"]["var"], norm.running_var, atol=1e-6)
    norm.eval()
    out = evaluate.apply(variables, first)
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(out), -1, 1), norm(there(first)).detach(), atol=1e-5
    )


def test_batch_norm_clips_its_output_to_bounds_where_they_are_given(normal):
    x, norm = normal(50, 2), BatchNorm(True)
    variables = norm.init(jax.random.key(0), x)
    bounds = {"lower": jnp.array([-0.5, -9.0]), "upper": jnp.array([0.25, 0.5])}
    plain, out = norm.apply(variables, x), norm.apply({**variables, "bounds": bounds}, x)
    np.testing.assert_allclose(out, np.clip(plain, bounds["lower"], bounds["upper"]))


def test_normalisation_is_per_channel_and_one_number_serves_all(normal):
    images = normal(2, 4, 4, 3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    np.testing.assert_allclose(
        normalise(images, mean, std), (images - np.array(mean)) / np.array(std), rtol=1e-5
    )
    np.testing.assert_allclose(normalise(images, (0.5,), (0.5,)), (images - 0.5) / 0.5, rtol=1e-5)


LINEAR = build.from_apply(
    lambda variables, images: images.reshape(images.shape[0], -1) @ variables["params"]["w"]
)


def optimisers(name: str, parameter, rate: float, momentum: float, decay: float):
    if name == "adam":
        return torch.optim.Adam([parameter], rate, weight_decay=decay)
    return torch.optim.SGD([parameter], rate, momentum=momentum, weight_decay=decay)


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "steps"])
def test_supervised_steps_equal_pytorchs(name, schedule, normal):
    """Weight decay is added to the gradient before momentum; the schedules are PyTorch's own."""
    steps, rate = 10, 0.1
    config = supervised.Config(
        learning_rate=rate,
        schedule=schedule,
        num_steps=steps,
        optimiser=name,
        momentum=0.9,
        weight_decay=0.05,
    )
    images, labels, weights = normal(16, 2, 2, 1), np.arange(16, dtype=np.int32) % 3, normal(4, 3)
    trainer = supervised.make(LINEAR, config)
    state, step = trainer.init({"params": {"w": jnp.asarray(weights)}}), jax.jit(trainer.step)
    parameter = torch.nn.Parameter(torch.tensor(weights))
    optimiser = optimisers(name, parameter, rate, 0.9, 0.05)
    scheduler = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimiser, 1.0),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps),
        "steps": lambda: torch.optim.lr_scheduler.MultiStepLR(optimiser, [6, 8], 0.1),
    }[schedule]()
    for _ in range(steps):
        state, info = step(jax.random.key(0), state, Batch(images, labels))
        optimiser.zero_grad()
        logits = torch.tensor(images.reshape(16, 4)) @ parameter
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels, dtype=torch.long))
        loss.backward()
        optimiser.step()
        scheduler.step()
        assert np.isclose(info.loss, loss.item(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            state.variables["params"]["w"], parameter.detach(), rtol=1e-3, atol=1e-5
        )


@pytest.fixture(scope="module")
def trained_mesa():
    """Jitted MESA steps at two rates of the moving average, with batch, cell and victim of the
    toy."""
    make = lambda rate: mesa.make(
        toys.NET, toys.SHAPE, mesa.Config(hidden=16, noise_dim=8, debias_rate=rate)
    )
    slow, instant = make(0.001), make(1.0)
    images, labels = toys.quadrants(0, 32, np.float32)
    arguments = (
        Batch(jnp.asarray(images), jnp.asarray(labels)),
        Cell(jnp.int32(2), jnp.int32(-1), jnp.float32(1.0)),
    )
    state = jax.jit(slow.init)(jax.random.key(0))
    run = lambda inversion: jax.jit(
        lambda key, state, batch: inversion.step(key, state, batch, *arguments[1:], victim)
    )
    victim = toys.victim(2)
    return run(slow), run(instant), state, arguments[0]


def test_moving_average_starts_at_the_first_batch_and_follows_at_its_rate(trained_mesa):
    """At rate 1 the average is the batch's own mean of e^T, so two rates from one state show the
    rule."""
    slow, instant, state, batch = trained_mesa
    first = slow(jax.random.key(1), state._replace(log_mean_exp=jnp.float32(55.0)), batch)[0]
    assert np.isclose(
        first.log_mean_exp, instant(jax.random.key(1), state, batch)[0].log_mean_exp, rtol=1e-6
    )
    for before in (0.0, -2.0, 5.0):
        moved = first._replace(log_mean_exp=jnp.float32(before))
        after = float(slow(jax.random.key(2), moved, batch)[0].log_mean_exp)
        mean = float(instant(jax.random.key(2), moved, batch)[0].log_mean_exp)
        assert np.isclose(np.exp(after), 0.999 * np.exp(before) + 0.001 * np.exp(mean), rtol=1e-5)


def test_moving_average_does_not_overflow(trained_mesa):
    slow, _, state, batch = trained_mesa
    moved = state._replace(step=jnp.int32(1), log_mean_exp=jnp.float32(500.0))
    after = slow(jax.random.key(2), moved, batch)[0]
    assert np.isclose(after.log_mean_exp, 500 + np.log(0.999), atol=1e-3)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_both_networks_take_adam_steps_with_the_released_betas(trained_mesa):
    """After one step mu = (1 - 0.5) g, nu = (1 - 0.999) g^2, and a parameter moves by -lr g / (|g|
    + eps)."""
    slow, _, state, batch = trained_mesa
    after = slow(jax.random.key(1), state, batch)[0]
    pairs = [
        (state.generator["params"], after.generator["params"], after.generator_opt[0]),
        (state.critic, after.critic, after.critic_opt[0]),
    ]
    for before, now, adam in pairs:
        gradient = jax.tree.map(lambda mu: np.asarray(mu) / 0.5, adam.mu)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-4
        toys.assert_close(adam.nu, jax.tree.map(lambda g: 0.001 * g**2, gradient), 1e-5)
        moved = jax.tree.map(lambda p, g: p - 2e-4 * g / (np.abs(g) + 1e-8), before, gradient)
        toys.assert_close(now, moved, 1e-5)


def test_generator_loss_is_equation_4_and_rates_ignore_rows_of_the_target(trained_mesa):
    """At level 1 the hinge is 1 - F, so L = 1 - mean F - alpha I."""
    slow, _, state, batch = trained_mesa
    info = slow(jax.random.key(1), state, batch)[1]
    assert np.isclose(info.generator_loss, 1 - info.confidence - 0.1 * info.entropy, rtol=1e-5)
    of_target = np.asarray(batch.labels) == 2
    scrambled = jnp.where(of_target[:, None, None, None], batch.images[::-1], batch.images)
    assert (scrambled != batch.images).any()
    other = slow(jax.random.key(1), state, batch._replace(images=scrambled))[1]
    assert (
        info.attack_success_rate == other.attack_success_rate
        and info.confidence != other.confidence
    )


def test_pixel_steps_are_momentum_sgd_clipped_every_so_often(normal):
    weights, images, labels = normal(64, 4), normal(10, 8, 8, 1), np.arange(10, dtype=np.int32) % 4
    config = pixel.Config(place="fixed", row=2, column=1, clip_every=3, learning_rate=0.5)
    inversion = pixel.make(LINEAR, (8, 8, 1), config)
    state, step = inversion.init(jax.random.key(0)), jax.jit(inversion.step)
    pattern = torch.nn.Parameter(torch.tensor(np.array(state.pattern)))
    optimiser = torch.optim.SGD([pattern], 0.5, momentum=0.9)
    cell, clipped = Cell(jnp.int32(3), jnp.int32(-1), jnp.float32(0.9)), False
    for number in range(7):
        state, info = step(
            jax.random.key(number), state, Batch(images, labels), cell, {"params": {"w": weights}}
        )
        stamped = torch.tensor(images).clone()
        stamped[:, 2:5, 1:4] = pattern
        logits = stamped.reshape(10, -1) @ torch.tensor(weights)
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits, torch.full((10,), 3))
        loss.backward()
        optimiser.step()
        assert np.isclose(info.loss, loss.item(), rtol=1e-4, atol=1e-6)
        assert np.isclose(
            info.attack_success_rate, (logits.argmax(1) == 3)[labels != 3].float().mean()
        )
        if number % 3 == 2:
            clipped |= bool(((pattern < 0) | (pattern > 1)).any())
            pattern.data.clamp_(0, 1)
        np.testing.assert_allclose(state.pattern, pattern.detach(), atol=1e-4)
    assert clipped


BRIGHT = build.from_apply(
    lambda variables, images: (
        (images.mean((1, 2, 3)) - 0.5)[:, None] * variables["params"]["w"][None]
    )
)
"""Answers 1 for bright images, 0 for dark ones."""
CONSTANT = lambda key, model, images: jnp.full_like(images, 1) * model
DARK_AND_BRIGHT = jnp.array([0.0, 1.0])


def unlearning(config, weights, label: int, image: float = 0.0):
    """Infos of ten steps in which stamped images are all dark or all bright; every image has one
    label."""
    repair = unlearn.make(Problem(BRIGHT, (1, 1, 1), 2, stamp=mixture.mix(CONSTANT)), config)
    variables = {"params": {"w": jnp.array([-1.0, 1.0])}}
    known = RepairData(trigger_params=mixture.Mixture(DARK_AND_BRIGHT, weights))
    state = repair.init(jax.random.key(0), variables, known)
    batch = Batch(jnp.full((1000, 1, 1, 1), image), jnp.full((1000,), label))
    infos, step = [], jax.jit(repair.phases[0].step)
    for number in range(10):
        state, info = step(jax.random.key(number), state, batch)
        infos.append(info)
    return jax.tree.map(lambda *leaves: np.array(leaves), *infos)


def test_unlearning_draws_models_by_weight_and_keeps_labels():
    """All stamped, label 1: a row is right where the bright model was drawn."""
    infos = unlearning(
        unlearn.Config(stamp_rate=1.0, learning_rate=1e-6), jnp.array([0.25, 0.75]), label=1
    )
    assert (infos.stamped == 1).all() and abs(infos.accuracy.mean() - 0.75) < 0.02
    assert infos.accuracy.std() > 0


def test_unlearning_by_epoch_takes_turns():
    config = unlearn.Config(stamp_rate=1.0, learning_rate=1e-6, mixing="epoch", epoch_steps=3)
    infos = unlearning(config, jnp.array([0.5, 0.5]), label=1)
    np.testing.assert_array_equal(infos.accuracy, [0, 0, 0, 1, 1, 1, 0, 0, 0, 1])


def test_unlearning_stamps_at_its_rate():
    infos = unlearning(
        unlearn.Config(stamp_rate=0.1, learning_rate=1e-6), jnp.array([0.0, 1.0]), label=1
    )
    np.testing.assert_allclose(infos.accuracy, infos.stamped, atol=1e-6)
    assert abs(infos.stamped.mean() - 0.1) < 0.01 and infos.stamped.std() > 0


def test_mixture_weights_are_algorithm_1():
    """gamma_i proportional to exp(h_i) / g'(g^-1(beta_i)); 1/N where nothing is known; 1 for a
    single model."""
    entropy, slope = np.array([0.5, 1.0, -2.0]), np.array([1.0, 4.0, 0.5])
    models = jnp.zeros((3, 2))
    expected = np.exp(entropy) / slope / (np.exp(entropy) / slope).sum()
    evidence = mixture.entropy_weighted(models, jnp.asarray(entropy), jnp.asarray(slope))
    np.testing.assert_allclose(evidence.weights, expected, rtol=1e-5)
    np.testing.assert_allclose(mixture.uniform(models).weights, np.full(3, 1 / 3), rtol=1e-6)
    lone = mixture.single({"pattern": jnp.ones((3, 3))})
    assert lone.models["pattern"].shape == (1, 3, 3) and (np.asarray(lone.weights) == [1]).all()
