"""Mini-ImageNet and VGGFace2."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from samples import encoded, pixels, refused

from jaxbd.data import folder, load, pictures


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
    train, test = (
        load.load(f"{kind}:{tmp_path}", split=split, limit=99) for split in ("train", "test")
    )
    assert train.class_names == test.class_names == tuple(names)
    assert train.images.dtype == np.uint8 and train.images.shape == (30, 64, 64, 3)
    for k, name in enumerate(names):
        order = sorted(range(12), key=lambda n, name=name: digest(f"{name}/{n:02}.png"))
        assert held(test)[name] == {16 * k + n for n in order[:2]}
        assert held(train)[name] == {16 * k + n for n in order[2:]}
    refused(
        "has no split 'val'; it is divided into train, test",
        load.load,
        f"{kind}:{tmp_path}",
        split="val",
    )


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
    monkeypatch.setattr(
        folder,
        "image_files",
        lambda at, skipped: looked_into.append(at.name) or listing(at, skipped),
    )
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
    train, test = (
        load.load(f"mini-imagenet:{tmp_path}", split=split) for split in ("train", "test")
    )
    assert (
        train.class_names == ("a", "b", "c", "d")
        and len(train.labels) == 20
        and len(test.labels) == 4
    )
    for k, name in enumerate("abcd"):
        first = min(range(6), key=lambda n, name=name: digest(f"{name}/{name}{n}.png"))
        assert held(test)[name] == {16 * k + first}
        assert held(train)[name] == {16 * k + n for n in range(6)} - {16 * k + first}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"filename,label\n", "lists no images"),
        (b"name,kind\nx.png,a", "FILENAME,LABEL"),
        (b"filename,label\nx.png", "FILENAME,LABEL"),
        (b"filename,label\n../x.png,a", "plain names"),
        (b"filename,label\nx.png,..", "plain names"),
        (b"filename,label\n/etc/x.png,a", "plain names"),
        (b"filename,label\nx.png,\xff\xfe", "is not UTF-8 text"),
        (b"filename,label\n" + b"x" * 200_000 + b",a", "not a readable .csv list"),
        (b"filename,label\n" + b"x.png,a\n" * 6, "x.png' cannot be read"),
    ],
)
def test_recipes_bad_lists(tmp_path, content, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "train.csv").write_bytes(content)
    refused(message, load.load, f"mini-imagenet:{tmp_path}", split="train")


def test_recipes_name_what_is_missing(tmp_path):
    for spec in (
        "vggface2:",
        "vggface2:no/such",
        "mini-imagenet:~nobody-at-all/x",
        "mini-imagenet:a\0b",
    ):
        refused(f"{spec} is not a folder", load.load, spec)
    refused("has no class sub-folders", load.load, f"vggface2:{tmp_path}")
    class_tree(tmp_path, ["a"], 2)
    refused("has no test images", load.load, f"vggface2:{tmp_path}")
    (tmp_path / "a" / "00.png").write_bytes(b"no image")
    refused("a/00.png' is corrupt", load.load, f"vggface2:{tmp_path}", split="train")


@pytest.mark.parametrize(
    "size", [(64, 64), (84, 84), (100, 75), (75, 100), (63, 200), (250, 251), (500, 20)]
)
@pytest.mark.parametrize("kind", ["mini-imagenet", "vggface2"])
def test_recipes_cut_the_middle_as_torchvision_does(tmp_path, kind, size):
    """`Resize(84)`, `CenterCrop(64)` by their documented rules, on Pillow; without Pillow's
    resizing, a plain crop."""
    image = Image.fromarray(pixels(1, *size)[0])
    (tmp_path / "a").mkdir()
    for n in range(3):
        image.save(tmp_path / "a" / f"{n}.png")
    side = 84 if kind == "vggface2" else 64
    height, width = size
    tall, wide = (
        (side, int(side * width / height))
        if height <= width
        else (int(side * height / width), side)
    )
    resized = np.asarray(
        image.resize((wide, tall), Image.Resampling.BILINEAR) if (tall, wide) != size else image
    )
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
    whole, half = (
        load.load(f"vggface2:{tmp_path}", split="train", image_shape=(s, s, 1)).images
        for s in (64, 32)
    )
    assert (whole[0] == 200).all() and whole.shape == (3, 64, 64, 1)
    assert (
        (half[0, 1:-1, 1:-1] == 200).all()
        and (half[0] > 150).all()
        and half.shape == (3, 32, 32, 1)
    )
    wide = load.load(f"vggface2:{tmp_path}", split="train", image_shape=(32, 64, 3)).images
    assert wide.shape == (3, 32, 64, 3)


def test_files_are_read_as_they_are_decoded(monkeypatch):
    """However many images there are, only a few encoded ones are in memory."""
    monkeypatch.setattr(pictures, "AT_ONCE", 4)
    images, taken = pixels(20), []

    def named():
        for row, image in enumerate(images):
            taken.append(row)
            yield f"{row}", encoded(image)

    seen = []
    real = pictures.stack
    monkeypatch.setattr(
        pictures,
        "stack",
        lambda rows, count: real((seen.append(len(taken)) or row for row in rows), count),
    )
    assert np.array_equal(pictures.decode(named(), 20), images)
    assert seen == [4 * (row // 4 + 1) for row in range(20)]
