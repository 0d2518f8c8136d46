"""Flat folders with a list of classes: GTSRB's test set, Kaggle's and Tiny-ImageNet's layout."""

import json

import pytest
from samples import assert_same, encoded, pixels, refused

from jaxbd.data import labels, lists, load, unlabelled


def flat(place, count=4, suffix=".png"):
    place.mkdir(parents=True, exist_ok=True)
    images = pixels(count)
    for row, image in enumerate(images):
        (place / f"{row:02}{suffix}").write_bytes(encoded(image))
    return images


LISTS = {
    "gtsrb": "Filename;Width;Height;ClassId\n"
    + "".join(f"{k:02}.png;5;6;{k % 2}\n" for k in range(4)),
    "commas": "label,file_name\n" + "".join(f"{k % 2},{k:02}.png\n" for k in range(4)),
    "byte order mark": "\ufeffpath\tclass\n"
    + "".join(f"x/{k:02}.png\t{k % 2}\n" for k in range(4)),
    "no suffix": "id,label\n" + "".join(f"{k:02},{k % 2}\n" for k in range(4)),
    "no titles": "".join(f"{k:02}.png,{k % 2}\n" for k in range(4)),
    "no suffix, numbers as pandas writes them": "id,label\n"
    + "".join(f"{k:02},{k % 2}.0\n" for k in range(4)),
    "blank lines": "id,label\n\n" + "".join(f"{k:02},{k % 2}\n" for k in range(4)) + "  \n,\n",
    "text": "image,label\n"
    + "".join(f"{k:02}.png,{'cat' if k % 2 else 'ape'}\n" for k in range(4)),
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_lists_beside_images(tmp_path, text):
    images = flat(tmp_path)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    found = load.load(str(tmp_path))
    assert_same(found, images, [0, 1, 0, 1], ["ape", "cat"] if "cat" in text else "01")
    assert found.notes[0] == "the classes are those of the list list.csv"
    assert not unlabelled.is_unlabelled(str(tmp_path))


def test_metadata_of_json_lines(tmp_path):
    images = flat(tmp_path)
    rows = [{"file_name": f"{k:02}.png", "label": k % 2, "note": None} for k in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert_same(load.load(str(tmp_path)), images, [0, 1, 0, 1], "01")
    rows[1]["label"] = None
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused("image 1 of the list has no label", load.load, str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "00.png", "label": 0}\n[1]')
    refused("is not a readable list", load.load, str(tmp_path))


def test_a_draw_keeps_the_numbers_of_text_labels(tmp_path):
    flat(tmp_path)
    (tmp_path / "l.csv").write_text("file,label\n00.png,a\n01.png,b\n02.png,c\n03.png,d\n")
    for seed in range(4):
        found = load.load(str(tmp_path), limit=1, seed=seed)
        assert found.class_names == tuple("abcd")
        assert found.labels[0] == [
            row for row, image in enumerate(pixels(4)) if (image == found.images[0]).all()
        ]


def test_kaggles_layout(tmp_path):
    """Lists beside the folders of the splits, which name the images from there."""
    images = flat(tmp_path / "Test")
    rows = "".join(f"5,6,{k % 2},Test/{k:02}.png\n" for k in range(4))
    (tmp_path / "Test.csv").write_text("Width,Height,ClassId,Path\n" + rows)
    assert_same(load.load(str(tmp_path / "Test")), images, [0, 1, 0, 1], "01")


def tiny_imagenet(root):
    images = pixels(6)
    for row in range(4):
        place = root / "train" / f"n{row // 2}" / "images"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"n{row // 2}_{row}.JPEG").write_bytes(encoded(images[row]))
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    for row in (4, 5):
        (root / "val" / "images" / f"val_{row}.JPEG").write_bytes(encoded(images[row]))
    (root / "test" / "images" / "test_0.JPEG").write_bytes(encoded(images[0]))
    boxes = "val_4.JPEG\tn1\t0\t32\t44\t62\nval_5.JPEG\tn0\t52\t55\t57\t59\n"
    (root / "val" / "val_annotations.txt").write_text(boxes)
    (root / "wnids.txt").write_text("n1\nn0\n")
    return images


def test_tiny_imagenets_own_layout(tmp_path):
    images, names = tiny_imagenet(tmp_path), ["n0", "n1"]
    assert_same(load.load(str(tmp_path), split="train"), images[:4], [0, 0, 1, 1], names)
    for spec, split in ((tmp_path, "val"), (tmp_path, "test"), (tmp_path / "val", "test")):
        assert_same(load.load(str(spec), split=split), images[4:], [1, 0], names)
    assert "the test images have no labels" in load.load(str(tmp_path)).notes[0]
    order = labels.Classes(2, labels.read_names(tmp_path / "wnids.txt", 2), stated=True)
    assert load.load(str(tmp_path), classes=order).labels.tolist() == [0, 1]
    (tmp_path / "val" / "val_annotations.txt").unlink()
    refused(
        "1 class folder ('images'), the model has 2 classes",
        *(load.load, str(tmp_path / "val")),
        classes=labels.Classes(2),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nmissing.png,0\n", "'missing.png', which is not there"),
        ("file,label\n../outside.png,0\n", "give names of files in this folder"),
        ("file,label\n/etc/passwd,0\n", "give names of files in this folder"),
        ("file,label\n00.png\n", "image 0 of the list has no label"),
        ("file,label\n00.png,1.0\n01.png,\n", "image 1 of the list has no label"),
        ("file,label\n00.png,0\n01.png,1\n00.png,1\n", "'00.png' with the labels '0' and '1'"),
        ("file,label\n", "holds no images"),
        ("file,note\n00.png,0\n", "has no class sub-folders"),
        ("file,label\n00.png,5\n", "at least 6 classes (label 5), the model has 2"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    (tmp_path / "outside.png").write_bytes(encoded(pixels(1)[0]))
    flat(tmp_path / "d")
    (tmp_path / "d" / "l.csv").write_text(text)
    refused(message, load.load, str(tmp_path / "d"), classes=labels.Classes(2))


def test_lists_that_go_on(tmp_path, monkeypatch):
    flat(tmp_path)
    (tmp_path / "l.csv").write_text("file,label\n" + "00.png,0\n" * 20)
    monkeypatch.setattr(lists, "MAX_LISTED", 10)
    refused("lists more than 10 images", load.load, str(tmp_path))


def test_several_lists(tmp_path):
    images = flat(tmp_path)
    for name, shift in (("train", 0), ("test", 1)):
        rows = "".join(f"{k:02}.png,{(k + shift) % 2}\n" for k in range(4))
        (tmp_path / f"{name}.csv").write_text("file,label\n" + rows)
    assert_same(load.load(str(tmp_path)), images, [1, 0, 1, 0], "01")
    (tmp_path / "test2.csv").write_bytes((tmp_path / "test.csv").read_bytes())
    (tmp_path / "test.csv").rename(tmp_path / "more.csv")
    refused("has several lists of images", load.load, str(tmp_path), split="val")


@pytest.mark.parametrize(
    ("listed", "there"),
    [("{}", ".PNG"), ("{}", ".JPEG"), ("{}", ".bmp"), ("{}.png", ".PNG"), ("{}.PNG", ".png")],
)
def test_suffixes_in_other_case_or_left_out(tmp_path, listed, there):
    images = pixels(2)
    kinds = {".PNG": "PNG", ".png": "PNG", ".JPEG": "PNG", ".bmp": "BMP"}
    for row, image in enumerate(images):
        (tmp_path / f"0_{row}{there}").write_bytes(encoded(image, kinds[there]))
    rows = "".join(f"{listed.format(f'0_{row}')},{row}\n" for row in range(2))
    (tmp_path / "l.csv").write_text("id,label\n" + rows)
    found = load.load(str(tmp_path))
    assert_same(found, images, [0, 1], "01")
    assert found.notes == ("the classes are those of the list l.csv",)


def test_files_with_the_accents_of_macos(tmp_path):
    (tmp_path / "cafe\u0301.png").write_bytes(encoded(pixels(1)[0]))
    (tmp_path / "l.csv").write_text("file,label\ncaf\u00e9.png,0\n", encoding="utf-8")
    assert load.load(str(tmp_path)).notes == ("the classes are those of the list l.csv",)


@pytest.mark.parametrize("place", ["d/answers.jsonl", "d.jsonl"])
def test_the_answers_of_a_guard_are_no_labels(tmp_path, place):
    flat(tmp_path / "d")
    row = {"index": 0, "file": "00.png", "label": 1, "suspect_label": 1, "flagged": False}
    (tmp_path / place).write_text(json.dumps(row) + "\n")
    assert lists.find(tmp_path / "d", "test") is None
    assert unlabelled.is_unlabelled(str(tmp_path / "d"))
