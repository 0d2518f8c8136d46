"""Classifiers and one supervised step as a plain PyTorch program, for `bench_scale.py`."""

import torch
import torch.nn.functional as F
from dhbe_in_torch import CLASSIFIERS as PLAIN
from dhbe_in_torch import descend
from torch import nn


class WideBlock(nn.Module):
    """Pre-activation block of a WideResNet (Zagoruyko and Komodakis 2016); the shortcut reads what
    is activated."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = (
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        )
        self.bn2, self.conv2 = (
            nn.BatchNorm2d(outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.convShortcut = None
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x), inplace=True)
        x = x if self.convShortcut is None else self.convShortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y)), inplace=True))


class WideGroup(nn.Module):
    def __init__(self, count: int, inputs: int, outputs: int, stride: int):
        super().__init__()
        rest = [WideBlock(outputs, outputs, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(WideBlock(inputs, outputs, stride), *rest)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-16-1 at any width; modules are named as in public checkpoints."""

    def __init__(self, channels: int, side: int, classes: int, width: int):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.block1 = WideGroup(2, width, widths[0], 1)
        self.block2 = WideGroup(2, widths[0], widths[1], 2)
        self.block3 = WideGroup(2, widths[1], widths[2], 2)
        self.bn1, self.fc = nn.BatchNorm2d(widths[2]), nn.Linear(widths[2], classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x), inplace=True).mean((2, 3)))


CLASSIFIERS = {**PLAIN, "wrn16-1": WideResNet}
"""(channels, side, classes, width) -> module."""


class Normalised(nn.Module):
    """A net on pixels in [0, 1]."""

    def __init__(self, net: nn.Module, mean: float, std: float):
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, images):
        return self.net((images - self.mean) / self.std)


class Images:
    """uint8 images [N, C, H, W] and labels [N] on the device, and random batches of them as floats
    in [0, 1], laid out in memory as `layout` says."""

    def __init__(self, images, labels, batch: int, layout=torch.contiguous_format):
        self.images, self.labels, self.batch, self.layout = images, labels, batch, layout

    def draw(self):
        index = torch.randint(len(self.labels), (self.batch,), device=self.labels.device)
        images = self.images[index].to(torch.float32, memory_format=self.layout)
        return images / 255, self.labels[index]


class Training:
    """Supervised training with SGD; `step` is one update."""

    def __init__(
        self, net: nn.Module, rate: float, momentum: float, weight_decay: float, autocast=None
    ):
        self.net, self.autocast = net.train(), autocast
        self.rule = torch.optim.SGD(
            net.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay
        )

    def step(self, images, labels) -> torch.Tensor:
        loss = F.cross_entropy(ask(self.net, images, self.autocast), labels)
        descend(self.rule, loss)
        return loss.detach()


def ask(net: nn.Module, images, autocast=None):
    """Logits, float32 whatever the type `autocast` that the net computes in."""
    with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
        return net(images).float()
