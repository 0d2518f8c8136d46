"""The statistics network T(z, x) of the mutual-information estimator."""

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.generators import LEAK, TORCH_KERNEL, torch_bias


class StatisticsNetwork(nn.Module):
    """Noise [N, noise] and triggers [N, h, w, C] -> statistics [N]; Qiao et al. 2019, section 4.1,
    in the released layout.

    Linear maps of both inputs to `hidden` are summed with one bias that starts at zero; then come a
    second hidden layer and a scalar output. LeakyReLU(0.2) follows every layer; also the output if
    `leaky_output` (released code).
    """

    hidden: int = 512
    leaky_output: bool = True

    @nn.compact
    def __call__(self, noise: Array, triggers: Array) -> Array:
        flat = triggers.reshape(triggers.shape[0], -1)
        # without bias: the second map has one for both
        x = nn.Dense(self.hidden, use_bias=False, kernel_init=TORCH_KERNEL)(noise)
        x = x + nn.Dense(self.hidden, kernel_init=TORCH_KERNEL)(flat)
        x = nn.leaky_relu(x, LEAK)
        x = nn.leaky_relu(
            nn.Dense(self.hidden, kernel_init=TORCH_KERNEL, bias_init=torch_bias(self.hidden))(x),
            LEAK,
        )
        x = nn.Dense(1, kernel_init=TORCH_KERNEL, bias_init=torch_bias(self.hidden))(x)
        return jnp.squeeze(nn.leaky_relu(x, LEAK) if self.leaky_output else x, -1)
