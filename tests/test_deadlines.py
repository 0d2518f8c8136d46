"""Every reader looks at the clock where a file could keep it busy: with a clock on which each look
is a hundred seconds after the one before, all of them give up."""

import collections
import contextlib
import gzip
import importlib
import io
import itertools
import pathlib
import signal
import subprocess
import sys
import tarfile
from typing import Any

import hostile
import numpy as np
import pytest
from PIL import Image

from jaxbd import limits
from jaxbd.base import UserError
from jaxbd.data import bounded, cifar, cifar_pickle, idx, npz_archive, parquet, pictures
from jaxbd.interop import archive, selection, state_dict, torch_zip, unpickle
from jaxbd.interop.allowed import Storage, Tensor
from jaxbd.limits import Limits, Refusal

PACKAGE = pathlib.Path(limits.__file__).parent
LATE = "takes more than .* seconds"


@pytest.fixture
def late(monkeypatch):
    """Every look at the clock is a hundred seconds after the one before."""
    clock = itertools.count(0, 100)
    monkeypatch.setattr(limits.time, "thread_time", lambda: next(clock))


def png() -> bytes:
    out = io.BytesIO()
    Image.new("L", (16, 16)).save(out, "PNG")
    return out.getvalue()


def in_zip() -> tuple[io.BytesIO, int]:
    data = hostile.archive(hostile.plain_state())
    return io.BytesIO(data), len(data)


def in_npz() -> tuple[io.BytesIO, int]:
    data = hostile.npz({"a.weight": hostile.array()})
    return io.BytesIO(data), len(data)


def in_graph(read):
    """Calls `read` on the hostile graphs' plain model, where the onnx package is there."""
    pytest.importorskip("onnx")
    sys.path.insert(0, str(pathlib.Path(__file__).parent / "interop" / "onnx"))
    graphs: Any = importlib.import_module("test_hostile_graphs")
    return read(graphs.model().SerializeToString())


def traced(data: bytes):
    from jaxbd.interop.onnx import open as graphs
    from jaxbd.interop.onnx import read
    from jaxbd.interop.onnx.graph import GraphLimits

    graph = read.read_onnx(data, GraphLimits(seconds=1e9))
    return graphs.examine(graph, pathlib.Path("m"), "", 0)


def scanned(data: bytes):
    import onnx

    from jaxbd.interop.onnx import graph, scan

    model = onnx.ModelProto.FromString(data)
    model.graph.node.extend(list(model.graph.node) * 30)
    whole = model.SerializeToString()
    scan.check_size(whole, onnx.ModelProto.DESCRIPTOR, graph.GraphLimits())


def net():
    """A net that fits no architecture, under each of its prefixes."""
    tensor = Tensor(Storage("0", np.dtype("f4"), 6), 0, (6,), (1,))
    value = {"x.a": tensor, "x.b": tensor, "x.c": tensor}
    fits = lambda shapes, loose: False
    load = lambda key, size: np.zeros(size, np.uint8)
    return state_dict.find(value, load, 24, Limits(), fits)


LOOPS = {
    "a pickle's plain steps": lambda: unpickle.Machine(b"N0" * 200 + b"N.", 0, Limits()).run(),
    "a pickle's calls": lambda: unpickle.Machine(
        b"ccollections\nOrderedDict\n)R.", 0, Limits()
    ).run(),
    "an archive's directory": lambda: torch_zip.directory(*in_zip(), Limits()),
    "arrays of an archive": lambda: archive.read_npz(*in_npz(), Limits()),
    "choosing a net": net,
    "named arrays": lambda: state_dict.find_named(
        {f"a.{name}": np.ones(3, "f4") for name in "xyz"}, Limits(), lambda shapes, loose: False
    ),
    "fields of a graph": lambda: in_graph(scanned),
    "constants of a graph": lambda: in_graph(traced),
    "a CIFAR pickle": lambda: cifar_pickle.read(b"\x80\x02}.", "x"),
    "a picture": lambda: bounded.open_picture(png(), "x").load(),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_reader_gives_up(late, name):
    with pytest.raises((Refusal, UserError), match=LATE):
        LOOPS[name]()


def test_comparing_nets_is_given_up(monkeypatch):
    """Copies of a net are read one after the other, and there is no end of them."""
    tries = [0]

    def check():
        tries[0] += 1
        if tries[0] > 2:
            raise Refusal("late")

    equal = state_dict._Equal(lambda each, keys: {}, check)
    one = selection.Candidate((), selection.Selection({}, ""))
    assert equal(one, one) and equal(one, one)
    with pytest.raises(Refusal, match="late"):
        equal(one, one)


def test_a_folder_is_given_up(late, tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(Refusal, match=LATE):
        limits.walk(tmp_path, Limits())


def test_pictures_are_given_up_by_name(late):
    with pytest.raises(UserError, match=rf"'x\.png': it {LATE}"):
        pictures.decode([("x.png", png())], 1)


def test_pictures_share_what_time_there_is_to_spare(monkeypatch):
    budget = bounded.PixelBudget()
    clock = [0.0]
    monkeypatch.setattr(limits.time, "thread_time", lambda: clock[0])
    own = budget.deadline(0).seconds
    for _ in range(3):  # each takes two thirds of it beyond its own time
        deadline = budget.deadline(0)
        clock[0] += own + Limits().seconds / 3
        deadline.check()
        deadline.check()  # what was taken is not taken twice
    deadline = budget.deadline(0)
    clock[0] += own * 0.9
    deadline.check()
    clock[0] += own
    with pytest.raises(Refusal, match=LATE):
        deadline.check()


def test_once_a_picture_failed_the_others_are_given_up():
    budget = bounded.PixelBudget()
    deadline = budget.deadline(0)
    deadline.check()
    assert budget.failed(UserError("first")) is budget.failed(UserError("second"))
    with pytest.raises(UserError, match="first"):
        deadline.check()


def test_packed_idx_files_are_given_up(late, tmp_path):
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match=LATE):
        idx.load(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_tar_archives_are_given_up(late, tmp_path, packed):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz" if packed else "w") as file:
        file.addfile(tarfile.TarInfo("test_batch"))
    with pytest.raises(UserError, match=LATE):
        cifar.load(path)


def test_members_of_a_tar_are_given_up(monkeypatch, tmp_path):
    """Its headers are in memory by then: the loop itself looks at the clock."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as file:
        for number in range(40):
            file.addfile(tarfile.TarInfo(f"{number}"))
    looks = collections.Counter()
    check = limits.Deadline.check
    monkeypatch.setattr(limits.Deadline, "check", lambda self: looks.update(n=1) or check(self))
    with pytest.raises(UserError, match="no CIFAR batches"):
        cifar.load(path)
    assert looks["n"] > 40


def test_headers_of_an_npz_are_given_up(late, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(hostile.npz({"images": hostile.array()}))
    with pytest.raises(UserError, match=LATE), npz_archive.Archive(path):
        pass


def test_programs_of_torch_export_are_given_up(late):
    from jaxbd.interop.onnx import graph, pt2

    with pytest.raises(Refusal, match=LATE):
        pt2._convert(None, [{}], graph.GraphLimits())  # pyright: ignore[reportArgumentType]


def test_the_worker_of_tables_has_the_same_seconds(monkeypatch, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    asked = []

    @contextlib.contextmanager
    def worker(files):
        yield lambda question: asked.append(question) or {"rows": [0], "label": "", "about": ""}, 0

    monkeypatch.setattr(parquet, "_worker", worker)
    with pytest.raises(UserError, match="no images"):
        parquet.load(tmp_path / "x.parquet")
    assert asked[0]["seconds"] == Limits().seconds


ENDLESS = "import {0} as w; w.{1}; import time\nwhile True: pass"


@pytest.mark.parametrize(
    ("folder", "call"),
    [("data", "parquet_worker limit_memory([],0.1,1)"), ("interop", "orbax_worker limit(1,0.1)")],
)
def test_workers_end_after_their_seconds(folder, call):
    module, _, call = call.partition(" ")
    ran = subprocess.run(
        [sys.executable, "-c", ENDLESS.format(module, call)],
        cwd=PACKAGE / folder,
        timeout=120,
        stderr=subprocess.DEVNULL,
    )
    assert ran.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
