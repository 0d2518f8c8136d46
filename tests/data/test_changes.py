"""What is said of pictures that were resized, or changed between grey and colour."""

import numpy as np
import pytest
from PIL import Image

from jaxbd.data import load, pictures


@pytest.fixture
def folder(tmp_path):
    """Two classes: a grey 4x4 picture, and a coloured 6x8 and 4x4 one."""
    for name, shape in (("a/0", (4, 4)), ("b/0", (6, 8, 3)), ("b/1", (4, 4, 3))):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros(shape, np.uint8)).save(path)
    return str(tmp_path)


def test_resizing_and_colour_are_told_in_a_line_each(folder):
    notes = load.load(folder, image_shape=(4, 4, 3)).notes
    assert notes == (
        "1 of 3 pictures were resized to 4x4 (from 6x8)",
        "1 of 3 pictures are grey and became RGB, as the model takes them",
    )
    small = load.load(folder, image_shape=(2, 2, 1)).notes
    assert small == (
        "3 of 3 pictures were resized to 2x2 (from 4x4 to 6x8)",
        "2 of 3 pictures are in colour and became grey, as the model takes them",
    )


def test_pictures_that_fit_are_not_spoken_of():
    assert pictures.describe_changes([(False, 4, 4)] * 3, (4, 4, 3)) == ()
    assert pictures.describe_changes([(True, 4, 4)] * 3, (4, 4, 1)) == ()
