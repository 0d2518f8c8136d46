"""One DHBE iteration as a plain PyTorch program (Yan et al. 2023, section 4 and App. B), for
`bench_dhbe.py`.

Layers, losses, optimisers and the order of passes are those of the released code. Work that its
loop does in vain is left out, so that the comparison is with what PyTorch needs: the student's
weights get no gradient while a generator learns, and the clean half of the trigger generator's loss
none at all.
"""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016a)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18(channels: int, side: int, classes: int, width: int) -> nn.Module:
    """ResNet-18 with a 3x3 stem and no pooling before its stages."""
    layers = [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [BasicBlock(inputs, outputs, 2 if stage else 1), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def vgg(channels: int, side: int, classes: int, width: int) -> nn.Module:
    """Three times two 3x3 convolutions with BatchNorm and ELU, then 2x2 max-pooling; linear."""
    layers, inputs = [], channels
    for stage in range(3):
        for _ in range(2):
            outputs = width * 2**stage
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ELU(inplace=True),
            ]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * (side // 8) ** 2, classes))


CLASSIFIERS = {"resnet18": resnet18, "vgg": vgg}


def _trunk(noise: int, start: int, doublings: int, channels: int, width: int) -> list[nn.Module]:
    """Linear to start x start, BatchNorm; per doubling a convolution, BatchNorm and LeakyReLU; a
    last convolution."""
    features = 2 * width if doublings else width
    layers = [nn.Linear(noise, features * start**2), nn.Unflatten(1, (features, start, start))]
    layers.append(nn.BatchNorm2d(features))
    for number in range(1, doublings + 1):
        wanted = width if number == doublings else 2 * width
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(features, wanted, 3, padding=1)]
        layers += [nn.BatchNorm2d(wanted), nn.LeakyReLU(0.2, inplace=True)]
        features = wanted
    return [*layers, nn.Conv2d(features, channels, 3, padding=1)]


def sample_generator(
    noise: int, start: int, doublings: int, channels: int, width: int
) -> nn.Module:
    """Noise to images that are already normalised: tanh, then BatchNorm without affine."""
    trunk = _trunk(noise, start, doublings, channels, width)
    return nn.Sequential(*trunk, nn.Tanh(), nn.BatchNorm2d(channels, affine=False))


def trigger_generator(
    noise: int, start: int, doublings: int, channels: int, width: int
) -> nn.Module:
    """Noise to triggers in (-1, 1): BatchNorm without affine, then tanh."""
    trunk = _trunk(noise, start, doublings, channels, width)
    return nn.Sequential(*trunk, nn.BatchNorm2d(channels, affine=False), nn.Tanh())


class Settings(NamedTuple):
    """Numbers of the iteration, named as in `jaxbd.repairs.dhbe.Config`; `autocast` is the nets'
    type or None."""

    regularisation: float
    inner_steps: int
    batch_size: int
    num_steps: int
    prior_weight: float
    learning_rate: float
    momentum: float
    weight_decay: float
    generator_rate: float
    trigger_rate: float
    noise_dim: int
    mean: float
    std: float
    autocast: torch.dtype | None


class Eraser:
    """The four nets with their optimisers; `iterate` is one iteration."""

    def __init__(
        self, teacher, student, samples, triggers, settings: Settings, device: torch.device
    ):
        self.settings, self.device = settings, device
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.student, self.samples, self.triggers = (
            net.to(device).train() for net in (student, samples, triggers)
        )
        self.student_rule = torch.optim.SGD(
            self.student.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.sample_rule = torch.optim.Adam(self.samples.parameters(), lr=settings.generator_rate)
        self.trigger_rule = torch.optim.Adam(self.triggers.parameters(), lr=settings.trigger_rate)
        drops = [settings.num_steps * 3 // 5, settings.num_steps * 4 // 5]
        rules = (self.student_rule, self.sample_rule, self.trigger_rule)
        self.schedules = [torch.optim.lr_scheduler.MultiStepLR(rule, drops, 0.1) for rule in rules]

    def iterate(self) -> None:
        """k updates of the student, one of the sample generator, one of the trigger generator."""
        for _ in range(self.settings.inner_steps):
            self.update_student()
        self.student.requires_grad_(False)
        self.update_samples()
        self.update_triggers()
        self.student.requires_grad_(True)
        for schedule in self.schedules:
            schedule.step()

    def update_student(self) -> None:
        with torch.no_grad():
            images = self.samples(self.noise())
            stamped = self.stamp(images, self.triggers(self.noise()))
            wanted = self.ask(self.teacher, images)
        logits = self.ask(self.student, images)
        changed = self.ask(self.student, stamped)
        loss = F.l1_loss(logits, wanted) + self.settings.regularisation * F.l1_loss(
            changed, logits.detach()
        )
        descend(self.student_rule, loss)

    def update_samples(self) -> None:
        images = self.samples(self.noise())
        discrepancy = F.l1_loss(self.ask(self.student, images), self.ask(self.teacher, images))
        descend(self.sample_rule, self.settings.prior_weight * roughness(images) - discrepancy)

    def update_triggers(self) -> None:
        with torch.no_grad():
            images = self.samples(self.noise())
            logits = self.ask(self.student, images)
        stamped = self.stamp(images, self.triggers(self.noise()))
        descend(self.trigger_rule, -F.l1_loss(self.ask(self.student, stamped), logits))

    def noise(self) -> torch.Tensor:
        return torch.randn(self.settings.batch_size, self.settings.noise_dim, device=self.device)

    def stamp(self, images, patches):
        """De-normalise, add at one random place for the whole batch, normalise again."""
        mean, std, room = (
            self.settings.mean,
            self.settings.std,
            images.shape[-1] - patches.shape[-1],
        )
        row, column = random.randint(0, room), random.randint(0, room)
        padded = F.pad(patches, (column, room - column, row, room - row))
        return ((images * std + mean + padded) - mean) / std

    def ask(self, net, images):
        """Logits, float32 whatever the type that the net computes in."""
        chosen = self.settings.autocast
        with torch.autocast(self.device.type, dtype=chosen, enabled=chosen is not None):
            return net(images).float()


def descend(rule: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One update."""
    rule.zero_grad(set_to_none=True)
    loss.backward()
    rule.step()


def roughness(images: torch.Tensor) -> torch.Tensor:
    """One Frobenius norm, over the whole batch, per direction of neighbour."""
    pairs = (
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, :-1] - images[..., 1:, 1:],
        images[..., :-1, 1:] - images[..., 1:, :-1],
    )
    return torch.stack([torch.linalg.vector_norm(pair) for pair in pairs]).sum()
