"""A file comes in, is changed and written, and PyTorch computes what we compute; per architecture
and container."""

import jax
import numpy as np
import pytest
import torch
import torch_twins as twins
from safetensors.torch import load_file, save_file
from twin_cases import CASES, as_torch, assert_close, images_of

from jaxbd.interop import load

CONTAINERS = ("zip", "legacy", "safetensors")


def write_source(path, state, kind: str) -> None:
    """The file a stranger sends: nested under `net` with other entries, where the container allows
    it."""
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        whole = {
            "net": {f"module.{name}": tensor for name, tensor in state.items()},
            "acc": 78.1,
            "epoch": 80,
        }
        torch.save(whole, path, _use_new_zipfile_serialization=kind == "zip")


def read_back(path, kind: str) -> dict:
    """The state_dict as a PyTorch user gets it."""
    if kind == "safetensors":
        return load_file(path)
    whole = torch.load(path, weights_only=True)
    assert whole["acc"] == 78.1 and whole["epoch"] == 80
    assert all(name.startswith("module.") for name in whole["net"])
    return {name.removeprefix("module."): tensor for name, tensor in whole["net"].items()}


def nudge_head(variables):
    """The same variables with one bias changed: the last linear layer's."""
    params = dict(variables["params"])
    name = next(
        name for name, leaves in params.items() if "kernel" in leaves and leaves["kernel"].ndim == 2
    )
    params[name] = {**params[name], "bias": params[name]["bias"] + 0.25}
    return {**variables, "params": params}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("case", CASES)
def test_repaired_file_computes_the_same_in_pytorch(case, kind, tmp_path):
    arch, make, width, side = CASES[case]
    twin = twins.randomise(make(width), seed=1)
    suffix = "safetensors" if kind == "safetensors" else "pth"
    source, target = tmp_path / f"source.{suffix}", tmp_path / f"repaired.{suffix}"
    write_source(source, twin.state_dict(), kind)
    model = load.open_model(source, image_shape=(side, side, 3))
    assert model.spec.arch == arch
    changed = nudge_head(model.variables)
    assert load.save_model(target, model, changed) is None
    state = read_back(target, kind)
    original = twin.state_dict()
    assert list(state) == list(original) if kind != "safetensors" else set(state) == set(original)
    differing = [name for name, tensor in original.items() if not torch.equal(tensor, state[name])]
    assert len(differing) == 1 and differing[0].endswith("bias")
    fresh = make(width).eval()
    fresh.load_state_dict(state, strict=True)
    images = images_of(side)
    with torch.no_grad():
        expected = fresh(as_torch(images))
    ours, _ = jax.jit(model.net.apply)(changed, images)
    assert_close(ours, expected)
    assert not np.allclose(ours, np.asarray(jax.jit(model.net.apply)(model.variables, images)[0]))
