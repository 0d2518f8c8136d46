"""Fine-tuning of the layers after a given one: finds their parameters, and makes an optimiser that
updates only these."""

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from jaxbd.base import Array, ArrayTree, Net, UserError, Variables


def list_layers(
    method: str, net: Net, variables: Variables, image_shape: tuple[int, int, int]
) -> dict[str, int]:
    """The layers in `Net.outputs` in order of execution, with their numbers of channels.

    Raises: UserError when there are none.
    """
    found: dict[str, int] = {}

    def look(variables: Variables) -> None:
        """Records names as a side effect, because the result of `eval_shape` would be sorted by
        name."""
        outputs = net.outputs(variables, jnp.zeros((1, *image_shape)))[1] if net.outputs else {}
        found.update({name: output.shape[-1] for name, output in outputs.items()})

    jax.eval_shape(look, variables)
    if not found:
        raise UserError(
            f"{method}: this net shows no layers; use one of this project's architectures"
        )
    return found


def later(
    net: Net, variables: Variables, image_shape: tuple[int, int, int], layer: str
) -> ArrayTree:
    """Marks the parameters on which the output of `layer` does not depend: a pytree of bools with
    the structure of the parameters.

    Follows the dependencies in the layer's jaxpr; computes nothing.
    """

    outputs = net.outputs
    assert outputs is not None  # `layer` is one of those that the net returns

    def output(params: ArrayTree) -> Array:
        return outputs({**variables, "params": params}, jnp.zeros((1, *image_shape)))[1][layer]

    leaves, tree = jax.tree.flatten(variables["params"])
    program = jax.make_jaxpr(output)(variables["params"]).jaxpr
    needs = {variable: {number} for number, variable in enumerate(program.invars)}
    for equation in program.eqns:
        given = [needs.get(x, set()) for x in equation.invars if not isinstance(x, core.Literal)]
        needs |= dict.fromkeys(equation.outvars, set().union(*given))
    needed = needs.get(program.outvars[0], set())
    return jax.tree.unflatten(tree, [number not in needed for number in range(len(leaves))])


def only(which: ArrayTree, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `rule` to the parameters marked in `which` (see `later`); the others do not change,
    and the rule does not see them."""
    return optax.multi_transform({True: rule, False: optax.set_to_zero()}, which)
