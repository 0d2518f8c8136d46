"""Operators of torch.export programs, before and after decomposition, compared with PyTorch; and
programs that are refused because they would be computed differently."""

import itertools
import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from jaxbd.base import UserError  # noqa: E402
from jaxbd.interop.onnx import open as graphs  # noqa: E402

SIDE = 6
ACTIVATIONS = {
    "softplus": lambda x: F.softplus(x, beta=2),
    "softplus with a threshold": lambda x: F.softplus(4 * x, beta=2, threshold=1.5),
    "elu": lambda x: F.elu(x, 0.5),
    "elu with all arguments": lambda x: torch.ops.aten.elu(x, 1.5, 1.2, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 2.0),
    "log_sigmoid": F.logsigmoid,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "hardtanh": lambda x: F.hardtanh(x, -0.2, 0.4),
    "log1p": lambda x: torch.log1p(x.abs()),
    "expm1": torch.expm1,
}
ARITHMETIC = {
    "add alpha": lambda x: torch.add(x, x.mean(1, keepdim=True), alpha=2),
    "sub alpha": lambda x: torch.sub(x, 1.5, alpha=2),
    "rsub alpha": lambda x: torch.rsub(x, 1.0, alpha=3),
    "rsub of tensors": lambda x: torch.rsub(x, x.mean(1, keepdim=True), alpha=3),
    "where with a number": lambda x: torch.where(x > 0, x, 0.1),
    "where with a number first": lambda x: torch.where(x > 0, -0.1, x),
    "a mask": lambda x: torch.where(x > -9, x, -torch.inf).softmax(1),
    "a mask times a number": lambda x: (x > 0) * 3,
    "a mask counted": lambda x: (x > 0).sum((2, 3)) / 7,
    "full of integers": lambda x: x * (torch.full((1, 3, 1, 1), 2) / 3),
    "a sum of another type": lambda x: (x > 0).sum(1, dtype=torch.float32),
    "softmax of another type": lambda x: (x > 0).softmax(1, dtype=torch.float32),
    "var": lambda x: x.var((1, 2, 3)),
    "var of axes": lambda x: x.var((2, 3), unbiased=False, keepdim=True),
    "var with a correction": lambda x: torch.var(x, (1, 2), correction=3),
    "std": lambda x: (x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True),
    "std and mean": lambda x: torch.cat(torch.std_mean(x, (2, 3)), 1),
    "flip": lambda x: x.flip(1, 3),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "attention": lambda x: F.scaled_dot_product_attention(x, x + 1, x, scale=0.0),
    "any and all": lambda x: (x > 0.9).any(3) * 2.0 + (x > -0.5).all(3),
    "constants changed in place": lambda x: x * _changed_in_place(),
}
NORMS = {
    "group_norm": lambda x: F.group_norm(x, 3, torch.arange(3.0), torch.ones(3)),
    "instance_norm": F.instance_norm,
    "instance_norm with weights": lambda x: F.instance_norm(
        x, weight=torch.arange(3.0), bias=torch.ones(3), eps=0.1
    ),
    "instance_norm with moments": lambda x: F.instance_norm(
        x, torch.arange(3.0), torch.ones(3) * 2, use_input_stats=False
    ),
    "layer_norm": lambda x: F.layer_norm(x, (SIDE,), torch.arange(float(SIDE)), eps=0.01),
    "batch_norm": lambda x: F.batch_norm(x, torch.arange(3.0), torch.ones(3) * 2),
}
RESIZES = {
    "nearest by 2": lambda x: F.interpolate(x, scale_factor=2),
    "nearest to a size": lambda x: F.interpolate(x, size=(74, 9)),  # rounded as in float32
    "nearest-exact": lambda x: F.interpolate(x, size=(8, 4), mode="nearest-exact"),
    "bilinear by 1.5": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "bilinear by 1.25, rounded": lambda x: F.interpolate(
        x, scale_factor=(1.25, 1.5), mode="bilinear"
    ),
    "bilinear to a size": lambda x: F.interpolate(x, size=(4, 9), mode="bilinear"),
    "bilinear to one pixel": lambda x: F.interpolate(x, size=1, mode="bilinear"),
    "bilinear with aligned corners": lambda x: F.interpolate(
        x, size=(4, 9), mode="bilinear", align_corners=True
    ),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "bicubic with aligned corners": lambda x: F.interpolate(
        x, size=(5, 11), mode="bicubic", align_corners=True
    ),
}
GROUPS = {
    "activations": ACTIVATIONS,
    "arithmetic": ARITHMETIC,
    "norms": NORMS,
    "resizes": RESIZES,
}


def _changed_in_place():
    constant = torch.ones(3, 1, 1)
    constant.view(-1).mul_(3)
    constant[0].add_(1)
    return constant


class Columns(nn.Module):
    """A net with one logit for each function: a weighted mean of what it makes of the image."""

    def __init__(self, functions):
        super().__init__()
        self.functions = list(functions)

    def forward(self, x):
        x = 2 * x - 1
        columns = []
        for function in self.functions:
            y = function(x)
            y = y.flatten(1) if y.ndim > 1 else y[:, None]
            columns.append((y * torch.cos(torch.arange(y.shape[1]))).mean(1))
        return torch.stack(columns, 1)


def export(module, path, images, *, is_open=False, is_decomposed=False):
    """Writes a module as a program for batches of any size, or of that of `images`."""
    shapes = ({0: torch.export.Dim("batch")},) if is_open else None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (images,), dynamic_shapes=shapes)
        program = program.run_decompositions() if is_decomposed else program
        torch.export.save(program, path)
    return path


def logits(path, images):
    """jaxbd's logits for images [B, C, H, W] in [0, 1]."""
    net, variables = graphs.to_net(graphs.open_graph(path))
    x = images.permute(0, 2, 3, 1).numpy().astype(np.float32)
    return np.asarray(jax.jit(net.apply)(variables, x)[0])


@pytest.mark.parametrize(
    ("group", "form"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] if each == ("resizes", "decomposed") else [])
        for each in itertools.product(GROUPS, ["any batch", "decomposed"])
    ],
)
def test_operators_compute_what_pytorch_does(group, form, tmp_path):
    functions = GROUPS[group]
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    module = Columns(functions.values()).eval()
    options = {"is_decomposed": form == "decomposed", "is_open": form == "any batch"}
    path = export(module, tmp_path / "model.pt2", images, **options)
    found, expected = logits(path, images), module(images).numpy()
    off = abs(found - expected).max(0)
    wrong = {name: float(d) for name, d in zip(functions, off, strict=True) if not d < 2e-6}
    assert not wrong


INTEGERS = {
    "divided": lambda x: x / 255,
    "shifted": lambda x: (x - 127.5) / 127.5,
    "converted": lambda x: x.float() / 255,
    "moved": lambda x: x.flip(3)[:, [2, 1, 0]].to(torch.float32) * 0.01,
    "compared": lambda x: (x > 100).float() + x.to(torch.int32).float() / 255,
}


@pytest.mark.parametrize("form", ["as exported", "decomposed"])
def test_an_image_of_integers_has_pixels_up_to_255(form, tmp_path):
    images = torch.randint(
        256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    class Integers(Columns):
        def forward(self, x):
            return torch.stack([f(x).mean((1, 2, 3)) for f in self.functions], 1)

    module = Integers(INTEGERS.values())
    path = export(module, tmp_path / "m.pt2", images, is_decomposed=form == "decomposed")
    np.testing.assert_allclose(logits(path, images / 255), module(images), atol=1e-5)


REFUSED = {
    "dropout in training": (lambda x: F.dropout(x, 0.5), r"dropout.*call \.eval\(\)"),
    "attention with dropout": (
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        "dropout",
    ),
    "moments of the batch": (lambda x: F.batch_norm(x, None, None, training=True), "moments"),
    "a division that rounds": (lambda x: torch.div(x, 0.3, rounding_mode="floor"), "rounds"),
    "a second output": (
        lambda x: F.max_pool2d(x, 2, return_indices=True)[1] / 9,
        "output that is not supported",
    ),
    "constants changed by the image": (lambda x: x * _added_to(x), "changed in place"),
}


def _added_to(x):
    constant = torch.ones(2, 3, SIDE, SIDE)
    view = constant[:, 1:]
    constant.add_(x)
    return view.sum()


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_computed_differently_is_refused(case, tmp_path):
    function, match = REFUSED[case]
    path = export(Columns([function]), tmp_path / "m.pt2", torch.rand(2, 3, SIDE, SIDE))
    with pytest.raises(UserError, match=match):
        graphs.open_graph(path)
