"""Reads the arrays of an Orbax folder through TensorStore, in a process of its own with limited
memory and time.

`orbax_file` starts this file by its path, so it imports nothing of jaxbd. TensorStore unpacks what
a block claims to hold before anything can be compared with its size: a file of a megabyte can
become gigabytes. Here that ends in an error message, and in no more.

On stdin: one JSON line {"specs", "bytes", "seconds"}, the arrays to open; then, once the answer is
found acceptable, an empty line. On stdout: a JSON line of one [shape, type, shape of a block] for
each array; after the second line the elements of all, little-endian in C order. {"error", "index"}
takes the place of the first line, an early end that of the elements.
"""

import contextlib
import json
import math
import os
import resource
import sys

MEMORY = 512 << 20
"""Bytes of address space beyond what the libraries and the arrays take."""


def limit(size, seconds):
    """From here on the process can allocate little more than `size` bytes, and ends after so many
    seconds of a processor."""
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
    asked = json.loads(sys.stdin.readline())
    with contextlib.suppress(OSError, ValueError):  # a system without these limits, such as macOS
        limit(asked["bytes"], asked["seconds"])
    alone = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    context, arrays = tensorstore.Context(alone), []
    for index, spec in enumerate(asked["specs"]):
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
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import tensorstore

    out = sys.stdout.buffer
    main()
