"""Unlearning: fine-tune on images stamped with recovered triggers under their true labels (Qiao et al. 2019, eq. 5)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses, supervised
from jaxbd.base import Array, ArrayTree, Batch, Key, Net, Repair, UserError, Variables, check_choices

PAPER = "https://arxiv.org/abs/1910.04749"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of unlearning; defaults follow the released code.

    Attributes:
      stamp_rate: r in eq. (5), probability with which an image of the batch is stamped. 0.01 in the paper; small data
        sets see too few stamped images at that rate.
      learning_rate: of SGD, constant.
      momentum: of SGD.
      weight_decay: of SGD, added to the gradient.
      num_steps: length of the run (the released code: 10 epochs of 62 batches).
      mixing: how several trigger models take turns. "sampled": each stamped image draws its model from the weights
        (the paper's mixture); "epoch": one model for `epoch_steps` steps, then the next (released).
      epoch_steps: length of one turn when mixing by epoch.
    """

    stamp_rate: float = 0.01
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    num_steps: int = 620
    mixing: Literal["sampled", "epoch"] = "sampled"
    epoch_steps: int = 62

    def __post_init__(self):
        check_choices("unlearn", self)
        if not 0 < self.stamp_rate <= 1:
            raise UserError(f"unlearn: stamp_rate {self.stamp_rate} is not in (0, 1]")
        if not self.learning_rate > 0 or self.num_steps < 1 or self.epoch_steps < 1:
            raise UserError("unlearn: learning_rate must be > 0, num_steps and epoch_steps at least 1")


class Evidence(NamedTuple):
    """What is known of the trigger.

    Attributes:
      models: trigger models stacked on a leading axis [L]: states of an inversion, or triggers of an attack.
      weights: [L] mixture weights gamma, summing to 1.
    """

    models: ArrayTree
    weights: Array


class State(NamedTuple):
    """step [] int32, variables of the net, optimiser state, and the evidence, which never changes."""

    step: Array
    variables: Variables
    opt: optax.OptState
    evidence: Evidence


class Info(NamedTuple):
    """loss [] in nats, accuracy [] on the batch as trained on, stamped [] share of stamped images."""

    loss: Array
    accuracy: Array
    stamped: Array


def single(model: ArrayTree) -> Evidence:
    """Evidence of one trigger model (a sub-model, a point trigger, or the true trigger for the ideal repair)."""
    return Evidence(jax.tree.map(lambda leaf: leaf[None], model), jnp.ones((1,)))


def uniform(models: ArrayTree) -> Evidence:
    """gamma_i = 1/N over models stacked on a leading axis [N] (Qiao et al. 2019, section 3.3)."""
    count = jax.tree.leaves(models)[0].shape[0]
    return Evidence(models, jnp.full((count,), 1 / count))


def entropy_weighted(models: ArrayTree, entropy: Array, slope: Array) -> Evidence:
    """gamma_i proportional to exp(h_i) / g'(g^-1(beta_i)) (Qiao et al. 2019, Algorithm 1).

    Args:
      models: stacked [N].
      entropy: h_i [N] in nats, from the bound.
      slope: g'(g^-1(beta_i)) [N] > 0, slope of the map from density to ASR at each level; ones for a linear g.
    """
    logits = entropy - jnp.log(slope)
    return Evidence(models, jax.nn.softmax(logits))


def mixed(stamp: Callable[[Key, Any, Array], Array]) -> Callable[[Key, Evidence, Array], Array]:
    """`stamp` for a mixture: each image's trigger comes from a model drawn by the weights, G_Y with Y ~ Categorical.

    The paper's mixture (Qiao et al. 2019, section 3.1).
    """

    def stamp_mixture(key: Key, evidence: Evidence, images: Array) -> Array:
        stamp_key, choose_key = jax.random.split(key)
        every = _stamp_each(stamp, stamp_key, evidence, images)
        choice = jax.random.categorical(choose_key, jnp.log(evidence.weights), shape=images.shape[:1])
        return every[choice, jnp.arange(images.shape[0])]

    return stamp_mixture


def _stamp_each(stamp: Callable[..., Array], key: Key, evidence: Evidence, images: Array) -> Array:
    """[L, B, H, W, C]: every image of [B, H, W, C] stamped by each of the L models."""
    keys = jax.random.split(key, evidence.weights.shape[0])
    return jax.vmap(stamp, (0, 0, None))(keys, evidence.models, images)


def make(net: Net, stamp: Callable[[Key, Any, Array], Array], config: Config) -> Repair:
    """Unlearning for `net`; `stamp(key, model, images)` is that of the inversion (or attack) behind the evidence.

    BatchNorm runs on batch moments and re-estimates its running ones, as released.
    """
    rule = supervised.optimiser(
        supervised.Config(
            learning_rate=config.learning_rate,
            schedule="constant",
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    )

    def init(key: Key, variables: Variables, evidence: Evidence) -> State:
        del key
        copy = lambda tree: jax.tree.map(jnp.copy, tree)
        variables = copy({"batch_stats": {}, **variables})
        return State(jnp.zeros((), jnp.int32), variables, rule.init(variables["params"]), copy(evidence))

    stamp_mixture = mixed(stamp)

    def stamped_images(key: Key, state: State, images: Array) -> Array:
        """Every image of [B, H, W, C] with a trigger of the mixture, or of the model whose turn it is."""
        if config.mixing == "sampled":
            return stamp_mixture(key, state.evidence, images)
        turn = (state.step // config.epoch_steps) % state.evidence.weights.shape[0]
        return _stamp_each(stamp, jax.random.split(key)[0], state.evidence, images)[turn]

    def loss(params: ArrayTree, variables: Variables, images: Array, labels: Array):
        logits, stats = net.apply({**variables, "params": params}, images, train=True)
        return losses.cross_entropy(logits, labels), (logits, stats)

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        rate_key, stamp_key = jax.random.split(key)
        chosen = jax.random.bernoulli(rate_key, config.stamp_rate, batch.labels.shape)
        images = stamped_images(stamp_key, state, batch.images)
        images = jnp.where(chosen[:, None, None, None], images, batch.images)
        params = state.variables["params"]
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, (logits, stats)), gradient = grad(params, state.variables, images, batch.labels)
        updates, opt = rule.update(gradient, state.opt, params)
        variables = {**state.variables, "params": optax.apply_updates(params, updates), "batch_stats": stats}
        accuracy = (logits.argmax(-1) == batch.labels).mean()
        return State(state.step + 1, variables, opt, state.evidence), Info(value, accuracy, chosen.mean())

    def extract(state: State) -> Variables:
        return state.variables

    return Repair(init, step, extract)
