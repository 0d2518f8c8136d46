"""Worker process that reads the arrays of an Orbax folder through TensorStore with limited memory
and time.

`orbax_file` runs this file by its path, so it imports nothing from jaxbd. TensorStore unpacks a
block before its claimed size can be checked, so a file of one megabyte can expand to gigabytes. In
this process that ends in an error message and nothing worse.

Protocol:
  stdin: one JSON line {"specs", "bytes", "seconds"} with the arrays to open; then an empty line
    once the parent has accepted the answer.
  stdout: one JSON line with [shape, type, shape of a block] for each array; then, after the second
    input line, for each array a newline and its elements, little-endian in C order. On an
    error a JSON line {"error", "index"} is written instead, and the output ends there.
"""

import contextlib
import json
import math
import os
import resource
import sys

MEMORY = 512 << 20
"""Bytes of address space allowed on top of what the libraries and arrays need."""


def limit(size, seconds):
    """From here on the process can allocate `MEMORY` + 2 * `size` bytes, and is killed after
    `seconds` more seconds of CPU time."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    most = now + MEMORY + 2 * size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(seconds + used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))


def answer(value):
    out.write(json.dumps(value).encode() + b"\n")
    out.flush()


def fail(error, index):
    answer({"error": str(error)[:10_000], "index": index})
    sys.exit()


def main():
    request = json.loads(sys.stdin.readline())
    with contextlib.suppress(OSError, ValueError):  # systems without these limits, e.g. macOS
        limit(request["bytes"], request["seconds"])
    # no concurrency: each parallel read or copy would take memory of its own
    alone = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    context, arrays = tensorstore.Context(alone), []
    for index, spec in enumerate(request["specs"]):
        try:
            arrays.append(tensorstore.open(spec, open=True, read=True, context=context).result())
        except Exception as error:
            fail(error, index)
    facts = lambda array: [
        array.shape,
        array.dtype.name,
        array.chunk_layout.read_chunk.shape,
    ]
    answer([facts(array) for array in arrays])
    sys.stdin.readline()
    for index, array in enumerate(arrays):
        try:
            values = array.read().result()
        except Exception as error:
            fail(error, index)
        out.write(b"\n")
        out.write(values.tobytes())
        out.flush()


if __name__ == "__main__":
    # silence stderr before TensorStore is imported, so that it logs nothing to the terminal
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import tensorstore

    out = sys.stdout.buffer
    main()
