"""Folders of pictures: which class a folder is, what is read and what is passed over."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from samples import assert_same, encoded, pixels, refused

from jaxbd.data import folder, labels, load


@pytest.fixture
def class_folder(tmp_path):
    """Three classes; cat has two images, dog one, eel none."""
    root, images = tmp_path / "animals", pixels(3)
    for name in ("cat", "dog", "eel", ".hidden"):
        (root / name).mkdir(parents=True)
    (root / "cat" / "b.png").write_bytes(encoded(images[1]))
    (root / "cat" / "a.BMP").write_bytes(encoded(images[0], "BMP"))
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".DS_Store").write_text("no image")
    (root / "dog" / "c.ppm").write_bytes(encoded(images[2], "PPM"))
    return root, images


def test_folder_lossless_files_come_back_exactly(class_folder):
    root, images = class_folder
    assert_same(load.load(str(root)), images, [0, 0, 1], ["cat", "dog", "eel"])


def test_folder_channels(class_folder):
    root, images = class_folder
    luma = np.array([np.asarray(Image.fromarray(image).convert("L")) for image in images])[
        ..., None
    ]
    assert np.array_equal(folder.load(root, image_shape=(0, 0, 1)).images, luma)
    assert np.array_equal(load.load(str(root), image_shape=(6, 5, 1)).images, luma)
    (root / "dog" / "c.ppm").write_bytes(encoded(luma[2], "PPM"))
    mixed = folder.load(root).images
    assert np.array_equal(mixed[:2], images[:2])
    assert np.array_equal(mixed[2], np.repeat(luma[2], 3, -1))
    (root / "cat" / "a.BMP").write_bytes(encoded(luma[0]))
    assert np.array_equal(folder.load(root).images[:2], [np.repeat(luma[0], 3, -1), images[1]])
    (root / "cat" / "b.png").write_bytes(encoded(luma[1]))
    assert np.array_equal(folder.load(root).images, luma)
    refused("1 or 3 channels, not 4", folder.load, root, image_shape=(0, 0, 4))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_folder_lossy_kinds_and_palettes(tmp_path, kind):
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    (tmp_path / "d" / "only").mkdir(parents=True)
    (tmp_path / "d" / "only" / f"x.{kind.lower()}").write_bytes(encoded(flat, kind))
    images = folder.load(tmp_path / "d").images.astype(int)
    assert images.shape == (1, 16, 16, 3)
    assert np.abs(images - flat).max() <= 8


def test_folder_resizes_only_on_request(class_folder):
    root, images = class_folder
    (root / "dog" / "d.png").write_bytes(encoded(np.full((12, 10, 3), 77, np.uint8)))
    refused("image 'dog/d.png' is 12x10 but 'cat/a.BMP' is 6x5", folder.load, root)
    resized = load.load(str(root), image_shape=[6, 5, 3]).images
    assert np.array_equal(resized[:3], images)
    assert np.array_equal(resized[3], np.full((6, 5, 3), 77))


def test_folder_limit_draws_rows_by_seed(tmp_path):
    images = pixels(20)
    for row, image in enumerate(images):
        place = tmp_path / "d" / str(row // 10) / f"{row:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(image))
    rows = np.sort(np.random.default_rng(3).permutation(20)[:7])
    part = load.load(str(tmp_path / "d"), limit=7, seed=3)
    assert_same(part, images[rows], rows // 10, "01")
    assert len(load.load(str(tmp_path / "d"), limit=99).labels) == 20
    refused("limit must be at least 1, got 0", load.load, str(tmp_path / "d"), limit=0)


def test_folder_with_one_folder_per_split(tmp_path):
    for split, seed in (("train", 1), ("test", 2)):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "x.png").write_bytes(encoded(pixels(1, seed=seed)[0]))
    assert_same(load.load(str(tmp_path), split="train"), pixels(1, seed=1), [0], "a")
    assert_same(load.load(str(tmp_path)), pixels(1, seed=2), [0], "a")
    refused("no split 'val'; it has test, train", load.load, str(tmp_path), split="val")


def test_folder_classes_named_like_splits_are_classes(tmp_path):
    for name in ("test", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(encoded(pixels(1)[0]))
    assert load.load(str(tmp_path)).class_names == ("test", "train")


def broken_png(width, height):
    """A small PNG file that claims `width` x `height` pixels."""
    chunk = lambda kind, data: (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data) & 0xFFFFFFFF)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0" * 99))
        + chunk(b"IEND", b"")
    )


BAD_IMAGES = {
    "empty": (b"", "is empty"),
    "text": (b"not an image at all", "corrupt"),
    "cut png": (encoded(pixels(1)[0])[:60], "corrupt"),
    "cut jpeg": (encoded(np.zeros((64, 64, 3), np.uint8), "JPEG")[:300], "corrupt"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "corrupt"),
    "jpeg 2000": (encoded(pixels(1)[0], "JPEG2000"), "corrupt"),
    "tiff of jpegs": (encoded(pixels(1)[0], "TIFF", compression="jpeg"), "save it uncompressed"),
    "bigtiff": (encoded(pixels(1)[0], "TIFF", big_tiff=True), "BigTIFF"),
    "over our limit": (broken_png(8_000, 8_000), "larger than"),
    "Pillow warns": (broken_png(10_000, 10_000), "larger than"),
    "Pillow refuses": (broken_png(60_000, 60_000), "larger than"),
}


@pytest.mark.parametrize(("content", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_folder_names_the_bad_image(class_folder, content, message):
    root, _ = class_folder
    (root / "dog" / "bad.png").write_bytes(content)
    refused("dog/bad.png'", load.load, str(root))
    refused(message, load.load, str(root), image_shape=(6, 5, 3))


def test_folder_refuses_sixteen_bits(class_folder):
    root, _ = class_folder
    Image.fromarray(np.full((6, 5), 40_000, np.uint16)).save(root / "dog" / "deep.png")
    refused("image 'dog/deep.png' has more than 8 bits", folder.load, root)


def test_folder_doubtful_classes(tmp_path):
    root = tmp_path / "d"
    refused("not a folder", folder.load, root)
    root.mkdir()
    refused("no class sub-folders", folder.load, root)
    for name in ("0", "2", "10"):
        (root / name).mkdir()
    refused("class folder 10 comes before 2", load.load, str(root))
    (root / "10").rmdir()
    refused("no class sub-folder holds images", load.load, str(root))
    (root / "2" / "x.psd").write_bytes(b"x")
    refused("holds files but no images", load.load, str(root))


# folders as people keep them


def tree(root, names, count=2, below="", suffix=".png", **how):
    """Class folders of pictures [count * len(names), 6, 5, 3], which are returned in that order."""
    images = pixels(count * len(names))
    kinds = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".jp2": "JPEG2000"}
    for row, image in enumerate(images):
        place = root / names[row // count] / below
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row:03}{suffix}").write_bytes(encoded(image, kinds[suffix], **how))
    return images


@pytest.mark.parametrize("below", ["images", "a/b/c"])
def test_images_lie_at_any_depth_below_their_class(tmp_path, below):
    images = tree(tmp_path, ["n01", "n02"], below=below)
    assert_same(load.load(str(tmp_path)), images, [0, 0, 1, 1], ["n01", "n02"])


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".ppm"])
def test_suffixes_of_lossless_pictures(tmp_path, suffix):
    images = tree(tmp_path, ["a", "b"], suffix=suffix)
    assert_same(load.load(str(tmp_path)), images, [0, 0, 1, 1], "ab")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiffs(tmp_path, compression):
    images = tree(tmp_path, ["a", "b"], suffix=".tif", compression=compression)
    assert_same(load.load(str(tmp_path)), images, [0, 0, 1, 1], "ab")


def test_greymaps_are_grey(tmp_path):
    (tmp_path / "a").mkdir()
    grey = pixels(1, channels=1)[0]
    (tmp_path / "a" / "x.pgm").write_bytes(encoded(grey, "PPM"))
    assert_same(load.load(str(tmp_path)), grey[None], [0], "a")


def test_what_is_passed_over_is_counted(tmp_path):
    images = tree(tmp_path / "d", ["a", "b"])
    for name in ("a/notes.txt", "a/x.jp2", "b/y.psd", "b/z.psd", "b/Thumbs.db", "b/.hidden.psd"):
        (tmp_path / "d" / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "d" / "a" / "pipe.png")
    (tmp_path / "d" / "outside.png").write_bytes(encoded(images[0]))
    found = load.load(str(tmp_path / "d"))
    assert_same(found, images, [0, 0, 1, 1], "ab")
    outside, others = found.notes
    assert "skipped 1 images outside" in outside
    assert "skipped 5 files" in others and ".psd: 2" in others and "pipes" in others


@pytest.mark.parametrize("name", ["__MACOSX", ".ipynb_checkpoints", "@eaDir"])
def test_leftovers_are_no_classes(tmp_path, name):
    images = tree(tmp_path, ["a", "b"])
    (tmp_path / name / "a").mkdir(parents=True)
    (tmp_path / name / "a" / "x.png").write_bytes(encoded(images[0]))
    (tmp_path / "a" / name).mkdir()
    (tmp_path / "a" / name / "y.png").write_bytes(encoded(images[0]))
    assert_same(load.load(str(tmp_path)), images, [0, 0, 1, 1], "ab")


def test_names_reach_no_terminal_as_they_are(tmp_path):
    tree(tmp_path, ["a\x1b[31m\u202e", "b"])
    (tmp_path / "b" / "x.\x1b]0;t\x07").write_bytes(b"x")
    found = load.load(str(tmp_path))
    assert found.class_names == ("a\\x1b[31m\\u202e", "b")
    assert all(text.isprintable() for text in (*found.class_names, *found.notes))


def test_a_wrapper_around_the_class_folders_is_passed_through(tmp_path):
    images = tree(tmp_path / "Final_Training" / "Images", ["00000", "00001"])
    for place in (tmp_path, tmp_path / "Final_Training"):
        assert_same(load.load(str(place), split="train"), images, [0, 0, 1, 1], ["00000", "00001"])


def test_links_are_followed_once(tmp_path):
    images = tree(tmp_path / "real", ["a", "b"])
    (tmp_path / "d").mkdir()
    for name in "ab":
        (tmp_path / "d" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "a" / "loop").symlink_to(tmp_path / "real" / "a")
    assert_same(load.load(str(tmp_path / "d")), images, [0, 0, 1, 1], "ab")


def test_splits_by_other_names(tmp_path):
    """ImageNette has train and val; Kaggle writes Train and Test; val stands in for test aloud."""
    train, val = tree(tmp_path / "Train", ["a", "b"]), tree(tmp_path / "val", ["a", "b"], 1)
    assert_same(load.load(str(tmp_path), split="train"), train, [0, 0, 1, 1], "ab")
    found = load.load(str(tmp_path))
    assert_same(found, val, [0, 1], "ab")
    assert found.notes == ("there is no test part, the val part is used",)
    (tmp_path / "val").rename(tmp_path / "Test")
    assert load.load(str(tmp_path)).notes == ()


def test_splits_below_a_wrapper(tmp_path):
    train = tree(tmp_path / "wrap" / "ds" / "train", ["a", "b"])
    test = tree(tmp_path / "wrap" / "ds" / "test", ["a", "b"], 1)
    assert_same(load.load(str(tmp_path / "wrap"), split="train"), train, [0, 0, 1, 1], "ab")
    two = labels.Classes(2)
    assert_same(load.load(str(tmp_path / "wrap"), classes=two), test, [0, 1], "ab")


def test_what_jaxbd_wrote_into_the_folder_is_no_class(tmp_path):
    """A case, a model, and the checkpoints of a run that was stopped."""
    images = tree(tmp_path, ["a", "b"])
    (tmp_path / "case" / "triggers").mkdir(parents=True)
    (tmp_path / "case" / "scan.json").write_text("{}")
    (tmp_path / "case" / "triggers" / "x.png").write_bytes(encoded(images[0]))
    for name, inside in (("model", "model.safetensors"), ("fixed.pth.run", "0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / inside).write_text("")
    assert_same(load.load(str(tmp_path)), images, [0, 0, 1, 1], "ab")
