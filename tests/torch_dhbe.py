"""DHBE's two generators, a small student, and one iteration in PyTorch, written from the paper's
and code's facts."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Body(nn.Module):
    """Linear, BN, n times [nearest x2, conv, BN, LeakyReLU 0.2], conv."""

    def __init__(self, noise: int, start: int, doublings: int, channels: int, width: int):
        super().__init__()
        features = 2 * width if doublings else width
        self.shape, self.doublings = (features, start, start), doublings
        self.linear, self.norm0 = (
            nn.Linear(noise, features * start * start),
            nn.BatchNorm2d(features),
        )
        for number in range(1, doublings + 1):
            wanted = width if number == doublings else 2 * width
            setattr(self, f"conv{number}", nn.Conv2d(features, wanted, 3, padding=1))
            setattr(self, f"norm{number}", nn.BatchNorm2d(wanted))
            features = wanted
        self.out = nn.Conv2d(features, channels, 3, padding=1)

    def forward(self, noise):
        x = self.norm0(self.linear(noise).view(-1, *self.shape))
        for number in range(1, self.doublings + 1):
            x = getattr(self, f"conv{number}")(F.interpolate(x, scale_factor=2))
            x = F.leaky_relu(getattr(self, f"norm{number}")(x), 0.2)
        return self.out(x)


class Generator(nn.Module):
    """`images`: tanh then BN (samples); otherwise BN then tanh (triggers)."""

    def __init__(
        self, noise: int, start: int, doublings: int, channels: int, width: int, *, images: bool
    ):
        super().__init__()
        self.body, self.images = Body(noise, start, doublings, channels, width), images
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, noise):
        x = self.body(noise)
        return self.norm(torch.tanh(x)) if self.images else torch.tanh(self.norm(x))


class Student(nn.Module):
    """The package's CNN with two stages, on normalised images."""

    def __init__(self, classes: int, width: int, channels: int):
        super().__init__()
        self.conv0, self.norm0 = (
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv1, self.norm1 = (
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(F.relu(self.norm0(self.conv0(x))))))
        return self.head(x.mean((2, 3)))


def load(module: nn.Module, variables) -> nn.Module:
    """`module` in float64 with the package's variables of the same layer names."""
    names = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    values = {}

    def walk(tree, path):
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, [*path, name])
            else:
                array = np.asarray(value)
                layer = module.get_submodule(".".join(path))
                if path[-1] == "linear":
                    features, side, _ = module.get_submodule(".".join(path[:-1])).shape
                    array = np.moveaxis(
                        array.reshape(*array.shape[:-1], side, side, features), -1, -3
                    )
                    array = array.reshape(*array.shape[:-3], -1)
                order = (3, 2, 0, 1) if array.ndim == 4 else range(array.ndim)[::-1]
                array = (
                    array.transpose(*order) if isinstance(layer, nn.Linear | nn.Conv2d) else array
                )
                values[".".join([*path, names[name]])] = torch.tensor(array.copy())

    for collection in ("params", "batch_stats"):
        walk(variables[collection], [])
    kept = {
        name: value
        for name, value in module.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    module.double().load_state_dict({**kept, **values})
    return module


def roughness(x):
    """The released image prior on [B, C, H, W]: one Frobenius norm per neighbour direction."""
    right, below = x[..., :-1] - x[..., 1:], x[..., :-1, :] - x[..., 1:, :]
    diagonals = x[..., 1:, :-1] - x[..., :-1, 1:], x[..., :-1, :-1] - x[..., 1:, 1:]
    return sum(torch.norm(difference) for difference in (right, below, *diagonals))


def stamped(images, patches, place, mean, std):
    """De-normalise, add at one place for all, normalise again."""
    row, column = place
    side, size = patches.shape[-1], images.shape[-1]
    padded = F.pad(patches, (column, size - side - column, row, size - side - row))
    return (images * std + mean + padded - mean) / std


def iteration(nets, optimisers, draws, *, regularisation, prior_weight, scale, mean, std):
    """k student updates, the sample generator, the trigger generator.

    `draws`: k + 2 tuples (noise of images, noise of triggers, place), the one before last without a
    trigger.
    """
    teacher, student, samples, triggers = nets
    for net in (student, samples, triggers):
        net.train()
    teacher.eval()
    add = lambda images, patches, place: stamped(images, scale * patches, place, mean, std)
    for z, z2, place in draws[:-2]:
        with torch.no_grad():
            images, patches = samples(z), triggers(z2)
            wanted = teacher(images)
        logits = student(images)
        changed = student(add(images, patches, place))
        loss = F.l1_loss(logits, wanted) + regularisation * F.l1_loss(changed, logits.detach())
        optimisers[0].zero_grad()
        loss.backward()
        optimisers[0].step()
    images = samples(draws[-2][0])
    loss = -F.l1_loss(student(images), teacher(images)) + prior_weight * roughness(images)
    optimisers[1].zero_grad()
    loss.backward()
    optimisers[1].step()
    z, z2, place = draws[-1]
    images, patches = samples(z).detach(), triggers(z2)
    loss = -F.l1_loss(student(images), student(add(images, patches, place)))
    optimisers[2].zero_grad()
    loss.backward()
    optimisers[2].step()
