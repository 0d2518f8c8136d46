"""Parquet and Arrow tables, read in a process of its own."""

import json

import numpy as np
import pytest
from samples import SHARED, assert_same, encoded, pixels, refused

from jaxbd.data import labels, load, parquet


def write_table(
    path, images, labels, *, names=None, image="image", label="label", rows_per_group=3, plain=False
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents = [encoded(each) if isinstance(each, np.ndarray) else each for each in images]
    column = (
        contents
        if plain
        else [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(contents)]
    )
    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(column, kind), label: pa.array(labels)})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
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
    assert_same(part, images[rows], np.array(labels)[rows], "012")
    assert parquet.load(tmp_path / "x.parquet", image_shape=(3, 3, 1)).images.shape == (8, 3, 3, 1)


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_shards_of_a_split(tmp_path, below):
    images = pixels(7)
    write_table(tmp_path / below / "train-00001-of-00002.parquet", images[3:5], [1, 0])
    write_table(tmp_path / below / "train-00000-of-00002.parquet", images[:3], [0, 0, 1])
    write_table(tmp_path / below / "test.parquet", images[5:], [1, 1])
    assert_same(load.load(str(tmp_path), split="train"), images[:5], [0, 0, 1, 1, 0], "01")
    assert_same(load.load(str(tmp_path)), images[5:], [1, 1], "01")
    refused(
        "no split 'validation'; it has test, train", load.load, str(tmp_path), split="validation"
    )


def test_parquet_shards_without_splits_come_whole(tmp_path):
    images = pixels(4)
    write_table(tmp_path / "b.parquet", images[2:], [1, 0])
    write_table(tmp_path / "a.parquet", images[:2], [0, 0])
    assert_same(load.load(str(tmp_path)), images, [0, 0, 1, 0], "01")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image="thing"), "no column image or img or jpg"),
        (dict(label="kind"), "it has 'image', 'kind'; rename one"),
        (dict(labels=[0.0, 1.0, 0.5, 1.0]), "labels are float64 with fractions"),
        (dict(labels=[{"a": 1}] * 4), "column 'label' is struct"),
        (dict(labels=[[0, 1], [1], [1, 0], [0, 1]]), "lists of many lengths"),
        (dict(labels=[0, 1, None, 1]), "some rows lack the label"),
        (dict(last=None), "some rows lack the image's bytes"),
        (dict(last=b"junk"), "image 'row 3 of"),
        (dict(last=pixels(1, 9)[0]), "is 9x5 but 'row 0 of"),
        (dict(names=["only"]), "label 1 has no name"),
        (
            dict(names=list("abc"), classes=10),
            "3 classes ('a', 'b', 'c'), the model has 10 classes",
        ),
        (dict(classes=1), "at least 2 classes (label 1), the model has 1"),
        (dict(labels=list("abab"), classes=10), "2 classes ('a', 'b'), the model has 10 classes"),
        (dict(labels=[]), "holds no images"),
    ],
)
def test_parquet_bad_tables(tmp_path, change, message):
    path, images = tmp_path / "x.parquet", list(pixels(4))
    classes = labels.Classes(change.pop("classes", None))
    images[3] = change.pop("last", images[3])
    given = change.pop("labels", [0, 1, 0, 1])
    write_table(path, images[: len(given)], given or np.zeros(0, np.int64), **change)
    refused(message, load.load, str(path), classes=classes)


COLUMNS = [("img", "fine_label"), ("jpg", "cls"), ("pixel_values", "labels"), ("picture", "target")]


@pytest.mark.parametrize(("image", "label"), COLUMNS)
def test_columns_of_other_names(tmp_path, image, label):
    images = pixels(4)
    write_table(tmp_path / "x.parquet", images, [0, 2, 1, 0], image=image, label=label, plain=True)
    assert_same(load.load(str(tmp_path / "x.parquet")), images, [0, 2, 1, 0], "012")


def test_labels_of_other_types(tmp_path):
    images = pixels(3)
    for given in ([1.0, 0.0, 1.0], [True, False, True], [[0, 1], [1, 0], [0, 1]], ["1", "0", "1"]):
        write_table(tmp_path / "x.parquet", images, given)
        assert_same(load.load(str(tmp_path / "x.parquet")), images, [1, 0, 1], "01")


def test_text_labels(tmp_path):
    import pyarrow as pa

    images, words = pixels(4), ["dog", "cat", "dog", "eel"]
    for given in (words, pa.array(words).dictionary_encode(), pa.array(words, pa.large_string())):
        write_table(tmp_path / "x.parquet", images, given)
        names = ["cat", "dog", "eel"]
        assert_same(load.load(str(tmp_path / "x.parquet")), images, [1, 0, 1, 2], names)
    write_table(tmp_path / "x.parquet", images, ["3", "1", "0", "2"])
    assert_same(load.load(str(tmp_path / "x.parquet")), images, [3, 1, 0, 2], "0123")
    write_table(tmp_path / "x.parquet", images, words, names=["eel", "dog", "cat"])
    assert load.load(str(tmp_path / "x.parquet")).labels.tolist() == [1, 2, 1, 0]


def test_a_draw_keeps_the_classes(tmp_path):
    """Text is numbered by all words of all tables, not only by the drawn ones."""
    import pyarrow as pa

    images, words = pixels(6), ["f", "e", "d", "c", "b", "a"]
    rows = np.sort(np.random.default_rng(0).permutation(6)[:2])
    write_table(tmp_path / "d" / "0.parquet", images[:4], words[:4])
    write_table(tmp_path / "d" / "1.parquet", images[4:], words[4:])
    table = pa.table({"image": [encoded(image) for image in images], "label": words})
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("d", "x.arrow"):
        found = load.load(str(tmp_path / name), limit=2, classes=labels.Classes(6))
        assert_same(found, images[rows], 5 - rows, "abcdef")
    write_table(tmp_path / "y.parquet", images, np.eye(6, dtype=int).tolist())
    assert load.load(str(tmp_path / "y.parquet"), limit=2).labels.tolist() == rows.tolist()


@pytest.mark.parametrize("below", ["default/{}/0000", "data/{}-00000-of-00001", "{}"])
def test_hub_folders_with_val_for_test(tmp_path, below):
    images = pixels(5)
    for name, rows in (("train", slice(0, 3)), ("validation", slice(3, 5))):
        path = tmp_path / f"{below.format(name)}.parquet"
        write_table(path, images[rows], [k % 2 for k in range(5)][rows])
    assert_same(load.load(str(tmp_path), split="train"), images[:3], [0, 1, 0], "01")
    found = load.load(str(tmp_path))
    assert_same(found, images[3:], [1, 0], "01")
    assert found.notes == ("there is no test part, the val part is used",)


@pytest.mark.parametrize("stream", [True, False])
def test_folders_of_save_to_disk(tmp_path, stream):
    """What the library `datasets` writes: Arrow files with the classes in a file beside them."""
    import pyarrow as pa

    images = pixels(40)
    for name, rows in (("train", slice(0, 35)), ("test", slice(35, 40))):
        place = tmp_path / name
        place.mkdir()
        cells = [{"bytes": encoded(image), "path": None} for image in images[rows]]
        table = pa.table(
            {"image": pa.array(cells), "label": pa.array([k % 3 for k in range(40)][rows])}
        )
        new = pa.ipc.new_stream if stream else pa.ipc.new_file
        with new(str(place / "data-00000-of-00001.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=20)
        features = {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
        (place / "dataset_info.json").write_text(json.dumps({"features": features}))
    assert_same(load.load(str(tmp_path)), images[35:], [2, 0, 1, 2, 0], "abc")
    rows = np.sort(np.random.default_rng(1).permutation(35)[:7])
    found = load.load(str(tmp_path), split="train", limit=7, seed=1)
    assert_same(found, images[rows], rows % 3, "abc")


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch):
    write_table(tmp_path / "x.parquet", pixels(2), [0, 1])
    (tmp_path / "worker.py").write_text("import os; os._exit(9)")
    monkeypatch.setattr(parquet, "WORKER", tmp_path / "worker.py")
    refused("more memory or time than any table", load.load, str(tmp_path / "x.parquet"))


def test_the_workers_memory_is_limited(tmp_path, monkeypatch):
    """A page of 30 MB that takes a few kilobytes is read, but not by a process of 20 MB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    value = encoded(pixels(1)[0]) + bytes(30 << 20)
    table = pa.table({"image": pa.array([value]), "label": pa.array([0])})
    how = dict(compression="ZSTD", use_dictionary=False, write_statistics=False)
    pq.write_table(table, tmp_path / "x.parquet", **how)
    assert (tmp_path / "x.parquet").stat().st_size < 20_000
    assert_same(load.load(str(tmp_path / "x.parquet")), pixels(1), [0], "0")
    worker = parquet.WORKER.read_text()
    (tmp_path / "worker.py").write_text(worker.replace("MEMORY = 512 << 20", "MEMORY = 20 << 20"))
    monkeypatch.setattr(parquet, "WORKER", tmp_path / "worker.py")
    refused("x.parquet is a damaged parquet file", load.load, str(tmp_path / "x.parquet"))


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
