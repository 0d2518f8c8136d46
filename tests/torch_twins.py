"""PyTorch references of our architectures, with the module names that public checkpoints have."""

import torch
import torch.nn.functional as F
from torch import nn


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False, **options)


class BasicBlock(nn.Module):
    """`shortcut` is the attribute's name: "downsample" (torchvision) or "shortcut" (kuangliu)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.projects = stride != 1 or inputs != outputs
        self.attribute = shortcut
        if self.projects:
            setattr(
                self,
                shortcut,
                nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)),
            )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (getattr(self, self.attribute)(x) if self.projects else x))


class ResNet(nn.Module):
    def __init__(self, blocks, classes: int, width: int, stem: str, naming: str, channels: int = 3):
        super().__init__()
        self.stem, self.head = stem, "fc" if naming == "torchvision" else "linear"
        side, stride, padding = {"cifar": (3, 1, 1), "imagenet": (7, 2, 3), "64px": (5, 2, 1)}[stem]
        self.conv1 = nn.Conv2d(channels, width, side, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        shortcut = "downsample" if naming == "torchvision" else "shortcut"
        inputs = width
        for stage, count in enumerate(blocks):
            outputs, stack = width * 2**stage, []
            for index in range(count):
                stack.append(
                    BasicBlock(inputs, outputs, 2 if stage and index == 0 else 1, shortcut)
                )
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*stack))
        setattr(self, self.head, nn.Linear(inputs, classes))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return getattr(self, self.head)(x.mean((2, 3)))


class PreActBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 3)
        self.shortcut = (
            nn.Sequential(_conv(inputs, outputs, 1, stride))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class PreActResNet18(nn.Module):
    def __init__(self, classes: int, width: int, channels: int = 3):
        super().__init__()
        self.conv1 = _conv(channels, width, 3)
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            first = PreActBlock(inputs, outputs, 2 if stage else 1)
            setattr(
                self, f"layer{stage + 1}", nn.Sequential(first, PreActBlock(outputs, outputs, 1))
            )
            inputs = outputs
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 3)
        self.convShortcut = _conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = x if self.convShortcut is None else self.convShortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideGroup(nn.Module):
    def __init__(self, count: int, inputs: int, outputs: int, stride: int):
        super().__init__()
        rest = [WideBlock(outputs, outputs, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(WideBlock(inputs, outputs, stride), *rest)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth: int, factor: int, classes: int, width: int, channels: int = 3):
        super().__init__()
        count, widths = (depth - 4) // 6, [width * factor * 2**group for group in range(3)]
        self.conv1 = _conv(channels, width, 3)
        self.block1 = WideGroup(count, width, widths[0], 1)
        self.block2 = WideGroup(count, widths[0], widths[1], 2)
        self.block3 = WideGroup(count, widths[1], widths[2], 2)
        self.bn1, self.fc = nn.BatchNorm2d(widths[2]), nn.Linear(widths[2], classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class SeparableBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = (
            _conv(inputs, inputs, 3, stride, groups=inputs),
            nn.BatchNorm2d(inputs),
        )
        self.conv2, self.bn2 = _conv(inputs, outputs, 1), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class MobileNet(nn.Module):
    def __init__(self, classes: int, width: int, channels: int = 3):
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, width, 3), nn.BatchNorm2d(width)
        outputs = [width * m for m in (2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32)]
        strides = [2 if index in (1, 3, 5, 11) else 1 for index in range(13)]
        inputs = [width, *outputs[:-1]]
        self.layers = nn.Sequential(*map(SeparableBlock, inputs, outputs, strides))
        self.linear = nn.Linear(outputs[-1], classes)

    def forward(self, x):
        return self.linear(self.layers(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class SmallVGG(nn.Module):
    def __init__(
        self, classes: int, width: int, side: int = 32, channels: int = 3, activation: type = nn.ELU
    ):
        super().__init__()
        stack, inputs = [], channels
        for outputs in (width, 2 * width, 4 * width):
            for number in (inputs, outputs):
                stack += [
                    nn.Conv2d(number, outputs, 3, padding=1),
                    nn.BatchNorm2d(outputs),
                    activation(),
                ]
            stack += [nn.MaxPool2d(2), nn.Dropout(0.0)]
            inputs = outputs
        self.features = nn.Sequential(*stack)
        self.classifier = nn.Linear(inputs * (side // 8) ** 2, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class SmallCNN(nn.Module):
    """Our own small CNN, in the names it is exported with."""

    def __init__(self, classes: int, width: int, stages: int = 3, channels: int = 3):
        super().__init__()
        self.stages, inputs = stages, channels
        for stage in range(stages):
            outputs = width * 2**stage
            setattr(self, f"conv{stage}", _conv(inputs, outputs, 3, 2 if stage else 1))
            setattr(self, f"norm{stage}", nn.BatchNorm2d(outputs))
            inputs = outputs
        self.head = nn.Linear(inputs, classes)

    def forward(self, x):
        for stage in range(self.stages):
            x = F.relu(getattr(self, f"norm{stage}")(getattr(self, f"conv{stage}")(x)))
        return self.head(x.mean((2, 3)))


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Random weights and BatchNorm statistics, scales and shifts far from where training starts;
    evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda tensor, low, high: tensor.uniform_(low, high, generator=generator)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                uniform(layer.weight, 0.5, 1.5), uniform(layer.bias, -0.5, 0.5)
                uniform(layer.running_mean, -0.5, 0.5), uniform(layer.running_var, 0.3, 2.0)
                layer.num_batches_tracked.fill_(17)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                bound = (6 / layer.weight[0].numel()) ** 0.5
                uniform(layer.weight, -bound, bound)
                if layer.bias is not None:
                    uniform(layer.bias, -0.5, 0.5)
    return module.eval()


def tensors(module: nn.Module) -> dict:
    """The state_dict as NumPy copies."""
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}
