"""A folder with one sub-folder of image files per class."""

from pathlib import Path

from jaxbd.base import Dataset, UserError
from jaxbd.data import pack

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm")


def load(
    path: str | Path,
    *,
    image_shape: pack.Shape | None = None,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Reads every image file of every class; class k is the k-th sub-folder in the order of names.

    An empty sub-folder keeps its class number. Hidden files and files of other kinds are passed over.

    Args:
      image_shape, channels: see `pack.decode`.
      limit: at most so many images, drawn with `seed` before anything is decoded.
    Raises: UserError when there are no classes or images, when the classes' order is doubtful, or on a bad image.
    """
    path = Path(path)
    classes = class_folders(path)
    files = [(file, label) for label, folder in enumerate(classes) for file in image_files(folder)]
    if not files:
        raise UserError(f"data {path}: no class sub-folder holds images ({', '.join(SUFFIXES)}); add some")
    chosen = [files[row] for row in pack.chosen_rows(len(files), limit, seed)]
    named = ((str(file.relative_to(path)), read_file(file)) for file, _ in chosen)
    images = pack.decode(named, len(chosen), image_shape=image_shape, channels=channels)
    return pack.dataset(images, [label for _, label in chosen], [folder.name for folder in classes], str(path))


def class_folders(path: Path) -> list[Path]:
    """The class sub-folders of `path`, sorted by name; names that are numbers must sort alike as text."""
    if not path.is_dir():
        raise UserError(f"data {path} is not a folder; give a folder with one sub-folder of images per class")
    folders = sorted((entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."), key=_name)
    if not folders:
        raise UserError(f"data {path} has no class sub-folders; put the images of each class into one of its own")
    names = [_name(folder) for folder in folders]
    by_number = sorted(names, key=int) if all(name.isdecimal() for name in names) else names
    for text, number in zip(names, by_number, strict=True):
        if text != number:
            order = f"{text} comes before {number}"
            raise UserError(f"data {path}: as text class folder {order}; pad the numbers with zeros (00, 01, …)")
    return folders


def _name(path: Path) -> str:
    return path.name


def image_files(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted; refuses a folder that holds only files of other kinds."""
    files = sorted((entry for entry in folder.iterdir() if entry.is_file() and entry.name[0] != "."), key=_name)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if files and not images:
        raise UserError(f"class folder {folder} holds files but no images ({', '.join(SUFFIXES)}); convert them")
    return images


def read_file(file: Path) -> bytes:
    """The content of an image file. Raises: UserError when it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"image {str(file)!r} cannot be read ({error.strerror}); check its permissions") from None
