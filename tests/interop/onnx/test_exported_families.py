"""Families of classifiers through both ONNX exporters and torch.export: logits, gradients and the
way back."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from experiments import import_families, torch_families

QUICK = [("ResNet", "onnx TorchScript"), ("ViT", "pt2")]
ALL = [(family, form) for family in torch_families.FAMILIES for form in import_families.FORMS]


@pytest.mark.parametrize(
    ("family", "form"),
    [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in ALL],
)
def test_a_family(family, form):
    row = import_families.measure(family, form)
    assert row["logits"] <= 1e-5
    assert row["gradient"] <= 1e-3
    assert row["round_trip"] <= 1e-5
