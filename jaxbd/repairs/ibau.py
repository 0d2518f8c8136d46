"""I-BAU: unlearns the worst universal perturbation of images, with the minimax problem's gradient
through its inner solution; needs no trigger (Zeng et al. 2022)."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses
from jaxbd.base import (
    Array,
    ArrayTree,
    Batch,
    Key,
    Need,
    Net,
    Phase,
    Problem,
    Repair,
    RepairData,
    UserError,
    Variables,
    check_choices,
)
from jaxbd.images import to_float

PAPER = "https://arxiv.org/abs/2110.03735"
NEEDS: frozenset[Need] = frozenset({"clean"})
CIFAR_BOUND = 10 / (32 * 32 * 3) ** 0.5
"""An L2 norm of 10 on 32 x 32 x 3 images, as a root mean square."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the minimax problem; defaults follow the released `defense.py`, where a pass over
    its 5,000 images is 50 steps here.

    Attributes:
      rounds: number of rounds; each searches a change and then unlearns it.
      inner_steps: steps of the search, which starts at zero.
      inner_learning_rate: SGD's, in the search.
      inner_labels: labels that the change should lead away from: "true" or "predicted".
      penalty: weight of ||delta||^2 in the inner loss.
      bound: maximum root mean square of the change over its pixels, enforced after every step of
        the search; 0 for no bound.
      outer_steps: unlearning steps per round.
      learning_rate: Adam's.
      stamp_share: share of a batch that carries the change, at least one image.
      fixed_points: K, number of iterations for the hypergradient.
      fixed_point_rate: step size of the inner descent that defines the fixed point.
      fixed_point_images: number of images for this descent, the same ones throughout.
    """

    rounds: int = 5
    inner_steps: int = 50
    inner_learning_rate: float = 10.0
    # Differs from paper: there the inner problem uses the true labels
    inner_labels: Literal["true", "predicted"] = "predicted"
    penalty: float = 1e-3
    # Differs from paper: there the change is confined to a ball
    bound: float = 0.0
    outer_steps: int = 50
    learning_rate: float = 1e-3
    # Differs from paper: there every image carries the change
    stamp_share: float = 0.01
    fixed_points: int = 5
    fixed_point_rate: float = 0.1
    fixed_point_images: int = 100

    def __post_init__(self):
        check_choices("ibau", self)
        for name in ("rounds", "inner_steps", "outer_steps", "fixed_points", "fixed_point_images"):
            if getattr(self, name) < 1:
                raise UserError(f"ibau: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("inner_learning_rate", "learning_rate", "fixed_point_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"ibau: {name} must be above 0, got {getattr(self, name)}")
        if not (0 <= self.penalty < float("inf") and 0 <= self.bound < float("inf")):
            raise UserError("ibau: penalty and bound must be at least 0")
        if not 0 < self.stamp_share <= 1:
            raise UserError(f"ibau: stamp_share must be in (0, 1], got {self.stamp_share}")


def quick(**changes: Any) -> Config:
    """For small data sets and a CPU. The change is bounded, because otherwise it outgrows small
    images. The fixed point's step is smaller, because otherwise the iteration diverges where logits
    are steep. Chosen on the small net of the tests, not on a published model."""
    settings = dict(inner_steps=20, outer_steps=60, stamp_share=0.3, bound=CIFAR_BOUND)
    return Config(**{**settings, "fixed_point_rate": 0.01, **changes})


def released(**changes: Any) -> Config:
    """The settings of the released `defense.py`."""
    return Config(**changes)


def paper(**changes: Any) -> Config:
    """The minimax problem as stated in the paper: true labels, and on every image a change within
    the ball of the released notebook (which projects once, after the search)."""
    settings = dict(inner_labels="true", bound=CIFAR_BOUND, stamp_share=1.0)
    return Config(**{**settings, **changes})


class State(NamedTuple):
    """Step [] int32, the net's variables, Adam's state, the change delta [H, W, C], and the images
    of the fixed point."""

    step: Array
    variables: Variables
    opt: optax.OptState
    delta: Array
    fixed: Batch


class Searched(NamedTuple):
    """Info of a search: inner loss [] in nats, norm [] of the change, and accuracy [] under it."""

    loss: Array
    norm: Array
    accuracy: Array


class Info(NamedTuple):
    """Info of the unlearning: outer loss [] in nats and accuracy [] on the stamped batch, and norm
    [] of the hypergradient's implicit part."""

    loss: Array
    accuracy: Array
    implicit: Array


def make(problem: Problem, config: Config) -> Repair:
    """Unlearning for `problem.net`, which runs in evaluation throughout, as released, so that
    BatchNorm's running moments do not change."""
    net, rule = problem.net, optax.adam(config.learning_rate)

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        assert data.clean is not None
        rows = jax.random.permutation(key, len(data.clean.labels))[: config.fixed_point_images]
        fixed = Batch(data.clean.images[rows], data.clean.labels[rows])
        params = variables["params"]
        delta = jnp.zeros(problem.image_shape, jax.tree.leaves(params)[0].dtype)
        # copies, since drivers donate the state
        copied = jax.tree.map(jnp.copy, {"batch_stats": {}, **variables})
        return State(jnp.zeros((), jnp.int32), copied, rule.init(copied["params"]), delta, fixed)

    def search(key: Key, state: State, batch: Batch) -> tuple[State, Searched]:
        del key
        if config.inner_labels == "predicted":
            logits, _ = net.apply(state.variables, batch.images)
            batch = batch._replace(labels=logits.argmax(-1).astype(batch.labels.dtype))
        grad = jax.value_and_grad(inner_loss, has_aux=True)
        params = state.variables["params"]
        (loss, accuracy), gradient = grad(
            state.delta, params, state.variables, net, batch, config.penalty
        )
        delta = project(state.delta - config.inner_learning_rate * gradient, config.bound)
        after = state._replace(step=state.step + 1, delta=delta)
        return after, Searched(loss, jnp.sqrt(jnp.square(delta).sum()), accuracy)

    def unlearn(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        params = state.variables["params"]
        carriers = choose_carriers(key, len(batch.labels), config.stamp_share)
        loss, accuracy, direct, implicit = hypergradient(net, state, batch, carriers, config)
        total = jax.tree.map(jnp.add, direct, implicit)
        updates, opt = rule.update(total, state.opt, params)
        variables = {**state.variables, "params": optax.apply_updates(params, updates)}
        after = state._replace(step=state.step + 1, variables=variables, opt=opt)
        size = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(implicit)))
        return after, Info(loss, accuracy, size)

    def extract(state: State, dial: None = None) -> Variables:
        del dial
        return state.variables

    # every round searches from zero change
    forget = lambda state: state._replace(delta=jnp.zeros_like(state.delta))
    phases = []
    for number in range(1, config.rounds + 1):
        phases.append(Phase(f"search {number}", search, config.inner_steps, Searched, begin=forget))
        phases.append(Phase(f"unlearn {number}", unlearn, config.outer_steps, Info))
    return Repair(init, tuple(phases), extract, needs=NEEDS)


def inner_loss(
    delta: Array,
    params: ArrayTree,
    variables: Variables,
    net: Net,
    batch: Batch,
    penalty: float,
) -> tuple[Array, Array]:
    """(-L(f(x + delta), y) + penalty ||delta||^2 [] in nats, accuracy [] under the change); the
    search minimises the first over delta. Changed images are not clipped, as released."""
    changed = to_float(batch.images) + delta[None]
    logits, _ = net.apply({**variables, "params": params}, changed)
    accuracy = (logits.argmax(-1) == batch.labels).mean()
    entropy = losses.cross_entropy(logits, batch.labels)
    return -entropy + penalty * jnp.square(delta).sum(), accuracy


def outer_loss(
    delta: Array,
    params: ArrayTree,
    variables: Variables,
    net: Net,
    batch: Batch,
    carriers: Array,
) -> tuple[Array, Array]:
    """(L(f(x + c delta), y) [] in nats, accuracy []) with carriers c [B] of 0 and 1."""
    images = batch.images + carriers[:, None, None, None] * delta[None]
    logits, _ = net.apply({**variables, "params": params}, images)
    return losses.cross_entropy(logits, batch.labels), (logits.argmax(-1) == batch.labels).mean()


def hypergradient(
    net: Net, state: State, batch: Batch, carriers: Array, config: Config
) -> tuple[Array, Array, ArrayTree, ArrayTree]:
    """Returns (outer loss E [], accuracy [], dE/dtheta, the implicit part of the hypergradient) at
    delta, which is assumed to be a fixed point of phi(delta, theta) = delta - rate * d inner_loss /
    d delta.

    With v = (1 - d phi / d delta)^-T dE/d delta, the implicit part is (d phi / d theta)^T v. v is
    the limit of v <- (d phi / d delta)^T v + dE/d delta from 0, truncated after K iterations (Zeng
    et al. 2022, section 4; Grazzi et al. 2020).
    # Differs from released code: always makes K iterations, even if v no longer changes.
    """
    params, variables = state.variables["params"], state.variables
    task = variables, net, batch, carriers
    grad = jax.value_and_grad(outer_loss, argnums=(0, 1), has_aux=True)
    (loss, accuracy), (by_delta, direct) = grad(state.delta, params, *task)
    fixed = variables, net, state.fixed, config.penalty
    slope = jax.grad(lambda delta, params: inner_loss(delta, params, *fixed)[0])
    # the Hessian is symmetric, so forward mode suffices, and the net runs once for all K
    _, times_hessian = jax.linearize(lambda delta: slope(delta, params), state.delta)
    rate, v = config.fixed_point_rate, jnp.zeros_like(state.delta)
    for _ in range(config.fixed_points):
        v = v - rate * times_hessian(v) + by_delta
    _, pull_back = jax.vjp(lambda params: -rate * slope(state.delta, params), params)
    return loss, accuracy, direct, pull_back(v)[0]


def choose_carriers(key: Key, count: int, share: float) -> Array:
    """Random zeros and ones [count] with a share of `share` ones, at least one."""
    order = jax.random.permutation(key, count)
    return (order < max(int(count * share), 1)).astype(jnp.float32)


def project(delta: Array, bound: float) -> Array:
    """Scales `delta` to a root mean square of at most `bound`; 0 means no bound."""
    size = jnp.sqrt(jnp.square(delta).mean())
    return delta * jnp.minimum(1, bound / jnp.maximum(size, 1e-12)) if bound else delta
