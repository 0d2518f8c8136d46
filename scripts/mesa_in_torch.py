"""One MESA step as a plain PyTorch program (Qiao et al. 2019, eqs. 3 and 4), for `bench_scale.py`.

Generator, statistics network, losses, optimisers and the order of passes are those of the released
code. Work that its loop does in vain is left out, so that the comparison is with what PyTorch
needs: the victim's weights get no gradient, nor do those of the statistics network while the
generator learns.
"""

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from dhbe_in_torch import descend
from torch import nn
from training_in_torch import ask


class Generator(nn.Module):
    """Noise in four chunks, one to each of four linear layers; BatchNorm and LeakyReLU after three,
    then a sigmoid."""

    def __init__(self, noise: int, hidden: int, channels: int, side: int):
        super().__init__()
        chunk, self.shape = noise // 4, (channels, side, side)
        self.layers = nn.ModuleList(
            nn.Linear(chunk + (hidden if n else 0), hidden) for n in range(3)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(3))
        self.last = nn.Linear(hidden + chunk, channels * side * side)

    def forward(self, noise):
        chunks = noise.chunk(4, dim=1)
        x = F.leaky_relu(self.norms[0](self.layers[0](chunks[0])), 0.2)
        for layer, norm, chunk in zip(self.layers[1:], self.norms[1:], chunks[1:], strict=False):
            x = F.leaky_relu(norm(layer(torch.cat([x, chunk], 1))), 0.2)
        return torch.sigmoid(self.last(torch.cat([x, chunks[3]], 1))).view(-1, *self.shape)


class Statistics(nn.Module):
    """T(z, x): both inputs through linear maps, summed; a second layer; a scalar. LeakyReLU after
    each."""

    def __init__(self, noise: int, hidden: int, values: int):
        super().__init__()
        self.noise = nn.Linear(noise, hidden, bias=False)
        self.trigger = nn.Linear(values, hidden)
        nn.init.zeros_(self.trigger.bias)
        self.middle, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def forward(self, noise, triggers):
        x = F.leaky_relu(self.noise(noise) + self.trigger(triggers.flatten(1)), 0.2)
        x = F.leaky_relu(self.middle(x), 0.2)
        return F.leaky_relu(self.last(x), 0.2).squeeze(1)


class Settings(NamedTuple):
    """Numbers of a step, named as in `jaxbd.inversion.mesa.Config`; `autocast` is the victim's type
    or None."""

    patch: int
    entropy_weight: float
    noise_dim: int
    hidden: int
    learning_rate: float
    b1: float
    b2: float
    trigger_noise: float
    debias_rate: float
    autocast: torch.dtype | None = None


class SubModel:
    """One level's model of one class; `step` updates generator and statistics network on a
    batch."""

    def __init__(
        self,
        victim: nn.Module,
        channels: int,
        target: int,
        level: float,
        settings: Settings,
        device,
    ):
        self.victim, self.target, self.level, self.settings = victim, target, level, settings
        self.device, self.average = device, None
        own = settings
        self.generator = (
            Generator(own.noise_dim, own.hidden, channels, own.patch).to(device).train()
        )
        self.statistics = Statistics(own.noise_dim, own.hidden, channels * own.patch**2).to(device)
        adam = lambda net: torch.optim.Adam(
            net.parameters(), lr=own.learning_rate, betas=(own.b1, own.b2)
        )
        self.generator_rule, self.statistics_rule = adam(self.generator), adam(self.statistics)

    def step(self, images) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of both nets on images [B, C, H, W]; one random place for the whole batch."""
        room = images.shape[-1] - self.settings.patch
        place = random.randint(0, room), random.randint(0, room)
        jitter = torch.randn(
            len(images), images.shape[1], *2 * (self.settings.patch,), device=self.device
        )
        draw = lambda: torch.rand(len(images), self.settings.noise_dim, device=self.device)
        noises, others = (draw(), draw()), (draw(), draw())
        self.statistics.requires_grad_(False)
        first = self.generator_loss(images, *noises, place, jitter)
        descend(self.generator_rule, first)
        self.statistics.requires_grad_(True)
        second = self.statistics_loss(*others)
        descend(self.statistics_rule, second)
        return first.detach(), second.detach()

    def generator_loss(self, images, noise, other, place: tuple[int, int], jitter):
        """max(0, beta - F) - alpha I(G(z); z'), eq. (4)."""
        triggers = self.generator(noise)
        side, (row, column) = self.settings.patch, place
        stamped = images.clone()
        stamped[:, :, row : row + side, column : column + side] = (
            triggers + self.settings.trigger_noise * jitter
        )
        logits = ask(self.victim, stamped, self.settings.autocast)
        confidence = logits.softmax(1)[:, self.target]
        joint, marginal = self.statistics(noise, triggers), self.statistics(other, triggers)
        entropy = joint.mean() - log_mean_exp(marginal)  # eq. (3)
        return F.relu(self.level - confidence).mean() - self.settings.entropy_weight * entropy

    def statistics_loss(self, noise, other):
        """Minus the bound, its gradient with the moving average of E[e^T] (Belghazi et al. 2018,
        section 3.2)."""
        with torch.no_grad():
            triggers = self.generator(noise)
        joint, marginal = self.statistics(noise, triggers), self.statistics(other, triggers)
        mean, rate = log_mean_exp(marginal.detach()), self.settings.debias_rate
        if self.average is None:
            self.average = mean
        else:
            self.average = torch.logaddexp(math.log1p(-rate) + self.average, math.log(rate) + mean)
        return torch.exp(marginal - self.average).mean() - joint.mean()


def log_mean_exp(values):
    """log of the mean of e^x over [N]."""
    return torch.logsumexp(values, 0) - math.log(len(values))
