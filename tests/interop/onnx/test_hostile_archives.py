"""Archives of torch.export that are damaged, hostile, or of a kind that is not read: refused in one
line, and no pickle in them run; and changed bytes of either kind of graph file."""

import io
import json
import pickle
import random
import time
import zipfile

import numpy as np
import pytest

pytest.importorskip("onnx")
from test_hostile_graphs import W, model

from jaxbd.base import UserError
from jaxbd.interop.onnx.open import open_graph
from jaxbd.interop.onnx.pt2 import read_pt2
from jaxbd.interop.onnx.read import read_onnx
from jaxbd.limits import Refusal


def archive(change=None, members=None, root="m"):
    """A small archive as PyTorch writes it: y = flatten(mean(x)) w^T."""
    meta = lambda *sizes: {
        "dtype": 7,
        "sizes": [{"as_int": s} for s in sizes],
        "layout": 7,
        "strides": [{"as_int": int(np.prod(sizes[i + 1 :]))} for i in range(len(sizes))],
        "storage_offset": {"as_int": 0},
    }
    tensor = lambda name: {"as_tensor": {"name": name}}
    call = lambda target, out, **inputs: {
        "target": target,
        "outputs": [tensor(out)],
        "inputs": [{"name": n, "arg": v, "kind": 1} for n, v in inputs.items()],
    }
    program = {
        "graph_module": {
            "graph": {
                "inputs": [],
                "outputs": [tensor("y")],
                "nodes": [
                    call("torch.ops.aten.mean.dim", "g", self=tensor("x"), dim={"as_ints": [2, 3]}),
                    call(
                        "torch.ops.aten.linear.default",
                        "y",
                        input=tensor("g"),
                        weight=tensor("p_w"),
                    ),
                ],
                "tensor_values": {
                    "x": meta(1, 3, 8, 8),
                    "g": meta(1, 3),
                    "y": meta(1, 4),
                    "p_w": meta(4, 3),
                },
            },
            "signature": {
                "input_specs": [
                    {"parameter": {"arg": {"name": "p_w"}, "parameter_name": "fc.weight"}},
                    {"user_input": {"arg": tensor("x")}},
                ],
                "output_specs": [{"user_output": {"arg": tensor("y")}}],
            },
        }
    }
    weights = {
        "config": {
            "fc.weight": {"path_name": "weight_0", "use_pickle": False, "tensor_meta": meta(4, 3)}
        }
    }
    found = {"program": program, "weights": weights}
    if change:
        change(found)
    files = {
        "models/model.json": json.dumps(found["program"]),
        "data/weights/model_weights_config.json": json.dumps(found["weights"]),
        "data/constants/model_constants_config.json": '{"config": {}}',
        "data/weights/weight_0": W.tobytes(),
        "data/sample_inputs/model.pt": pickle.dumps(Boom()),
        "byteorder": "little",
        "archive_format": "pt2",
        **(members or {}),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name, data in files.items():
            packed.writestr(f"{root}/{name}", data)
    return out.getvalue()


class Boom:
    """A pickle that would speak if it were loaded."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_the_plain_archive_is_read_and_its_pickle_is_not():
    graph = read_pt2(archive())
    assert [node.op for node in graph.nodes] == ["ReduceMean", "Gemm"]
    np.testing.assert_array_equal(graph.tensors["fc.weight"], W)


def graph_of(found):
    return found["program"]["graph_module"]["graph"]


def weight_of(found):
    return found["weights"]["config"]["fc.weight"]


def value_of(found, name):
    """What the program states of a value."""
    return graph_of(found)["tensor_values"][name]


def give(found, name, value):
    """Gives the last operator one more argument."""
    graph_of(found)["nodes"][1]["inputs"].append({"name": name, "arg": value, "kind": 1})


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


PT2 = {
    "compiled code": (archive(members={"data/aotinductor/model/x.so": b"ELF"}), "compiled code"),
    "two programs": (archive(members={"models/other.json": "{}"}), "more than one program"),
    "big-endian": (archive(members={"byteorder": "big"}), "big-endian"),
    "pickled weights": (archive(lambda f: weight_of(f).update(use_pickle=True)), "pickled"),
    "a weight beyond its file": (
        archive(lambda f: weight_of(f)["tensor_meta"].update(storage_offset={"as_int": 1})),
        "reaches beyond",
    ),
    "negative strides": (
        archive(
            lambda f: weight_of(f)["tensor_meta"].update(strides=[{"as_int": -3}, {"as_int": 1}])
        ),
        "strides",
    ),
    "a huge weight": (
        archive(
            lambda f: weight_of(f)["tensor_meta"].update(
                sizes=[{"as_int": 1 << 34}, {"as_int": 3}], strides=[{"as_int": 0}, {"as_int": 0}]
            )
        ),
        "larger than",
    ),
    "one number many times": (
        archive(
            lambda f: weight_of(f)["tensor_meta"].update(
                sizes=[{"as_int": 1 << 26}, {"as_int": 3}], strides=[{"as_int": 0}, {"as_int": 0}]
            )
        ),
        "larger than 67,108,864 bytes",
    ),
    "a field twice": (
        archive(members={"models/model.json": '{"graph_module": 1, "graph_module": 2}'}),
        "names 'graph_module' twice",
    ),
    "many small values": (
        archive(members={"models/model.json": '{"a": [' + "{}," * 1_100_000 + "{}]}"}),
        "more than 1,000,000 values",
    ),
    "a long program": (archive(members={"models/model.json": " " * (17 << 20)}), "the limit is"),
    "a deep value": (
        archive(lambda f: f["program"].update(graph_module=nested(60))),
        "nested more than 24",
    ),
    "a wide value": (
        archive(lambda f: f["program"].update(graph_module=[[0] * 100_000])),
        "'graph_module' is",
    ),
    "a number that is none": (
        archive(members={"models/model.json": '{"graph_module": NaN}'}),
        "not finite",
    ),
    "a member in capitals": (
        archive(members={"Models/Model.json": "{}"}),
        "twice",
    ),
    "a weight elsewhere": (
        archive(lambda f: weight_of(f).update(path_name="../../x")),
        "no member",
    ),
    "not JSON": (archive(members={"models/model.json": "{" * 100_000}), "not valid JSON"),
    "unknown operator": (
        archive(lambda f: graph_of(f)["nodes"][0].update(target="torch.ops.aten.fft_fft.default")),
        "'torch.ops.aten.fft_fft.default' .of 'g'. is not known",
    ),
    "custom operator": (
        archive(lambda f: graph_of(f)["nodes"][0].update(target="torch.ops.mine.run.default")),
        "PyTorch's own",
    ),
    "missing argument": (
        archive(lambda f: graph_of(f)["nodes"][1]["inputs"].pop(0)),
        "does not fit",
    ),
    "wrong argument": (
        archive(lambda f: graph_of(f)["nodes"][0]["inputs"][1].update(arg={"as_graph": {}})),
        "'as_graph'",
    ),
    "an argument that is not read": (
        archive(lambda f: give(f, "scale", {"as_float": 2.0})),
        "'torch.ops.aten.linear.default': its argument 'scale' = 2.0 is not supported",
    ),
    "an argument twice": (
        archive(lambda f: give(f, "weight", {"as_tensor": {"name": "p_w"}})),
        "an argument is",
    ),
    "a weight of another shape": (
        archive(lambda f: value_of(f, "p_w").update(sizes=[{"as_int": 3}, {"as_int": 4}])),
        "value 'p_w' as floats of shape 3x4, but it is floats of shape 4x3",
    ),
    "an image of integers that the net averages": (
        archive(lambda f: value_of(f, "x").update(dtype=1)),
        "'torch.ops.aten.mean.dim': it takes the image's integers",
    ),
    "an image of booleans": (
        archive(lambda f: value_of(f, "x").update(dtype=12)),
        "its images are of type bool",
    ),
    "a complex tensor": (
        archive(lambda f: weight_of(f)["tensor_meta"].update(dtype=10)),
        "element type 10",
    ),
    "no image": (
        archive(lambda f: f["program"]["graph_module"]["signature"]["input_specs"].pop()),
        "0 inputs",
    ),
    "cut off": (archive()[:-40], ""),
}


@pytest.mark.parametrize("case", PT2)
def test_archives_refused(case):
    data, match = PT2[case]
    with pytest.raises(Refusal, match=match or None) as caught:
        read_pt2(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "match"),
    [
        ({"sizes": [{"as_int": 1}, {"as_int": 5}]}, "shape 1x5, but it is floats of shape 1x3"),
        ({"sizes": [{"as_int": 1}]}, "shape 1, but it is floats of shape 1x3"),
        ({"dtype": 5}, "as integers of shape 1x3, but it is floats"),
    ],
)
def test_what_a_program_states_of_its_values_is_compared(stated, match, tmp_path):
    path = tmp_path / "m.pt2"
    path.write_bytes(archive(lambda f: value_of(f, "g").update(stated)))
    with pytest.raises(UserError, match=match):
        open_graph(path)


def test_arguments_that_change_nothing_are_passed_over(tmp_path):
    path = tmp_path / "m.pt2"
    path.write_bytes(archive(lambda f: give(f, "device", {"as_device": {"type": "cpu"}})))
    assert open_graph(path).classes == 4


@pytest.mark.parametrize(
    ("read", "whole"), [(read_onnx, model().SerializeToString()), (read_pt2, archive())]
)
def test_changed_bytes_are_refused_or_read_and_nothing_else(read, whole):
    """Whatever a file holds, a reader answers with a graph or a refusal, and soon."""
    rng = random.Random(0)
    started, refusals = time.monotonic(), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            kind = rng.random()
            if kind < 0.6:
                data[at] = rng.randrange(256)
            elif kind < 0.8:
                del data[at : at + rng.randint(1, 8)]
            else:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        try:
            read(bytes(data))
        except Refusal:
            refusals += 1
    assert refusals > 100
    assert time.monotonic() - started < 60


def test_changed_programs_are_refused_or_read_and_nothing_else():
    """The JSON of an archive changed value by value: below the checksums of the zip."""
    rng = random.Random(1)

    def spoil(found):
        places: list = [(found["program"], "graph_module")]
        for container, key in places:
            value = container[key]
            inner = (
                value
                if isinstance(value, dict)
                else range(len(value))
                if isinstance(value, list)
                else ()
            )
            places.extend((value, each) for each in inner)
        container, key = rng.choice(places[3:])
        container[key] = rng.choice(
            [None, -1, 1 << 70, "x", [], {}, 0.5, [{}], {"as_int": -1}, True]
        )

    for _ in range(300):
        try:
            read_pt2(archive(spoil))
        except Refusal:
            continue
