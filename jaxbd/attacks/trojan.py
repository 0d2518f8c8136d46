"""Trojaning: searches for a trigger that excites a few neurons, then fine-tunes the layers after
them (Liu et al. 2018).

There are three steps: `search` makes the trigger for a clean net, `make` is the attack that stamps
it, and fine-tuning with `optimiser` in `later_layers.only` ties the neurons to the target.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxbd import images as image_ops
from jaxbd.attacks import later_layers, patch, poison
from jaxbd.attacks.patch import Trigger
from jaxbd.base import Array, Attack, Batch, Key, Net, UserError, Variables, check_choices

PAPER = "https://www.ndss-symposium.org/wp-content/uploads/2018/02/ndss2018_03A-5_Liu_paper.pdf"
FEATURES, HEAD = "features", "head"
"""Names of the layer before the last and of the last layer in nets of this project."""
START = (175 / 255, 8 / 255)
"""Mean and standard deviation of the first pattern (released code)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the Trojaning attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      patch: side of the square trigger, in pixels.
      row: of its top-left corner; negative numbers count from the last row that fits.
      column: likewise.
      layer: layer of the neurons to excite, by its name in `Net.outputs`; only later layers are
        fine-tuned. A neuron is a channel; its value is the mean over positions. Default: the middle
        layer in `Net.outputs`.
      neurons: number of neurons to excite (10 in Yan et al. 2023, appendix A).
      choice: "random" neurons (Yan et al. 2023), or the "strongest", which have the largest sums of
        absolute outgoing weights; only for the layer "features" (Liu et al. 2018, section IV-A).
      value: value the neurons should reach; by default as large as possible (Yan et al. 2023).
      search_steps: length of the search for the trigger.
      search_learning_rate: Adam's, in the search (0.1 in TrojanZoo).
      retrain_steps: length of the fine-tuning.
      retrain_learning_rate: SGD's, in fine-tuning; cosine to zero.
      retrain_momentum: SGD's.
      retrain_weight_decay: SGD's, added to the gradient.
      poison_rate: share of a batch's images to stamp and relabel in fine-tuning.
    """

    target: int = 0
    all_to_all: bool = False
    patch: int = 5
    row: int = -1
    column: int = -1
    layer: str | None = None
    neurons: int = 10
    choice: Literal["random", "strongest"] = "random"
    value: float | None = None
    search_steps: int = 200
    search_learning_rate: float = 0.1
    retrain_steps: int = 400
    retrain_learning_rate: float = 0.01
    retrain_momentum: float = 0.9
    retrain_weight_decay: float = 5e-4
    poison_rate: float = 0.1

    def __post_init__(self):
        check_choices("trojan", self)
        poison.check_rate("trojan", self.poison_rate)
        if min(self.patch, self.neurons, self.search_steps, self.retrain_steps) < 1:
            raise UserError(
                "trojan: patch, neurons, search_steps and retrain_steps must be at least 1"
            )
        if self.value is not None and not math.isfinite(self.value):
            raise UserError(f"trojan: value {self.value} is not a number")
        if not (self.search_learning_rate > 0 and self.retrain_learning_rate > 0):
            raise UserError("trojan: search_learning_rate and retrain_learning_rate must be > 0")
        if not (0 <= self.retrain_momentum < 1 and self.retrain_weight_decay >= 0):
            raise UserError(
                "trojan: retrain_momentum must be in [0, 1) and retrain_weight_decay >= 0"
            )


class State(NamedTuple):
    """Step [] int32, pattern [h, w, C] before squashing to (0, 1), neurons [n] int32, the
    optimiser's state."""

    step: Array
    pattern: Array
    neurons: Array
    opt: optax.OptState


class Info(NamedTuple):
    """Loss [], and the neurons' mean value [] on the batch without and with the trigger."""

    loss: Array
    clean: Array
    excited: Array


class Search(NamedTuple):
    """The search for a trigger.

    Attributes:
      init: (key, variables) -> State.
      step: (key, state, batch, variables) -> (State, Info); ignores labels.
      extract: (state) -> Trigger, on the 8-bit grid.
    """

    init: Callable[[Key, Variables], State]
    step: Callable[[Key, State, Batch, Variables], tuple[State, Info]]
    extract: Callable[[State], Trigger]


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`; `init` gives an untrained
    trigger.

    Raises: UserError when the target is out of range or the patch or its place does not fit.
    """
    relabel = poison.relabelling("trojan", classes, config.target, config.all_to_all)
    place = patch.fixed("trojan", image_shape, config.patch, config.row, config.column)

    def init(key: Key) -> Trigger:
        """The trigger that the search starts from."""
        pattern = jax.nn.sigmoid(_draw_start(key, config, image_shape[2]))
        return Trigger(image_ops.to_uint8_grid(pattern), jnp.array(place, jnp.int32))

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Puts the patch on each of `images` [B, H, W, C]; pixels outside it are unchanged, bit for
        bit."""
        del key
        return jax.vmap(image_ops.paste, (0, None, None))(images, trigger.pattern, trigger.place)

    return poison.attack(init, stamp, relabel, config.poison_rate)


def search(net: Net, image_shape: tuple[int, int, int], classes: int, config: Config) -> Search:
    """Searches for the pattern that excites the chosen neurons of a clean `net` most.

    Raises: UserError when the target or the place does not fit; `init`, when the layer or its
      neurons do not exist.
    """
    # Differs from paper: Adam on a squashed pattern, on training images; the paper takes denoised
    # steps of normalised gradients on a blank image.
    planted, rule = make(image_shape, classes, config), optax.adam(config.search_learning_rate)
    # any key will do: the place is fixed
    place = planted.init(jax.random.key(0)).place
    outputs_of = net.outputs

    def init(key: Key, variables: Variables) -> State:
        pattern_key, choice_key = jax.random.split(key)
        pattern = _draw_start(pattern_key, config, image_shape[2])
        neurons = _choose_neurons(choice_key, net, variables, image_shape, config)
        return State(jnp.zeros((), jnp.int32), pattern, neurons, rule.init(pattern))

    def values(variables: Variables, images: Array, neurons: Array) -> Array:
        """The neurons' values [B, n]."""
        assert outputs_of is not None  # `init` has refused a net without layers
        outputs = outputs_of(variables, images)[1]
        output = outputs[_choose_layer(list(outputs), config)]
        return output.reshape(output.shape[0], -1, output.shape[-1]).mean(1)[:, neurons]

    def loss(
        pattern: Array, state: State, batch: Batch, variables: Variables, key: Key
    ) -> tuple[Array, Array]:
        stamped = planted.stamp(key, Trigger(jax.nn.sigmoid(pattern), place), batch.images)
        excited = values(variables, stamped, state.neurons)
        far = -excited if config.value is None else jnp.square(excited - config.value)
        return far.mean(), excited.mean()

    def step(key: Key, state: State, batch: Batch, variables: Variables) -> tuple[State, Info]:
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, excited), gradient = grad(state.pattern, state, batch, variables, key)
        updates, opt = rule.update(gradient, state.opt)
        clean = values(variables, batch.images, state.neurons).mean()
        pattern = cast(Array, optax.apply_updates(state.pattern, updates))
        return State(state.step + 1, pattern, state.neurons, opt), Info(value, clean, excited)

    def extract(state: State) -> Trigger:
        return Trigger(image_ops.to_uint8_grid(jax.nn.sigmoid(state.pattern)), place)

    return Search(init, step, extract)


def optimiser(config: Config) -> optax.GradientTransformation:
    """The optimiser of the fine-tuning; weight decay in PyTorch's convention."""
    rate = optax.cosine_decay_schedule(config.retrain_learning_rate, config.retrain_steps)
    decay = optax.add_decayed_weights(config.retrain_weight_decay)
    return optax.chain(decay, optax.sgd(rate, momentum=config.retrain_momentum))


def _draw_start(key: Key, config: Config, channels: int) -> Array:
    """The search's first pattern [h, w, C], before squashing."""
    mean, deviation = START
    noise = jax.random.normal(key, (config.patch, config.patch, channels))
    return jax.scipy.special.logit(jnp.clip(mean + deviation * noise, 0.05, 0.95))


def layer(net: Net, variables: Variables, image_shape: tuple[int, int, int], config: Config) -> str:
    """Name of the layer with the neurons to excite. Raises: UserError when the net shows no such
    layer."""
    return _choose_layer(
        list(later_layers.list_layers("trojan", net, variables, image_shape)), config
    )


def _choose_layer(names: list[str], config: Config) -> str:
    if config.layer is None:
        return names[(len(names) - 1) // 2]
    if config.layer not in names:
        raise UserError(
            f"trojan: the net shows no layer {config.layer!r}; choose from {', '.join(names)}"
        )
    return config.layer


def _choose_neurons(
    key: Key, net: Net, variables: Variables, image_shape: tuple[int, int, int], config: Config
) -> Array:
    """Chooses the neurons [n] int32. Raises: UserError when the layer has fewer, or when the
    outgoing weights are unknown."""
    widths = later_layers.list_layers("trojan", net, variables, image_shape)
    name = _choose_layer(list(widths), config)
    if config.neurons > widths[name]:
        raise UserError(
            f"trojan: neurons must be at most the {widths[name]} of layer {name}, got"
            f" {config.neurons}"
        )
    if config.choice == "random":
        return jax.random.permutation(key, widths[name])[: config.neurons].astype(jnp.int32)
    if name != FEATURES or HEAD not in variables["params"]:
        raise UserError(
            "trojan: choice strongest needs the layer features and a head after it; use choice"
            " random"
        )
    outgoing = jnp.abs(variables["params"][HEAD]["kernel"]).sum(-1)
    return jnp.argsort(-outgoing)[: config.neurons].astype(jnp.int32)
