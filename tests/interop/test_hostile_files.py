"""Every file of the hostile corpus is refused, quickly, cheaply, and without anything having
happened."""

import json
import os
import pathlib
import subprocess
import sys

import hostile
import numpy as np
import pytest

from jaxbd.base import UserError
from jaxbd.interop import container, inspect, load
from jaxbd.interop.unpickle import Machine
from jaxbd.limits import Limits, Refusal

MOST_SECONDS, MOST_MEGABYTES = 2.0, 200.0
HERE = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """What became of every file: its reports by name, and the folder."""
    root = tmp_path_factory.mktemp("hostile")
    names = hostile.build(root)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "hostile.py"), str(root)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    reports = {report["name"]: report for report in map(json.loads, ran.stdout.splitlines())}
    return names, reports, root


def test_every_file_is_read_to_an_answer(corpus):
    names, reports, _ = corpus
    assert sorted(reports) == names and len(names) > 250


def test_every_file_is_refused_with_one_line_that_names_it(corpus):
    _, reports, _ = corpus
    wrong = [
        (r["name"], r["outcome"], r["message"])
        for r in reports.values()
        if r["outcome"] != ("accepted" if r["name"] in hostile.INERT else "refused")
    ]
    assert not wrong
    for report in reports.values():
        if report["name"] in hostile.INERT:
            continue
        message = report["message"]
        assert (
            message.startswith(f"{report['name']}: refused, ")
            and message.isprintable()
            and len(message) < 600
        )


def test_every_file_is_refused_in_time_and_memory(corpus):
    _, reports, _ = corpus
    dear = [
        (r["name"], r["seconds"], r["megabytes"])
        for r in reports.values()
        if r["seconds"] > MOST_SECONDS or r["megabytes"] > MOST_MEGABYTES
    ]
    assert not dear


def test_beside_what_is_inert_the_weights_are_read_alone(corpus):
    _, _, root = corpus
    for name in sorted(hostile.INERT):
        read = container.read(root / name)
        assert read.tensors["w"].tobytes() == hostile.WEIGHTS and list(read.tensors) == ["w"]
        assert read.ignored or isinstance(read.outer["extra"], int | list), name


def test_nothing_was_executed_and_nothing_written(corpus):
    names, reports, root = corpus
    assert [r for r in reports.values() if r["events"]] == []
    assert sorted(entry.name for entry in root.iterdir()) == names
    assert (
        not list(root.rglob(f"*{hostile.CANARY}*"))
        and not pathlib.Path(f"/tmp/{hostile.CANARY}").exists()
    )


def test_the_canary_works(tmp_path):
    """An ordinary unpickler on the same payload does create the file: the corpus is armed."""
    payload = hostile.pickle.dumps(hostile.Call(os.system, f"touch {hostile.CANARY}"))
    subprocess.run(
        [sys.executable, "-c", f"import pickle; pickle.loads({payload!r})"],
        cwd=tmp_path,
        check=True,
    )
    assert (tmp_path / hostile.CANARY).exists()


@pytest.mark.parametrize(
    "name, said",
    [
        ("call_os_system_2.pth", "'posix.system'"),
        ("call_eval_4.pth", "'builtins.eval'"),
        ("call_nested_reduce_2.pth", "'__builtin__.eval'"),
        ("trick_stack_global.pth", "'os.system'"),
        ("trick_dotted.pth", "'collections.OrderedDict.__init__.__globals__'"),
        ("trick_ext1.pth", "EXT1"),
        ("cost_claims_bytearray8.pth", "claims more bytes than there are"),
        ("zip_traversal.pth", "'../../canary'"),
        ("view_two_models.pth", "'left', 'right'"),
        ("view_path_key.pth", "'../../../../etc/passwd'"),
        ("stream_and_tar.pth", "tar archive at once"),
        ("st_claims_10gb.safetensors", "10,737,418,240"),
        ("folder_other_tensors", "params/w"),
        ("folder_guard_missing", "guard.safetensors is missing"),
        ("folder_guard_claims_10gb", "guard.safetensors: its tensors take 10,737,418,240"),
        ("folder_guard_pickle", "guard.safetensors: its header"),
        ("folder_guard_not_spoken_of", "guard is None"),
        ("folder_guard_target_outside", "targets are [2], but the net has 2"),
        ("folder_guard_target_without_arrays", "holds nothing for target 0"),
        ("folder_guard_another_target", "'0/batch_stats/norm0/mean', which belongs to no target"),
        ("folder_guard_weights", "'1/params/head/bias'"),
        ("folder_guard_shape", "batch_stats/norm0/mean has shape (2,) where the net has (1,)"),
        ("folder_guard_one_bound", "bounds/norm0/lower is missing"),
        ("folder_guard_no_spread", "bounds/features/std is missing"),
        ("folder_guard_unknown_layer", "'bounds/conv0/upper' is not in the net"),
        ("folder_guard_targets_differ", "different bounds"),
        ("folder_guard_nan_bound", "'1/bounds/norm0/upper' holds 1 values"),
        ("folder_guard_endless_moment", "'1/batch_stats/norm0/var' holds 1 values"),
        ("folder_guard_endless_spread", "'1/bounds/features/std' holds 1 values"),
        ("folder_guard_other_file", "are not the two that config.json names"),
        ("folder_guard_plain_config", "does not describe a guarded model"),
    ],
)
def test_the_message_names_the_offence(corpus, name, said):
    assert said in corpus[1][name]["message"]


def test_inspect_reports_a_refusal_and_the_hash(corpus):
    facts = inspect.describe(corpus[2] / "call_os_system_2.pth")
    assert (
        "posix.system" in facts["refused"] and len(facts["sha256"]) == 64 and facts["tensors"] == []
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    path = tmp_path / "model.pth"
    body, storages = [], {}
    for number, (name, shape) in enumerate(_cnn_shapes().items()):
        array = np.ones(shape, np.float32)
        if name == "norm1.running_var":
            array[3] = value
        stride = tuple(step // 4 for step in array.strides)
        held = hostile.storage(str(number), array.size)
        body.append((hostile.text(name), hostile.tensor(shape=shape, stride=stride, held=held)))
        storages[str(number)] = array.tobytes()
    path.write_bytes(hostile.archive(hostile.program(hostile.table(*body)), storages))
    with pytest.raises(UserError, match=r"'norm1\.running_var' holds 1 values"):
        load.open_model(path)
    assert load.open_model(path, allow_nonfinite=True).spec.arch == "cnn"
    assert inspect.describe(path)["nonfinite"] == {"norm1.running_var": 1}


def _cnn_shapes():
    from jaxbd.interop import layouts
    from jaxbd.models import build

    spec = build.Spec(
        arch="cnn", classes=2, image_shape=(8, 8, 3), options={"width": 4, "stages": 2}
    )
    layout = layouts.export_names(spec)
    turned = lambda shape: tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else shape[::-1]
    return {name: turned(layout.shapes[path]) for path, name in layout.names.items()}


@pytest.mark.parametrize(
    "shape", [(1 << 22, 3, 1, 1), (1 << 11, 1 << 11, 1, 1), (4, 3, 1 << 9, 1 << 9), (4, 3, 0, 3)]
)
def test_shapes_that_no_net_has_are_refused_by_name(tmp_path, shape):
    """Views that repeat one stored number: a small file whose first layer claims to be enormous."""
    shapes = _cnn_shapes() | {"conv0.weight": shape}
    body = [
        (hostile.text(n), hostile.tensor(shape=s, stride=(0,) * len(s))) for n, s in shapes.items()
    ]
    (tmp_path / "m.pth").write_bytes(hostile.archive(hostile.program(hostile.table(*body))))
    with pytest.raises(UserError, match=r"m\.pth: .*(conv0\.weight|norm0\.running_mean)"):
        load.open_model(tmp_path / "m.pth")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    for reader in (container.read, inspect.describe, load.open_model):
        with pytest.raises(UserError, match="no such file"):
            reader(tmp_path / "nowhere.pth")


def test_limits_can_be_tightened(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(hostile.archive(hostile.plain_state()))
    assert container.read(path).tensors["w"].shape == (2, 3)
    for limits in (
        Limits(file_bytes=10),
        Limits(pickle_bytes=10),
        Limits(instructions=5),
        Limits(tensors=0),
    ):
        with pytest.raises(UserError, match="refused"):
            container.read(path, limits)


def test_the_extension_registry_is_never_asked():
    """EXT instructions name a registered class by number; the registry is the caller's process, not
    the file's."""
    import copyreg

    copyreg.add_extension("os", "system", 0x7F)
    try:
        with pytest.raises(Refusal, match="EXT1"):
            Machine(hostile.program(b"\x82\x7f"), 0, Limits()).run()
    finally:
        copyreg.remove_extension("os", "system", 0x7F)


def test_other_weights_in_a_folder_of_the_hub_are_named(tmp_path):
    """Which of them a library loads depends on what is installed."""
    (tmp_path / "config.json").write_text('{"architecture": "x"}')
    (tmp_path / "model.safetensors").write_bytes(hostile.safetensors({"w": hostile.entry()}))
    assert container.read(tmp_path).ignored == ()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert container.read(tmp_path).ignored == ("pytorch_model.bin",)
