"""Recovered triggers on disk, one .npz each: saves what a search found and loads it as `Evidence`
for repairs.

A trigger with fixed pixels is written like `interop.trigger` does (`pattern`, `mask`, `place` or
`random_place`, `target`, `application`), so `jaxbd evaluate --trigger` and others can use the file
directly; `kind` and `sources` are added. A distribution of triggers is stored as its generators:
`generator/…` (the arrays of its L models, stacked), `weights`, `places`, `place_logits`, and the
`settings` needed to rebuild it, as JSON; `samples` serve readers that do not rebuild it.
docs/case-file.md has the table.

Nothing in a file is executed, and sizes are checked before anything is unpacked.
"""

import functools
import json
import pathlib
from typing import Any, Literal, NamedTuple, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import files
from jaxbd.attacks import given
from jaxbd.base import Array, Evidence, Net, Suspect, UserError
from jaxbd.caching import cached
from jaxbd.data import npz_archive
from jaxbd.interop import trigger
from jaxbd.inversion import mesa
from jaxbd.limits import Refusal, parse_json
from jaxbd.repairs import mixture

Kind = Literal["mask", "patch", "additive", "distribution"]
KINDS: tuple[Kind, ...] = ("mask", "patch", "additive", "distribution")
SAMPLES = 64
"""Number of sample triggers stored in a distribution's file."""
MOST_BYTES, MOST_MODELS, MOST_WIDTH = 256 << 20, 64, 4096
"""Upper limits: total bytes of a file's arrays; models of one distribution; width of a generator,
its noise and its patches."""
SETTINGS = ("patch", "noise_dim", "noise", "generator", "hidden", "place")
"""Settings of MESA on which drawing and stamping depend."""


class Models(NamedTuple):
    """L trigger generators: the part of MESA's states that stamping needs.

    Attributes:
      generator: variables of G, each [L, …].
      place: [L, 2] int32, row and column of triggers at a fixed place.
      place_logits: [L, P], for triggers whose place was searched.
    """

    generator: Any
    place: Array
    place_logits: Array


class Saved(NamedTuple):
    """A recovered trigger, as stored in a file.

    Attributes:
      kind: "mask": pixels blended over the image; "patch": a square at random places; "additive":
        pixels added to the image; "distribution": modelled by generators.
      target: class that triggered images are sent to.
      sources: classes that the trigger works on; empty for all others.
      pixels: a fixed trigger's pixels; None for a distribution.
      models, settings: a distribution's generators and MESA settings; None for a fixed trigger.
    """

    kind: Kind
    target: int
    sources: tuple[int, ...] = ()
    pixels: given.Loaded | None = None
    models: mixture.Mixture | None = None
    settings: mesa.Config | None = None

    def size(self) -> float | None:
        """L1 norm of a mask, L2 norm of an additive pattern, or a distribution's patch side in
        pixels."""
        if self.settings is not None:
            return float(self.settings.patch)
        assert self.pixels is not None and self.pixels.pattern is not None
        if self.kind == "additive":
            return float(np.linalg.norm(self.pixels.pattern))
        return None if self.pixels.mask is None else float(self.pixels.mask.sum())


def shrink(found: mixture.Mixture) -> mixture.Mixture:
    """Reduces a mixture of MESA states [L, …] to the parts that a file stores."""
    states = found.models
    return found._replace(models=Models(states.generator, states.place, states.place_logits))


def draw(saved: Saved, image_shape: tuple[int, int, int], count: int = SAMPLES) -> np.ndarray:
    """Draws triggers [count, h, w, C] from a distribution; each model's share is its weight."""
    assert saved.models is not None and saved.settings is not None
    inversion = _make(_NO_NET, image_shape, saved.settings)
    weights = np.asarray(saved.models.weights, float)
    # stratified by weight: sample i goes to the model at quantile (i + 0.5) / count
    numbers = np.searchsorted(np.cumsum(weights) / weights.sum(), (np.arange(count) + 0.5) / count)
    drawn = []
    for number in np.unique(numbers):
        one = jax.tree.map(lambda leaf, n=number: jnp.asarray(leaf[n]), saved.models.models)
        # fixed keys, so that the same trigger gives the same file
        key = jax.random.key(int(number))
        drawn.append(np.asarray(inversion.sample(key, one, int((numbers == number).sum()))))
    return np.concatenate(drawn)


def save(path: pathlib.Path, saved: Saved, image_shape: tuple[int, int, int]) -> None:
    """Writes one trigger. Raises: UserError when the file cannot be written."""
    more: dict[str, Any] = {"kind": saved.kind, "sources": np.asarray(saved.sources, np.int32)}
    if saved.pixels is not None:
        arrays = trigger.to_arrays(saved.pixels._replace(target=saved.target)) | more
    else:
        assert saved.models is not None and saved.settings is not None
        settings = {name: getattr(saved.settings, name) for name in SETTINGS}
        models = saved.models.models
        generator = flax.traverse_util.flatten_dict(models.generator, sep="/")
        arrays = {f"generator/{name}": leaf for name, leaf in generator.items()} | more
        arrays |= {
            "target": saved.target,
            "weights": saved.models.weights,
            "places": models.place,
            "place_logits": models.place_logits,
            "settings": json.dumps(settings),
            "samples": draw(saved, image_shape),
        }
    try:
        with files.replacing(path) as sibling, sibling.open("wb") as file:
            plain = {name: np.asarray(value) for name, value in arrays.items()}
            np.savez(file, allow_pickle=False, **plain)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose a writable folder with space"
        ) from None


def load(path: pathlib.Path, suspect: Suspect) -> Saved:
    """Reads a trigger for the net of `suspect`.

    Raises: UserError naming the file when it is damaged, too large, or does not fit the net.
    """
    with npz_archive.Archive(path, "trigger", trigger.MOST_BYTES) as archive:
        if sum(header.size for header in archive.headers.values()) > MOST_BYTES:
            raise UserError(f"trigger {path}: its arrays claim more than {MOST_BYTES >> 20} MiB")
        read = lambda name: archive.read(name) if name in archive.headers else None
        kind, sources, target = read("kind"), read("sources"), read("target")
        stored = {
            name: archive.read(name) for name in archive.headers if name.startswith("generator/")
        }
        names = ("weights", "places", "place_logits", "settings")
        stored |= {name: value for name in names if (value := read(name)) is not None}
    word = cast(Kind, _text(kind, path, "kind", 20))
    if word not in KINDS:
        raise UserError(f"trigger {path}: kind is {word!r}; known: {', '.join(KINDS)}")
    aims = _classes(target, path, "target", suspect.classes)
    if len(aims) != 1:
        raise UserError(f"trigger {path}: target must be one class")
    found = Saved(word, aims[0], _classes(sources, path, "sources", suspect.classes))
    if aims[0] in found.sources:
        raise UserError(f"trigger {path}: class {aims[0]} is its target and one of its sources")
    if word == "distribution":
        models, settings = _read_models(path, stored, suspect)
        return found._replace(models=models, settings=settings)
    return found._replace(pixels=trigger.load(str(path)))


def to_evidence(saved: Saved, suspect: Suspect) -> Evidence:
    """The `Evidence` that repairs take, from a saved trigger.

    Raises: UserError when the pixels do not fit the suspect's images.
    """
    if saved.models is not None:
        assert saved.settings is not None
        stamp = mixture.mix(_make(suspect.net, suspect.image_shape, saved.settings).stamp)
        return Evidence(saved.target, saved.sources, stamp, saved.models)
    assert saved.pixels is not None
    pixels = saved.pixels
    place = pixels.place or (0, 0)
    row, column = (0, 0) if place == "random" else place
    config = given.Config(
        apply=pixels.apply or "overwrite",
        place="random" if place == "random" else "fixed",
        row=row,
        column=column,
    )
    attack, params = given.make(suspect.image_shape, suspect.classes, config, pixels)
    shape = None if pixels.pattern is None else pixels.pattern.shape
    stamp = _share(suspect.image_shape, suspect.classes, config, shape) or attack.stamp
    return Evidence(saved.target, saved.sources, mixture.mix(stamp), mixture.single(params))


_make = cached(32)(mesa.make)
_NO_NET = Net(lambda *_: {}, cast(Any, None))
"""Placeholder: drawing triggers never calls the net."""


@cached(32)
def _share(
    image_shape: tuple[int, int, int], classes: int, config: given.Config, shape: Any
) -> Any:
    """One stamp function for all triggers of `shape` [h, w, C], so that they share one compiled
    program."""
    if shape is None:
        return None
    blank = given.Loaded(np.zeros(shape, np.float32), np.zeros((*shape[:2], 1), np.float32))
    return given.make(image_shape, classes, config, blank)[0].stamp


def _read_models(
    path: pathlib.Path, stored: dict[str, np.ndarray], suspect: Suspect
) -> tuple[mixture.Mixture, mesa.Config]:
    """The generators and their settings; every array is checked against the shape that the settings
    imply."""
    settings = _read_settings(path, stored, suspect.image_shape)
    weights = stored.get("weights", np.zeros(0))
    if weights.ndim != 1 or not 1 <= len(weights) <= MOST_MODELS or weights.dtype.kind != "f":
        raise UserError(f"trigger {path}: weights must be 1 to {MOST_MODELS} numbers")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise UserError(f"trigger {path}: weights must be at least 0 and finite, not all 0")
    inversion = _make(suspect.net, suspect.image_shape, settings)
    # expected shapes from an abstract trace: nothing is computed
    state = jax.eval_shape(inversion.init, jax.random.key(0))
    wanted: dict[str, Any] = flax.traverse_util.flatten_dict(state.generator, sep="/")
    shapes = {f"generator/{name}": leaf.shape for name, leaf in wanted.items()}
    shapes |= {"places": state.place.shape, "place_logits": state.place_logits.shape}
    names = {*stored} - {"weights", "settings"}
    if names != set(shapes):
        other = sorted(names ^ set(shapes))[0]
        raise UserError(f"trigger {path}: array {other[:60]!r} is missing or unexpected")
    for name, shape in shapes.items():
        value, kind = stored[name], "i" if name == "places" else "f"
        if value.shape != (len(weights), *shape) or value.dtype.kind != kind:
            given_as = f"{value.dtype} {list(value.shape)}"
            raise UserError(
                f"trigger {path}: array {name[:60]!r} is {given_as}, but its settings need"
                f" {[len(weights), *shape]}"
            )
        if not np.isfinite(value).all():
            raise UserError(f"trigger {path}: array {name[:60]!r} is not finite")
    flat = {name: jnp.asarray(stored[f"generator/{name}"], jnp.float32) for name in wanted}
    models = Models(
        flax.traverse_util.unflatten_dict(flat, sep="/"),
        jnp.asarray(stored["places"], jnp.int32),
        jnp.asarray(stored["place_logits"], jnp.float32),
    )
    return mixture.Mixture(models, jnp.asarray(weights / weights.sum(), jnp.float32)), settings


def _read_settings(
    path: pathlib.Path, stored: dict[str, np.ndarray], image_shape: tuple[int, int, int]
) -> mesa.Config:
    """The settings, checked so that building the generator from them has a bounded cost."""
    text = _text(stored.get("settings"), path, "settings", 2000)
    try:
        content = parse_json(text.encode(errors="replace"), "settings")
    except Refusal as error:
        raise UserError(f"trigger {path}: {error}") from None
    if not isinstance(content, dict) or set(content) != set(SETTINGS):
        raise UserError(f"trigger {path}: settings must be {', '.join(SETTINGS)}")
    for name in ("patch", "noise_dim", "hidden"):
        if type(content[name]) is not int or not 1 <= content[name] <= MOST_WIDTH:
            raise UserError(f"trigger {path}: {name} must be 1 to {MOST_WIDTH}")
    if any(type(content[name]) is not str for name in ("noise", "generator", "place")):
        raise UserError(f"trigger {path}: noise, generator and place must be words")
    try:
        settings = mesa.Config(**content)
        # a trial build raises UserError for settings that MESA refuses
        _make(_NO_NET, image_shape, settings)
    except UserError as error:
        raise UserError(f"trigger {path}: {error}") from None
    return settings


def _text(value: np.ndarray | None, path: pathlib.Path, name: str, most: int) -> str:
    """A short string stored as an array."""
    if value is None or value.dtype.kind != "U" or value.size != 1 or value.itemsize > 4 * most:
        raise UserError(f"trigger {path}: {name} is missing or not text; jaxbd did not write it")
    return str(value.reshape(-1)[0])


def _classes(
    value: np.ndarray | None, path: pathlib.Path, name: str, classes: int
) -> tuple[int, ...]:
    """Class numbers stored in `value`, each within the suspect's `classes`."""
    value = np.zeros(0, np.int32) if value is None else value.reshape(-1)
    if value.dtype.kind not in "iu" or len(value) > classes:
        raise UserError(f"trigger {path}: {name} must be class numbers")
    numbers = tuple(int(number) for number in value)
    if any(not 0 <= number < classes for number in numbers):
        raise UserError(f"trigger {path}: {name} is outside the model's classes 0..{classes - 1}")
    return numbers


def settings_of(stamp: Any) -> mesa.Config:
    """The MESA settings that a stamp was made with."""
    # MESA's stamp is a partial whose first argument carries the config
    parts = cast(functools.partial, stamp).args[0]
    return parts.config
