"""Attention distillation in PyTorch, written from the formulas of NAD and ARGD: maps, losses, and
one update of a small student beside a frozen teacher."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
import torch_dhbe
from torch import nn


def layers(net: torch_dhbe.Student, images):
    """Logits, and the outputs of both normalisation layers."""
    first = net.norm0(net.conv0(images))
    second = net.norm1(net.conv1(F.relu(first)))
    return net.head(F.relu(second).mean((2, 3))), [first, second]


def attention_map(features, power=2.0):
    """[B, C, H, W] -> [B, 1, H, W]."""
    summed = features.abs().pow(power).sum(1, keepdim=True)
    return summed / (torch.norm(summed, dim=(2, 3), keepdim=True) + 1e-6)


def nodes(student, teacher, weights):
    return sum(w * F.mse_loss(s, t) for w, s, t in zip(weights, student, teacher, strict=True))


def edges(student, teacher):
    """For lists of maps whose sizes fall."""
    terms = []
    for i in range(len(student)):
        for j in range(i + 1, len(student)):
            both = [_edge(maps[i], maps[j]) for maps in (student, teacher)]
            terms.append(F.mse_loss(*both))
    return sum(terms) / len(terms)


def _edge(larger, smaller):
    larger = F.adaptive_avg_pool2d(larger, smaller.shape[2:])
    distance = (larger - smaller).flatten(1).pow(2).sum(1).clamp(min=1e-12)
    return distance / distance.max()


class Unit(nn.Module):
    """Linear, then BatchNorm by the batch's moments."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs)

    def forward(self, x):
        return self.norm(self.linear(x))


class Embedding(nn.Module):
    """Relates every map of a student to every one of a teacher."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.count, self.dim = count, dim
        self.queries = nn.ModuleList([Unit(1, dim) for _ in range(count)])
        self.keys = nn.ModuleList([Unit(1, dim) for _ in range(count)])
        self.bilinear = Unit(dim, dim * count)
        self.student_place = nn.Parameter(torch.zeros(count, dim))
        self.teacher_place = nn.Parameter(torch.zeros(count, dim))

    def load(self, values):
        """The package's parameters, in float64."""
        as_torch = lambda array: nn.Parameter(torch.tensor(np.asarray(array, np.float64)))
        units = [*zip(self.queries, values.queries, strict=True)]
        units += [*zip(self.keys, values.keys, strict=True), (self.bilinear, values.bilinear)]
        for unit, (kernel, bias, scale, shift) in units:
            unit.linear.weight = as_torch(np.asarray(kernel).T)
            unit.linear.bias = as_torch(bias)
            unit.norm.weight, unit.norm.bias = as_torch(scale), as_torch(shift)
        self.student_place = as_torch(values.student_place)
        self.teacher_place = as_torch(values.teacher_place)
        return self.double()

    def forward(self, student, teacher):
        means = lambda maps: maps.mean((2, 3))
        query = torch.stack(
            [unit(means(m)) for unit, m in zip(self.queries, teacher, strict=True)], 1
        )
        key = torch.stack(
            [F.relu(unit(means(m))) for unit, m in zip(self.keys, student, strict=True)], 1
        )
        key = self.bilinear(key.flatten(0, 1)).view(-1, self.count, self.count, self.dim)
        logits = torch.einsum("bstq,btq->bts", key, query)
        share = F.softmax(
            (logits + self.teacher_place @ self.student_place.T) / self.dim**0.5, dim=2
        )
        total = 0
        for number, wanted in enumerate(teacher):
            value = F.normalize(wanted.pow(2).flatten(1), dim=1)
            pooled = [
                F.adaptive_avg_pool2d(maps.pow(2), wanted.shape[2:]).flatten(1) for maps in student
            ]
            own = F.normalize(torch.stack(pooled, 1), dim=2)
            apart = (own - value[:, None]).pow(2).mean(2)
            total = total + (apart * share[:, number]).sum(1).mean()
        return total


def update(student, teacher, images, labels, distance, *, rate, decay, more=()):
    """One step of the student's phase: (loss of the labels, distance); `student` and the parameters
    `more` change in place."""
    student.train()
    teacher.eval()
    rule = torch.optim.SGD(
        [*student.parameters(), *more], lr=rate, momentum=0.9, weight_decay=decay, nesterov=True
    )
    logits, found = layers(student, images)
    with torch.no_grad():
        wanted = [attention_map(each) for each in layers(teacher, images)[1]]
    entropy = F.cross_entropy(logits, labels)
    apart = distance([attention_map(each) for each in found], wanted)
    rule.zero_grad()
    (entropy + apart).backward()
    rule.step()
    return entropy.item(), apart.item()


def fine_tune(net, images, labels, *, rate, decay):
    """One step of the teacher's phase, on a copy."""
    net = copy.deepcopy(net).train()
    rule = torch.optim.SGD(
        net.parameters(), lr=rate, momentum=0.9, weight_decay=decay, nesterov=True
    )
    F.cross_entropy(net(images), labels).backward()
    rule.step()
    return net


def assert_same(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-9):
    """All weights, and the running moments of two-dimensional BatchNorm."""
    moments = {
        f"{name}.{leaf}": getattr(module, leaf)
        for name, module in theirs.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for leaf in ("running_mean", "running_var")
    }
    for name, value in {**dict(theirs.named_parameters()), **moments}.items():
        torch.testing.assert_close(
            ours.state_dict()[name], value.detach(), rtol=tolerance, atol=tolerance
        )
