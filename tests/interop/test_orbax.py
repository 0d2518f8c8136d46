"""Orbax folders are read as Orbax reads them; whatever is missing or double is an error."""

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxbd.base import UserError
from jaxbd.interop import container, manifest, orbax_file

ocp = pytest.importorskip("orbax.checkpoint")
TREE = {
    "params": {"conv0": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}},
    "batch_stats": {"norm0": {"mean": np.zeros(3, np.float32), "var": np.float32(2) * np.ones(3)}},
}
FORMS = {
    "files": dict(use_ocdbt=False),
    "files of zarr 3": dict(use_ocdbt=False, use_zarr3=True),
    "database": dict(use_ocdbt=True),
    "database of zarr 3": dict(use_ocdbt=True, use_zarr3=True),
}
CHUNK = "params.conv0.kernel/0.0"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of every form, by name."""
    logging.getLogger("absl").disabled = True
    root = tmp_path_factory.mktemp("orbax")
    for form, how in FORMS.items():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)) as checkpointer:
            checkpointer.save(root / form, args=ocp.args.PyTreeSave(TREE))
    return root


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the folder of files, to be spoilt."""
    return shutil.copytree(written / "files", tmp_path / "m")


def refused(folder: pathlib.Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        container.read(folder)
    assert str(caught.value).startswith("m: refused, ") and str(caught.value).isprintable()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_orbax_reads_it(written, form):
    read = container.read(written / form)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**FORMS[form])) as checkpointer:
        theirs = checkpointer.restore(written / form)
    flat = {
        f"{collection}/{module}/{leaf}": np.asarray(array)
        for collection, modules in theirs.items()
        for module, leaves in modules.items()
        for leaf, array in leaves.items()
    }
    assert read.kind == "orbax" and read.tensors.keys() == flat.keys()
    for name, array in read.tensors.items():
        assert array.dtype == flat[name].dtype and array.tobytes() == flat[name].tobytes()
    assert read.files == manifest.of(written / form) and "_METADATA" in read.files


def test_a_lost_block_is_no_zeros(folder):
    (folder / CHUNK).unlink()
    refused(folder, "'params/conv0/kernel' cannot be read: its block 0, 0 is missing")


def test_a_block_of_zeros_is_read_and_its_loss_is_not_taken_for_it(folder):
    assert not container.read(folder).tensors["batch_stats/norm0/mean"].any()
    (folder / "batch_stats.norm0.mean" / "0").unlink()
    refused(folder, "'batch_stats/norm0/mean' cannot be read")


@pytest.mark.parametrize("form", ["database", "database of zarr 3"])
def test_a_lost_file_of_a_database_is_an_error(written, tmp_path, form):
    folder = shutil.copytree(written / form, tmp_path / "m")
    for path in [*folder.rglob("d/*")]:
        path.unlink()
    refused(folder, "cannot be")


def test_what_is_no_file_is_refused_by_name(folder):
    (folder / CHUNK).unlink()
    (folder / CHUNK).mkdir()
    refused(folder, "block 0, 0")
    (folder / CHUNK).rmdir()
    os.mkfifo(folder / CHUNK)
    refused(folder, "a pipe, device or socket, 'params.conv0.kernel/0.0'")
    (folder / CHUNK).unlink()
    (folder / CHUNK).symlink_to("/dev/zero")
    refused(folder, "a link, 'params.conv0.kernel/0.0'")


def test_two_stores_in_one_folder_are_refused(written, folder):
    shutil.copytree(written / "database", folder, dirs_exist_ok=True)
    refused(folder, "twice, in a database and in files")
    (folder / "_METADATA").write_text((written / "files" / "_METADATA").read_text())
    refused(folder, "twice, in a database and in files")


def test_two_descriptions_of_one_array_are_refused(written, folder):
    other = written / "files of zarr 3" / "params.conv0.kernel"
    shutil.copytree(other, folder / "params.conv0.kernel", dirs_exist_ok=True)
    refused(folder, "'params/conv0/kernel' is described by")


def test_a_second_checkpoint_inside_is_refused(written, folder):
    shutil.copytree(written / "files", folder / "default")
    refused(folder, "holds several checkpoints")


def test_a_model_of_jaxbd_beside_it_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "config.json").write_text("{}")
    refused(folder, "a model of jaxbd and an Orbax checkpoint")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"use_ocdbt": True}, "says use_ocdbt True"),
        ({"use_ocdbt": "no"}, "use_ocdbt is 'no'"),
        ({"use_zarr3": True}, "is described by"),
        ({"use_zarr3": 1}, "use_zarr3 is 1"),
        ({"tree_metadata": []}, "not that of an Orbax checkpoint"),
    ],
)
def test_a_table_of_contents_that_contradicts_the_files_is_refused(folder, change, said):
    contents = json.loads((folder / "_METADATA").read_text())
    (folder / "_METADATA").write_text(json.dumps({**contents, **change}))
    refused(folder, said)


def test_json_with_two_meanings_is_refused(folder):
    text = (folder / "_METADATA").read_text()
    (folder / "_METADATA").write_text(text.replace("{", '{"use_ocdbt": true, ', 1))
    refused(folder, "names 'use_ocdbt' twice")
    (folder / "_METADATA").write_text("[" * 100_000)
    refused(folder, "_METADATA is not valid JSON")
    (folder / "_METADATA").write_text(text)
    (folder / "params.conv0.kernel" / ".zarray").write_text("[" * 100_000)
    refused(folder, r"\.zarray is not valid JSON")


def test_the_worker_takes_no_more_memory_than_it_is_given(tmp_path):
    """An array of which no block is stored takes no room in the folder and 1 GB in memory."""
    described = dict(
        zarr_format=2,
        shape=[1 << 28],
        chunks=[1 << 28],
        dtype="<f4",
        order="C",
        compressor=None,
        fill_value=0,
        filters=None,
    )
    (tmp_path / ".zarray").write_text(json.dumps(described))
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/"}}
    asked = json.dumps({"specs": [spec], "bytes": 1, "seconds": 60})
    ran = subprocess.run(
        [sys.executable, "-I", str(orbax_file.WORKER)],
        input=f"{asked}\n\n".encode(),
        stdout=subprocess.PIPE,
    )
    facts, _, rest = ran.stdout.partition(b"\n")
    assert json.loads(facts)[0][:2] == [[1 << 28], "float32"] and len(rest) < 10_000


def test_a_worker_that_ends_early_is_a_refusal(folder, tmp_path, monkeypatch):
    for number, script in enumerate(("", "print('[[[1], \"float32\", [1]]]'); input()")):
        worker = tmp_path / f"{number}.py"
        worker.write_text(f"input()\n{script}")
        monkeypatch.setattr(orbax_file, "WORKER", worker)
        monkeypatch.setattr(orbax_file, "_entries", lambda contents: [("params", "w")])
        monkeypatch.setattr(orbax_file, "_check_description", lambda *given: None)
        refused(folder, "take more memory or time than a folder of its size")


def test_two_arrays_in_one_place_are_refused(folder):
    contents = json.loads((folder / "_METADATA").read_text())
    rows = contents["tree_metadata"]
    first = next(name for name in rows if "kernel" in name)
    keys = [{"key": "params", "key_type": 2}, {"key": "conv0.kernel", "key_type": 2}]
    rows["second"] = {**rows[first], "key_metadata": keys}
    (folder / "_METADATA").write_text(json.dumps(contents))
    refused(folder, "gives two arrays one place")
