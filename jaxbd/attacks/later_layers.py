"""Fine-tuning of what comes after one layer of a net: which parameters that is, and the trainer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from jaxbd import losses
from jaxbd.base import Array, ArrayTree, Batch, Key, Net, UserError, Variables


class State(NamedTuple):
    """step [] int32, the net's variables, the optimiser's state (of the trained parameters alone)."""

    step: Array
    variables: Variables
    opt: optax.OptState


class Info(NamedTuple):
    """loss [] in nats and accuracy [] on the batch as drawn."""

    loss: Array
    accuracy: Array


class Trainer(NamedTuple):
    """init: (variables) -> State (the variables are copied); step: (key, state, batch) -> (state, Info)."""

    init: Callable[[Variables], State]
    step: Callable[[Key, State, Batch], tuple[State, Info]]


def shown(method: str, net: Net, variables: Variables, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """The layers that the net shows, in order of execution, and how many channels each has.

    Raises: UserError when it shows none.
    """
    found: dict[str, int] = {}

    def look(variables: Variables) -> None:
        """Notes names as the net gives them: a result of `eval_shape` would be sorted by name."""
        outputs = net.outputs(variables, jnp.zeros((1, *image_shape)))[1] if net.outputs else {}
        found.update({name: output.shape[-1] for name, output in outputs.items()})

    jax.eval_shape(look, variables)
    if not found:
        raise UserError(f"{method}: this net shows no layers; bring one of this project's architectures")
    return found


def later(net: Net, variables: Variables, image_shape: tuple[int, int, int], layer: str) -> ArrayTree:
    """Which parameters the output of `layer` does not depend on, as a pytree of bools shaped like the parameters.

    Read off the program that computes the layer; nothing is computed.
    """

    def output(params: ArrayTree) -> Array:
        return net.outputs({**variables, "params": params}, jnp.zeros((1, *image_shape)))[1][layer]

    leaves, tree = jax.tree.flatten(variables["params"])
    program = jax.make_jaxpr(output)(variables["params"]).jaxpr
    needs = {variable: {number} for number, variable in enumerate(program.invars)}
    for equation in program.eqns:
        given = [needs.get(x, set()) for x in equation.invars if not isinstance(x, core.Literal)]
        needs |= dict.fromkeys(equation.outvars, set().union(*given))
    needed = needs.get(program.outvars[0], set())
    return jax.tree.unflatten(tree, [number not in needed for number in range(len(leaves))])


def trainer(net: Net, which: ArrayTree, rule: optax.GradientTransformation) -> Trainer:
    """The trainer of the parameters of `net` that `which` says, see `later`; the others and BatchNorm's moments stay.

    The net is in evaluation throughout: with moments of the batch, the layers that stay would change what they do.
    """

    def trained(params: ArrayTree) -> ArrayTree:
        """`params` with None for those that stay."""
        return jax.tree.map(lambda wanted, leaf: leaf if wanted else None, which, params)

    def merged(some: ArrayTree, params: ArrayTree) -> ArrayTree:
        return jax.tree.map(lambda wanted, new, old: new if wanted else old, which, some, params)

    def init(variables: Variables) -> State:
        variables = jax.tree.map(jnp.copy, {"batch_stats": {}, **variables})
        return State(jnp.zeros((), jnp.int32), variables, rule.init(trained(variables["params"])))

    def loss(some: ArrayTree, variables: Variables, batch: Batch) -> tuple[Array, Array]:
        params = merged(some, variables["params"])
        logits, _ = net.apply({**variables, "params": params}, batch.images, train=False)
        return losses.cross_entropy(logits, batch.labels), logits

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        del key
        some = trained(state.variables["params"])
        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(some, state.variables, batch)
        updates, opt = rule.update(gradient, state.opt, some)
        params = merged(optax.apply_updates(some, updates), state.variables["params"])
        accuracy = (logits.argmax(-1) == batch.labels).mean()
        return State(state.step + 1, {**state.variables, "params": params}, opt), Info(value, accuracy)

    return Trainer(init, step)
