"""Every classifier beside its PyTorch twin: cases for the tests of models and of model files."""

import numpy as np
import torch
import torch_twins as twins

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
CLASSES = 7


def _resnet(arch: str, stem: str, naming: str):
    return lambda width: twins.ResNet(BLOCKS[arch], CLASSES, width, stem, naming)


CASES = {
    f"{arch}-{stem}-{naming}": (arch, _resnet(arch, stem, naming), 8, 16 if stem == "cifar" else 32)
    for arch in BLOCKS
    for stem in ("cifar", "imagenet", "64px")
    for naming in ("torchvision", "kuangliu")
} | {
    "preactresnet18": ("preactresnet18", lambda width: twins.PreActResNet18(CLASSES, width), 8, 16),
    "wrn16-1": ("wrn16-1", lambda width: twins.WideResNet(16, 1, CLASSES, width), 8, 16),
    "wrn28-10": ("wrn28-10", lambda width: twins.WideResNet(28, 10, CLASSES, width), 2, 8),
    "wrn40-1": ("wrn40-1", lambda width: twins.WideResNet(40, 1, CLASSES, width), 8, 16),
    "wrn40-2": ("wrn40-2", lambda width: twins.WideResNet(40, 2, CLASSES, width), 4, 16),
    "mobilenet": ("mobilenet", lambda width: twins.MobileNet(CLASSES, width), 8, 32),
    "vgg": ("vgg", lambda width: twins.SmallVGG(CLASSES, width, side=16), 8, 16),
    "cnn": ("cnn", lambda width: twins.SmallCNN(CLASSES, width), 8, 16),
}
"""Name -> (architecture, twin of a width, width, side of the images)."""


def images_of(side: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(side).uniform(0, 1, (count, side, side, 3)).astype(np.float32)


def as_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def assert_close(ours, theirs: torch.Tensor, relative: float = 1e-4):
    """Largest difference, in units of the largest value."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= relative * np.abs(theirs).max()
