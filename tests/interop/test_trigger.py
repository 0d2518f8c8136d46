"""Trigger files in the forms that people save, and hostile ones."""

import io
import os
import struct

import hostile
import numpy as np
import pytest
from PIL import Image

from jaxbd.base import UserError
from jaxbd.interop import trigger

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(2, 256, (4, 5, 3), dtype=np.uint8)
MASK = (RNG.uniform(size=(4, 5)) > 0.5).astype(np.float32)


def refused(message, path):
    with pytest.raises(UserError) as caught:
        trigger.load(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


FORMS = {
    "uint8": PIXELS,
    "floats to 1": PIXELS.astype(np.float32) / 255,
    "floats to 255": PIXELS.astype(np.float64),
    "int64": PIXELS.astype(np.int64),
    "channels first": PIXELS.transpose(2, 0, 1),
    "a batch of one": PIXELS[None],
    "a batch of one, channels first": PIXELS.transpose(2, 0, 1)[None].astype(np.float32) / 255,
}


@pytest.mark.parametrize("pattern", FORMS.values(), ids=FORMS)
def test_patterns_in_any_form(tmp_path, pattern):
    np.save(tmp_path / "t.npy", pattern)
    np.savez(tmp_path / "t.npz", pattern=pattern)
    np.savez(tmp_path / "u.npz", trigger=pattern)
    for name in ("t.npy", "t.npz", "u.npz"):
        loaded = trigger.load(str(tmp_path / name))
        np.testing.assert_allclose(loaded.pattern, PIXELS / np.float32(255), atol=1e-7)
        assert loaded.mask.shape == (4, 5, 1) and (loaded.mask == 1).all()
        assert loaded.pattern.dtype == loaded.mask.dtype == np.float32


MASKS = {
    "flat": MASK,
    "one channel": MASK[..., None],
    "channel first": MASK[None],
    "three equal channels": np.repeat(MASK[..., None], 3, -1),
    "three equal channels first": np.repeat(MASK[None], 3, 0),
    "uint8 of 0 and 255": (MASK * 255).astype(np.uint8),
    "uint8 of 0 and 1": MASK.astype(np.uint8),
    "floats of 0 and 255": MASK * 255,
    "truth values": MASK > 0,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_in_any_form(tmp_path, mask):
    np.savez(tmp_path / "t.npz", pattern=PIXELS, mask=mask)
    assert np.array_equal(trigger.load(str(tmp_path / "t.npz")).mask, MASK[..., None])


def test_signed_patterns_that_are_added(tmp_path):
    signed = PIXELS.astype(np.int16) - 128
    for pattern in (signed, signed.astype(np.float32), signed / np.float32(255)):
        np.savez(tmp_path / "t.npz", pattern=pattern)
        loaded = trigger.load(str(tmp_path / "t.npz"))
        np.testing.assert_allclose(loaded.pattern, signed / np.float32(255), atol=1e-7)


def test_a_small_square_keeps_its_channels_last(tmp_path):
    square = RNG.uniform(size=(3, 3, 3)).astype(np.float32)
    np.savez(tmp_path / "t.npz", pattern=square)
    assert np.array_equal(trigger.load(str(tmp_path / "t.npz")).pattern, square)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(pattern=np.full((4, 5, 3), 1.2)), "reaches 1.2, beyond [-1, 1]; undo"),
        (dict(pattern=np.full((4, 5, 3), 300)), "outside [-1, 1] and -255..255"),
        (dict(pattern=np.full((4, 5, 3), np.inf)), "not finite"),
        (dict(pattern=np.ones((4, 5, 3), np.uint8)), "whole numbers up to 1; give 0..255"),
        (dict(pattern=np.ones((4, 5, 2))), "give [h, w], [h, w, 3] or [3, h, w]"),
        (dict(pattern=np.ones((2, 4, 5, 3))), "pattern is float64 [2, 4, 5, 3]"),
        (dict(pattern=np.array(["a"])), "pattern is <U1 [1]"),
        (dict(pattern=PIXELS, mask=RNG.uniform(size=(4, 5, 3))), "the mask's channels differ"),
        (dict(pattern=PIXELS, mask=-MASK), "outside [0, 1]"),
        (dict(pattern=PIXELS, mask=MASK[:2]), "differ in size"),
        (dict(other=PIXELS), "needs an array 'pattern'"),
    ],
)
def test_arrays_that_are_no_trigger(tmp_path, arrays, message):
    np.savez(tmp_path / "t.npz", **arrays)
    refused(message, tmp_path / "t.npz")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_lossless_pictures(tmp_path, kind):
    how = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(PIXELS).save(tmp_path / "t.img", kind, **how)
    np.testing.assert_allclose(
        trigger.load(str(tmp_path / "t.img")).pattern, PIXELS / np.float32(255), atol=1e-7
    )


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/started"\nexit 1\n')
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    # also with the binary preview header that EPS files from Windows have
    preview = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(head)) + bytes(18) + head
    for content in (head, preview):
        for suffix in (".png", ".eps", ".npz", ".npy", ""):
            (tmp_path / f"t{suffix}").write_bytes(content)
            refused("t", tmp_path / f"t{suffix}")
    assert not (tmp_path / "started").exists()


def test_what_claims_too_much(tmp_path):
    header = io.BytesIO()
    claim = {"descr": "<f8", "fortran_order": False, "shape": (1 << 20, 1 << 10, 3)}
    np.lib.format.write_array_header_1_0(header, claim)
    (tmp_path / "t.npy").write_bytes(header.getvalue())
    refused("is not a plain .npy file", tmp_path / "t.npy")
    np.savez_compressed(tmp_path / "t.npz", pattern=np.zeros((3000, 3000, 3)))
    refused("array 'pattern' claims 216,000,000 bytes", tmp_path / "t.npz")
    os.mkfifo(tmp_path / "pipe.png")
    refused("is not a regular file", tmp_path / "pipe.png")
    with (tmp_path / "hollow.png").open("wb") as file:
        file.truncate(1 << 32)
    refused("is larger than 32 MiB", tmp_path / "hollow.png")
    (tmp_path / "objects.npy").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    refused("is not a plain .npy file", tmp_path / "objects.npy")
    for number, head in enumerate((b"{'descr': '''", b"(" * 9_000, b"-" * 9_000 + b"1")):
        (tmp_path / f"{number}.npy").write_bytes(hostile.array(head=head))
        refused("is not a plain .npy file", tmp_path / f"{number}.npy")
