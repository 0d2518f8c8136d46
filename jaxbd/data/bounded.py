"""Limits on image data, checked against a file's claims before anything is decoded.

A small file can be very expensive: a 200 kB PNG unpacks to 200 MB, a 1 MB .npz to 1 GB, and a 2 MB
progressive JPEG takes a minute to decode. Everything here refuses such files by what they claim.
"""

import io
import stat
import struct
import threading
from pathlib import Path
from typing import Any

from jaxbd.base import UserError
from jaxbd.limits import BYTES_PER_SECOND, Deadline, Limits, Refusal, read_bounded, watched

LIMITS = Limits()
"""Bytes and pixels per picture (the largest in ImageNet has 28 million pixels); images and bytes
per data set."""
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "PPM", "TIFF")
"""The only decoders that are ever tried.

EPS starts Ghostscript; JPEG 2000 and AVIF decoders are large and no data set needs them; Pillow's
other formats are rare. TIFF is read only if uncompressed or packed with LZW, Deflate or PackBits.
"""
MAX_PIXELS_BY_FORMAT = {"WEBP": 16_000_000, "GIF": 16_000_000, "TIFF": 16_000_000}
"""Lower pixel limits for formats whose decoders hold several copies of the picture."""
MAX_SCAN_PIXELS = 300_000_000
"""Maximum pixels x scans of a JPEG; a 25-megapixel progressive JPEG has about 10 scans."""
MAX_SCANS = 100
"""Maximum scans of a JPEG; encoders write about 10, libjpeg-turbo's fuzzers stop at 500."""
LARGE_PICTURE = 2_000_000
"""Pictures with more pixels are decoded one at a time and count towards the source's total."""
FREE_LARGE_PIXELS, PIXELS_PER_BYTE = 100_000_000, 20
"""Limit on the total pixels of a source's large pictures: the free allowance, plus so many pixels
per byte of their files (a JPEG photograph has 2 to 10 pixels per byte)."""
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits")
MAX_TIFF_TAGS = 200
"""Maximum tags of a picture in a TIFF file; 10 to 40 are usual."""
PLAIN, MAX_PLAIN_PIXELS = (b"P1", b"P2", b"P3"), 250_000
"""Magic bytes of PNM files that spell pixels as text (Pillow parses them one number at a time), and
their pixel limit."""
JPEG = b"\xff\xd8\xff"
SECONDS_PER_PICTURE, PIXELS_PER_SECOND = 0.05, 10_000_000
"""CPU seconds allowed for any picture, and the minimum decoding and resizing rate of a slow machine
(a typical one is five times as fast)."""

FREE_UNPACKED, EXPANSION = 128 << 20, 32
"""An archive may unpack to the larger of: so many bytes, or so many times its own size."""


def max_unpacked(file_bytes: int) -> int:
    """Bytes that an archive of `file_bytes` bytes may unpack to."""
    return min(LIMITS.data_bytes, max(FREE_UNPACKED, EXPANSION * file_bytes))


def is_regular(path: Path) -> bool:
    """Whether `path` is, or links to, a regular file (not a named pipe or device)."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def read_file(path: Path, most: int = LIMITS.image_bytes, what: str = "image") -> bytes:
    """Reads a regular file of at most `most` bytes.

    Raises: UserError when the file is larger, sparse, empty, a pipe or device, or unreadable.
    """
    where = f"{what} {str(path)!r}"
    try:
        return read_bounded(path, LIMITS, most)
    except Refusal as refusal:
        raise UserError(f"{where}: {refusal}; replace or remove it") from None
    except UserError:
        raise UserError(f"{where} cannot be read (no such file); check its name") from None
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}); check its permissions"
        ) from None


class PixelBudget:
    """Budget shared by all decoding threads: pixels of a source's large pictures, and time.

    Attributes:
      alone: lock held while decoding a large picture, so that only one is in memory.
      error: error of the first picture that could not be read.
    """

    def __init__(self) -> None:
        self.alone = threading.Lock()
        self._count = threading.Lock()
        self._pixels = self._bytes = 0
        self._spare = LIMITS.seconds
        self.error: UserError | None = None

    def deadline(self, size: int) -> Deadline:
        """Deadline for one picture of `size` bytes.

        Each picture gets the time its bytes and pixels explain. All time beyond that comes out of
        the `LIMITS.seconds` that the whole source shares.
        """
        return _Shared(SECONDS_PER_PICTURE + size / BYTES_PER_SECOND, self)

    def failed(self, error: UserError) -> UserError:
        """Records the first error, which stops the other threads too, and returns it."""
        with self._count:
            self.error = self.error or error
            return self.error

    def take(self, seconds: float) -> bool:
        """Takes `seconds` from the spare time; whether there was enough left."""
        with self._count:
            self._spare -= seconds
            return self._spare >= 0

    def spend(self, pixels: int, size: int, name: str) -> None:
        """Counts one large picture of `size` bytes. Raises: UserError above the total."""
        with self._count:
            self._pixels, self._bytes = self._pixels + pixels, self._bytes + size
            limit = FREE_LARGE_PIXELS + PIXELS_PER_BYTE * self._bytes
            if self._pixels > limit:
                raise UserError(
                    f"image {name!r}: the large images so far claim {self._pixels:,} pixels in"
                    f" {self._bytes:,} bytes, the limit is {limit:,}; scale them down or remove"
                    " them"
                )


class _Shared(Deadline):
    """A deadline that extends itself while the source has spare time."""

    def __init__(self, own: float, budget: PixelBudget):
        super().__init__(own, "it")
        self._budget, self._over = budget, 0.0

    def check(self) -> None:
        if self._budget.error is not None:
            raise self._budget.error
        over = self.used() - self.seconds
        if over <= self._over:  # this much was already charged to the budget
            return
        more, self._over = over - self._over, over
        if not self._budget.take(more):
            raise Refusal(f"it takes more than {self.used():.2g} seconds")


def open_picture(content: bytes, name: str, deadline: Deadline | None = None) -> Any:
    """Opens an encoded picture as a lazy Pillow image that is safe to decode.

    Tries only `FORMATS`. Checks size, scans and tags; decodes nothing yet.

    Args:
      name: the picture's name in messages.
      deadline: covers opening and decoding; extended by the time its pixels explain.
    Raises: UserError when the picture has another format or is corrupt, too large or too costly.
      Decoding raises Refusal once the deadline has passed.
    """
    from PIL import Image

    deadline = deadline or LIMITS.deadline("it", len(content))
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff_tags(content, name)  # first, because Pillow reads the tags while opening
    try:
        # a crafted file can make Pillow's loops over chunks, segments and blocks endless
        image = Image.open(watched(io.BytesIO(content), deadline), formats=FORMATS)
    except UserError:
        raise
    except Refusal as refusal:
        raise too_long(name, refusal) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, LIMITS.image_pixels) from None
    except Exception:  # decoders raise every kind of exception on broken files
        raise corrupt(name) from None
    pixels, most = (
        image.width * image.height,
        MAX_PIXELS_BY_FORMAT.get(image.format or "", LIMITS.image_pixels),
    )
    if pixels > most:
        raise _too_large(name, most)
    if content[:2] in PLAIN and pixels > MAX_PLAIN_PIXELS:
        raise UserError(f"image {name!r} spells its {pixels:,} pixels as text; save it as PNG")
    deadline.seconds += pixels / PIXELS_PER_SECOND
    # test the bytes, not image.format: Pillow calls a JPEG with more pictures behind it MPO
    if content.startswith(JPEG):
        _check_scans(content, pixels, name)
    if image.format == "TIFF" and image.info.get("compression") not in TIFF_COMPRESSIONS:
        raise UserError(
            f"image {name!r} is a TIFF compressed as {image.info.get('compression')!r}; save it"
            " uncompressed, or as PNG"
        )
    if image.mode[0] in "IF":  # Pillow's modes I, I;16 and F
        raise UserError(f"image {name!r} has more than 8 bits a channel; convert it to 8 bits")
    return image


def too_long(name: str, refusal: Refusal) -> UserError:
    """The error for a picture that is not opened or decoded in time."""
    return UserError(f"image {name!r}: {refusal}; replace or remove it")


def _too_large(name: str, most: int) -> UserError:
    return UserError(f"image {name!r} is larger than {most:,} pixels; scale it down or remove it")


def corrupt(name: str) -> UserError:
    return UserError(f"image {name!r} is corrupt or not {', '.join(FORMATS)}; replace or remove it")


def _check_scans(content: bytes, pixels: int, name: str) -> None:
    """Raises UserError for a JPEG with too many scans.

    Each scan costs a pass over all pixels, however few bytes it has. Within a scan's data 0xFF is
    always followed by 0 or a restart marker, which makes this count exact except for previews in
    the metadata.
    """
    scans = content.count(b"\xff\xda")
    if scans > MAX_SCANS or pixels * scans > MAX_SCAN_PIXELS:
        raise UserError(
            f"image {name!r} is a JPEG of {scans:,} scans over {pixels:,} pixels; save it as a"
            " baseline JPEG or remove it"
        )


def _check_tiff_tags(content: bytes, name: str) -> None:
    """Raises UserError when the first picture's tags claim more bytes than the file has.

    All tags of a TIFF can point to the same bytes, and Pillow copies them for each tag. Only the
    first picture is read later, so only its tags are checked.
    """
    order = "<" if content[:2] == b"II" else ">"
    try:
        if content[2:4] in (b"+\0", b"\0+"):
            raise UserError(f"image {name!r} is a BigTIFF; save it as TIFF or PNG")
        (start,) = struct.unpack_from(f"{order}I", content, 4)
        (count,) = struct.unpack_from(f"{order}H", content, start)
        if count > MAX_TIFF_TAGS:
            raise UserError(f"image {name!r} has {count} TIFF tags; save it as PNG")
        widths = (1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4)  # bytes per value, by field type
        claimed = 0
        for row in range(count):
            kind, length = struct.unpack_from(f"{order}HI", content, start + 4 + 12 * row)
            claimed += length * widths[kind] if kind < len(widths) else 0
    except struct.error:
        raise corrupt(name) from None
    if claimed > len(content):
        raise corrupt(name)
