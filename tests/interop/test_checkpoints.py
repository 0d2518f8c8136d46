"""Checkpoints as people save them: good weights are found, what lies beside them is inert, and what
is written back is what PyTorch reads."""

import argparse
import collections
import datetime
import json
import pathlib
import warnings
import zipfile

import hostile
import numpy as np
import pytest
import torch
import torch_twins as twins

from jaxbd.base import UserError
from jaxbd.interop import container, inspect, load

SHAPE = (8, 8, 3)


def weights(seed: int = 1, classes: int = 5) -> collections.OrderedDict:
    """The state_dict of a small CNN with random weights."""
    return twins.randomise(twins.SmallCNN(classes, 4), seed).state_dict()


def prefixed(state: dict, prefix: str) -> collections.OrderedDict:
    return collections.OrderedDict((prefix + name, value) for name, value in state.items())


def opened(path: pathlib.Path, value, **how) -> load.Model:
    torch.save(value, path)
    return load.open_model(path, image_shape=SHAPE, **how)


def assert_same(model: load.Model, state: dict) -> None:
    assert model.container is not None
    found = model.container.tensors
    assert set(found) == set(state)
    for name, value in state.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-6, atol=1e-7, err_msg=name)


BESIDE = {
    "namespace": argparse.Namespace(lr=0.1),
    "counter": collections.Counter("ab"),
    "default": collections.defaultdict(list, {"a": [1]}),
    "set": {1, 2},
    "frozen": frozenset({1}),
    "path": pathlib.PurePosixPath("data"),
    "date": datetime.datetime(2024, 1, 1),
    "complex": 1j,
    "array": np.eye(3),
    "strings": np.array(["a", "b"]),
    "objects": np.array([{}, None], dtype=object),
    "generator": np.random.RandomState(0).get_state(),
    "keys": {(1, 2): 3},
    "many": {i: i for i in range(6000)},
    "large_keys": {2**50 + i: i for i in range(6000)},
    "long": 2**3000,
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.empty(3, device="meta"),
    "scheduler": torch.optim.lr_scheduler.StepLR(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), 3
    ),
}
"""What people keep beside the weights, by the kind of thing."""


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_lies_beside_the_weights_is_left_out_and_named(tmp_path, protocol):
    state = weights()
    torch.save({"state_dict": state, **BESIDE}, tmp_path / "m.pth", pickle_protocol=protocol)
    model = load.open_model(tmp_path / "m.pth", image_shape=SHAPE)
    assert_same(model, state)
    plain = {"many"}
    assert set(model.container.ignored) == set(BESIDE) - plain
    assert model.container.outer == {name: BESIDE[name] for name in plain}
    note = load.save_model(tmp_path / "out.pth", model, model.variables)
    assert note == f"{len(BESIDE) - 1} entries beside the weights are left out"
    back = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(back["state_dict"][name], state[name]) for name in state)


@pytest.mark.parametrize(
    "odd",
    [torch.eye(4).to_sparse(), torch.empty(4, device="meta"), torch._neg_view(torch.ones(4))],
    ids=["sparse", "meta", "negated"],
)
def test_a_weight_that_is_not_read_is_refused_by_name(tmp_path, odd):
    state = weights() | {"norm0.bias": odd}
    with pytest.raises(UserError, match=r"'norm0\.bias' among the weights is "):
        opened(tmp_path / "m.pth", {"net": state, "epoch": 3})


@pytest.mark.parametrize(
    "prefix",
    ["model.", "net.", "0.", "1.", "backbone.", "module.model.", "model._orig_mod.", "classifier."],
)
def test_any_prefix_is_taken_off_and_put_back(tmp_path, prefix):
    state = weights()
    model = opened(tmp_path / "m.pth", {"state_dict": prefixed(state, prefix)})
    assert_same(model, state)
    load.save_model(tmp_path / "out.pth", model, model.variables)
    back = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert list(back) == list(prefixed(state, prefix))


@pytest.mark.parametrize(
    "inner", ["module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."]
)
@pytest.mark.parametrize("outer", ["", "model.", "module."])
def test_inner_wrappers_are_taken_off_and_put_back(tmp_path, inner, outer):
    state = weights()
    inside = lambda name: name.replace("conv1.", f"conv1.{inner}").replace("head.", f"{inner}head.")
    wrap = lambda name: outer + inside(name)
    wrapped = collections.OrderedDict((wrap(name), value) for name, value in state.items())
    model = opened(tmp_path / "m.pth", wrapped)
    assert_same(model, state)
    assert load.save_model(tmp_path / "out.pth", model, model.variables) is None
    assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == list(wrapped)
    # two names that become one
    wrapped[f"{outer}conv1.weight"] = torch.zeros_like(state["conv1.weight"])
    with pytest.raises(UserError, match=r"no known architecture|2 missing .* 3 extra"):
        opened(tmp_path / "m.pth", wrapped)


def test_a_pruned_weight_in_an_inner_wrapper_is_written_whole_under_its_key(tmp_path):
    state = weights()
    mask = (torch.rand_like(state["conv1.weight"]) > 0.5).float()
    wrapped = {name.replace("conv1.", "conv1._orig_mod."): value for name, value in state.items()}
    whole = wrapped.pop("conv1._orig_mod.weight")
    parts = {"conv1._orig_mod.weight_orig": whole, "conv1._orig_mod.weight_mask": mask}
    model = opened(tmp_path / "m.pth", prefixed(wrapped | parts, "net."))
    assert_same(model, state | {"conv1.weight": whole * mask})
    load.save_model(tmp_path / "out.pth", model, model.variables)
    back = torch.load(tmp_path / "out.pth", weights_only=True)
    assert torch.equal(back["net.conv1._orig_mod.weight"], whole * mask)
    assert len(back) == len(state)


def test_counts_of_operations_are_left_out(tmp_path):
    state = weights()
    counts = {
        f"{m}total_{what}": torch.ones(1) for m in ("", "conv1.") for what in ("ops", "params")
    }
    model = opened(tmp_path / "m.pth", collections.OrderedDict(state | counts))
    assert_same(model, state)
    assert set(model.container.ignored) == set(counts) and not model.container.unused


OPAQUE = {
    "a": torch.zeros(3, dtype=torch.uint16),
    "b": torch.zeros(2, 2, dtype=torch.uint32),
    "c": torch.zeros((), dtype=torch.uint64),
    "d": torch.zeros(3).to(torch.float8_e4m3fn),
    "e": torch.zeros(3).to(torch.float8_e5m2),
}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["pth", "stream", "safetensors"])
def test_types_that_are_not_read_are_left_out_beside_the_weights(tmp_path, kind, nested):
    from safetensors.torch import save_file

    state, path = weights(), tmp_path / f"m.{kind}"
    if kind == "safetensors":
        write = lambda value: save_file(value, path)
    else:
        write = lambda value: torch.save(value, path, _use_new_zipfile_serialization=kind == "pth")
    if nested and kind != "safetensors":
        write({"state_dict": state, "beside": OPAQUE, "storage": torch.zeros(3).untyped_storage()})
        left_out = {"beside", "storage"}
    elif nested:
        write(prefixed(state, "net.") | {f"other.{n}.weight": t for n, t in OPAQUE.items()})
        left_out = {f"other.{n}.weight" for n in OPAQUE}
    else:
        write(dict(state) | OPAQUE)
        left_out = set(OPAQUE)
    model = load.open_model(path, image_shape=SHAPE)
    assert_same(model, state)
    assert set(model.container.ignored) == left_out
    for name in ("conv1.weight", "norm0.running_mean", "norm1.neuron_mask", "mean"):
        write(dict(state) | {name: OPAQUE["a"]})
        with pytest.raises(UserError, match=rf"{name}'.* is .*(U|u\w*)(int)?16"):
            load.open_model(path, image_shape=SHAPE)


def test_body_and_head_may_have_different_prefixes(tmp_path):
    state = weights()
    two = {("head." if n.startswith("head") else "backbone.") + n: v for n, v in state.items()}
    model = opened(tmp_path / "m.pth", two)
    assert_same(model, state)
    load.save_model(tmp_path / "out.pth", model, model.variables)
    assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == list(two)


@pytest.mark.parametrize(
    "value",
    [
        lambda good, other: {"netC": good, "netG": {"down.weight": torch.ones(2, 2)}},
        lambda good, other: {"state_dict": good, "state_dict_ema": other},
        lambda good, other: {"net": good, "model": collections.OrderedDict(good)},
        lambda good, other: prefixed(good, "model.") | prefixed(other, "ema_model."),
        lambda good, other: {"ema": {"module": good}},
        lambda good, other: [good, 3],
        lambda good, other: ({"accuracy": 0.9}, good),
        lambda good, other: {"a": {"b": {"nets": [good]}}},
        lambda good, other: {name: value.numpy() for name, value in good.items()},
    ],
)
def test_the_classifier_is_found_and_goes_back_where_it_was(tmp_path, value):
    good = weights()
    whole = value(good, weights(2))
    model = opened(tmp_path / "m.pth", whole)
    assert_same(model, good)
    load.save_model(tmp_path / "out.pth", model, model.variables)
    back = torch.load(tmp_path / "out.pth", weights_only=True)
    assert type(back) in (type(whole), collections.OrderedDict)
    assert_same(load.open_model(tmp_path / "out.pth", image_shape=SHAPE), good)


def test_two_nets_are_not_guessed_between_but_can_be_named(tmp_path):
    first, second = weights(1), weights(2)
    for value, keys in (
        ({"net": first, "student": second}, ("net", "student")),
        (prefixed(first, "a.") | prefixed(second, "b."), ("a", "b.")),
    ):
        with pytest.raises(UserError, match=r"several nets .* different weights.*--key NAME"):
            opened(tmp_path / "m.pth", value)
        for key, state in zip(keys, (first, second), strict=True):
            assert_same(load.open_model(tmp_path / "m.pth", key=key, image_shape=SHAPE), state)
        with pytest.raises(UserError, match="--key c names no single net"):
            load.open_model(tmp_path / "m.pth", key="c", image_shape=SHAPE)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"1.weight": (10, 5), "1.bias": (10,)}, "'1.weight' takes its 5 outputs"),
        ({"head.0.weight": (9, 5), "head.2.weight": (3, 9)}, "'head.0.weight' takes its 5 outputs"),
        ({"cam.weight": (5, 5, 1, 1)}, "'cam.weight' takes its 5 outputs"),
        ({"stn.0.weight": (8, 3, 3, 3), "stn.2.weight": (3, 8, 5, 5)}, "makes its 3-channel input"),
    ],
)
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_part_of_a_net_is_not_read_as_the_whole(tmp_path, more, said, kind):
    from safetensors.torch import save_file

    state = weights()
    whole = prefixed(state, "0.") | {name: torch.ones(shape) for name, shape in more.items()}
    path = tmp_path / f"m.{kind}"
    (torch.save if kind == "pth" else save_file)(dict(whole), path)
    with pytest.raises(UserError, match=f"only a part of another: .*{said}.* with --key 0$"):
        load.open_model(path, image_shape=SHAPE)
    assert_same(load.open_model(path, image_shape=SHAPE, key="0"), state)


def test_what_does_not_belong_to_the_net_is_left_out_with_a_note(tmp_path, capsys):
    from jaxbd.cli import common

    state = weights()
    beside = {
        "criterion.weight": torch.ones(5),
        "accuracy.confmat": torch.ones(5, 5),
        "queue": torch.ones(5, 99),
        "centres": torch.ones(4, 5),
        **prefixed(weights(2), "ema_model."),
    }
    model = opened(tmp_path / "m.pth", prefixed(state, "model.") | beside)
    assert_same(model, state)
    assert set(model.container.ignored) == set(beside) and model.container.unused == ()
    others = {
        "rotation.weight": torch.ones(4, 16),
        "projector.0.weight": torch.ones(8, 16),
        "teacher.patch.weight": torch.ones(9, 3, 4, 4),
    }
    for nesting in (lambda value: value, lambda value: {"state_dict": value, "optimizer": others}):
        torch.save(nesting(prefixed(state, "model.") | beside | others), tmp_path / "m.pth")
        model = common.open_model(tmp_path / "m.pth", image_shape=SHAPE)
        assert_same(model, state)
        assert model.container.unused == tuple(others)
        assert "note: 3 weights beside the net are left out (rotation" in capsys.readouterr().err


def test_a_normalisation_in_the_file_becomes_the_models(tmp_path):
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 1.0])
    state = weights()
    for prefix, names in (("1.", ("0.mean", "0.std")), ("", ("mu", "sigma"))):
        held = {names[0]: mean.view(1, 3, 1, 1), names[1]: std.view(1, 3, 1, 1)}
        model = opened(tmp_path / "m.pth", collections.OrderedDict(held | prefixed(state, prefix)))
        assert_same(model, state)
        assert model.states_normalisation()
        np.testing.assert_allclose((model.spec.mean, model.spec.std), (mean, std))
        load.save_model(tmp_path / "out.pth", model, model.variables)
        back = torch.load(tmp_path / "out.pth", weights_only=True)
        assert all(torch.equal(back[name], value) for name, value in held.items())
    held = {"mean": mean, "std": -std}
    with pytest.raises(UserError, match="standard deviation"):
        opened(tmp_path / "m.pth", collections.OrderedDict(held | state))


def test_a_normalisation_for_bytes_is_divided_by_255(tmp_path, capsys):
    from jaxbd.cli import common, main

    state = prefixed(weights(), "1.")
    for mean, std in (
        ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ([0.0] * 3, [255.0] * 3),
    ):
        held = {"0.mean": torch.tensor(mean), "0.std": torch.tensor(std)}
        torch.save(collections.OrderedDict(held | state), tmp_path / "m.pth")
        model = common.open_model(tmp_path / "m.pth", image_shape=SHAPE)
        assert "for pixels from 0 to 255" in capsys.readouterr().err
        np.testing.assert_allclose(model.spec.mean, np.array(mean) / 255, rtol=1e-6)
        np.testing.assert_allclose(model.spec.std, np.array(std) / 255, rtol=1e-6)
        assert main.main(["inspect", str(tmp_path / "m.pth")]) == 0
        assert "(stated for pixels from 0 to 255)" in capsys.readouterr().out
        load.save_model(tmp_path / "out.pth", model, model.variables)
        back = torch.load(tmp_path / "out.pth", weights_only=True)
        assert all(torch.equal(back[name], value) for name, value in held.items())


def test_weights_in_parts_are_multiplied_out_as_pytorch_does(tmp_path):
    from torch.nn.utils import parametrizations, prune

    def pruned(net):
        for layer in (net.conv0, net.conv1, net.head):
            prune.random_unstructured(layer, "weight", 0.4)

    def normed(net):
        parametrizations.weight_norm(net.conv1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old form is what older files hold
            torch.nn.utils.weight_norm(net.conv2)
        with torch.no_grad():
            net.conv1.parametrizations.weight.original0.mul_(3)

    for change in (pruned, normed):
        net = twins.randomise(twins.SmallCNN(5, 4), 1)
        change(net)
        images = torch.rand(2, 3, 8, 8)
        with torch.no_grad():
            expected = net(images)
        model = opened(tmp_path / "m.pth", net.state_dict())
        logits = model.net.apply(model.variables, images.permute(0, 2, 3, 1).numpy())[0]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        note = load.save_model(tmp_path / "out.pth", model, model.variables)
        assert "stored in parts" in note and "are written whole" in note
        plain = twins.SmallCNN(5, 4).eval()
        plain.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True))
        with torch.no_grad():
            np.testing.assert_allclose(plain(images), expected, rtol=1e-4, atol=1e-4)


def test_a_pruned_neuron_gives_nothing(tmp_path):
    state = weights()
    mask = torch.tensor([0.0, 1, 1, 1])
    extra = {"norm0.neuron_mask": mask, "norm0.neuron_noise": torch.zeros(4)}
    model = opened(tmp_path / "m.pth", state | extra | {"norm0.neuron_noise_bias": torch.zeros(4)})
    assert_same(model, state | {"norm0.weight": state["norm0.weight"] * mask})


def test_forms_a_model_comes_in(tmp_path):
    from safetensors.torch import save_file

    state = weights()
    torch.save(state, tmp_path / "m.pth")
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(dict(state), hub / "model.safetensors")
    known = {"input_size": [3, 8, 8], "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    (hub / "config.json").write_text(json.dumps({"num_classes": 5, "pretrained_cfg": known}))
    with zipfile.ZipFile(tmp_path / "download.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "m.pth", "checkpoint/m.pth")
        archive.writestr("__MACOSX/checkpoint/._m.pth", b"x")
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in state.items()})
    for name in ("hub", "download.zip", "w.npz"):
        assert_same(load.open_model(tmp_path / name, image_shape=SHAPE), state)
    spec = load.open_model(hub).spec
    assert (spec.mean, spec.std, spec.image_shape) == ((0.1, 0.2, 0.3), (1, 2, 3), SHAPE)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\x08\x07\x12\x07pytorch\x1a\x051.13:", "an ONNX model"),
        (b"\x83\xa6params\x80", "a msgpack file"),
        (b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
        (b"\x08\x01\x12\x80", "a TensorFlow SavedModel"),
    ],
)
def test_other_kinds_of_files_are_told(tmp_path, head, words):
    (tmp_path / "m").write_bytes(head + b"\0" * 64)
    with pytest.raises(UserError, match=words):
        container.read(tmp_path / "m")


def test_an_npz_of_objects_and_an_archive_of_two_models_are_refused(tmp_path):
    np.savez(tmp_path / "o.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="of type 'object', which is not supported"):
        container.read(tmp_path / "o.npz")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.pth", b"x")
        archive.writestr("b.pth", b"x")
    with pytest.raises(UserError, match="does not hold one model file"):
        container.read(tmp_path / "two.zip")


# what is never executed may not change what is read


def test_objects_that_share_the_weights_are_left_out(tmp_path):
    """Whole nets, optimisers and parameters with attributes refer to the same memory."""
    net = twins.randomise(twins.SmallCNN(5, 4), 1)
    net.head.weight.no_decay = True
    optimiser = torch.optim.Adam(net.parameters())
    state = net.state_dict()
    beside = {
        "hyper_parameters": {"model": net},
        "optimiser": optimiser,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimiser, 3),
        "default": collections.defaultdict(list, a=net.head.weight),
        "parameters": list(net.parameters()),
    }
    model = opened(tmp_path / "m.pth", {"state_dict": state, **beside})
    assert_same(model, state)
    assert set(model.container.ignored) == {*beside, "hyper_parameters"}


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "__builtin__.exec",
        "subprocess.Popen",
        "torch.load",
        "importlib.import_module",
        "operator.setitem",
        "torch.hub.load",
    ],
)
def test_names_that_run_code_are_refused_even_where_they_are_not_called(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    body = hostile.with_weights(hostile.name(module, attribute))
    (tmp_path / "m.pth").write_bytes(hostile.archive(body))
    with pytest.raises(UserError, match=f"'{name}', which can run code"):
        container.read(tmp_path / "m.pth")


def test_inspect_refuses_what_scan_would(tmp_path):
    from jaxbd.cli import main

    torch.save({"net": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "m.pth")
    assert main.main(["inspect", str(tmp_path / "m.pth")]) == 2
    facts = inspect.describe(tmp_path / "m.pth")
    assert "no known architecture" in facts["not_recognised"] and facts["tensors"]
