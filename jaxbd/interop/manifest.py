"""Lists the files that decide what a model computes, each with its SHA-256, in the format of the
OpenSSF model signing specification (an in-toto statement with predicate version 1.0), so that its
tools can sign what a record names.

For a model file these are the file itself and any activation bounds and external data beside it;
for a model folder its weights, settings and guard; for an Orbax folder all its files.
"""

import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxbd.interop import beside, folder, hub, orbax_file
from jaxbd.limits import Limits, Refusal, opened, quote, refusing, sha256, walk

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}


def root(files: Mapping[str, str]) -> str:
    """One SHA-256 for all `files` {name: SHA-256}: the hash of their digests, sorted by name."""
    return hashlib.sha256(
        b"".join(bytes.fromhex(files[name]) for name in sorted(files))
    ).hexdigest()


def statement(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of `files` {name: SHA-256}, which together make up the model `name`."""
    resources = [
        {"name": each, "algorithm": "sha256", "digest": files[each]} for each in sorted(files)
    ]
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": root(files)}}],
        "predicateType": PREDICATE,
        "predicate": {"serialization": SERIALIZATION, "resources": resources},
    }


def parse(value: Any) -> dict[str, str]:
    """The files {name: SHA-256} of a `statement`. Raises Refusal if `value` is not a statement, or
    its total hash does not match its files."""
    try:
        (subject,), resources = value["subject"], value["predicate"]["resources"]
        files = {each["name"]: each["digest"] for each in resources}
        kinds, stated = {each["algorithm"] for each in resources}, subject["digest"]["sha256"]
    except (KeyError, TypeError, ValueError):
        raise Refusal("its manifest is not one of model signing 1.0") from None
    if (
        value.get("predicateType") != PREDICATE
        or kinds != {"sha256"}
        or len(files) != len(resources)
    ):
        raise Refusal("its manifest is not one of model signing 1.0, with SHA-256, in single files")
    for name, digest in files.items():
        if type(digest) is not str or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise Refusal(f"its manifest gives {quote(name)} the hash {quote(digest)}")
        if type(name) is not str or {"", ".", ".."} & set(name.split("/")) or "\0" in name:
            raise Refusal(f"its manifest names a file {quote(name)}")
    if root(files) != stated:
        raise Refusal("its manifest was changed: the total hash does not match that of its files")
    return files


def of(path: pathlib.Path, limits: Limits = Limits(), named: Iterable[str] = ()) -> dict[str, str]:
    """{name: SHA-256} of the files that decide what the model at `path` computes, hashed as they
    are on disk now.

    Args:
      named: files beside a model file that are known only from its content (external data of a
        graph).
    Raises: UserError when there is no such model, or a file cannot be read.
    """
    with refusing(path):
        if not path.is_dir():
            bounds = beside.find(path)
            others = [at for name in named if (at := path.parent / name).is_file() and at != path]
            if bounds is not None and bounds not in others:
                others.append(bounds)
            return _hashes(path.parent, [path, *others], limits)
        if orbax_file.is_checkpoint(path):
            return _hashes(path, walk(path, limits), limits)
        weights = hub.weights_of(path)
        if weights is not None or folder.is_model(path):
            names = (folder.WEIGHTS, folder.CONFIG, folder.GUARD)
            if weights is not None:
                names = (weights.name, folder.CONFIG, hub.PROCESSOR)
            return _hashes(path, [path / name for name in names if (path / name).exists()], limits)
        raise Refusal("the folder holds no model")


def _hashes(above: pathlib.Path, paths: list[pathlib.Path], limits: Limits) -> dict[str, str]:
    files = {}
    for path in paths:
        name = path.relative_to(above).as_posix()
        if path.is_file() and not path.stat().st_size:  # `opened` would refuse an empty file
            files[name] = hashlib.sha256().hexdigest()
            continue
        with opened(path, limits) as (file, _):
            files[name] = sha256(file)
    return files


def differences(stated: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """Name -> "same", "differs", "missing" or "new", for every file in either."""
    words = {}
    for name in sorted({*stated, *found}):
        if name not in found:
            words[name] = "missing"
        elif name not in stated:
            words[name] = "new"
        else:
            words[name] = "same" if stated[name] == found[name] else "differs"
    return words
