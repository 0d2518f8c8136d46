"""One step of the largest margins as a plain PyTorch program (Wang et al. 2024), for
`bench_scale.py`."""

import torch
from torch import nn
from training_in_torch import ask


class Search:
    """Random images [N, C, H, W] of one class, all starts as one batch; `step` is one ascent."""

    def __init__(self, victim: nn.Module, shape, target: int, rate: float, device, autocast=None):
        self.victim, self.target, self.rate, self.autocast = victim, target, rate, autocast
        self.images = torch.rand(shape, device=device)
        self.best, self.best_margin = self.images, torch.full(shape[:1], -torch.inf, device=device)

    def step(self) -> torch.Tensor:
        """The margins [N] of the images as they were."""
        images = self.images.detach().requires_grad_()
        margins = margin(ask(self.victim, images, self.autocast), self.target)
        (gradient,) = torch.autograd.grad(margins.sum(), images)
        with torch.no_grad():
            better = margins > self.best_margin
            self.best = torch.where(better[:, None, None, None], images, self.best)
            self.best_margin = torch.maximum(margins, self.best_margin)
            self.images = (images + self.rate * gradient).clamp(0, 1)
        return margins.detach()


def margin(logits: torch.Tensor, target: int) -> torch.Tensor:
    """z_t - max over k != t of z_k, [N]; eq. (2)."""
    others = logits.clone()
    others[:, target] = -torch.inf
    return logits[:, target] - others.max(1).values
