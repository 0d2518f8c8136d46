"""One Neural Cleanse step as a plain PyTorch program (Wang et al. 2019, eq. 3), for
`bench_scale.py`.

The schedule of the mask's weight stays on the device: no step waits for a number.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from dhbe_in_torch import descend
from torch import nn
from training_in_torch import ask

COST_DOWN = 1.5


class Settings(NamedTuple):
    """Numbers of a step, named as in `jaxbd.inversion.neural_cleanse.Config`; `autocast`: the
    victim's type or None."""

    learning_rate: float
    b1: float
    b2: float
    attack_threshold: float
    first_cost: float
    cost_multiplier: float
    patience: int
    first_mask: float
    memory: float
    stop_ratio: float
    autocast: torch.dtype | None = None


class Search:
    """Mask [H, W] and pattern [C, H, W] that lead images to one target; `step` is one update on a
    batch."""

    def __init__(
        self,
        victim: nn.Module,
        shape: tuple[int, int, int],
        target: int,
        settings: Settings,
        device,
    ):
        self.victim, self.settings, self.target, self.steps = victim, settings, target, 0
        channels, height, width = shape
        start = lambda value: torch.atanh((2 * value - 1) * (1 - 1e-3)).requires_grad_()
        self.mask = start(settings.first_mask * torch.rand(height, width, device=device))
        self.pattern = start(torch.rand(channels, height, width, device=device))
        betas = (settings.b1, settings.b2)
        self.rule = torch.optim.Adam(
            [self.mask, self.pattern], lr=settings.learning_rate, betas=betas
        )
        zero = torch.zeros((), device=device)
        self.cost = self.worked = self.failed = self.rate = self.stalled = zero
        self.best_norm = self.stop_norm = zero + torch.inf
        self.raised = self.lowered = zero > 0
        self.best = squash(self.mask).detach(), squash(self.pattern).detach()

    def step(self, images) -> torch.Tensor:
        """The loss on images [B, C, H, W]."""
        mask, pattern = squash(self.mask), squash(self.pattern)
        logits = ask(self.victim, (1 - mask) * images + mask * pattern, self.settings.autocast)
        wanted = torch.full((len(images),), self.target, device=images.device)
        norm = mask.sum()
        loss = F.cross_entropy(logits, wanted) + self.cost * norm
        descend(self.rule, loss)
        with torch.no_grad():
            self.follow((logits.argmax(1) == wanted).float().mean(), norm, mask, pattern)
        return loss.detach()

    def follow(self, success, norm, mask, pattern) -> None:
        """Best mask so far, weight of the norm, and what the stop looks at."""
        own, choose = self.settings, torch.where
        old = min(own.memory, self.steps / (self.steps + 1))
        self.steps += 1
        self.rate = old * self.rate + (1 - old) * success
        works = torch.minimum(self.rate, success) >= own.attack_threshold
        better = works & (norm < self.best_norm)
        smaller = better & (norm < own.stop_ratio * self.stop_norm)
        keep = better | self.best_norm.isinf()
        self.best = choose(keep, mask, self.best[0]), choose(keep, pattern, self.best[1])
        self.best_norm, self.stop_norm = (
            choose(better, norm, self.best_norm),
            choose(smaller, norm, self.stop_norm),
        )
        self.stalled = choose(smaller, 0, self.stalled + 1)
        worked, failed = choose(works, self.worked + 1, 0), choose(works, 0, self.failed + 1)
        up, down = worked >= own.patience, failed >= own.patience
        self.raised, self.lowered = (
            self.raised | (up & (self.cost > 0)),
            self.lowered | (down & (self.cost > 0)),
        )
        higher = choose(self.cost == 0, own.first_cost, self.cost * own.cost_multiplier)
        self.cost = choose(
            up, higher, choose(down, self.cost / own.cost_multiplier**COST_DOWN, self.cost)
        )
        self.worked, self.failed = choose(up, 0, worked), choose(down, 0, failed)


def squash(value):
    """(tanh(value) + 1) / 2."""
    return (torch.tanh(value) + 1) / 2
