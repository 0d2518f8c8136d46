"""TensorFlow Datasets, and that nothing goes to the network unasked."""

import io
import shutil
import socket
import sys

import numpy as np
import pytest
from samples import assert_same, encoded, pixels, refused

from jaxbd.data import labels, load, tfds


def test_tfds_by_name():
    import tensorflow_datasets

    with tensorflow_datasets.testing.mock_data(num_examples=6):
        dataset = load.load("tfds:mnist")
        source = tensorflow_datasets.data_source("mnist", split="test")
        images = np.stack([source[row]["image"] for row in range(6)])
        assert_same(
            dataset,
            images,
            [int(source[row]["label"]) for row in range(6)],
            [str(k) for k in range(10)],
        )
        assert dataset.name == "tfds:mnist/test"
        assert load.load("tfds:mnist/train[:50%]").name == "tfds:mnist/train[:50%]"
        assert load.load("tfds:cifar100", image_shape=(16, 16, 1), limit=2).images.shape == (
            2,
            16,
            16,
            1,
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set prepared for real, without TensorFlow, as array_record files: 4 train and 2 test
    images."""
    import tensorflow_datasets

    class JaxbdTiny(tensorflow_datasets.core.GeneratorBasedBuilder):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            kinds = tensorflow_datasets.features
            picture, kind = (
                kinds.Image(shape=(None, None, 3)),
                kinds.ClassLabel(names=["cat", "dog"]),
            )
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
    for name, split, rows in (
        ("jaxbd_tiny", "train", range(4)),
        ("jaxbd_tiny:1.0.0/test", "train", range(4, 6)),
    ):
        dataset = tfds.load(name, split=split, **settings)
        found = [
            next(row for row in rows if np.array_equal(pixels(6)[row], image))
            for image in dataset.images
        ]
        assert sorted(found) == list(rows)
        assert_same(dataset, pixels(6)[found], [row % 2 for row in found], ["cat", "dog"])
    assert tfds.load("jaxbd_tiny", image_shape=(3, 4, 1), limit=1, **settings).images.shape == (
        1,
        3,
        4,
        1,
    )


def test_tfds_errors_are_one_line(prepared, tmp_path):
    settings = dict(data_dir=prepared, download=False)
    refused("not a data set TFDS knows", tfds.load, "no_such_thing", **settings)
    refused(
        "tfds:jaxbd_tiny/extra cannot be read", tfds.load, "jaxbd_tiny", split="extra", **settings
    )
    refused("cannot be read", tfds.load, "jaxbd_tiny:9.9.9", **settings)
    refused("is not prepared in", tfds.load, "mnist", data_dir=tmp_path)
    refused("--download fetches", tfds.load, "mnist", data_dir=tmp_path)
    for name in ("", "../x", "huggingface:mnist", "kaggle:some/thing", "a b"):
        refused("is not NAME", load.load, f"tfds:{name}")


def test_tfds_needs_labelled_images():
    import tensorflow_datasets

    with tensorflow_datasets.testing.mock_data(num_examples=1):
        for name in ("ag_news_subset", "voc", "div2k", "penguins"):
            refused("is not a set of labelled images", load.load, f"tfds:{name}")


def test_tfds_damaged_records(prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    (file,) = copy.rglob("*test.array_record*")
    content = bytearray(file.read_bytes())
    middle = content.index(b"PNG") + 20
    content[middle : middle + 40] = bytes(40)
    file.write_bytes(content)
    refused(
        "jaxbd_tiny/test cannot be read", tfds.load, "jaxbd_tiny", data_dir=copy, download=False
    )


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    refused("install it with: pip install 'jaxbd[data]'", load.load, "tfds:mnist")


def test_classes_of_another_number(prepared):
    refused(
        "2 classes ('cat', 'dog'), the model has 10 classes",
        *(tfds.load, "jaxbd_tiny"),
        data_dir=prepared,
        classes=labels.Classes(10),
    )


@pytest.fixture
def guard(monkeypatch):
    """Every attempt to connect or to look a host up, by Python code or by what it calls."""
    tried = []

    def refuse(*where, **_):
        tried.append(where)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


def test_nothing_goes_to_the_network_unasked(guard, tmp_path, monkeypatch, prepared):
    """Every kind of source, those that are not there among them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    for name in ("mnist", "cifar10/test", "cifar100:3.0.2", "imagenette/160px"):
        refused("--download fetches and prepares it", load.load, f"tfds:{name}")
    refused("not a data set TFDS knows", load.load, "tfds:no_such_thing")
    assert len(tfds.load("jaxbd_tiny", data_dir=prepared).labels) == 2
    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "a" / "x.png").write_bytes(encoded(pixels(1)[0]))
    assert len(load.load(str(tmp_path / "d")).labels) == 1
    assert len(load.load("digits").labels) == 1797
    for spec in (
        "https://example.org/x.npz",
        "hf://datasets/x",
        "gs://tfds-data/mnist",
        "s3://x/y",
    ):
        refused("does not exist", load.load, spec)
    assert guard == []


def test_download_is_asked_of_the_library(monkeypatch):
    import tensorflow_datasets

    asked = []

    def data_source(name, *, download, **_):
        asked.append(download)
        raise OSError("no network in this test")

    monkeypatch.setattr(tensorflow_datasets, "data_source", data_source)
    for download in (False, True):
        refused("cannot be read: no network", load.load, "tfds:mnist", download=download)
    assert asked == [False, True]
