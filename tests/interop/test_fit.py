"""Nets that a config.json makes deeper than its file has arrays are refused untraced."""

import numpy as np
import pytest

from jaxbd.interop import fit
from jaxbd.limits import Refusal
from jaxbd.models import build


@pytest.mark.parametrize(
    "options, layers",
    [
        ({"stages": 64}, 64),
        ({"blocks": (16, 16, 16, 16)}, 64),
        ({"depth": 40}, 40),
        ({"width": 4096}, 0),
        ({"blocks": "many", "stages": "3", "depth": True}, 0),
    ],
)
def test_layers_are_counted_from_the_options(options, layers):
    assert fit.least_layers(options) == layers


def test_a_deep_net_of_one_array_is_not_traced(monkeypatch):
    spec = build.Spec(arch="cnn", classes=2, image_shape=(8, 8, 1), options={"stages": 64})
    monkeypatch.setattr(build, "net", lambda spec: pytest.fail("the net was built"))
    with pytest.raises(Refusal, match="1 arrays, too few for the 64 layers"):
        fit.check({"params/w": np.zeros(3, np.float32)}, spec)
