"""PyTorch references of families of architectures, small, with the module names that public
checkpoints have. Written for the tests; every block's arithmetic stands here once more."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def images(side: int, count: int) -> np.ndarray:
    """Random images [count, side, side, 3] in [0, 1]."""
    return np.random.default_rng(side).uniform(0, 1, (count, side, side, 3)).astype(np.float32)


def chw(x: np.ndarray) -> torch.Tensor:
    """The images as PyTorch takes them."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def assert_close(ours, theirs: torch.Tensor, relative: float = 1e-4):
    """Largest difference, in units of the largest value."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= relative * np.abs(theirs).max()


def conv(inputs, outputs, size=3, stride=1, bias=False, groups=1, padding=None):
    padding = size // 2 if padding is None else padding
    return nn.Conv2d(inputs, outputs, size, stride, padding, bias=bias, groups=groups)


class CifarBlock(nn.Module):
    """A basic block of nets for CIFAR; "A": shortcuts without weights, "B": 1x1 convolutions."""

    def __init__(self, inputs, outputs, stride, option):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.widens, self.option, self.more = inputs != outputs, option, outputs - inputs
        self.stride = stride
        self.shortcut = nn.Sequential()
        if self.widens and option == "B":
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.widens and self.option != "B":
            before = self.more // 2 if self.option == "A" else 0
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.more - before)
            )
        else:
            x = self.shortcut(x)
        return F.relu(x + y)


class Stages(nn.Module):
    """conv1, bn1, layer1.., a head, with any block made by `block(inputs, width, stride)`."""

    def __init__(
        self,
        block,
        counts,
        width,
        expansion,
        classes,
        head="linear",
        stem=None,
        strides=(1, 2, 2, 2),
    ):
        super().__init__()
        self.conv1, self.bn1 = stem or conv(3, width), nn.BatchNorm2d(width)
        inputs, self.names, self.head = width, [], head
        for stage, count in enumerate(counts):
            blocks = []
            for index in range(count):
                stride = strides[stage] if index == 0 else 1
                blocks.append(block(inputs, width * 2**stage, stride))
                inputs = width * 2**stage * expansion
            self.names.append(f"layer{stage + 1}")
            setattr(self, self.names[-1], nn.Sequential(*blocks))
        setattr(self, head, nn.Linear(inputs, classes))
        self.pool = stem is not None

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.pool else x
        for name in self.names:
            x = getattr(self, name)(x)
        return getattr(self, self.head)(x.mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, with `groups`, squeeze-and-excitation and the full width inside where asked
    for."""

    def __init__(
        self, inputs, width, stride, groups=1, squeeze=False, shortcut="shortcut", wide=False
    ):
        super().__init__()
        outputs = width * 4
        width = outputs if wide else width
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, groups=groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.attribute = shortcut
        if stride != 1 or inputs != outputs:
            projection = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            setattr(self, shortcut, projection)
        if squeeze:
            self.fc1, self.fc2 = conv(outputs, 2, 1, bias=True), conv(2, outputs, 1, bias=True)

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        if hasattr(self, "fc1"):
            weights = self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True))))
            y = y * torch.sigmoid(weights)
        return F.relu(
            y + (getattr(self, self.attribute)(x) if hasattr(self, self.attribute) else x)
        )


class PreActBottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), conv(width, width * 4, 1)
        if stride != 1 or inputs != width * 4:
            self.shortcut = nn.Sequential(conv(inputs, width * 4, 1, stride))

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = self.shortcut(y) if hasattr(self, "shortcut") else x
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return x + self.conv3(F.relu(self.bn3(y)))


class PreActResNet(Stages):
    def __init__(self, counts, width, classes):
        super().__init__(PreActBottleneck, counts, width, 4, classes)
        del self.bn1

    def forward(self, x):
        x = self.conv1(x)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.linear(x.mean((2, 3)))


class BiasedWide(nn.Module):
    """A block of meliketoy/wide-resnet.pytorch: biases, the stride in the second convolution, the
    shortcut from the input."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, bias=True)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, bias=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(conv(inputs, width, 1, stride, bias=True))

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + self.shortcut(x)


class BiasedWideResNet(nn.Module):
    def __init__(self, count, factor, width, classes):
        super().__init__()
        self.conv1, inputs = conv(3, width, bias=True), width
        for stage in range(3):
            blocks = []
            for index in range(count):
                outputs = width * factor * 2**stage
                blocks.append(BiasedWide(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn1, self.linear = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(F.relu(self.bn1(x)).mean((2, 3)))


def sequential_vgg(plan, linears, norm, places=1):
    """`plan`: widths, and "M" for pooling; `linears`: widths of the hidden linear layers."""
    layers, inputs = [], 3
    for width in plan:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [conv(inputs, width, bias=True), *([nn.BatchNorm2d(width)] if norm else [])]
        layers.append(nn.ReLU())
        inputs = width
    head, size = [], inputs * places**2
    for width in linears[:-1]:
        head += [nn.Linear(size, width), nn.ReLU(), nn.Dropout()]
        size = width
    head.append(nn.Linear(size, linears[-1]))
    net = nn.Sequential()
    net.add_module("features", nn.Sequential(*layers))
    net.add_module("flat", nn.Sequential(nn.AdaptiveAvgPool2d(places), nn.Flatten()))
    net.add_module("classifier", nn.Sequential(*head) if len(linears) > 1 else head[0])
    return net


class LeNet(nn.Module):
    """Two convolutions and three linear layers, as in a hundred tutorials."""

    def __init__(self, classes, channels=1, side=28, padding=0):
        super().__init__()
        self.conv1 = conv(channels, 6, 5, bias=True, padding=padding)
        self.conv2 = conv(6, 8, 5, bias=True, padding=padding)
        rest = (((side - 4 + 2 * padding) // 2) - 4 + 2 * padding) // 2
        self.fc1, self.fc2 = nn.Linear(8 * rest**2, 20), nn.Linear(20, 12)
        self.fc3 = nn.Linear(12, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.max_pool2d(F.relu(self.conv1(x)), 2))), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class Plain(nn.Module):
    """conv1, bn1, .., fc1, ..: `convs` holds (width, size, padding, stride), `pools` "1" or "0" for
    each."""

    def __init__(self, channels, convs, linears, pools, act=F.relu, pool=F.max_pool2d, norm=False):
        super().__init__()
        self.pools, self.act, self.pool, self.norm = pools, act, pool, norm
        for number, (width, size, padding, stride) in enumerate(convs, 1):
            layer = conv(channels, width, size, stride, True, padding=padding)
            setattr(self, f"conv{number}", layer)
            if norm:
                setattr(self, f"bn{number}", nn.BatchNorm2d(width))
            channels = width
        self.count, self.mean = len(linears) - 1, linears[0] == channels
        for number in range(self.count):
            setattr(self, f"fc{number + 1}", nn.Linear(linears[number], linears[number + 1]))

    def forward(self, x):
        for number, pool in enumerate(self.pools, 1):
            x = getattr(self, f"conv{number}")(x)
            x = self.act(getattr(self, f"bn{number}")(x) if self.norm else x)
            x = self.pool(x, 2) if pool == "1" else x
        x = x.mean((2, 3)) if self.mean else x.flatten(1)
        for number in range(self.count):
            x = getattr(self, f"fc{number + 1}")(x)
            x = self.act(x) if number < self.count - 1 else x
        return x


def sequential_with_dropout():
    """Convolutions in a `Sequential` with a dropout where others pool, for images of 16x16."""
    unit = lambda i, o: [conv(i, o, bias=True), nn.BatchNorm2d(o), nn.ReLU()]
    layers = [*unit(3, 4), nn.Dropout(), *unit(4, 6), nn.MaxPool2d(2), *unit(6, 8)]
    net = nn.Sequential()
    net.add_module("features", nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten()))
    net.add_module("classifier", nn.Linear(8 * 16, 7))
    return net


class InvertedResidual(nn.Module):
    """A block in the names of torchvision's MobileNetV2."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        unit = lambda i, o, size, step, groups: nn.Sequential(
            conv(i, o, size, step, groups=groups), nn.BatchNorm2d(o), nn.ReLU6()
        )
        layers = [unit(inputs, hidden, 1, 1, 1)] if expansion > 1 else []
        layers += [unit(hidden, hidden, 3, stride, hidden), conv(hidden, outputs, 1)]
        self.conv = nn.Sequential(*layers, nn.BatchNorm2d(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes):
        super().__init__()
        layers = [nn.Sequential(conv(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU6())]
        inputs = 4
        for outputs, stride, count, expansion in (
            (2, 1, 1, 1),
            (3, 2, 2, 6),
            (4, 2, 1, 6),
            (5, 2, 2, 6),
            (6, 1, 1, 6),
            (7, 2, 1, 6),
            (8, 1, 1, 6),
        ):
            for index in range(count):
                step = stride if index == 0 else 1
                layers.append(InvertedResidual(inputs, outputs, step, expansion))
                inputs = outputs
        layers.append(nn.Sequential(conv(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(16, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class TimmBlock(nn.Module):
    """An inverted residual block in timm's names, which sort the depthwise convolution first."""

    def __init__(self, inputs, outputs, size, stride, expansion, activation):
        super().__init__()
        hidden = inputs * expansion
        names = ["conv_pw", "conv_dw", "conv_pwl"] if expansion > 1 else ["conv_dw", "conv_pw"]
        made = [conv(inputs, hidden, 1)] if expansion > 1 else []
        made += [conv(hidden, hidden, size, stride, groups=hidden), conv(hidden, outputs, 1)]
        for index, (name, layer) in enumerate(zip(names, made, strict=True), 1):
            setattr(self, name, layer)
            setattr(self, f"bn{index}", nn.BatchNorm2d(layer.out_channels))
        self.names, self.activation = names, activation
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        y = x
        for index, name in enumerate(self.names, 1):
            y = getattr(self, f"bn{index}")(getattr(self, name)(y))
            y = self.activation(y) if index < len(self.names) else y
        return x + y if self.adds else y


class TimmMobile(nn.Module):
    """timm's MobileNetV2 (ReLU6, 3x3) or MNASNet (ReLU, some 5x5), narrow."""

    def __init__(self, classes, activation, sizes=(3,) * 7):
        super().__init__()
        self.conv_stem, self.bn1, inputs = conv(3, 4, 3, 2), nn.BatchNorm2d(4), 4
        stages, strides, expansions = [], (1, 2, 2, 2, 1, 2, 1), (1, 3, 3, 3, 3, 3, 3)
        for outputs, size, stride, expansion in zip(
            (2, 3, 4, 5, 6, 7, 8), sizes, strides, expansions, strict=True
        ):
            blocks = []
            for step in (stride, 1):
                blocks.append(TimmBlock(inputs, outputs, size, step, expansion, activation))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = conv(8, 16, 1), nn.BatchNorm2d(16)
        self.classifier, self.activation = nn.Linear(16, classes), activation

    def forward(self, x):
        x = self.blocks(self.activation(self.bn1(self.conv_stem(x))))
        x = self.activation(self.bn2(self.conv_head(x)))
        return self.classifier(x.mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth)

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([y, x], 1)


class Transition(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inputs), conv(inputs, outputs, 1)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """In the names of kuangliu/pytorch-cifar."""

    def __init__(self, counts, growth, classes):
        super().__init__()
        width, self.count = 2 * growth, len(counts)
        self.conv1 = conv(3, width)
        for stage, count in enumerate(counts, 1):
            layers = [DenseLayer(width + index * growth, growth) for index in range(count)]
            setattr(self, f"dense{stage}", nn.Sequential(*layers))
            width += count * growth
            if stage < self.count:
                setattr(self, f"trans{stage}", Transition(width, width // 2))
                width //= 2
        self.bn, self.linear = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.conv1(x)
        for stage in range(1, self.count + 1):
            x = getattr(self, f"dense{stage}")(x)
            x = getattr(self, f"trans{stage}")(x) if stage < self.count else x
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))
