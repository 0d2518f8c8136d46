"""Wasserstein backdoor: trains a trigger generator together with a net that hides the trigger in
its features (Doan et al. 2021).

The attacker controls training, so this module trains victims instead of poisoning data. The BNA
paper uses it as the adaptive attack (section 5.4).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses
from jaxbd.attacks import poison
from jaxbd.base import (
    Array,
    ArrayTree,
    Attack,
    Batch,
    Key,
    Net,
    UserError,
    Variables,
    check_choices,
)
from jaxbd.images import to_uint8_grid
from jaxbd.models.linen import apply_module
from jaxbd.models.unet import UNet

PAPER = "https://papers.nips.cc/paper/2021/hash/9d99197e2ebf03fc388d09f1e94af89b-Abstract.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the two stages; defaults follow an unofficial implementation (the authors
    released none).

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      epsilon: maximum change of a pixel, in [0, 1], in stage I.
      second_epsilon: the same in stage II; None for the value of stage I.
      eight_bit: whether to round triggered images to multiples of 1/255, as in 8-bit storage.
      width: channels of the generator's first level.
      latent_weight: weight, in the generator's loss, of the distance between the features of
        triggered and clean images.
      directions: directions on which features are projected: the "rows" of the last layer, or the
        rows scaled to length 1 ("unit").
      stamped_weight: weight w of triggered images in the classifier's loss; clean images have
        1 - w.
      generator_learning_rate: Adam's, on the generator.
      learning_rate: SGD's, on the classifier; constant in stage I, cosine to zero over stage II.
      momentum, weight_decay: SGD's, on the classifier.
      first_steps: length of stage I, in which generator and classifier alternate (50 epochs of 390
        batches).
      second_steps: length of stage II, in which the generator is frozen (500 such epochs).
    """

    target: int = 0
    all_to_all: bool = False
    epsilon: float = 0.1
    second_epsilon: float | None = None
    eight_bit: bool = False
    width: int = 16
    latent_weight: float = 1.0
    directions: Literal["rows", "unit"] = "rows"
    stamped_weight: float = 0.5
    generator_learning_rate: float = 5e-4
    learning_rate: float = 0.01
    momentum: float = 0.9
    # Differs from released code: weight decay applies in both stages; the rate of stage II follows
    # a cosine, not steps.
    weight_decay: float = 5e-4
    first_steps: int = 50 * 390
    second_steps: int = 500 * 390

    def __post_init__(self):
        check_choices("latent", self)
        for name in ("epsilon", "second_epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"latent: {name} {value} is not in (0, 1]")
        if not 0 < self.stamped_weight < 1 or not self.latent_weight >= 0:
            raise UserError("latent: stamped_weight must be in (0, 1) and latent_weight >= 0")
        if not (self.learning_rate > 0 and self.generator_learning_rate > 0):
            raise UserError("latent: learning_rate and generator_learning_rate must be > 0")
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise UserError("latent: momentum must be in [0, 1) and weight_decay >= 0")
        if self.first_steps < 1 or self.second_steps < 0 or self.width < 1:
            raise UserError(
                "latent: first_steps and width must be at least 1, second_steps at least 0"
            )

    @property
    def num_steps(self) -> int:
        """Length of both stages together."""
        return self.first_steps + self.second_steps


class Trigger(NamedTuple):
    """Maximum change of a pixel, epsilon [], and the generator's parameters."""

    epsilon: Array
    generator: ArrayTree


class Seen(NamedTuple):
    """Logits [B, K] of a net in evaluation, its features [B, d] before the last layer, and that
    layer's rows [K, d]."""

    logits: Array
    features: Array
    rows: Array


class State(NamedTuple):
    """Step [] int32, the classifier's variables, the generator's parameters, and both optimisers'
    states."""

    step: Array
    variables: Variables
    generator: ArrayTree
    opt: optax.OptState
    generator_opt: optax.OptState


class Info(NamedTuple):
    """Metrics of a step, all [].

    Attributes:
      loss: the classifier's, in nats.
      accuracy: on the batch's clean images; attack_success_rate: on all of them with the trigger.
      distance: sliced Wasserstein distance between triggered and clean features before the
        generator's step; 0 in stage II.
    """

    loss: Array
    accuracy: Array
    attack_success_rate: Array
    distance: Array


class Trainer(NamedTuple):
    """The attack as a trainer.

    Attributes:
      init: (key, variables) -> State (the variables are copied).
      step: (key, state, batch) -> (state, Info); the state's step number decides the stage.
      second: the same for states in stage II only. It is faster there, because `step` also computes
        the generator's gradient and drops it. (`step` has no compiled branch: on XLA:CPU that would
        be slower still, since a convolution's weight gradient is slow inside a branch.)
      extract: (state) -> (variables, Trigger).
    """

    init: Callable[[Key, Variables], State]
    step: Callable[..., tuple[State, Info]]
    second: Callable[..., tuple[State, Info]]
    extract: Callable[[State], tuple[Variables, Trigger]]


def penultimate(net: Net) -> Callable[[Variables, Array], Seen]:
    """The `features` argument of `make` for a net that ends in a linear layer named "head".

    Raises: UserError, when called, if `net.outputs` has no layer "features".
    """

    def observe(variables: Variables, images: Array) -> Seen:
        logits, layers = net.outputs(variables, images) if net.outputs else (None, {})
        if logits is None or "features" not in layers:
            raise UserError(
                "latent: this net does not show its features; give a function that returns them"
            )
        return Seen(logits, layers["features"], variables["params"]["head"]["kernel"].T)

    return observe


def attack(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack with a trained generator, on images of `image_shape` (H, W, C) with K = `classes`;
    triggers are `Trigger`s.

    `poison` stamps and relabels a share `stamped_weight` of the rows, so the loss on poisoned
    batches equals the classifier's loss in expectation.

    Raises: UserError when the target is out of range.
    """
    relabel = poison.relabelling("latent", classes, config.target, config.all_to_all)
    unet = UNet(image_shape[2], config.width)

    def init(key: Key) -> Trigger:
        """An untrained generator."""
        return Trigger(
            jnp.float32(config.epsilon), unet.init(key, jnp.zeros((1, *image_shape)))["params"]
        )

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """T(x) = clip(x + epsilon g(x), 0, 1) for each of `images` [B, H, W, C]; deterministic."""
        del key
        direction = apply_module(unet, {"params": trigger.generator}, images)
        change = trigger.epsilon.astype(images.dtype) * direction
        stamped = jnp.clip(images + change, 0, 1)
        if not config.eight_bit:
            return stamped
        # straight-through estimator: rounding itself has zero gradient
        return stamped + jax.lax.stop_gradient(to_uint8_grid(stamped) - stamped)

    return poison.attack(init, stamp, relabel, config.stamped_weight)


def make(
    net: Net,
    features: Callable[[Variables, Array], Seen],
    image_shape: tuple[int, int, int],
    classes: int,
    config: Config,
) -> Trainer:
    """The trainer of a victim of architecture `net`. `features` returns the features that the
    generator's loss compares, see `penultimate`."""
    planted = attack(image_shape, classes, config)
    rule, generator_rule = _classifier_rule(config), optax.adam(config.generator_learning_rate)

    def init(key: Key, variables: Variables) -> State:
        variables = jax.tree.map(jnp.copy, {"batch_stats": {}, **variables})
        generator = planted.init(key).generator
        opt, generator_opt = rule.init(variables["params"]), generator_rule.init(generator)
        return State(jnp.zeros((), jnp.int32), variables, generator, opt, generator_opt)

    def trigger_of(step: Array, generator: ArrayTree) -> Trigger:
        """The generator with the epsilon of step number `step` []."""
        later = config.epsilon if config.second_epsilon is None else config.second_epsilon
        return Trigger(
            jnp.where(step < config.first_steps, config.epsilon, later).astype(jnp.float32),
            generator,
        )

    def generator_loss(generator: ArrayTree, key: Key, state: State, batch: Batch, clean: Array):
        """CE(f(T(x)), wanted) + weight x distance of phi(T(x)) and phi(x); Doan et al. 2021, stage
        I."""
        stamped = planted.stamp(key, trigger_of(state.step, generator), batch.images)
        seen = features(state.variables, stamped)
        length = jnp.linalg.norm(seen.rows, axis=-1, keepdims=True)
        rows = seen.rows / length if config.directions == "unit" else seen.rows
        distance = losses.sliced_wasserstein(seen.features, clean, rows)
        entropy = losses.cross_entropy(seen.logits, planted.relabel(batch.labels))
        return entropy + config.latent_weight * distance, distance

    def move_generator(key: Key, state: State, batch: Batch) -> tuple[State, Array]:
        clean = features(state.variables, batch.images).features
        gradient, distance = jax.grad(generator_loss, has_aux=True)(
            state.generator, key, state, batch, clean
        )
        updates, opt = generator_rule.update(gradient, state.generator_opt, state.generator)
        return state._replace(
            generator=optax.apply_updates(state.generator, updates), generator_opt=opt
        ), distance

    def classifier_loss(params: ArrayTree, variables: Variables, images: Array, labels: Array):
        """(1 - w) CE(f(x), y) + w CE(f(T(x)), wanted); clean images first, as many triggered ones
        after them."""
        # Differs from released code: one pass over both halves, so that BatchNorm's moments cover
        # both.
        logits, stats = net.apply({**variables, "params": params}, images, train=True)
        clean, stamped = (
            losses.cross_entropy(*half)
            for half in zip(jnp.split(logits, 2), jnp.split(labels, 2), strict=True)
        )
        return (1 - config.stamped_weight) * clean + config.stamped_weight * stamped, (
            logits,
            stats,
        )

    def move_classifier(
        key: Key, state: State, batch: Batch
    ) -> tuple[State, tuple[Array, Array, Array]]:
        stamped = planted.stamp(key, trigger_of(state.step, state.generator), batch.images)
        images = jnp.concatenate([batch.images, jax.lax.stop_gradient(stamped)])
        labels = jnp.concatenate([batch.labels, planted.relabel(batch.labels)])
        params, grad = state.variables["params"], jax.value_and_grad(classifier_loss, has_aux=True)
        (value, (logits, stats)), gradient = grad(params, state.variables, images, labels)
        updates, opt = rule.update(gradient, state.opt, params)
        variables = {
            **state.variables,
            "params": optax.apply_updates(params, updates),
            "batch_stats": stats,
        }
        clean, triggered = (half.mean() for half in jnp.split(logits.argmax(-1) == labels, 2))
        state = state._replace(step=state.step + 1, variables=variables, opt=opt)
        return state, (value, clean, triggered)

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        moved, distance = move_generator(key, state, batch)
        first = state.step < config.first_steps
        # computed in both stages; stage II drops the update of the generator
        state = jax.tree.map(lambda new, old: jnp.where(first, new, old), moved, state)
        # Differs from released code: the classifier trains against the generator of this step, not
        # of the last epoch.
        state, seen = move_classifier(key, state, batch)
        return state, Info(*seen, jnp.where(first, distance, 0))

    def second(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        state, seen = move_classifier(key, state, batch)
        return state, Info(*seen, jnp.zeros_like(seen[0]))

    def extract(state: State) -> tuple[Variables, Trigger]:
        # the epsilon of the last step that was made
        return state.variables, trigger_of(jnp.maximum(state.step - 1, 0), state.generator)

    return Trainer(init, step, second, extract)


def _classifier_rule(config: Config) -> optax.GradientTransformation:
    """SGD with momentum; weight decay in PyTorch's convention."""
    rate = optax.join_schedules(
        [
            optax.constant_schedule(config.learning_rate),
            optax.cosine_decay_schedule(config.learning_rate, max(config.second_steps, 1)),
        ],
        [config.first_steps],
    )
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, momentum=config.momentum)
    )
