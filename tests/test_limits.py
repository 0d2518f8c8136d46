"""Files that never end or hold nothing, JSON with two meanings, and text that would command a
terminal."""

import os
import pathlib
import socket

import pytest

from jaxbd import limits
from jaxbd.base import UserError
from jaxbd.limits import Limits, Refusal


@pytest.fixture
def odd(tmp_path) -> dict[str, pathlib.Path]:
    """Things that are no regular file, by what they are."""
    made = {name: tmp_path / name for name in ("pipe", "socket", "folder", "link to a pipe")}
    os.mkfifo(made["pipe"])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(made["socket"]))
    made["folder"].mkdir()
    made["link to a pipe"].symlink_to(made["pipe"])
    return {**made, "device": pathlib.Path("/dev/zero")}


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "link to a pipe", "device"])
def test_only_regular_files_are_opened(odd, kind):
    with pytest.raises(Refusal, match="not a regular file"), limits.opened(odd[kind], Limits()):
        pass


def test_a_pipe_in_the_place_of_a_file_that_was_looked_at_is_not_waited_for(odd, monkeypatch):
    monkeypatch.setattr(limits, "check_regular", lambda path: None)
    with pytest.raises(Refusal, match="regular"), limits.opened(odd["pipe"], Limits()):
        pass


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "a\x1b[2Jb"])
def test_a_file_that_is_not_there_is_named_without_control_characters(tmp_path, name):
    with pytest.raises(UserError) as caught, limits.opened(tmp_path / name, Limits()):
        pass
    assert str(caught.value).isprintable()


def test_hollow_files_are_refused_and_full_ones_read(tmp_path):
    path, small = tmp_path / "hollow", Limits(free_bytes=1 << 16)
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(1 << 24)
    with pytest.raises(Refusal, match="it is hollow"), limits.opened(path, small):
        pass
    path.write_bytes(b"x" * (1 << 20))
    with limits.opened(path, small) as (file, size):
        assert (size, file.read()) == (1 << 20, path.read_bytes())
    with pytest.raises(Refusal, match="the limit is 100"), limits.opened(path, small, 100):
        pass


def test_a_folder_is_walked_in_order_and_only_through_files(tmp_path):
    for name in ("b/2", "b/1", "a/c/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in limits.walk(tmp_path, Limits())]
    assert found == ["a/c/3", "b/1", "b/2"]
    with pytest.raises(Refusal, match="more than 3 files"):
        limits.walk(tmp_path, Limits(entries=3))
    with pytest.raises(Refusal, match="more than 1 deep"):
        limits.walk(tmp_path, Limits(depth=1))
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    with pytest.raises(Refusal, match="a link, 'a/round'"):
        limits.walk(tmp_path, Limits())


@pytest.mark.parametrize(
    "text, said",
    [
        (b"[" * 100_000, "not valid JSON|nested"),
        (b"[" * 33 + b"]" * 33, "nested more than 32"),
        (b'{"a": {"b": 1, "b": 2}}', "names 'b' twice"),
        (b"[NaN]", "'NaN', which is not finite"),
        (b"[-Infinity]", "not finite"),
        (b"1e999", "not finite"),
        (b"9" * 5000, "not valid JSON"),
        (b'"\xff"', "not valid JSON"),
        (b'{"\\ud800": 1}', "not valid JSON"),
        (b"", "not valid JSON"),
        (b" " * (3 << 20), "the limit is"),
    ],
)
def test_json_with_two_meanings_or_none_is_refused(text, said):
    with pytest.raises(Refusal, match=said):
        limits.parse_json(text, "config.json")


def test_json_is_read():
    text = b'{"a": [1, 2.5, "[[[{{{"], "b": {"c": null}}'
    assert limits.parse_json(text, "x") == {"a": [1, 2.5, "[[[{{{"], "b": {"c": None}}
    assert limits.parse_json(rb'"\ud83d\ude00"', "x") == "😀"
    assert type(limits.parse_json(b"-0", "x")) is float


HOSTILE = "a\x1b]0;title\x07\x9b2Jb\r\nc\u202ed\u2066\u200b\x7f\udc80\ue000"


def test_text_is_printable_whatever_it_held():
    cleaned = limits.clean_text(HOSTILE)
    assert cleaned.isprintable() and cleaned.startswith(r"a\x1b]0;title\x07\x9b2Jb\r\nc\u202ed")
    for plain in ("", "conv1.weight", "Größe 3 — ü", "猫\u3000犬", "99.3\N{NO-BREAK SPACE}%"):
        assert limits.clean_text(plain) == plain
    assert limits.clean_text("two\nlines\r", allow="\n") == "two\nlines\\r"
    assert limits.clean_text("x" * 20, 5) == "xxxx…"


def test_trees_are_cleaned_keys_and_all():
    tree = {HOSTILE: [HOSTILE, 3, None, {"deep": (HOSTILE,)}]}
    cleaned = limits.clean_text(HOSTILE)
    assert limits.clean_tree(tree) == {cleaned: [cleaned, 3, None, {"deep": [cleaned]}]}


def test_a_deadline_passes():
    limits.Deadline(60, "it").check()
    with pytest.raises(Refusal, match="the table takes more than 0 seconds"):
        limits.Deadline(0, "the table").check()
