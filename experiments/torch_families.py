"""Small members of twelve families of image classifiers in PyTorch, written for the operators each
family is made of."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 10


def norm_conv(
    i: int, o: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type | None = nn.ReLU
):
    parts = [
        nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(o),
    ]
    return nn.Sequential(*parts, *([act()] if act else []))


class Residual(nn.Module):
    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None
    ):
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.body(x) + self.shortcut(x))


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, inner: int, act: type = nn.ReLU, gate: type = nn.Sigmoid):
        super().__init__()
        self.pool, self.fc1, self.fc2 = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.Conv2d(inner, channels, 1),
        )
        self.act, self.gate = act(), gate()

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


class Head(nn.Module):
    """Mean over positions, then a linear layer."""

    def __init__(self, channels: int, drop: float = 0.0):
        super().__init__()
        self.pool, self.drop, self.fc = (
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Dropout(drop),
            nn.Linear(channels, CLASSES),
        )

    def forward(self, x):
        return self.fc(self.drop(torch.flatten(self.pool(x), 1)))


def resnet() -> nn.Module:
    def block(i, o, stride=1):
        shortcut = norm_conv(i, o, 1, stride, act=None) if stride > 1 or i != o else None
        body = nn.Sequential(norm_conv(i, o, 3, stride), norm_conv(o, o, act=None))
        return Residual(body, shortcut, nn.ReLU(inplace=True))

    stem = nn.Sequential(norm_conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(stem, block(8, 8), block(8, 16, 2), Head(16))


def vgg() -> nn.Module:
    body = [norm_conv(3, 8), norm_conv(8, 8), nn.MaxPool2d(2), norm_conv(8, 16), nn.MaxPool2d(2)]
    head = [
        nn.AdaptiveAvgPool2d((4, 4)),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(32, CLASSES),
    ]
    return nn.Sequential(*body, *head)


def mobilenet_v2() -> nn.Module:
    def block(i, o, stride=1):
        body = nn.Sequential(
            norm_conv(i, 4 * i, 1, act=nn.ReLU6),
            norm_conv(4 * i, 4 * i, 3, stride, 4 * i, nn.ReLU6),
            norm_conv(4 * i, o, 1, act=None),
        )
        return Residual(body) if stride == 1 and i == o else body

    return nn.Sequential(
        norm_conv(3, 8, 3, 2, act=nn.ReLU6),
        block(8, 8),
        block(8, 12, 2),
        block(12, 12),
        Head(12, 0.2),
    )


def mobilenet_v3() -> nn.Module:
    def block(i, o, stride=1):
        body = nn.Sequential(
            norm_conv(i, 3 * i, 1, act=nn.Hardswish),
            norm_conv(3 * i, 3 * i, 5, stride, 3 * i, nn.Hardswish),
            Squeeze(3 * i, 8, nn.ReLU, nn.Hardsigmoid),
            norm_conv(3 * i, o, 1, act=None),
        )
        return Residual(body) if stride == 1 and i == o else body

    return nn.Sequential(
        norm_conv(3, 8, 3, 2, act=nn.Hardswish), block(8, 8), block(8, 16, 2), Head(16)
    )


def efficientnet() -> nn.Module:
    def block(i, o, stride=1):
        body = nn.Sequential(
            norm_conv(i, 4 * i, 1, act=nn.SiLU),
            norm_conv(4 * i, 4 * i, 3, stride, 4 * i, nn.SiLU),
            Squeeze(4 * i, 4, nn.SiLU),
            norm_conv(4 * i, o, 1, act=None),
        )
        return Residual(body) if stride == 1 and i == o else body

    return nn.Sequential(
        norm_conv(3, 8, 3, 2, act=nn.SiLU),
        block(8, 8),
        block(8, 12, 2),
        norm_conv(12, 32, 1, act=nn.SiLU),
        Head(32),
    )


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = (
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, 4 * growth, 1, bias=False),
        )
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(4 * growth),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x):
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


def densenet() -> nn.Module:
    transition = nn.Sequential(
        nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2, 2)
    )
    return nn.Sequential(
        norm_conv(3, 8, 3, 2),
        DenseLayer(8, 4),
        DenseLayer(12, 4),
        transition,
        DenseLayer(8, 4),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        Head(12),
    )


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.mix, self.norm = (
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            nn.LayerNorm(channels, eps=1e-6),
        )
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-1))

    def forward(self, x):
        y = self.fc2(F.gelu(self.fc1(self.norm(self.mix(x).permute(0, 2, 3, 1)))))
        return x + self.gamma * y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), ChannelNorm(8, eps=1e-6))
    down = nn.Sequential(ChannelNorm(8, eps=1e-6), nn.Conv2d(8, 16, 2, 2))
    return nn.Sequential(
        stem,
        ConvNextBlock(8),
        down,
        ConvNextBlock(16),
        nn.AdaptiveAvgPool2d(1),
        ChannelNorm(16),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        y = self.ln1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 16, patch: int = 8, size: int = 32):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.encoder = nn.Sequential(Encoder(width, 4), Encoder(width, 4))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, CLASSES)

    def forward(self, x):
        n = x.shape[0]
        x = self.patches(x)
        x = x.reshape(n, x.shape[1], -1).permute(0, 2, 1)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.position
        return self.head(self.norm(self.encoder(x))[:, 0])


class WindowAttention(nn.Module):
    """Attention in windows of 4x4, shifted by `shift`, with a table of relative positions."""

    index: torch.Tensor

    def __init__(self, width: int, heads: int, side: int, shift: int, window: int = 4):
        super().__init__()
        self.heads, self.side, self.shift, self.window = heads, side, shift, window
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(0.1 * torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        between = (at[:, :, None] - at[:, None]) + window - 1
        self.register_buffer("index", (between[0] * (2 * window - 1) + between[1]).view(-1))

    def forward(self, x):  # [B, H, W, C]
        b, h, w, c = x.shape
        s, n = self.window, self.window**2
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, n, c)
        q, k, v = (
            self.qkv(x).reshape(x.size(0), n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        )
        a = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        a = a + self.table[self.index].view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.shift:
            mask = x.new_zeros((h, w))
            count = 0
            for i in ((0, -s), (-s, -self.shift), (-self.shift, None)):
                for j in ((0, -s), (-s, -self.shift), (-self.shift, None)):
                    mask[i[0] : i[1], j[0] : j[1]] = count
                    count += 1
            mask = mask.view(h // s, s, w // s, s).permute(0, 2, 1, 3).reshape(-1, n)
            mask = mask.unsqueeze(1) - mask.unsqueeze(2)
            mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
            a = a.view(x.size(0) // mask.size(0), mask.size(0), self.heads, n, n) + mask.unsqueeze(
                1
            ).unsqueeze(0)
            a = a.view(-1, self.heads, n, n)
        x = self.proj((F.softmax(a, dim=-1) @ v).transpose(1, 2).reshape(x.size(0), n, c))
        x = x.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2)) if self.shift else x


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, side: int, shift: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, side, shift)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.reduction = (
            nn.LayerNorm(4 * width),
            nn.Linear(4 * width, 2 * width, bias=False),
        )

    def forward(self, x):
        h, w = x.shape[-3:-1]
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        x = torch.cat([x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.norm0 = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.blocks = nn.Sequential(
            SwinBlock(8, 2, 16, 0), SwinBlock(8, 2, 16, 2), PatchMerging(8), SwinBlock(16, 4, 8, 0)
        )
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.norm0(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(self.blocks(x)).permute(0, 3, 1, 2).mean([2, 3]))


class Shuffle(nn.Module):
    """A block of ShuffleNetV2."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        half = channels // 2
        self.left = (
            nn.Sequential(
                norm_conv(channels, channels, 3, 2, channels, None),
                norm_conv(channels, channels, 1),
            )
            if stride > 1
            else None
        )
        width = channels if stride > 1 else half
        self.right = nn.Sequential(
            norm_conv(width, width, 1),
            norm_conv(width, width, 3, stride, width, None),
            norm_conv(width, width, 1),
        )

    def forward(self, x):
        if self.left is None:
            kept, moved = x.chunk(2, dim=1)
            y = torch.cat((kept, self.right(moved)), 1)
        else:
            y = torch.cat((self.left(x), self.right(x)), 1)
        b, c, h, w = y.size()
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def shufflenet() -> nn.Module:
    return nn.Sequential(
        norm_conv(3, 8, 3, 2),
        nn.MaxPool2d(3, 2, 1),
        Shuffle(8, 2),
        Shuffle(16, 1),
        norm_conv(16, 32, 1),
        Head(32),
    )


def regnet() -> nn.Module:
    def block(i, o, stride):
        body = nn.Sequential(
            norm_conv(i, o, 1),
            norm_conv(o, o, 3, stride, o // 8),
            Squeeze(o, 4),
            norm_conv(o, o, 1, act=None),
        )
        return Residual(
            body, norm_conv(i, o, 1, stride, act=None) if stride > 1 or i != o else None, nn.ReLU()
        )

    return nn.Sequential(norm_conv(3, 8, 3, 2), block(8, 16, 2), block(16, 16, 1), Head(16))


class Inception(nn.Module):
    def __init__(self, i: int):
        super().__init__()
        self.a = norm_conv(i, 4, 1)
        self.b = nn.Sequential(norm_conv(i, 4, 1), norm_conv(4, 8))
        self.c = nn.Sequential(norm_conv(i, 2, 1), norm_conv(2, 4, 5))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), norm_conv(i, 4, 1))
        self.e = nn.Sequential(nn.AvgPool2d(3, 1, 1), norm_conv(i, 4, 1))

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x), self.e(x)], 1)


def googlenet() -> nn.Module:
    stem = nn.Sequential(norm_conv(3, 8, 5, 2), nn.MaxPool2d(3, 2, ceil_mode=True))
    return nn.Sequential(
        stem, Inception(8), nn.MaxPool2d(3, 2, ceil_mode=True), Inception(24), Head(24, 0.2)
    )


class Fire(nn.Module):
    def __init__(self, i: int, inner: int, o: int):
        super().__init__()
        self.squeeze, self.one, self.three = (
            nn.Conv2d(i, inner, 1),
            nn.Conv2d(inner, o, 1),
            nn.Conv2d(inner, o, 3, padding=1),
        )

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


def squeezenet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, ceil_mode=True)]
    head = [
        nn.Dropout(0.5),
        nn.Conv2d(16, CLASSES, 1),
        nn.ReLU(True),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
    ]
    return nn.Sequential(*stem, Fire(8, 4, 8), Fire(16, 4, 8), *head)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ResNet": resnet,
    "VGG": vgg,
    "MobileNetV2": mobilenet_v2,
    "MobileNetV3": mobilenet_v3,
    "EfficientNet": efficientnet,
    "DenseNet": densenet,
    "ConvNeXt": convnext,
    "ViT": VisionTransformer,
    "Swin": Swin,
    "ShuffleNet": shufflenet,
    "RegNet": regnet,
    "GoogLeNet": googlenet,
    "SqueezeNet": squeezenet,
}


def make(family: str, seed: int = 0) -> nn.Module:
    """A net of the family in evaluation, with random weights, affine parameters and moments."""
    torch.manual_seed(seed)
    net = FAMILIES[family]()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
            elif isinstance(module, nn.MultiheadAttention):
                module.in_proj_bias.normal_(0, 0.1)
                module.out_proj.bias.normal_(0, 0.1)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5 * 1.5)
    return net.eval()
