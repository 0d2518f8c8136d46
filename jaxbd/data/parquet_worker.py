"""Reads Parquet and Arrow tables in a separate process with limited memory and CPU time.

`parquet` runs this file by its path, so it imports nothing from jaxbd. Arrow allocates whatever a
file claims: a 500-byte footer can ask for petabytes, and a 1 MB dictionary entry repeated in 4,000
rows for gigabytes. In this process such a claim ends in an error message and nothing worse.

Protocol. stdin: a JSON line {"files", "images", "labels", "seconds", "bytes_per_second"}, then a
JSON line {"rows"}: the chosen rows, counted over all files. stdout: after the first line, a JSON
line that describes the tables; after the second, an 8-byte length and the encoded image for every
chosen row, then the length -1 and a JSON line {"labels"}: of all rows, as text is numbered by all
words that occur; of the chosen rows if the labels are lists. A line {"error"} replaces either
answer.
"""

import contextlib
import json
import math
import os
import resource
import struct
import sys

MEMORY = 512 << 20
"""Bytes of address space beyond what the libraries use."""
BATCH, LABEL_BATCH = 16, 1_024
"""Rows of images and of labels decoded at a time."""
MOST_TEXT, MOST_LETTERS, MOST_LABELS = 2 << 20, 1_000, 10_000_000
"""Limits: bytes of a table's metadata, characters per label, numbers in all labels together."""


class Refused(Exception):
    """A file is not read. The message says what is wrong with it."""


class Table:
    """One file.

    Attributes:
      rows: number of rows.
      names: names of the columns.
    """

    def __init__(self, path):
        self.path, self.is_arrow = path, path.endswith(".arrow")
        try:
            self._open_arrow() if self.is_arrow else self._open_parquet()
        except (pa.ArrowException, OSError, ValueError, MemoryError):
            kind = "Arrow" if self.is_arrow else "parquet"
            raise Refused(f"{path} is not a readable {kind} file; fetch it again") from None
        self.names = list(self.schema.names)

    def _open_parquet(self):
        self._file = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        self.schema = self._file.schema_arrow  # decodes the column names; fails here if damaged
        metadata = self._file.metadata
        groups = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self.rows = metadata.num_rows
        size = os.path.getsize(self.path)
        if self.rows < 0 or min(groups, default=0) < 0 or sum(groups) != self.rows:
            raise Refused(f"{self.path} claims {self.rows:,} rows but has others; fetch it again")
        if self.rows > size:  # no image takes less than a byte
            raise Refused(
                f"{self.path} claims {self.rows:,} rows in {size:,} bytes; fetch it again"
            )

    def _open_arrow(self):
        self._source = pa.memory_map(self.path)
        self._reader = self._open_stream()
        self.schema = self._reader.schema
        size = os.path.getsize(self.path)
        self.rows = 0
        for batch in self._reader:
            self.rows += batch.num_rows
            if self.rows > size:
                raise Refused(f"{self.path} claims more rows than bytes; fetch it again")

    def _open_stream(self):
        self._source.seek(0)
        try:
            return pa.ipc.open_stream(self._source)
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(self._source)
            batches = (file.get_batch(k) for k in range(file.num_record_batches))
            return pa.RecordBatchReader.from_batches(file.schema, batches)

    def batches(self, column, size):
        """Yields all rows of the column in order, at most `size` at a time."""
        if not self.is_arrow:
            for batch in self._file.iter_batches(size, columns=[column], use_threads=False):
                yield batch[column]
            return
        for batch in self._open_stream():
            for start in range(0, batch.num_rows, size):
                yield batch[column].slice(start, size)

    def column(self, candidates):
        """The first of the candidate columns that the table has."""
        for name in candidates:
            if name in self.names:
                return name
        has = ", ".join(repr(name[:40]) for name in self.names[:12]) or "none"
        raise Refused(
            f"{self.path} has no column {' or '.join(candidates)}; it has {has}; rename one"
        )

    def metadata(self):
        """Metadata of the Hugging Face libraries about the columns, as JSON text; may be empty."""
        noted = (self.schema.metadata or {}).get(b"huggingface") or b""
        return noted[:MOST_TEXT].decode("utf-8", "replace")


def contents(column, name, path):
    """Encoded images of one batch's column, as bytes."""
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.call_function("struct_field", [column], pc.StructFieldOptions("bytes"))
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise Refused(
            f"{path}: column {name!r} is {str(column.type)[:60]}; it must hold encoded images as"
            " bytes"
        )
    if column.null_count:
        raise Refused(f"{path}: some rows lack the image's bytes; embed them or drop the rows")
    return column.to_pylist()


def holds_lists(kind):
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def labels(column, name, path):
    """Labels of one batch's column: numbers, booleans, one-hot lists, or text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_list = holds_lists(column.type)
    kind = column.type.value_type if is_list else column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_number or (is_text and not is_list)):
        raise Refused(
            f"{path}: column {name!r} is {str(column.type)[:60]}; it must hold class numbers or"
            " text"
        )
    if column.null_count:
        raise Refused(f"{path}: some rows lack the label; add it or drop the rows")
    found = column.to_pylist()
    if is_text and any(len(label) > MOST_LETTERS for label in found):
        raise Refused(f"{path}: a label has over {MOST_LETTERS:,} characters; give class numbers")
    if is_list and any(len(row) != len(found[0]) or len(row) > 10_000 for row in found):
        raise Refused(f"{path}: column {name!r} holds lists of many lengths; give class numbers")
    return found


def read_rows(tables, asked, chosen):
    """Sends the chosen rows' images; returns the labels of all rows, or of these if they are
    lists."""
    rows = range(sum(table.rows for table in tables))
    first = tables[0].schema.field(tables[0].column(asked["labels"])).type
    found = []
    for path, part in pick(
        tables, asked["labels"], LABEL_BATCH, chosen if holds_lists(first) else rows, labels
    ):
        found += part
        width = len(found[0]) if isinstance(found[0], list) else 1
        if len(found) * width > MOST_LABELS:
            raise Refused(f"{path} has more than {MOST_LABELS:,} numbers for labels")
    total, most = 0, max(256 << 20, 4 * sum(os.path.getsize(table.path) for table in tables))
    for path, part in pick(tables, asked["images"], BATCH, chosen, contents):
        for content in part:
            total += len(content)
            if total > most:
                raise Refused(f"{path} unpacks to more than {most:,} bytes")
            send(content)
    return found


def pick(tables, candidates, size, chosen, convert):
    """Yields (path, converted values) of the `chosen` rows of a column, `size` rows or fewer at a
    time; stops after the last of them.

    Args:
      candidates: names that the column may have.
      chosen: ascending row numbers, counted over all tables.
      convert: turns a part of the column into a list; also gets its name and the table's path.
    """
    start, chosen = 0, iter(chosen)
    row = next(chosen, None)
    for table in tables:
        name = table.column(candidates)
        try:
            for column in table.batches(name, size):
                picked = []
                while row is not None and row < start + len(column):
                    picked.append(row - start)
                    row = next(chosen, None)
                start += len(column)
                if picked:
                    yield table.path, convert(column.take(pa.array(picked)), name, table.path)
                if row is None:
                    return
        except (pa.ArrowException, OSError, ValueError, MemoryError):
            raise Refused(f"{table.path} is a damaged parquet file; fetch it again") from None
    raise Refused(f"{tables[-1].path} has fewer rows than it claims; fetch it again")


def send(content):
    out.write(struct.pack("<q", len(content)))
    out.write(content)


def answer(value):
    out.write(json.dumps(value).encode() + b"\n")
    out.flush()


def limit_memory(files, seconds, bytes_per_second):
    """Limits what this process may still allocate, and its CPU time: `seconds` plus what the files'
    size explains."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    size = sum(os.path.getsize(path) for path in files)
    mapped = sum(os.path.getsize(path) for path in files if path.endswith(".arrow"))
    most = now + MEMORY + mapped
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds += used.ru_utime + used.ru_stime + size / bytes_per_second
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds)))


def main():
    asked = json.loads(sys.stdin.readline())
    with contextlib.suppress(OSError, ValueError):  # systems without these limits, e.g. macOS
        limit_memory(asked["files"], asked["seconds"], asked["bytes_per_second"])
    try:
        tables = [Table(path) for path in asked["files"]]
        label = tables[0].column(asked["labels"])
        tables[0].column(asked["images"])
        answer({"rows": [t.rows for t in tables], "label": label, "about": tables[0].metadata()})
        chosen = json.loads(sys.stdin.readline())["rows"]
    except Refused as error:
        answer({"error": str(error)})
        return
    try:
        last = {"labels": read_rows(tables, asked, chosen) if chosen else []}
    except Refused as error:
        last = {"error": str(error)}
    out.write(struct.pack("<q", -1))
    answer(last)


if __name__ == "__main__":
    # import first: MEMORY counts from what the process uses when `main` sets the limits
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.ipc
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    out = sys.stdout.buffer
    main()
