"""Small files of images that claim much: each must be refused quickly and in little memory.

Run as a program it loads every one of them, in a folder, and prints what happened as JSON lines.
"""

import functools
import io
import json
import os
import pathlib
import resource
import struct
import sys
import tarfile
import time
import zipfile
import zlib

import numpy as np
from PIL import Image

GOOD = io.BytesIO()
Image.new("L", (16, 16)).save(GOOD, "PNG")


@functools.cache
def png(side, kind=6, channels=4):
    """A black PNG of side x side pixels, by default RGBA."""
    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    packer, row = zlib.compressobj(9), bytes(channels * side + 1)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">2I5B", side, side, 8, kind, 0, 0, 0)
    ends = chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + ends


def two_classes(place, **files):
    """Class folders a, with `files`, and b, with a good picture."""
    for name in ("a", "b"):
        (place / name).mkdir(parents=True)
    (place / "b" / "good.png").write_bytes(GOOD.getvalue())
    for name, content in files.items():
        (place / "a" / name.replace("_", ".")).write_bytes(content)
    return place


def many_scans(side):
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, "JPEG", quality=1, progressive=True)
    content = out.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * (1_000_000 // len(scan)) + content[-2:]


def tiff_of_tags(count, size):
    """A TIFF whose `count` tags all name the same `size` bytes."""
    entries = b"".join(
        struct.pack("<HHII", (40_000 + k) % 65_536, 7, size, 8 + 2 + 12 * count + 4)
        for k in range(count)
    )
    return b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4) + bytes(size)


def npy(shape, kind, content):
    head = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + content


def npz_of_zeros(path, size, labels):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            file.write(npy((size >> 8, 16, 16, 1), "|u1", b""))
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
        archive.writestr("labels.npy", npy((labels,), "<i8", bytes(8 * labels)))
    return path


def hollow(path, start, size):
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def repeated_value(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    # a PNG whose data go on behind its end, so that it decodes
    value = GOOD.getvalue() + bytes(4_000_000)
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))
    table = pa.table({"image": column, "label": pa.array(np.arange(rows) % 2)})
    pq.write_table(table, path, row_group_size=rows, store_schema=False, compression="ZSTD")
    return path


def one_large_value(path):
    """A table of two images of 150 MB of zeros each, which pack to next to nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.array([bytes(150 << 20)] * 2, pa.large_binary())
    table = pa.table({"image": values, "label": pa.array([0, 1])})
    pq.write_table(table, path, compression="ZSTD", use_dictionary=False, write_statistics=False)
    return path


def claimed_rows(path, rows, fields):
    """A table of 3 rows whose footer claims `rows` in its first `fields` counts of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.array([GOOD.getvalue()] * 3)
    pq.write_table(pa.table({"image": values, "label": pa.array([0, 1, 1])}), path)
    content = path.read_bytes()
    length = struct.unpack("<I", content[-8:-4])[0]
    footer, claim = content[-8 - length : -8], varint(2 * rows)
    footer = footer.replace(b"\x16\x06", b"\x16" + claim, fields)
    ending = footer + struct.pack("<I", len(footer)) + b"PAR1"
    path.write_bytes(content[: -8 - length] + ending)
    return path


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def encoded_again(place):
    """A CIFAR pickle that encodes one remembered text of a megabyte 2,000 times."""
    place.mkdir()
    text = b"X" + struct.pack("<I", 1_000_000) + b"x" * 1_000_000
    call = b"c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02"
    body = b"](" + call + b"h\x00h\x01h\x02\x86R" * 2000 + b"e"
    (place / "test_batch").write_bytes(b"\x80\x02}X\x04\x00\x00\x00data" + body + b"s.")
    return place


def sparse_tar(path):
    """A tar whose member says 250 MB of holes, ten times."""
    with tarfile.open(path, "w") as archive:
        for number in range(1, 6):
            member = tarfile.TarInfo(f"data_batch_{number}.bin")
            member.pax_headers = {
                "GNU.sparse.major": "0",
                "GNU.sparse.minor": "1",
                "GNU.sparse.size": str(250_000_000),
                "GNU.sparse.map": "0,0",
            }
            archive.addfile(member)
    return path


def gz_of_zeros(path, size):
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    path.write_bytes(
        b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    )
    return path


def idx_claims(place):
    """A .gz of IDX images whose header claims 2^32 - 1 images, and honest labels."""
    import gzip

    place.mkdir()
    head = struct.pack(">4I", 0x803, 2**32 - 1, 28, 28)
    (place / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(1 << 20)))
    labels = struct.pack(">2I", 0x801, 4) + bytes(4)
    (place / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return place


def with_pipe(place):
    """Class folders with a named pipe and a link to a device among the pictures."""
    two_classes(place)
    os.mkfifo(place / "a" / "pipe.png")
    (place / "a" / "zero.png").symlink_to("/dev/zero")
    return place


def pipe(path):
    os.mkfifo(path)
    return path


def deep(place):
    folder = two_classes(place) / "a"
    for _ in range(40):
        folder = folder / "b"
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(GOOD.getvalue())
    return place


def endless_list(place):
    """A picture and a .csv of 50 MB of short rows."""
    place.mkdir()
    (place / "a.png").write_bytes(GOOD.getvalue())
    (place / "l.csv").write_bytes(b"file,label\n" + b"a,b\n" * 12_000_000)
    return place


def chunks_of_png(count):
    """A PNG with `count` empty chunks of no meaning before its pixels."""
    content = GOOD.getvalue()
    empty = struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    return content[:33] + empty * count + content[33:]


def segments_of_jpeg(count):
    out = io.BytesIO()
    Image.new("L", (16, 16)).save(out, "JPEG")
    content = out.getvalue()
    return content[:2] + b"\xff\xef\0\2" * count + content[2:]


def scans_behind_pictures():
    """The JPEG of many scans, with a second picture behind it, which makes it an MPO file."""
    out = io.BytesIO()
    small = Image.new("RGB", (16, 16))
    small.save(out, "MPO", save_all=True, append_images=[small])
    head = out.getvalue()
    start = head.index(b"\xff\xe2")
    (length,) = struct.unpack(">H", head[start + 2 : start + 4])
    scans = many_scans(1000)
    return (
        scans[:2] + head[start : start + 2 + length] + scans[2:] + head[head.rindex(b"\xff\xd8") :]
    )


def text_of_ppm(side):
    return b"P3 %d %d 255\n" % (side, side) + b"1 " * (3 * side * side)


def npz_of(path, method=zipfile.ZIP_STORED, **arrays):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npz_of_texts(path, count):
    images = npy((count, 1, 1, 1), "|u1", bytes(count))
    labels = npy((count,), "<U2", np.array(["ab"], "<U2").tobytes() * count)
    return npz_of(path, zipfile.ZIP_DEFLATED, images=images, labels=labels)


def npz_of_huge_directory(path):
    """The older end record says that the directory is small, a comment hides how large it is."""
    npz_of(path, images=npy((4, 1, 1, 1), "|u1", bytes(4)), labels=npy((4,), "<i8", bytes(32)))
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    lines = b"".join(
        b"PK\1\2" + struct.pack("<6H3I5H2I", *(0,) * 9, 4, *(0,) * 6) + b"%04x" % i
        for i in range(60_000)
    )
    table = lines * 8
    record = struct.pack(
        "<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 480_000, 480_000, len(table), end
    )
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end + len(table), 1)
    decoy = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, 100, 0)
    ends = content[end:-2] + struct.pack("<H", len(decoy)) + decoy
    path.write_bytes(content[:end] + table + record + locator + ends)
    return path


def labelled(place, name, content):
    place.mkdir()
    (place / "a.png").write_bytes(GOOD.getvalue())
    (place / name).write_bytes(content)
    return place


def long_labels(place, rows):
    """A list of which one label is as long as a field may be."""
    listed = b"".join(b"a.png,b\n" for _ in range(rows))
    return labelled(place, "l.csv", b"file,label\na.png," + b"c" * 130_000 + b"\n" + listed)


def table_of(path, labels, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array([GOOD.getvalue()] * rows)
    pq.write_table(pa.table({"image": images, "label": labels}), path, compression="ZSTD")
    return path


def long_text_labels(path, rows):
    """A table whose labels are one text of a megabyte, and short ones."""
    import pyarrow as pa

    return table_of(path, pa.array(["x" * 1_000_000] + ["y"] * (rows - 1)), rows)


def noted_table(path):
    """A table whose notes are 60 MB of brackets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": pa.array([GOOD.getvalue()]), "label": pa.array([0])})
    table = table.replace_schema_metadata({"huggingface": "[" + "{}," * 20_000_000 + "{}]"})
    pq.write_table(table.rename_columns(["picture of " + "x" * 1_000_000, "label"]), path)
    return path


def announced_tar(path, count):
    """A tar of headers that each announce a long name for the next."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = b"L", 4
    block = header.tobuf(tarfile.GNU_FORMAT) + b"abc".ljust(512, b"\0")
    path.write_bytes(block * count + bytes(1024))
    return path


def many_members(path, count):
    block = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(block * count + bytes(1024))
    return path


def empty_parts(count):
    import gzip

    return gzip.compress(b"", 1, mtime=0) * count


def idx_of_empty_parts(place, count):
    place.mkdir()
    (place / "t10k-images-idx3-ubyte.gz").write_bytes(empty_parts(count))
    (place / "t10k-labels-idx1-ubyte.gz").write_bytes(empty_parts(count))
    return place


def written(path, content):
    path.write_bytes(content)
    return path


def linked(place):
    (two_classes(place) / "a" / "up").symlink_to(place.parent)
    return place


def crowded(place, count):
    two_classes(place)
    first = place / "a" / "0.txt"
    first.touch()
    for number in range(1, count):
        os.link(first, place / "a" / f"{number}.txt")
    return place


def pickled_steps(place, count):
    place.mkdir()
    body = b"](" + b"K\1" * count + b"e"
    (place / "test_batch").write_bytes(b"\x80\x02}X\x04\x00\x00\x00data" + body + b"s.")
    return place


CASES = {
    "chunks of a png": lambda p: two_classes(p / "x", x_png=chunks_of_png(1_500_000)),
    "segments of a jpeg": lambda p: two_classes(p / "x", x_jpg=segments_of_jpeg(3_000_000)),
    "scans behind pictures": lambda p: two_classes(p / "x", x_jpg=scans_behind_pictures()),
    "numbers of a ppm": lambda p: two_classes(
        p / "x", **{f"{k}_ppm": text_of_ppm(1_000) for k in "abcdefgh"}
    ),
    "texts in an npz": lambda p: npz_of_texts(p / "x.npz", 5_000_000),
    "huge directory of an npz": lambda p: npz_of_huge_directory(p / "x.npz"),
    "npz packed with bzip2": lambda p: npz_of(
        p / "x.npz", zipfile.ZIP_BZIP2, images=npy((9, 8, 8, 1), "|u1", bytes(576))
    ),
    "npz packed with lzma": lambda p: npz_of(
        p / "x.npz", zipfile.ZIP_LZMA, images=npy((9, 8, 8, 1), "|u1", bytes(576))
    ),
    "array named twice": lambda p: npz_of(
        p / "x.npz",
        zipfile.ZIP_STORED,
        **{
            "images.npy": npy((1,), "<i8", bytes(8)),
            "images": npy((9, 8, 8, 1), "|u1", bytes(576)),
            "labels": npy((9,), "<i8", bytes(72)),
        },
    ),
    "names in an npz": lambda p: npz_of(
        p / "x.npz",
        zipfile.ZIP_DEFLATED,
        images=npy((4, 8, 8, 1), "|u1", bytes(256)),
        labels=npy((4,), "<i8", bytes(32)),
        class_names=npy((8_000_000,), "<U2", np.array(["ab"], "<U2").tobytes() * 8_000_000),
    ),
    "rows of an npz": lambda p: npz_of(
        p / "x.npz",
        zipfile.ZIP_DEFLATED,
        images=npy((1_200, 1, 1, 1), "|u1", bytes(1_200)),
        labels=npy((1_200, 100_000), "|u1", bytes(120_000_000)),
    ),
    "link to what is above": lambda p: linked(p / "x"),
    "files that are no pictures": lambda p: crowded(p / "x", 20_003),
    "row of commas": lambda p: labelled(p / "x", "l.csv", b"file,label" + b"," * 60_000_000),
    "row of many lines": lambda p: labelled(
        p / "x", "l.csv", b"file,label\n" + b'"\n",' * 10_000_000
    ),
    "row of brackets": lambda p: labelled(p / "x", "l.jsonl", b"[" + b"{}," * 15_000_000 + b"{}]"),
    "long label": lambda p: long_labels(p / "x", 20_000),
    "long label of a table": lambda p: long_text_labels(p / "x.parquet", 400),
    "notes of a table": lambda p: noted_table(p / "x.parquet"),
    "headers that announce": lambda p: announced_tar(p / "x.tar", 10_000),
    "many members": lambda p: many_members(p / "x.tar", 120_000),
    "empty parts": lambda p: written(p / "x.tar.gz", empty_parts(400_000)),
    "empty parts of idx": lambda p: idx_of_empty_parts(p / "x", 400_000),
    "steps of a pickle": lambda p: pickled_steps(p / "x", 790_000),
    "endless list": lambda p: endless_list(p / "x"),
    "49 million pixels": lambda p: two_classes(p / "x", **{f"{k}_png": png(7000) for k in "abc"}),
    "large in total": lambda p: two_classes(
        p / "x", **{f"{k}_png": png(6000, 0, 1) for k in "abcdefghijkl"}
    ),
    "scans": lambda p: two_classes(p / "x", x_jpg=many_scans(2000)),
    "scans of a small picture": lambda p: two_classes(p / "x", x_jpg=many_scans(1000)),
    "tags": lambda p: two_classes(p / "x", x_tif=tiff_of_tags(150, 4_000_000)),
    "very many tags": lambda p: two_classes(p / "x", x_tif=tiff_of_tags(60_000, 1_000_000)),
    "postscript": lambda p: two_classes(p / "x", x_png=b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    "hollow png": lambda p: (
        hollow(two_classes(p / "x") / "a" / "h.png", GOOD.getvalue()[:40], 1 << 30).parent.parent
    ),
    "pipe among pictures": lambda p: with_pipe(p / "x"),
    "pipe as .npz": lambda p: pipe(p / "x.npz"),
    "pipe as .parquet": lambda p: pipe(p / "x.parquet"),
    "deep folders": lambda p: deep(p / "x"),
    "npz of zeros": lambda p: npz_of_zeros(p / "x.npz", 400 << 20, (400 << 20) >> 8),
    "npz of zeros, few labels": lambda p: npz_of_zeros(p / "x.npz", 1 << 27, 4),
    "npz of labels": lambda p: npz_of_zeros(p / "x.npz", 1 << 20, 20_000_000),
    "rows of a footer": lambda p: claimed_rows(p / "x.parquet", 1 << 40, 1),
    "rows everywhere": lambda p: claimed_rows(p / "x.parquet", 1 << 40, 9),
    "2e9 rows everywhere": lambda p: claimed_rows(p / "x.parquet", 2_000_000_000, 9),
    "one value in all rows": lambda p: repeated_value(p / "x.parquet", 500),
    "large values": lambda p: one_large_value(p / "x.parquet"),
    "encoded again and again": lambda p: encoded_again(p / "x"),
    "sparse tar": lambda p: sparse_tar(p / "x.tar"),
    "gz of zeros": lambda p: gz_of_zeros(p / "x.tar.gz", 100 << 20),
    "idx that claims": lambda p: idx_claims(p / "x"),
}


def main(root):
    from jaxbd.base import UserError
    from jaxbd.data import load

    load.load("digits", limit=1)
    for name, make in CASES.items():
        place = root / name.replace(" ", "-")
        place.mkdir(parents=True)
        path = make(place)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            found = load.load(str(path), limit=100, image_shape=None)
            said = f"read {found.images.shape} {found.notes}"
        except UserError as error:
            said = f"refused: {error}"
        took = time.process_time() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps([name, said, took, grown / 1024]), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
