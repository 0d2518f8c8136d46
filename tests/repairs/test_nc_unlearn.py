"""Neural Cleanse's unlearning: one update against PyTorch, and its one epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_student
from torch_student import PROBLEM

from jaxbd import methods
from jaxbd.base import RepairData, UserError
from jaxbd.cli.commands import repair as command
from jaxbd.repairs import nc_unlearn, stamping


def whiten(key, amount, images):
    """A trigger: a corner of one brightness."""
    return images.at[:, :3, :3].set(amount)


def test_one_update_is_that_of_pytorch_on_images_of_which_some_are_stamped():
    config = nc_unlearn.Config(stamp_rate=0.5, learning_rate=0.3, weight_decay=0.01)
    made = nc_unlearn.make(PROBLEM._replace(stamp=whiten), config)
    with jax.enable_x64(True):
        data = RepairData(torch_student.batch(9), trigger_params=jnp.float64(0.7))
        state = jax.jit(made.init)(jax.random.key(0), torch_student.variables(), data)
        net, batch = torch_student.twin(state.variables), torch_student.batch(6, 1)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
        for number in range(2):
            key = jax.random.key(number)
            _, chosen = stamping.stamp_some(key, whiten, 0.7, batch.images, 0.5)
            state, info = jax.jit(made.phases[0].step)(key, state, batch)
            assert 0 < info.stamped == chosen.mean() < 1
            images, labels = torch_student.as_torch(batch)
            images = images.clone()
            images[np.flatnonzero(chosen), :, :3, :3] = 0.7
            loss = F.cross_entropy(net(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            np.testing.assert_allclose(info.loss, loss.item(), rtol=1e-9)
        torch_student.assert_same(state.variables, net)


@pytest.mark.parametrize("count, steps", [(64, 1), (65, 2), (640, 10)])
def test_the_papers_length_is_one_pass_over_the_images(count, steps):
    data = RepairData(torch_student.batch(count))
    fitted = nc_unlearn.adapt(nc_unlearn.paper(), None, data, 64)
    assert (fitted.num_steps, fitted.epochs, fitted.stamp_rate) == (steps, None, 0.2)
    assert nc_unlearn.adapt(nc_unlearn.quick(), None, data, 64) == nc_unlearn.quick()


def test_steps_given_on_the_command_line_replace_the_epoch():
    asked = command.with_steps(nc_unlearn.paper(), 7)
    assert nc_unlearn.adapt(asked, None, RepairData(torch_student.batch(640)), 64).num_steps == 7


def test_the_trigger_comes_from_neural_cleanse():
    method = methods.find("repair", "nc-unlearn")
    assert method.search == "neural-cleanse" and method.needs == {"clean", "trigger"}
    _, defaults = command.choose(["MODEL", "--method", "nc-unlearn"])
    assert defaults.search.method == "neural-cleanse"


def test_a_problem_without_a_stamp_is_refused():
    with pytest.raises(UserError, match="nc-unlearn: the problem has no stamp"):
        nc_unlearn.make(PROBLEM, nc_unlearn.Config())
