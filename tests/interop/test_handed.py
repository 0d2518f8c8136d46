"""What foreign code in a file could change when another reader runs it is not read."""

import hostile
import pytest

from jaxbd.base import UserError
from jaxbd.interop import container


def handed_over() -> dict[str, bytes]:
    """Instructions that give weights to foreign code, each followed by a dictionary of weights.

    Elsewhere the code would run, and could change what is read here. The memo holds a dictionary
    with the tensor at 0, the array's bytes at 1 and the array at 2.
    """
    mod = lambda name: hostile.name("mod", name)
    one = hostile.number(1)
    raw = hostile.call("_codecs", "encode", hostile.text("a" * 8), hostile.text("latin1"))
    array = hostile.call(
        "numpy.core.multiarray", "_reconstruct", hostile.name("numpy", "ndarray"), b")", b"h\x01"
    )
    kind = hostile.call("numpy", "dtype", hostile.text("f4"), b"\x89", b"\x88")
    state = hostile.group(hostile.number(1), hostile.group(hostile.number(2)), kind, b"\x89h\x01")
    given = b"}q\x00(" + hostile.text("w") + hostile.tensor() + b"u0"
    arrays = raw + b"q\x010" + array + b"q\x02" + state + b"b0"
    tensor, storage = hostile.tensor(), hostile.storage()
    empty, attribute = hostile.table(), lambda value: hostile.table((hostile.text("data"), value))
    rebuild = lambda function, *more: hostile.call(
        "torch._tensor", "_rebuild_from_type_v2", function, mod("Kind"), *more
    )
    with_state = lambda *more: hostile.call(
        "torch._utils", "_rebuild_parameter_with_state", tensor, b"\x89", empty, *more
    )
    bodies = {
        "a call with a dictionary": mod("change") + b"h\x00\x85R",
        "the state of an object": mod("Kind") + b")\x81h\x00b",
        "items of an object": mod("Kind") + b")R(" + hostile.text("a") + b"h\x00u",
        "a call with a tensor": mod("change") + tensor + b"\x85R",
        "a call with a storage": mod("change") + storage + b"\x85R",
        "a call with an array": mod("change") + b"h\x02\x85R",
        "a call with an array's bytes": mod("change") + b"h\x01\x85R",
        "a call with bytes as a key": mod("change") + b"}h\x01Ns\x85R",
        "a call with an odd key": mod("change") + b"}" + tensor + b"Ns\x85R",
        "a call with a value under an odd key": mod("change") + b"})" + tensor + b"s\x85R",
        "a class that is made with a tensor": mod("Kind") + tensor + b"\x85\x81",
        "a call with an object that has a tensor": (
            mod("change") + mod("Kind") + b")\x81" + attribute(tensor) + b"b\x85R"
        ),
        "an object that has a tensor, called": (
            mod("Kind") + b")\x81" + attribute(tensor) + b"b)R"
        ),
        "an object that has a tensor, with new items": (
            mod("Kind") + b")\x81" + attribute(tensor) + b"bK\x00K\x00s"
        ),
        "an object that has a tensor, appended to": (
            mod("Kind") + b")\x81" + attribute(tensor) + b"bK\x00a"
        ),
        "an object that has a tensor, with a new state": (
            mod("Kind") + b")\x81" + attribute(tensor) + b"b" + attribute(one) + b"b"
        ),
        "a list that has a tensor, called": mod("Kind") + b")\x81" + tensor + b"a)R",
        "a rebuilder that calls": rebuild(mod("change"), hostile.group(tensor), b"N"),
        "a rebuilder that calls a rebuilder": rebuild(
            hostile.name("torch._tensor", "_rebuild_from_type_v2"), hostile.group(tensor), b"N"
        ),
        "a rebuilder that sets numbers": with_state(
            hostile.table((hostile.text("real"), hostile.number(0)))
        ),
        "a rebuilder that sets numbers in slots": with_state(
            b"N" + hostile.table((hostile.text("real"), hostile.number(0))) + b"\x86"
        ),
        "a rebuilder that sets what an object lists": with_state(mod("Kind") + b")\x81"),
        "what a rebuilder made, with new items": with_state(empty) + b"K\x00K\x00s",
        "a tensor with hooks, with new items": (
            hostile.tensor(hooks=hostile.table((one, one))) + b"K\x00K\x00s"
        ),
    }
    ending = b"0}(" + hostile.text("w") + tensor + hostile.text("a") + b"h\x02u"
    ending = hostile.table((hostile.text("net"), b"h\x00"), (hostile.text("more"), ending[1:]))
    return {
        name: hostile.program(given + arrays + body + b"0" + ending)
        for name, body in bodies.items()
    }


HANDED_OVER = handed_over()


@pytest.mark.parametrize("case", HANDED_OVER)
def test_weights_handed_to_foreign_code_are_refused(tmp_path, case):
    (tmp_path / "m.pth").write_bytes(hostile.archive(HANDED_OVER[case]))
    with pytest.raises(UserError, match=r"it hands its tensors to '(mod|torch\._|a tensor)"):
        container.read(tmp_path / "m.pth")


@pytest.mark.parametrize("target", [b"h\x02", hostile.tensor(), hostile.storage()])
@pytest.mark.parametrize("change", [b"K\x00K\x00s", b"(K\x00K\x00u", b"K\x00a", b"(K\x00e", b"}b"])
def test_what_is_read_cannot_be_filled(tmp_path, target, change):
    program = HANDED_OVER["a call with bytes as a key"]
    begin = program.index(hostile.name("mod", "change"))
    (tmp_path / "m.pth").write_bytes(hostile.archive(program[:begin] + target + change + b"0N."))
    with pytest.raises(UserError, match=r"something that is not|sets attributes"):
        container.read(tmp_path / "m.pth")


def test_an_entry_is_not_replaced(tmp_path):
    """A function given the dictionary before would still have the first entry."""
    two = hostile.table((hostile.text("w"), hostile.tensor()), (hostile.text("w"), b"N"))
    (tmp_path / "m.pth").write_bytes(hostile.archive(hostile.with_weights(two)))
    with pytest.raises(UserError, match="two entries under one key"):
        container.read(tmp_path / "m.pth")
