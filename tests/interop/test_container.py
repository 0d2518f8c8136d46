"""Reading model files into arrays, writing them back, folders, and models of every kind. Torch is
the reference."""

import collections
import hashlib
import json
import pathlib
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxbd.base import UserError
from jaxbd.detection import guard
from jaxbd.interop import container, folder, guarded, inspect, layouts, load, safetensors_file
from jaxbd.models import build

torch = pytest.importorskip("torch")

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared"
SPEC = build.Spec(
    arch="cnn",
    classes=3,
    image_shape=(8, 8, 3),
    options={"width": 4, "stages": 2},
    mean=(0.5,),
    std=(0.25,),
    class_names=("cat", "dog", "cow"),
)
DTYPES = (
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "bool",
)


@pytest.fixture(scope="module")
def variables():
    return build.net(SPEC).init(jax.random.key(1))


def bits(tensor) -> bytes:
    """The exact bytes of a torch tensor or array, in dense order."""
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    dense = tensor.detach().contiguous()
    return (dense.view(torch.int16) if dense.dtype is torch.bfloat16 else dense).numpy().tobytes()


def all_types() -> dict:
    generator = torch.Generator().manual_seed(0)
    made = {
        name: (100 * torch.randn(3, 4, generator=generator)).to(getattr(torch, name))
        for name in DTYPES
    }
    return made | {"half.nan": torch.tensor([float("nan"), float("-inf")], dtype=torch.float16)}


def save(path, value, legacy: bool = False) -> pathlib.Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def same(state, tensors) -> None:
    assert list(state) == list(tensors)
    for name, tensor in state.items():
        assert tuple(tensor.shape) == tensors[name].shape and bits(tensor) == bits(tensors[name]), (
            name
        )


# reading


@pytest.mark.parametrize("legacy", [False, True])
def test_every_type_is_read_bit_for_bit(tmp_path, legacy):
    state = all_types()
    read = container.read(save(tmp_path / "m.pth", state, legacy))
    same(state, read.tensors)
    assert read.kind == ("torch-legacy" if legacy else "torch-zip")
    assert (
        read.tensors["bfloat16"].dtype == ml_dtypes.bfloat16
        and read.tensors["bool"].dtype == np.bool_
    )
    assert (read.nesting, read.prefix, read.outer, read.ignored) == ((), "", {}, ())
    assert read.bytes == (tmp_path / "m.pth").stat().st_size and len(read.sha256) == 64


@pytest.mark.parametrize("legacy", [False, True])
def test_views_of_shared_storage_are_read_as_torch_sees_them(tmp_path, legacy):
    base = torch.arange(24.0)
    state = {
        "whole": base,
        "tail": base[20:],
        "turned": base.view(4, 6).T,
        "stepped": base[1::5],
        "repeated": base[:1].expand(3, 2),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": base[7],
        "empty": base[:0].view(0, 3),
        "tied": base,
    }
    read = container.read(save(tmp_path / "m.pth", state, legacy))
    same(state, read.tensors)
    assert np.shares_memory(read.tensors["whole"], read.tensors["tied"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path, protocol):
    state = collections.OrderedDict(w=torch.randn(2, 3), n=torch.tensor(5))
    torch.save({"net": state, "epoch": 3}, tmp_path / "m.pth", pickle_protocol=protocol)
    read = container.read(tmp_path / "m.pth")
    same(state, read.tensors)
    assert read.outer == {"epoch": 3}


def test_parameters_and_modules_metadata(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = {
        name: torch.nn.Parameter(p) if p.is_floating_point() else p
        for name, p in module.state_dict().items()
    }
    same(state, container.read(save(tmp_path / "p.pth", state)).tensors)
    read = container.read(save(tmp_path / "m.pth", module.state_dict()))
    assert (
        read.metadata["1"] == {"version": 2} and read.tensors["1.num_batches_tracked"].shape == ()
    )


@pytest.mark.parametrize(
    "wrap, nesting",
    [
        (lambda s: s, ()),
        (lambda s: {"net": s, "acc": 84.46, "epoch": 48}, ("net",)),
        (lambda s: {"state_dict": s, "ema_state_dict": s}, ("state_dict",)),
        (lambda s: {"odd name": s, "epoch": torch.tensor(3)}, ("odd name",)),
        (
            lambda s: {"checkpoint": {"model": s, "step": 7}, "args": {"lr": 0.1}},
            ("checkpoint", "model"),
        ),
    ],
)
def test_the_state_dict_is_found(tmp_path, wrap, nesting):
    state = collections.OrderedDict(w=torch.randn(2, 3))
    read = container.read(save(tmp_path / "m.pth", wrap(state)))
    assert read.nesting == nesting
    same(state, read.tensors)


def test_prefixes_are_taken_off_only_when_all_names_have_them(tmp_path):
    read = lambda *names: container.read(
        save(tmp_path / "m.pth", {name: torch.ones(1) for name in names})
    )
    assert read("module.a", "module.b").prefix == "module." and list(read("module.a").tensors) == [
        "a"
    ]
    assert (
        read("module.a", "b").prefix == ""
        and read("module._orig_mod.a").prefix == "module._orig_mod."
    )


def test_the_rest_of_the_file(tmp_path):
    """Plain values are kept, NumPy numbers as Python's; what holds tensors or types is named and
    left out."""
    state = collections.OrderedDict(w=torch.randn(2, 3))
    parameter = torch.nn.Parameter(torch.ones(2))
    optimiser = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimiser.step()
    outer = {
        "acc": np.float64(0.1) + np.float64(0.2),
        "seen": np.int64(2**40),
        "lists": [1, (2.5, None), {"a": True, 3: "b"}],
        "ordered": collections.OrderedDict(b=1, a=-(2**70)),
        "bytes": b"\x00\xff",
    }
    value = {
        "net": state,
        **outer,
        "opt": optimiser.state_dict(),
        "dtype": torch.float16,
        "dev": torch.device("cpu"),
    }
    read = container.read(save(tmp_path / "m.pth", value))
    assert read.outer == outer
    assert (
        type(read.outer["acc"]) is float and type(read.outer["ordered"]) is collections.OrderedDict
    )
    assert read.ignored == ("opt", "dtype", "dev")


def test_several_models_are_not_guessed_between(tmp_path):
    state, other = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    for value in (
        {"netG": state, "netD": other},
        {"net": state, "model": other},
        {"w": torch.ones(1), "sub": state},
    ):
        with pytest.raises(UserError, match="several dictionaries of tensors"):
            container.read(save(tmp_path / "m.pth", value))


def test_a_pickled_module_is_refused_with_advice(tmp_path):
    with pytest.raises(
        UserError, match=r"'torch\.nn\.modules\.linear\.Linear'.*save model\.state_dict\(\) instead"
    ):
        container.read(save(tmp_path / "m.pth", torch.nn.Linear(2, 2)))


def test_the_kind_is_known_by_content_not_by_name(tmp_path):
    safetensors_file.write(tmp_path / "m.pth", {"w": np.ones(3, np.float32)})
    save(tmp_path / "m.safetensors", {"w": torch.ones(3)})
    assert container.read(tmp_path / "m.pth").kind == "safetensors"
    assert container.read(tmp_path / "m.safetensors").kind == "torch-zip"


def test_a_deflated_archive_is_refused(tmp_path):
    """torch.load(mmap=True) would take the packed bytes for the weights."""
    old, deflated = zipfile.ZipFile(save(tmp_path / "m.pth", all_types())), zipfile.ZIP_DEFLATED
    with old, zipfile.ZipFile(tmp_path / "d.pth", "w", deflated) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="is compressed, and PyTorch can read such a file"):
        container.read(tmp_path / "d.pth")


# writing


@pytest.mark.parametrize("legacy", [False, True])
def test_round_trip_keeps_everything(tmp_path, legacy):
    inner = collections.OrderedDict(
        (f"module.{name}", tensor) for name, tensor in all_types().items()
    )
    inner["module.turned"] = torch.arange(6.0).view(2, 3).T
    inner["module.empty"] = torch.zeros(0, 2)
    inner._metadata = {"": {"version": 1}}
    value = {
        "checkpoint": {"model": inner, "step": 7},
        "acc": 0.1,
        "note": "é",
        "big": 2**70,
        "l": [1, (2, None)],
    }
    source = container.read(save(tmp_path / "a.pth", value, legacy))
    container.write(tmp_path / "b.pth", source, source.tensors)
    loaded = torch.load(tmp_path / "b.pth", weights_only=True)
    state = loaded["checkpoint"].pop("model")
    same(inner, {name: tensor.contiguous() for name, tensor in state.items()})
    assert {name: t.dtype for name, t in state.items()} == {
        name: t.dtype for name, t in inner.items()
    }
    assert state._metadata == {"": {"version": 1}} and loaded.pop("checkpoint") == {"step": 7}
    assert loaded == {name: entry for name, entry in value.items() if name != "checkpoint"}
    again = container.read(tmp_path / "b.pth")
    assert again._replace(
        sha256="", path="", bytes=0, tensors={}, kind="", files={}
    ) == source._replace(sha256="", path="", bytes=0, tensors={}, kind="", files={})


def test_torch_loads_the_written_file_strictly_and_mapped(tmp_path):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
    )
    module(torch.randn(2, 3, 8, 8))
    source = container.read(save(tmp_path / "a.pth", module.state_dict()))
    container.write(tmp_path / "b.pth", source, source.tensors)
    for mapped in (False, True):
        fresh = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
        )
        fresh.load_state_dict(
            torch.load(tmp_path / "b.pth", weights_only=True, mmap=mapped), strict=True
        )
        same(
            module.state_dict(),
            {name: tensor.numpy() for name, tensor in fresh.state_dict().items()},
        )
    with zipfile.ZipFile(tmp_path / "b.pth") as archive:
        assert archive.testzip() is None
        assert all(_data_offset(archive, info) % 64 == 0 for info in archive.infolist())


def _data_offset(archive, info) -> int:
    head = archive.fp
    head.seek(info.header_offset + 26)
    sizes = np.frombuffer(head.read(4), "<u2")
    return info.header_offset + 30 + int(sizes.sum())


def test_equal_tensors_make_equal_files(tmp_path):
    source = container.read(save(tmp_path / "a.pth", all_types()))
    for name in ("b.pth", "c.pth"):
        container.write(tmp_path / name, source, source.tensors)
    assert (tmp_path / "b.pth").read_bytes() == (tmp_path / "c.pth").read_bytes()


def test_safetensors_round_trip(tmp_path):
    import safetensors.torch

    state = all_types() | {"scalar": torch.tensor(3), "empty": torch.zeros(0, 2)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    source = container.read(tmp_path / "a.safetensors")
    assert source.outer == {"format": "pt"} and set(source.tensors) == set(state)
    container.write(tmp_path / "b.safetensors", source, source.tensors)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    container.write(tmp_path / "c.pth", source, source.tensors, kind="torch-zip")
    same(torch.load(tmp_path / "c.pth", weights_only=True), source.tensors)


def test_writing_refuses_other_names_and_shapes_and_leaves_nothing(tmp_path):
    source = container.read(save(tmp_path / "a.pth", {"w": torch.ones(2, 3), "b": torch.ones(2)}))
    for tensors, said in (
        ({"w": np.ones((2, 3))}, "'b' is missing"),
        ({**source.tensors, "x": np.ones(1)}, "'x' is not in the source"),
        ({**source.tensors, "b": np.ones(3)}, "'b' has shape"),
    ):
        with pytest.raises(UserError, match=said):
            container.write(tmp_path / "b.pth", source, tensors)
    with pytest.raises(UserError, match="cannot be read or written"):
        (tmp_path / "dir.pth").mkdir()
        container.write(tmp_path / "dir.pth", source, source.tensors)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pth", "dir.pth"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    source = container.read(save(tmp_path / "a.pth", {"w": torch.ones(2, 3)}))
    before = (tmp_path / "a.pth").read_bytes()
    monkeypatch.setattr(
        zipfile.ZipFile, "writestr", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        container.write(tmp_path / "a.pth", source, source.tensors)
    assert (tmp_path / "a.pth").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# folders


def test_folder_round_trip(tmp_path, variables):
    folder.save(tmp_path / "m", SPEC, variables, {"from": "test"})
    spec, again, digest = folder.load(tmp_path / "m")
    assert spec == SPEC and digest == container.read(tmp_path / "m").sha256
    jax.tree.map(np.testing.assert_array_equal, dict(variables), again)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["notes"] == {"from": "test"}
    assert container.read(tmp_path / "m").kind == "folder" and len(list(tmp_path.iterdir())) == 1


def test_folder_keeps_bounds(tmp_path, variables):
    open_below = lambda n: {
        "lower": np.full(n, -np.inf, np.float32),
        "upper": np.ones(n, np.float32),
    }
    bounds = {name: open_below(4 * 2**i) for i, name in enumerate(("norm0", "norm1"))}
    folder.save(tmp_path / "m", SPEC, {**variables, "bounds": bounds})
    model = load.open_model(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, bounds, model.variables["bounds"])


def test_folder_replaces_only_a_model_folder(tmp_path, variables):
    (tmp_path / "m").mkdir()
    folder.save(tmp_path / "m", SPEC, variables)
    folder.save(tmp_path / "m", SPEC, jax.tree.map(lambda leaf: leaf + 1, variables))
    assert float(folder.load(tmp_path / "m")[1]["params"]["head"]["bias"][0]) == 1
    (tmp_path / "m" / "diary.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("m", "other", "file"):
        with pytest.raises(UserError, match="not overwritten"):
            folder.save(tmp_path / name, SPEC, variables)
    assert (tmp_path / "m" / "diary.txt").exists() and len(list(tmp_path.iterdir())) == 3


def test_folder_lists_what_does_not_fit(tmp_path, variables):
    flat = folder.flatten(variables)
    flat["params/extra"] = np.ones(1, np.float32)
    flat["params/head/bias"] = np.ones(7, np.float32)
    flat["params/head/kernel"] = np.ones((8, 3), np.int32)
    del flat["params/conv0/kernel"]
    folder.save(tmp_path / "m", SPEC, variables)
    safetensors_file.write(tmp_path / "m" / "model.safetensors", flat)
    with pytest.raises(UserError) as caught:
        folder.load(tmp_path / "m")
    message = str(caught.value)
    assert (
        "params/conv0/kernel is missing" in message
        and "'params/extra' is not in the net" in message
    )
    assert "params/head/bias has shape (7,) where the net has (3,)" in message
    assert "params/head/kernel holds int32, not floats" in message


def test_orbax_folder(tmp_path, variables):
    import orbax.checkpoint as ocp

    arrays = jax.tree.map(np.asarray, dict(variables))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "o", {**arrays, "opt_state": {"m": np.zeros(3)}})
    read = container.read(tmp_path / "o")
    assert read.kind == "orbax" and read.ignored == ("opt_state",)
    same(
        folder.flatten(variables), {name: read.tensors[name] for name in folder.flatten(variables)}
    )
    with pytest.raises(UserError, match="give --arch"):
        load.open_model(tmp_path / "o")
    model = load.open_model(tmp_path / "o", arch="cnn", image_shape=(8, 8, 3))
    assert (model.spec.classes, dict(model.spec.options)) == (3, dict(SPEC.options))
    jax.tree.map(
        np.testing.assert_array_equal, arrays, jax.tree.map(np.asarray, dict(model.variables))
    )
    load.save_model(tmp_path / "o.pth", model, model.variables)
    assert load.open_model(tmp_path / "o.pth").spec.arch == "cnn"


# models


@pytest.mark.parametrize("name", ["m", "m.pth", "m.safetensors"])
def test_a_model_of_ours_goes_out_and_comes_back(tmp_path, variables, name):
    folder.save(tmp_path / "born", SPEC, variables)
    model = load.open_model(tmp_path / "born")
    assert load.save_model(tmp_path / name, model, variables) is None
    again = load.open_model(tmp_path / name, image_shape=(8, 8, 3), mean=(0.5,), std=(0.25,))
    assert (again.spec.arch, again.spec.options, again.spec.mean) == ("cnn", SPEC.options, (0.5,))
    images = jax.random.uniform(jax.random.key(2), (2, 8, 8, 3))
    np.testing.assert_array_equal(
        model.net.apply(variables, images)[0], again.net.apply(again.variables, images)[0]
    )


def test_the_weights_of_a_folder_on_their_own_need_the_architecture(tmp_path, variables):
    folder.save(tmp_path / "m", SPEC, variables)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="give --arch"):
        load.open_model(tmp_path / "alone.safetensors")
    model = load.open_model(tmp_path / "alone.safetensors", arch="cnn")
    load.save_model(tmp_path / "out.safetensors", model, model.variables)
    again = load.open_model(tmp_path / "out.safetensors")
    jax.tree.map(np.testing.assert_array_equal, dict(variables), dict(again.variables))


def test_a_folder_knows_its_own_architecture(tmp_path, variables):
    folder.save(tmp_path / "m", SPEC, variables)
    for wrong in ({"arch": "vgg"}, {"image_shape": (32, 32, 3)}):
        with pytest.raises(UserError, match="the folder says"):
            load.open_model(tmp_path / "m", **wrong)


def test_what_a_repair_did_not_touch_is_bit_identical(tmp_path, variables):
    layout = layouts.export_names(SPEC)
    state = {
        name: torch.from_numpy(array)
        for name, array in layouts.to_tensors(variables, layout).items()
    }
    state["conv0.weight"] = (
        state["conv0.weight"].double() + 1e-12
    )  # more digits than we compute with
    model = load.open_model(save(tmp_path / "a.pth", {"net": state, "epoch": 3}))
    head = {**model.variables["params"]["head"], "bias": np.full(3, 0.5, np.float32)}
    repaired = {**model.variables, "params": {**model.variables["params"], "head": head}}
    assert load.save_model(tmp_path / "b.pth", model, repaired) is None
    loaded = torch.load(tmp_path / "b.pth", weights_only=True)
    assert loaded["epoch"] == 3 and loaded["net"]["head.bias"].tolist() == [0.5] * 3
    for name, tensor in state.items():
        assert name == "head.bias" or (bits(loaded["net"][name]) == bits(tensor))
        assert loaded["net"][name].dtype == tensor.dtype


def test_bounds_go_beside_a_state_dict_and_are_spoken_of(tmp_path, variables):
    folder.save(tmp_path / "m", SPEC, variables)
    model = load.open_model(tmp_path / "m")
    bounds = {"norm0": {"lower": np.zeros(4, np.float32), "upper": np.ones(4, np.float32)}}
    note = load.save_model(tmp_path / "r.pth", model, {**variables, "bounds": bounds})
    assert "r.bounds.safetensors" in note and "bounds" in note
    with (tmp_path / "r.bounds.safetensors").open("rb") as file:
        held, _ = safetensors_file.read(
            file, (tmp_path / "r.bounds.safetensors").stat().st_size, container.Limits()
        )
    assert set(held) == {"bounds/norm0/lower", "bounds/norm0/upper"}
    assert set(torch.load(tmp_path / "r.pth", weights_only=True)) == set(
        layouts.to_tensors(variables, layouts.export_names(SPEC))
    )


# bounds beside a file


def clipped(variables) -> dict:
    """`variables` with bounds that are easy to tell: one layer clipped, and the features
    normalised."""
    open_end, width = np.full(4, np.inf, np.float32), 8
    norm0 = {"lower": -open_end, "upper": np.full(4, 0.25, np.float32)}
    ends = {"lower": np.zeros(width, np.float32), "upper": np.ones(width, np.float32)}
    features = {
        "mean": np.full(width, 0.5, np.float32),
        "std": np.full(width, 2.0, np.float32),
        **ends,
    }
    return {**variables, "bounds": {"norm0": norm0, "features": features}}


@pytest.mark.parametrize("name", ["r.pth", "r.safetensors"])
def test_bounds_beside_a_file_are_applied_when_it_is_opened(tmp_path, variables, name):
    folder.save(tmp_path / "m", SPEC, variables)
    repaired = clipped(variables)
    load.save_model(tmp_path / name, load.open_model(tmp_path / "m"), repaired)
    model = load.open_model(tmp_path / name, mean=SPEC.mean, std=SPEC.std)
    jax.tree.map(np.testing.assert_array_equal, repaired["bounds"], model.variables["bounds"])
    images = jax.random.uniform(jax.random.key(0), (5, 8, 8, 3))
    wanted = build.net(SPEC).apply(repaired, images)[0]
    np.testing.assert_allclose(model.net.apply(model.variables, images)[0], wanted, rtol=1e-5)
    assert not np.allclose(wanted, build.net(SPEC).apply(variables, images)[0], rtol=1e-3)
    assert model.bounds == inspect.describe(tmp_path / name)["bounds"] == "r.bounds.safetensors"
    assert (
        load.open_model(tmp_path / "m").bounds is None
        and inspect.describe(tmp_path / "m")["bounds"] is None
    )
    load.save_model(tmp_path / f"again-{name}", model, model.variables)  # and they travel on
    again = load.open_model(tmp_path / f"again-{name}")
    jax.tree.map(np.testing.assert_array_equal, repaired["bounds"], again.variables["bounds"])


def test_bounds_of_a_replaced_file_do_not_stay_behind(tmp_path, variables):
    folder.save(tmp_path / "m", SPEC, variables)
    model = load.open_model(tmp_path / "m")
    load.save_model(tmp_path / "r.pth", model, clipped(variables))
    load.save_model(tmp_path / "r.pth", model, variables)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "r.pth"]


def test_bounds_of_another_file_are_neither_applied_nor_lost(tmp_path, variables):
    folder.save(tmp_path / "m", SPEC, variables)
    model = load.open_model(tmp_path / "m")
    load.save_model(tmp_path / "r.pth", model, clipped(variables))
    before = (tmp_path / "r.bounds.safetensors").read_bytes()
    for repaired in (variables, clipped(variables)):
        with pytest.raises(
            UserError, match=r"of another model; choose another name than r\.safetensors"
        ):
            load.save_model(tmp_path / "r.safetensors", model, repaired)
    save(
        tmp_path / "r.tar",
        torch.load(tmp_path / "r.pth", weights_only=True) | {"head.bias": torch.zeros(3)},
    )
    with pytest.raises(
        UserError,
        match=r"r\.bounds\.safetensors: refused, it holds the activation bounds of another",
    ):
        load.open_model(tmp_path / "r.tar")
    assert "of another model file" in inspect.describe(tmp_path / "r.tar")["refused"]
    assert (tmp_path / "r.bounds.safetensors").read_bytes() == before and not (
        tmp_path / "r.safetensors"
    ).exists()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"params/head/bias": np.zeros(3, np.float32)}, "'params/head/bias'"),
        ({"bounds/norm0/upper": np.ones(4, np.float32)}, "bounds/norm0/lower is missing"),
        (
            {f"bounds/norm0/{side}": np.ones(5, np.float32) for side in ("lower", "upper")},
            "has shape (5,)",
        ),
        (
            {f"bounds/norm9/{side}": np.ones(4, np.float32) for side in ("lower", "upper")},
            "'bounds/norm9/lower' is not",
        ),
        (
            {f"bounds/norm0/{side}": np.full(4, np.nan, np.float32) for side in ("lower", "upper")},
            "holds 4 values",
        ),
        (
            {f"bounds/norm0/{side}": np.ones(4, np.int32) for side in ("lower", "upper")},
            "holds int32",
        ),
        (
            {
                f"bounds/features/{side}": np.full(8, -1.0, np.float32)
                for side in ("lower", "upper", "mean", "std")
            },
            "negative variance or standard deviation",
        ),
        (None, "empty"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(tmp_path, variables, arrays, words):
    folder.save(tmp_path / "m", SPEC, variables)
    load.save_model(tmp_path / "r.pth", load.open_model(tmp_path / "m"), variables)
    owner = hashlib.sha256((tmp_path / "r.pth").read_bytes()).hexdigest()
    if arrays is None:
        (tmp_path / "r.bounds.safetensors").touch()
    else:
        safetensors_file.write(
            tmp_path / "r.bounds.safetensors", arrays, {load.beside.OWNER: owner}
        )
    with pytest.raises(UserError) as caught:
        load.open_model(tmp_path / "r.pth")
    assert words in str(caught.value) and str(caught.value).startswith(
        "r.bounds.safetensors: refused"
    )


# guarded models


def guard_variables(variables) -> dict:
    """A guarded net's variables for the targets (2, 0): one moment moved, other bounds for each."""
    moved = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    first = {**clipped(variables), "batch_stats": moved}
    return guard.pack(
        variables,
        [first, jax.tree.map(lambda leaf: 2 * leaf, first) | {"params": variables["params"]}],
    )


def test_a_guarded_model_round_trips(tmp_path, variables):
    held = guard_variables(variables)
    guarded.save(tmp_path / "g", SPEC, held, (2, 0), {"from": "test"})
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == [
        "config.json",
        "guard.safetensors",
        "model.safetensors",
    ]
    model = load.open_model(tmp_path / "g")
    assert (
        model.spec == SPEC and model.guard.targets == (2, 0) and model.sha256 != model.guard.sha256
    )
    jax.tree.map(np.testing.assert_array_equal, held, model.variables)
    images = jax.random.uniform(jax.random.key(0), (9, 8, 8, 3))
    wanted = guard.make(build.net(SPEC), (2, 0)).apply(held, images)[0]
    np.testing.assert_allclose(model.net.apply(model.variables, images)[0], wanted, rtol=1e-5)
    with (tmp_path / "g" / "guard.safetensors").open("rb") as file:
        names, _ = safetensors_file.read(
            file, (tmp_path / "g" / "guard.safetensors").stat().st_size, container.Limits()
        )
    assert "2/batch_stats/norm0/mean" in names and "0/bounds/features/std" in names
    assert not any("params" in name for name in names)
    facts = inspect.describe(tmp_path / "g")
    assert facts["guard"] == {"targets": [2, 0], "sha256": model.guard.sha256, "arrays": len(names)}
    assert (
        facts["architecture"].startswith("cnn, 3 classes")
        and facts["nonfinite"] == {}
        and json.dumps(facts)
    )


def test_a_guarded_model_goes_into_folders_only(tmp_path, variables):
    guarded.save(tmp_path / "g", SPEC, guard_variables(variables), (2, 0))
    model = load.open_model(tmp_path / "g")
    with pytest.raises(UserError, match="a guarded model is a folder"):
        load.save_model(tmp_path / "g.pth", model, model.variables)
    load.save_model(tmp_path / "h", model, model.variables)
    again = load.open_model(tmp_path / "h")
    assert again.guard == model.guard and sorted(path.name for path in tmp_path.iterdir()) == [
        "g",
        "h",
    ]


def test_a_guarded_model_never_passes_for_a_plain_one(tmp_path, variables):
    guarded.save(tmp_path / "g", SPEC, guard_variables(variables), (2, 0))
    with pytest.raises(UserError, match="it is a guarded model"):
        folder.load(tmp_path / "g")
    (tmp_path / "g" / "guard.safetensors").rename(tmp_path / "elsewhere")
    for read in (folder.load, load.open_model, guarded.load):
        with pytest.raises(UserError, match=r"guard\.safetensors is missing"):
            read(tmp_path / "g")
    folder.save(tmp_path / "g", SPEC, variables)  # a plain one replaces it, whole
    (tmp_path / "elsewhere").rename(tmp_path / "g" / "guard.safetensors")
    with pytest.raises(UserError, match="does not describe a guarded model"):
        load.open_model(tmp_path / "g")


def test_a_guard_belongs_to_its_suspect(tmp_path, variables):
    other = jax.tree.map(lambda leaf: leaf + 1, dict(variables))
    for name, suspect in (("g", variables), ("h", other)):
        guarded.save(tmp_path / name, SPEC, guard_variables(suspect), (2, 0))
    (tmp_path / "h" / "model.safetensors").replace(tmp_path / "g" / "model.safetensors")
    with pytest.raises(UserError, match=r"are not the two that config\.json names"):
        load.open_model(tmp_path / "g")
    assert "are not the two" in inspect.describe(tmp_path / "g")["refused"]


def test_an_interrupted_guard_leaves_the_old_model(tmp_path, variables, monkeypatch):
    folder.save(tmp_path / "g", SPEC, variables)
    write = safetensors_file.write
    failing = lambda path, tensors: (
        write(path, tensors) if path.name == "model.safetensors" else 1 / 0
    )
    monkeypatch.setattr(safetensors_file, "write", failing)
    with pytest.raises(ZeroDivisionError):
        guarded.save(tmp_path / "g", SPEC, guard_variables(variables), (2, 0))
    assert load.open_model(tmp_path / "g").guard is None and len(list(tmp_path.iterdir())) == 1


def test_inspect_describes_a_file(tmp_path, variables):
    folder.save(tmp_path / "m", SPEC, variables)
    model = load.open_model(tmp_path / "m")
    load.save_model(tmp_path / "m.pth", model, variables)
    for name in ("m", "m.pth"):
        facts = inspect.describe(tmp_path / name)
        assert facts["architecture"].startswith("cnn, 3 classes") and facts["refused"] is None
        assert facts["parameters"] == build.parameter_count(variables) and facts["nonfinite"] == {}
        assert json.dumps(facts)
    facts = inspect.describe(
        save(tmp_path / "x.pth", {"net": {"some.weight": torch.ones(2)}, "o": torch.ones(1)})
    )
    assert facts["architecture"] is None and "no known architecture" in facts["not_recognised"]
    assert (facts["nesting"], facts["ignored"]) == (["net"], ["o"])


@pytest.mark.parametrize("name", ["badnets_8_02_ckpt.pth", "l2_inv_0_02_ckpt.pth"])
def test_published_models(tmp_path, name):
    path = SHARED / "models" / "ibau" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    model = load.open_model(path)
    same(theirs["net"], model.container.tensors)
    assert model.spec.arch == "vgg" and set(model.container.outer) == {"acc", "epoch"}
    load.save_model(tmp_path / "out.pth", model, model.variables)
    again = torch.load(tmp_path / "out.pth", weights_only=True)
    same(theirs["net"], {key: tensor.numpy() for key, tensor in again["net"].items()})
    assert again["epoch"] == theirs["epoch"] and again["acc"] == theirs["acc"]
