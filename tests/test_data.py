"""Data sources: pixels and labels come out as they went in, bad input ends in one clear line, nothing is executed."""

import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from jaxbd.base import Batch, Dataset, UserError
from jaxbd.data import cifar, folder, load, npz, pack, parquet, tfds

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def pixels(count, height=6, width=5, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind)
    return file.getvalue()


def refused(message, function, *args, **kwargs):
    """Asserts a UserError of one line that contains `message`."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert message in text, text
    assert "\n" not in text


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def assert_same(dataset, images, labels, names):
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int32
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == list(labels)
    assert dataset.class_names == tuple(names)


# ---- npz ----------------------------------------------------------------------------------------------------------


def test_npz_keeps_uint8_and_names(tmp_path):
    images = pixels(4)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([1, 0, 2, 1]), class_names=["a", "b", "c"])
    assert_same(load.load(str(tmp_path / "d.npz")), images, [1, 0, 2, 1], "abc")


def test_npz_floats_round_to_the_pixel_they_came_from(tmp_path):
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    for kind in (np.float32, np.float64):
        np.savez_compressed(tmp_path / "d.npz", images=(images / 255).astype(kind), labels=np.zeros((4, 1), np.int8))
        assert_same(npz.load(tmp_path / "d.npz"), images, [0] * 4, ["0"])


def test_npz_layouts(tmp_path):
    path, images = tmp_path / "d.npz", pixels(2)
    np.savez(path, images=images[..., 0], labels=[0, 1])
    assert_same(npz.load(path), images[..., :1], [0, 1], "01")
    np.savez(path, images=images.transpose(0, 3, 1, 2), labels=[0, 1])
    assert_same(npz.load(path), images, [0, 1], "01")
    for shape in ((2, 3, 9, 3), (2, 1, 1, 1)):
        np.savez(path, images=np.zeros(shape, np.uint8), labels=[0, 1])
        refused("could have its channels first or last", npz.load, path)
    for shape in ((2, 9, 9, 4), (2, 9), (2, 3, 9, 9, 3)):
        np.savez(path, images=np.zeros(shape, np.uint8), labels=[0, 1])
        refused("give [N, H, W, C] with 1 or 3 channels", npz.load, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(images=np.zeros((2, 4, 4, 3), np.int64)), "images are int64"),
        (dict(images=np.full((2, 4, 4, 3), 1.5)), "leave [0, 1]"),
        (dict(images=np.full((2, 4, 4, 3), np.nan)), "not finite"),
        (dict(images=np.zeros((0, 4, 4, 3), np.uint8), labels=np.zeros(0, int)), "holds no images"),
        (dict(labels=[0]), "2 images but 1 labels"),
        (dict(labels=[0.0, 1.0]), "labels are float64 [2]"),
        (dict(labels=np.eye(2, dtype=int)), "labels are int64 [2, 2]"),
        (dict(labels=[-1, 0]), "labels run from -1 to 0"),
        (dict(labels=[0, 2**31 - 1]), "give class numbers"),
        (dict(labels=[0, 2], class_names=["a", "b"]), "label 2 has no name"),
        (dict(class_names=[1, 2]), "class_names is int64"),
        (dict(labels=None, targets=[0, 1]), "has no array 'labels', it has images, targets"),
    ],
)
def test_npz_bad_arrays(tmp_path, change, message):
    arrays = {**dict(images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1]), **change}
    np.savez(tmp_path / "d.npz", **{name: value for name, value in arrays.items() if value is not None})
    refused(message, load.load, str(tmp_path / "d.npz"))


def test_npz_refuses_pickles_without_running_them(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "d.npz"
    evil = np.array([Canary(canary)], dtype=object)
    for arrays in (dict(images=evil, labels=[0]), dict(images=pixels(1), labels=evil)):
        np.savez(path, **arrays)
        refused("holds pickled objects", load.load, str(path))
    path.write_bytes(pickle.dumps(Canary(canary)))
    refused("pickles are never loaded", load.load, str(path))
    np.savez(path, images=pixels(1), labels=[0], other=evil)
    assert len(npz.load(path).labels) == 1
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary must be able to sing"


def test_npz_damaged_files(tmp_path):
    good, path = tmp_path / "good.npz", tmp_path / "d.npz"
    np.savez_compressed(good, images=pixels(50), labels=np.zeros(50, int))
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[200] ^= 0xFF
    np.save(tmp_path / "bare.npy", pixels(1))
    for bad in (b"", b"PK", content[: len(content) // 2], bytes(flipped), (tmp_path / "bare.npy").read_bytes()):
        path.write_bytes(bad)
        refused("write it with np.savez", npz.load, path)
    refused("does not exist", npz.load, tmp_path / "missing.npz")


def test_npz_claimed_size_is_not_believed(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 3)}
    )
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    refused("d.npz", npz.load, tmp_path / "d.npz")


# ---- folder -------------------------------------------------------------------------------------------------------


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
    luma = np.array([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
    assert np.array_equal(folder.load(root, channels=1).images, luma)
    assert np.array_equal(load.load(str(root), image_shape=(6, 5, 1)).images, luma)
    (root / "dog" / "c.ppm").write_bytes(encoded(luma[2], "PPM"))
    mixed = folder.load(root).images
    assert np.array_equal(mixed[:2], images[:2])
    assert np.array_equal(mixed[2], np.repeat(luma[2], 3, -1))
    (root / "cat" / "a.BMP").write_bytes(encoded(luma[0]))
    assert np.array_equal(folder.load(root).images[:2], [np.repeat(luma[0], 3, -1), images[1]])
    (root / "cat" / "b.png").write_bytes(encoded(luma[1]))
    assert np.array_equal(folder.load(root).images, luma)
    refused("1 or 3 channels, not 4", folder.load, root, channels=4)


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
    refused("limit 0", load.load, str(tmp_path / "d"), limit=0)


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
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) & 0xFFFFFFFF)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")
    )


BAD_IMAGES = {
    "empty": (b"", "corrupt"),
    "text": (b"not an image at all", "corrupt"),
    "cut png": (encoded(pixels(1)[0])[:60], "corrupt"),
    "cut jpeg": (encoded(np.zeros((64, 64, 3), np.uint8), "JPEG")[:300], "corrupt"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "corrupt"),
    "tiff": (encoded(pixels(1)[0], "TIFF"), "corrupt"),
    "over our limit": (broken_png(8_000, 8_000), "larger than"),
    "Pillow warns": (broken_png(10_000, 10_000), "larger than"),
    "Pillow refuses": (broken_png(60_000, 60_000), "larger than"),
}


@pytest.mark.parametrize(("content", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_folder_names_the_bad_image(class_folder, content, message):
    root, _ = class_folder
    (root / "dog" / "bad.png").write_bytes(content)
    refused("image 'dog/bad.png'", load.load, str(root))
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
    (root / "2" / "x.tif").write_bytes(b"x")
    refused("holds files but no images", load.load, str(root))


# ---- parquet ------------------------------------------------------------------------------------------------------


def write_table(path, images, labels, *, names=None, image="image", label="label", rows_per_group=3, plain=False):
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents = [encoded(each) if isinstance(each, np.ndarray) else each for each in images]
    column = contents if plain else [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(contents)]
    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(column, kind), label: pa.array(labels)})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)


def test_parquet_file(tmp_path):
    images, labels = pixels(8), [2, 0, 1, 2, 0, 1, 1, 0]
    write_table(tmp_path / "x.parquet", images, labels, names=["a", "b", "c", "d"])
    assert_same(load.load(str(tmp_path / "x.parquet")), images, labels, "abcd")
    write_table(tmp_path / "x.parquet", images, labels, image="img", label="fine_label", plain=True)
    assert_same(parquet.load(tmp_path / "x.parquet"), images, labels, "012")
    part = parquet.load(tmp_path / "x.parquet", limit=4, seed=5)
    rows = np.sort(np.random.default_rng(5).permutation(8)[:4])
    assert_same(part, images[rows], np.array(labels)[rows], [str(k) for k in range(max(np.array(labels)[rows]) + 1)])
    assert parquet.load(tmp_path / "x.parquet", image_shape=(3, 3, 1)).images.shape == (8, 3, 3, 1)


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_shards_of_a_split(tmp_path, below):
    images = pixels(7)
    write_table(tmp_path / below / "train-00001-of-00002.parquet", images[3:5], [1, 0])
    write_table(tmp_path / below / "train-00000-of-00002.parquet", images[:3], [0, 0, 1])
    write_table(tmp_path / below / "test.parquet", images[5:], [1, 1])
    assert_same(load.load(str(tmp_path), split="train"), images[:5], [0, 0, 1, 1, 0], "01")
    assert_same(load.load(str(tmp_path)), images[5:], [1, 1], "01")
    refused("no split 'validation'; it has test, train", load.load, str(tmp_path), split="validation")


def test_parquet_shards_without_splits_come_whole(tmp_path):
    images = pixels(4)
    write_table(tmp_path / "b.parquet", images[2:], [1, 0])
    write_table(tmp_path / "a.parquet", images[:2], [0, 0])
    assert_same(load.load(str(tmp_path)), images, [0, 0, 1, 0], "01")


def test_parquet_bad_tables(tmp_path):
    path, images = tmp_path / "x.parquet", pixels(4)
    write_table(path, images, [0, 1, 0, 1], image="picture")
    refused("no column image or img; it has 'picture', 'label'", load.load, str(path))
    write_table(path, images, [0, 1, 0, 1], label="y")
    refused("no column label or fine_label", load.load, str(path))
    write_table(path, images, [0.0, 1.0, 0.0, 1.0])
    refused("column 'label' is double", load.load, str(path))
    write_table(path, images, [0, 1, None, 1])
    refused("some rows lack", load.load, str(path))
    write_table(path, [*images[:3], None], [0, 1, 0, 1])
    refused("some rows lack", load.load, str(path))
    write_table(path, [*images[:3], b"junk"], [0, 1, 0, 1])
    refused("image 'row 3 of", load.load, str(path))
    write_table(path, [*images[:3], pixels(1, 9)[0]], [0, 1, 0, 1])
    refused("is 9x5 but 'row 0 of", load.load, str(path))
    write_table(path, images, [0, 1, 0, 1], names=["only"])
    refused("label 1 has no name", load.load, str(path))
    write_table(path, [], np.zeros(0, np.int64))
    refused("holds no images", load.load, str(path))


def test_parquet_damaged_files(tmp_path):
    path = tmp_path / "x.parquet"
    write_table(path, pixels(40), [0] * 40, rows_per_group=40)
    content = path.read_bytes()
    for bad in (b"", b"PAR1", content[:-20], content[20:]):
        path.write_bytes(bad)
        refused("parquet file; fetch it again", load.load, str(path))
    write_table(path, pixels(1), [0])
    path.write_bytes(path.read_bytes().replace(b"label", b"la\xffel"))
    refused("parquet file; fetch it again", load.load, str(path))
    path.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    refused("x.parquet", load.load, str(path))
    refused("does not exist", parquet.load, tmp_path / "missing.parquet")


def test_parquet_odd_metadata_is_no_trouble(tmp_path):
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    for odd in (b"{", b"[]", b'{"info": {"features": {"label": {"names": [1, 2]}}}}', b"\xff"):
        write_table(path, pixels(2), [0, 1])
        pq.write_table(pq.read_table(path).replace_schema_metadata({b"huggingface": odd}), path)
        assert parquet.load(path).class_names == ("0", "1")


def test_parquet_published_cifar10():
    path = SHARED / "data" / "cifar10"
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    dataset = load.load(str(path), limit=500)
    assert dataset.images.shape == (500, 32, 32, 3)
    assert dataset.class_names[:2] == ("airplane", "automobile")
    assert set(dataset.labels) == set(range(10))
    assert 100 < dataset.images.mean() < 140


# ---- cifar --------------------------------------------------------------------------------------------------------

NAMES10 = [f"kind{k}" for k in range(10)]
NAMES100 = [f"kind{k}" for k in range(100)]


def records(images, *label_columns):
    """CIFAR's binary form: label bytes, then the image channel by channel."""
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    return np.concatenate([*(np.array(column, np.uint8)[:, None] for column in label_columns), flat], 1).tobytes()


def batch(images, labels, key="labels"):
    return {"data": images.transpose(0, 3, 1, 2).reshape(len(images), 3072), key: list(labels), "filenames": ["x.png"]}


def python2_batch(images, labels, key=b"labels"):
    """The opcodes Python 2 wrote: byte strings, `numpy.core`, protocol 2."""
    short = lambda text: b"U" + bytes([len(text)]) + text
    flat = images.transpose(0, 3, 1, 2).tobytes()
    count = b"K" + bytes([len(images)])
    dtype = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    array += b"(K\x01" + count + b"M\x00\x0c\x86" + dtype + b"\x89T" + struct.pack("<i", len(flat)) + flat + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x01(" + short(b"data") + array + short(key) + numbers + b"u."


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def put(tmp_path, form, top, files):
    """The files as a folder, as a folder with the published sub-folder, or as an archive."""
    if form == "archive":
        tar(tmp_path / "c.tar.gz", {f"{top}/{name}": content for name, content in files.items()})
        return str(tmp_path / "c.tar.gz")
    place = tmp_path / "c" / (top if form == "below" else "")
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    return str(tmp_path / "c")


@pytest.mark.parametrize("form", ["folder", "below", "archive"])
def test_cifar10_binary(tmp_path, form):
    images = pixels(7, 32, 32)
    files = {
        "data_batch_2.bin": records(images[3:5], [9, 0]),
        "data_batch_1.bin": records(images[:3], [1, 2, 3]),
        "test_batch.bin": records(images[5:], [5, 4]),
        "batches.meta.txt": "\n".join(NAMES10).encode() + b"\n\n",
    }
    path = put(tmp_path, form, "cifar-10-batches-bin", files)
    assert_same(load.load(path, split="train"), images[:5], [1, 2, 3, 9, 0], NAMES10)
    assert_same(load.load(path), images[5:], [5, 4], NAMES10)
    refused("no split 'val'", load.load, path, split="val")
    assert_same(load.load(path, split="train", limit=5), images[:5], [1, 2, 3, 9, 0], NAMES10)
    assert len(load.load(path, split="train", limit=2).labels) == 2


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_cifar100_binary_takes_the_fine_labels(tmp_path, form):
    images = pixels(4, 32, 32)
    files = {
        "train.bin": records(images[:3], [1, 1, 1], [99, 0, 42]),
        "test.bin": records(images[3:], [1], [7]),
        "fine_label_names.txt": "\n".join(NAMES100).encode(),
    }
    path = put(tmp_path, form, "cifar-100-binary", files)
    assert_same(load.load(path, split="train"), images[:3], [99, 0, 42], NAMES100)
    assert_same(load.load(path), images[3:], [7], NAMES100)


@pytest.mark.parametrize("form", ["folder", "below", "archive"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar10_python(tmp_path, form, protocol):
    images = pixels(5, 32, 32)
    if protocol == 0:  # the published bytes, rather than what Python 3 makes of them
        train, test = python2_batch(images[:3], [1, 2, 3]), python2_batch(images[3:], [5, 4])
    else:
        train = pickle.dumps(batch(images[:3], [1, 2, 3]), protocol)
        test = pickle.dumps(batch(images[3:], [5, 4]), protocol)
    meta = pickle.dumps({"label_names": NAMES10, "num_cases_per_batch": 10000}, 2)
    files = {"data_batch_1": train, "test_batch": test, "batches.meta": meta}
    path = put(tmp_path, form, "cifar-10-batches-py", files)
    assert_same(load.load(path, split="train"), images[:3], [1, 2, 3], NAMES10)
    assert_same(load.load(path), images[3:], [5, 4], NAMES10)


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
def test_cifar10_python2_bytes_are_what_pickle_reads():
    images = pixels(2, 32, 32)
    read = pickle.loads(python2_batch(images, [3, 4]), encoding="bytes")
    assert np.array_equal(read[b"data"], batch(images, [])["data"])
    assert read[b"labels"] == [3, 4]


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_cifar100_python(tmp_path, form):
    images = pixels(3, 32, 32)
    train = {**batch(images[:2], [99, 0], "fine_labels"), "coarse_labels": [1, 2]}
    in_bytes = {key.encode(): value for key, value in batch(images[2:], [7], "fine_labels").items()}
    in_bytes[b"fine_labels"] = np.array([7])
    files = {"train": pickle.dumps(train, 2), "test": pickle.dumps(in_bytes, 3)}
    files["meta"] = pickle.dumps({b"fine_label_names": [name.encode() for name in NAMES100]}, 2)
    path = put(tmp_path, form, "cifar-100-python", files)
    assert_same(load.load(path, split="train"), images[:2], [99, 0], NAMES100)
    assert_same(load.load(path), images[2:], [7], NAMES100)


def evil_pickles(canary):
    """(name that the refusal tells or None, pickle) pairs, each of which makes the folder `canary` when it is run."""
    path = str(canary).encode()
    call = b"(V" + path + b"\ntR."
    nested = pickle.dumps({"data": [{"deep": Canary(canary)}], "labels": []}, 2)
    yield "posix.mkdir", pickle.dumps(Canary(canary), 2)
    yield "posix.mkdir", pickle.dumps(Canary(canary), 4)
    yield "posix.mkdir", nested
    yield "os.mkdir", b"cos\nmkdir\n" + call
    yield "builtins.eval", b"cbuiltins\neval\n(V__import__('os').mkdir('" + path + b"')\ntR."
    yield "numpy.load", b"cnumpy\nload\n" + call
    yield "numpy.core.multiarray._reconstruct.x", b"cnumpy.core.multiarray\n_reconstruct.x\n" + call
    yield "numpy.f2py.os.mkdir", b"\x80\x04\x8c\x05numpy\x8c\x0df2py.os.mkdir\x93" + call
    yield None, b"(V" + path + b"\nios\nmkdir\n."  # INST
    yield None, b"(cos\nmkdir\nV" + path + b"\no."  # OBJ
    yield None, b"\x80\x02cos\nmkdir\nV" + path + b"\n\x85\x81."  # NEWOBJ


def test_cifar_pickles_are_refused_without_running_them(tmp_path):
    canary, root = tmp_path / "canary", tmp_path / "c"
    root.mkdir()
    for name, content in evil_pickles(canary):
        (root / "test_batch").write_bytes(content)
        refused(f"asks for {name!r}" if name else "not a readable CIFAR batch", load.load, str(root))
        tar(tmp_path / "c.tar.gz", {"test_batch": content})
        refused("test_batch", load.load, str(tmp_path / "c.tar.gz"))
    (root / "test_batch").write_bytes(pickle.dumps(batch(pixels(1, 32, 32), [0]), 2))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": Canary(canary)}, 2))
    refused("asks for 'posix.mkdir'", load.load, str(root))
    assert not canary.exists()


def with_data(data, labels):
    return pickle.dumps({"data": data, "labels": labels}, 2)


ROW = np.zeros((1, 3072), np.uint8)
BAD_BATCHES = {
    "empty": b"",
    "stop": b".",
    "no keys": b"\x80\x02}.",
    "a list": b"\x80\x02].",
    "data a list": with_data([1, 2], [0]),
    "data too narrow": with_data(ROW[:, :9], [0]),
    "data int64": with_data(ROW.astype(np.int64), [0]),
    "data float": with_data(ROW.astype(np.float32), [0]),
    "data objects": with_data(np.array([None]), [0]),
    "too few labels": with_data(np.zeros((2, 3072), np.uint8), [0]),
    "label a float": with_data(ROW, [0.5]),
    "label a bool": with_data(ROW, [True]),
    "label too large": with_data(ROW, [10]),
    "label negative": with_data(ROW, [-1]),
    "array never filled": b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)Rs.",
    "state for a function": b"\x80\x02cnumpy\ndtype\n}b.",
    "memo of 2^31": b"\x80\x02}r\xff\xff\xff\x7f.",
    "short number": b"\x80\x02\x8a\xff.",
    "2 GiB that are not there": b"\x80\x02B\xff\xff\xff\x7f.",
    "deep key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "key that doubles 60 times": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "too many operations": b"\x80\x02]" + b"Na" * 1_100_000 + b".",
}


@pytest.mark.parametrize("content", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_cifar_hostile_and_wrong_batches(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    refused("test_batch", load.load, str(tmp_path))


def test_cifar_truncations_never_crash(tmp_path):
    good = pickle.dumps(batch(pixels(1, 32, 32), [0]), 2)
    for stop in range(0, len(good), 97):
        (tmp_path / "test_batch").write_bytes(good[:stop])
        refused("test_batch", cifar.load, tmp_path)


def test_cifar_bad_binaries_and_archives(tmp_path):
    good = records(pixels(2, 32, 32), [0, 1])
    for content, message in (
        (b"", "has 0 bytes"),
        (good[:-1], "no multiple of 3073"),
        (records(pixels(1, 32, 32), [10]), "has label 10, not in 0..9"),
    ):
        (tmp_path / "test_batch.bin").write_bytes(content)
        refused(message, load.load, str(tmp_path))
    refused("no train batches", load.load, str(tmp_path), split="train")
    (tmp_path / "test_batch.bin").write_bytes(good)
    (tmp_path / "batches.meta.txt").write_text("one two")
    refused("does not name 10 classes", load.load, str(tmp_path))
    archive = tmp_path / "c.tar.gz"
    tar(archive, {"readme": b"nothing"})
    refused("has no CIFAR batches", load.load, str(archive))
    tar(archive, {"x/test_batch.bin": good})
    whole = archive.read_bytes()
    for bad in (b"", b"\x1f\x8b", whole[: len(whole) // 2], b"no archive" * 99):
        archive.write_bytes(bad)
        refused("not a readable .tar.gz", load.load, str(archive))
    refused("does not exist", cifar.load, tmp_path / "missing")


def test_cifar_archives_that_mislead(tmp_path, monkeypatch):
    archive, outside = tmp_path / "c.tar.gz", tmp_path / "outside"
    outside.write_bytes(records(pixels(1, 32, 32), [0]))
    with tarfile.open(archive, "w:gz") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("test_batch.bin")
            member.type, member.linkname = kind, str(outside)
            file.addfile(member)
    refused("has no CIFAR batches", load.load, str(archive))
    before = sorted(tmp_path.rglob("*"))
    tar(archive, {"../../test_batch.bin": outside.read_bytes()})
    assert len(load.load(str(archive)).labels) == 1
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(cifar, "MAX_ARCHIVE", 1000)
    archive.write_bytes(gzip.compress(bytes(2000)))
    refused("unpacks to more than", load.load, str(archive))


# ---- tfds ---------------------------------------------------------------------------------------------------------


def test_tfds_by_name():
    import tensorflow_datasets

    with tensorflow_datasets.testing.mock_data(num_examples=6):
        dataset = load.load("tfds:mnist")
        source = tensorflow_datasets.data_source("mnist", split="test")
        images = np.stack([source[row]["image"] for row in range(6)])
        assert_same(dataset, images, [int(source[row]["label"]) for row in range(6)], [str(k) for k in range(10)])
        assert dataset.name == "tfds:mnist/test"
        assert load.load("tfds:mnist/train[:50%]").name == "tfds:mnist/train[:50%]"
        assert load.load("tfds:cifar100", image_shape=(16, 16, 1), limit=2).images.shape == (2, 16, 16, 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set prepared for real, without TensorFlow, as array_record files: 4 train and 2 test images."""
    import tensorflow_datasets

    class JaxbdTiny(tensorflow_datasets.core.GeneratorBasedBuilder):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            kinds = tensorflow_datasets.features
            picture, kind = kinds.Image(shape=(None, None, 3)), kinds.ClassLabel(names=["cat", "dog"])
            return tensorflow_datasets.core.DatasetInfo(
                builder=self,
                features=kinds.FeaturesDict({"picture": picture, "kind": kind}),
                supervised_keys=("picture", "kind"),
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(0, 4), "test": self._generate_examples(4, 6)}

        def _generate_examples(self, start, stop):
            for row in range(start, stop):
                yield row, {"picture": io.BytesIO(encoded(pixels(6)[row])), "kind": row % 2}

    place = tmp_path_factory.mktemp("tfds")
    JaxbdTiny(data_dir=str(place), file_format="array_record").download_and_prepare()
    return place


def test_tfds_prepared_files_come_back_exactly(prepared):
    settings = dict(data_dir=prepared, download=False)
    for name, split, rows in (("jaxbd_tiny", "train", range(4)), ("jaxbd_tiny:1.0.0/test", "train", range(4, 6))):
        dataset = tfds.load(name, split=split, **settings)
        found = [next(row for row in rows if np.array_equal(pixels(6)[row], image)) for image in dataset.images]
        assert sorted(found) == list(rows)
        assert_same(dataset, pixels(6)[found], [row % 2 for row in found], ["cat", "dog"])
    assert tfds.load("jaxbd_tiny", image_shape=(3, 4, 1), limit=1, **settings).images.shape == (1, 3, 4, 1)


def test_tfds_errors_are_one_line(prepared, tmp_path):
    settings = dict(data_dir=prepared, download=False)
    refused("not a data set TFDS knows", tfds.load, "no_such_thing", **settings)
    refused("tfds:jaxbd_tiny/extra cannot be read", tfds.load, "jaxbd_tiny", split="extra", **settings)
    refused("cannot be read", tfds.load, "jaxbd_tiny:9.9.9", **settings)
    refused("cannot be read", tfds.load, "mnist", data_dir=tmp_path, download=False)
    for name in ("", "../x", "huggingface:mnist", "kaggle:some/thing", "a b"):
        refused("is not NAME", load.load, f"tfds:{name}")


def test_tfds_needs_labelled_images():
    import tensorflow_datasets

    with tensorflow_datasets.testing.mock_data(num_examples=1):
        for name in ("ag_news_subset", "voc", "div2k", "penguins"):
            refused("no set of labelled images", load.load, f"tfds:{name}")


def test_tfds_damaged_records(prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    (file,) = copy.rglob("*test.array_record*")
    content = bytearray(file.read_bytes())
    middle = content.index(b"PNG") + 20
    content[middle : middle + 40] = bytes(40)
    file.write_bytes(content)
    refused("jaxbd_tiny/test cannot be read", tfds.load, "jaxbd_tiny", data_dir=copy, download=False)


# ---- mini-imagenet and vggface2 -----------------------------------------------------------------------------------


def digest(text):
    return hashlib.sha256(text.encode()).digest()


def flat(value, height=64, width=64):
    return encoded(np.full((height, width, 3), value, np.uint8))


def class_tree(root, names, count=12):
    """Image `n` of class `k` is of the one value 16 k + n."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for n in range(count):
            (root / name / f"{n:02}.png").write_bytes(flat(16 * k + n))


def held(dataset):
    """{class name: values of its images}, and a check that every image is as written."""
    found = {name: set() for name in dataset.class_names}
    for image, label in zip(dataset.images, dataset.labels, strict=True):
        assert (image == image[0, 0, 0]).all()
        found[dataset.class_names[label]].add(int(image[0, 0, 0]))
    return found


@pytest.mark.parametrize("kind", ["mini-imagenet", "vggface2"])
@pytest.mark.parametrize("arrangement", ["classes", "disjoint splits"])
def test_recipes_pool_and_divide_every_class(tmp_path, kind, arrangement):
    names = ["n01", "n02", "n10"]
    class_tree(tmp_path, names)
    if arrangement == "disjoint splits":
        for split, name in zip(("train", "test", "val"), names, strict=True):
            (tmp_path / split).mkdir()
            (tmp_path / name).rename(tmp_path / split / name)
        (tmp_path / "meta" / "lists").mkdir(parents=True)
    train, test = (load.load(f"{kind}:{tmp_path}", split=split, limit=99) for split in ("train", "test"))
    assert train.class_names == test.class_names == tuple(names)
    assert train.images.dtype == np.uint8 and train.images.shape == (30, 64, 64, 3)
    for k, name in enumerate(names):
        order = sorted(range(12), key=lambda n, name=name: digest(f"{name}/{n:02}.png"))
        assert held(test)[name] == {16 * k + n for n in order[:2]}
        assert held(train)[name] == {16 * k + n for n in order[2:]}
    refused("has no split 'val'; it is divided into train, test", load.load, f"{kind}:{tmp_path}", split="val")


def test_recipes_take_splits_with_the_same_classes_as_they_are(tmp_path):
    for split, values in (("train", 0), ("test", 1)):
        class_tree(tmp_path / split, ["a", "b"], 3 + values)
    assert len(load.load(f"vggface2:{tmp_path}", split="train").labels) == 6
    assert len(load.load(f"vggface2:{tmp_path}").labels) == 8
    refused("no split 'val'; it has test, train", load.load, f"vggface2:{tmp_path}", split="val")
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    refused("share only some classes, such as 'a'", load.load, f"vggface2:{tmp_path}")


def test_recipes_take_a_hundred_classes_by_their_digest(tmp_path, monkeypatch):
    names = [f"n{number:06}" for number in range(2, 122)]
    for name in names:
        (tmp_path / name).mkdir()
        for n in range(6):
            (tmp_path / name / f"{n}.png").write_bytes(flat(n, 1, 1))
    looked_into = []
    listing = folder.image_files
    monkeypatch.setattr(folder, "image_files", lambda place: looked_into.append(place.name) or listing(place))
    wanted = sorted(sorted(names, key=digest)[:100])
    dataset = load.load(f"vggface2:{tmp_path}", image_shape=(4, 4, 3))
    assert dataset.class_names == tuple(wanted) and looked_into == wanted
    assert dataset.labels.tolist() == list(range(100))
    assert wanted != names[:100]


def test_recipes_from_lists(tmp_path):
    """The published arrangement: one folder of images, and lists of disjoint classes."""
    (tmp_path / "images").mkdir()
    rows = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
    for split, classes in rows.items():
        lines = ["filename,label"]
        for name in classes:
            for n in range(6):
                lines.append(f"{name}{n}.png,{name}")
                place = tmp_path / "images" / (name if name == "d" else "")
                place.mkdir(exist_ok=True)
                (place / f"{name}{n}.png").write_bytes(flat(16 * (ord(name) - 97) + n))
        (tmp_path / f"{split}.csv").write_text("\ufeff" * (split == "val") + "\n".join(lines))
    train, test = (load.load(f"mini-imagenet:{tmp_path}", split=split) for split in ("train", "test"))
    assert train.class_names == ("a", "b", "c", "d") and len(train.labels) == 20 and len(test.labels) == 4
    for k, name in enumerate("abcd"):
        first = min(range(6), key=lambda n, name=name: digest(f"{name}/{name}{n}.png"))
        assert held(test)[name] == {16 * k + first}
        assert held(train)[name] == {16 * k + n for n in range(6)} - {16 * k + first}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no images"),
        (b"name,kind\nx.png,a", "FILENAME,LABEL"),
        (b"filename,label\nx.png", "FILENAME,LABEL"),
        (b"filename,label\n../x.png,a", "plain names"),
        (b"filename,label\nx.png,..", "plain names"),
        (b"filename,label\n/etc/x.png,a", "plain names"),
        (b"filename,label\nx.png,\xff\xfe", "not a readable .csv list"),
        (b"filename,label\n" + b"x" * 200_000 + b",a", "not a readable .csv list"),
        (b"filename,label\n" + b"x.png,a\n" * 6, "x.png' cannot be read"),
    ],
)
def test_recipes_bad_lists(tmp_path, content, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "train.csv").write_bytes(content)
    refused(message, load.load, f"mini-imagenet:{tmp_path}", split="train")


def test_recipes_name_what_is_missing(tmp_path):
    for spec in ("vggface2:", "vggface2:no/such", "mini-imagenet:~nobody-at-all/x", "mini-imagenet:a\0b"):
        refused(f"{spec} is not a folder", load.load, spec)
    refused("has no class sub-folders", load.load, f"vggface2:{tmp_path}")
    class_tree(tmp_path, ["a"], 2)
    refused("has no test images", load.load, f"vggface2:{tmp_path}")
    (tmp_path / "a" / "00.png").write_bytes(b"no image")
    refused("a/00.png' is corrupt", load.load, f"vggface2:{tmp_path}", split="train")


@pytest.mark.parametrize("size", [(64, 64), (84, 84), (100, 75), (75, 100), (63, 200), (250, 251), (500, 20)])
@pytest.mark.parametrize("kind", ["mini-imagenet", "vggface2"])
def test_recipes_cut_the_middle_as_torchvision_does(tmp_path, kind, size):
    """`Resize(84)`, `CenterCrop(64)` by their documented rules, on Pillow; without Pillow's resizing, a plain crop."""
    image = Image.fromarray(pixels(1, *size)[0])
    (tmp_path / "a").mkdir()
    for n in range(3):
        image.save(tmp_path / "a" / f"{n}.png")
    side = 84 if kind == "vggface2" else 64
    height, width = size
    tall, wide = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    resized = np.asarray(image.resize((wide, tall), Image.Resampling.BILINEAR) if (tall, wide) != size else image)
    top, left = round((tall - 64) / 2.0), round((wide - 64) / 2.0)
    expected = resized[top : top + 64, left : left + 64]
    found = load.load(f"{kind}:{tmp_path}", split="train").images
    assert found.shape == (3, 64, 64, 3) and all(np.array_equal(one, expected) for one in found)


def test_recipes_other_shapes_keep_the_recipe(tmp_path):
    """Half the size is cut from half the picture; a grey model gets grey images."""
    class_tree(tmp_path, ["a"], 3)
    image = np.zeros((84, 84, 3), np.uint8)
    image[10:74, 10:74] = 200
    (tmp_path / "a" / "00.png").write_bytes(encoded(image))
    whole, half = (load.load(f"vggface2:{tmp_path}", split="train", image_shape=(s, s, 1)).images for s in (64, 32))
    assert (whole[0] == 200).all() and whole.shape == (3, 64, 64, 1)
    assert (half[0, 1:-1, 1:-1] == 200).all() and (half[0] > 150).all() and half.shape == (3, 32, 32, 1)
    wide = load.load(f"vggface2:{tmp_path}", split="train", image_shape=(32, 64, 3)).images
    assert wide.shape == (3, 32, 64, 3)


def test_files_are_read_as_they_are_decoded(monkeypatch):
    """However many images there are, only a few encoded ones are in memory."""
    monkeypatch.setattr(pack, "AT_ONCE", 4)
    images, taken = pixels(20), []

    def named():
        for row, image in enumerate(images):
            taken.append(row)
            yield f"{row}", encoded(image)

    seen = []
    real = pack.stack
    monkeypatch.setattr(
        pack, "stack", lambda rows, count: real((seen.append(len(taken)) or row for row in rows), count)
    )
    assert np.array_equal(pack.decode(named(), 20), images)
    assert seen == [4 * (row // 4 + 1) for row in range(20)]


# ---- what all share -----------------------------------------------------------------------------------------------


def test_digits_by_name():
    assert load.load("digits").images.shape == (1797, 16, 16, 1)
    dataset = load.load("digits", image_shape=(8, 8, 1), limit=100)
    assert dataset.images.shape == (100, 8, 8, 1)
    assert len(dataset.class_names) == 10
    refused("16x16 images, the model takes 28x28", load.load, "digits", image_shape=(28, 28, 1))
    refused("1 channel(s), the model takes 3", load.load, "digits", image_shape=(16, 16, 3))


def test_load_names_what_is_missing_empty_or_unknown(tmp_path):
    for spec in ("", "no/such/place", "~nobody-at-all/x", "a\0b", "x" * 5000):
        refused(repr(spec)[1:60], load.load, spec)
    refused("is an empty folder", load.load, str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    refused("is of no known kind; give digits", load.load, str(tmp_path / "notes.txt"))
    refused("has no class sub-folders", load.load, str(tmp_path))


def test_load_refuses_arrays_of_another_shape(tmp_path):
    np.savez(tmp_path / "d.npz", images=pixels(2), labels=[0, 1])
    refused("6x5 images, the model takes 32x32", load.load, str(tmp_path / "d.npz"), image_shape=(32, 32, 3))


def some(count=10):
    return Dataset(pixels(count), np.arange(count, dtype=np.int32) % 4, tuple("abcd"), "some")


def test_check():
    load.check(some(), (6, 5, 3), 4, at_least=10)
    refused("3 channel(s), the model takes 1", load.check, some(), (6, 5, 1), 4)
    refused("6x5 images, the model takes 5x6", load.check, some(), (5, 6, 3), 4)
    refused("image 3 has label 3, the model has classes 0..2", load.check, some(), (6, 5, 3), 3)
    refused("has 10 images, 11 are needed", load.check, some(), (6, 5, 3), 4, at_least=11)


def test_take_and_split():
    dataset = some()
    part = load.take(dataset, np.array([7, 2]))
    assert_same(part, dataset.images[[7, 2]], [3, 2], "abcd")
    first, second = load.split(dataset, 3, seed=1)
    order = np.random.default_rng(1).permutation(10)
    assert np.array_equal(first.images, dataset.images[order[:3]])
    assert np.array_equal(np.concatenate([first.labels, second.labels]), dataset.labels[order])
    assert not np.array_equal(load.split(dataset, 3, seed=2)[0].images, first.images)
    for wrong in (0, 10, -1):
        refused("cannot be set apart", load.split, dataset, wrong, 0)


def test_as_batch():
    data = load.as_batch(some())
    assert isinstance(data, Batch)
    assert isinstance(data.images, jax.Array)
    assert data.images.dtype == np.uint8
    assert data.labels.dtype == np.int32
    assert np.array_equal(data.images, some().images)


def test_smaller_limits_choose_subsets():
    large, small = pack.chosen_rows(100, 50, 0), pack.chosen_rows(100, 20, 0)
    assert set(small) < set(large)
    assert len(set(large)) == 50
    assert np.array_equal(pack.chosen_rows(5, None, 0), np.arange(5))
