"""Correction of activation distributions for one trigger, and what it did to them. Composition, as `workflow`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import evaluate, histogram, loop, losses, pairs, stages
from jaxbd.base import Array, Batch, Key, Net, UserError, Variables
from jaxbd.data import draw
from jaxbd.images import to_float
from jaxbd.remembered import remembered
from jaxbd.repair import activations as measured
from jaxbd.repair import bna
from jaxbd.workflow import Progress, Repaired

make_bna = remembered(32)(bna.make)
"""Remembers what it made, so that nothing is traced twice for another victim of the same shape."""

Stamp = Callable[[Key, Any, Array], Array]


LEFT, HALVINGS = 0.03, 2
"""Share of triggered images that a correction may leave with the target, and how often it is tried anew for them."""


def trigger(
    key: Key,
    net: Net,
    variables: Variables,
    stamp: Stamp,
    model: Any,
    data: Batch,
    config: bna.Config,
    *,
    kept: Batch | None = None,
    false_alarms: float = 0.15,
    batch_size: int = 64,
    progress: Progress | None = None,
    label: str = "bna",
    keep: stages.Keep = stages.through,
) -> Repaired:
    """Corrects the net for one trigger, see `repair.bna`: `variables` with changed moments and with `bounds`.

    How much the target class has to give way differs between nets. Where more than `LEFT` of the triggered images keep
    their target, the correction is made anew with half the weight on what keeps the class, up to `HALVINGS` times and
    as long as that takes no more than `false_alarms` of the images in `kept` from it.

    Args:
      stamp, model: `stamp(key, model, images)` puts the trigger on images.
      data: clean images of the source classes (uint8 or float); batches are drawn from them.
      kept: clean images of the target class, whose activations are to stay; see `bna.Config.keep`.
      false_alarms: share of the images that the net gives to the target and its correction does not; 0 to 1. The 15 %
        are what the paper grants STRIP.
    Returns: the last correction that holds to it, or the first, with the seconds of all.
    Raises: UserError when there are fewer images than a batch, or the net shows no layer to correct.
    """
    if len(data.labels) < batch_size:
        raise UserError(f"{len(data.labels)} images to correct with, fewer than a batch of {batch_size}; bring more")
    data = Batch(jnp.asarray(data.images), jnp.asarray(data.labels))
    kept = kept if kept is not None and len(kept.labels) and config.keep else None
    layers = bna.trained_layers(net, variables, to_float(data.images[:1]), config)
    config = bna.lengthened(config, len(layers), -(-len(data.labels) // batch_size))
    # one compiled step for all weights: the state brings them
    method = make_bna(net, stamp, dataclasses.replace(config, keep=float(kept is not None)))
    weight, spent, report = config.keep, [], progress or (lambda *_: None)
    fit = lambda state, left, on_chunk: loop.fit(
        jax.random.fold_in(key, 1), method.step, draw.uniform(batch_size), data, state, num_steps=left,
        on_chunk=on_chunk,
    )  # fmt: skip
    for attempt in range(1 + (HALVINGS if kept is not None else 0)):
        part = f"{label}, keep {weight:g}" if attempt else label
        report(part, 0, config.num_steps)
        state = _starter(method.init)(jax.random.fold_in(key, 0), variables, bna.Evidence(model, data, kept))
        state = state._replace(keep=jnp.float32(weight))
        state, infos, seconds = stages.run(keep, report, part, state, fit, info=bna.Info, num_steps=config.num_steps)
        spent.append(seconds)
        corrected = method.extract(state)
        if attempt and _lost(net, variables, corrected, kept) > false_alarms:
            break
        best = Repaired(corrected, infos, seconds)
        if kept is None or _left(net, variables, corrected, stamp, model, data, int(kept.labels[0])) <= LEFT:
            break
        weight /= 2
    return best._replace(seconds=loop.total(*spent))


def _left(net: Net, variables: Variables, corrected: Variables, stamp, model, data: Batch, target: int) -> float:
    """Share of the images, but those that the net as it came gives to the target anyway, that are sent there."""
    key, tell = jax.random.key(0), _labeller(net)
    asked = evaluate.per_image(key, tell, variables, data) != target
    sent = evaluate.per_image(key, tell, corrected, data, stamp, model) == target
    return float(sent[asked].mean()) if asked.any() else 0.0


def _lost(net: Net, variables: Variables, corrected: Variables, kept: Batch) -> float:
    """Share of the images, all of one class, that the net as it came gives to that class and the corrected does not."""
    if not len(kept.labels):
        return 0.0
    key, tell, label = jax.random.key(0), _labeller(net), int(kept.labels[0])
    asked = evaluate.per_image(key, tell, variables, kept) == label
    lost = evaluate.per_image(key, tell, corrected, kept) != label
    return float(lost[asked].mean()) if asked.any() else 0.0


@remembered(32)
def _labeller(net: Net) -> Callable[[Key, Variables, Array], Array]:
    """(key, variables, images) -> classes [B]; the same function for the same net."""
    return lambda _, variables, images: net.apply(variables, images, train=False)[0].argmax(-1)


class Suspect(NamedTuple):
    """The net under correction: its architecture, weights, image shape (H, W, C), number of classes."""

    net: Net
    variables: Variables
    image_shape: tuple[int, int, int]
    classes: int


def detected(
    key: Key,
    suspect: Suspect,
    found: pairs.PairScan,
    target: int,
    data: Batch,
    config: bna.Config,
    scan: pairs.Config,
    *,
    rounds: int = 2,
    false_alarms: float = 0.15,
    batch_size: int = 64,
    progress: Progress | None = None,
    label: str = "bna",
    keep: stages.Keep = stages.through,
) -> Repaired:
    """Corrects the net for a detected target, then for what still leads there, up to `rounds` times.

    The estimated trigger is not the attacker's, and a correction for the one may let the other through. So a trigger is
    estimated for the corrected net too, and the net as it came is corrected anew for all triggers so far. Without a
    shortcut left, such a trigger is what the class looks like, and a correction for it hits clean images of the class:
    a round that takes more than `false_alarms` of them for another class is undone, and is the last.

    # Differs from paper: it corrects once, for the one trigger it estimates

    Args:
      found: what `pairs.scan` found with the settings `scan`.
      data: clean images of all classes; see `trigger`. Those of the target tell whether a round is kept.
      false_alarms: share of the images that the net gives to the target and its correction does not; 0 to 1.
      keep: what may save every round's corrections and search, each a stage of its own, and go on from there.
    Returns: the last correction that is kept, with the seconds of all. Raises: UserError as `trigger` does.
    """
    first = found.triggers[target]
    triggers, spent = pairs.estimates(found, target), []
    clean, kept = of_classes(data, first.sources), of_classes(data, (target,))
    for number in range(rounds + 1):
        part = f"{label}, round {number + 1} of {rounds + 1}" if rounds else label
        repaired = trigger(
            jax.random.fold_in(key, number), suspect.net, suspect.variables, *pairs.together(triggers), clean, config,
            kept=kept, false_alarms=false_alarms, batch_size=batch_size, progress=progress, label=part, keep=keep,
        )  # fmt: skip
        spent.append(repaired.seconds)
        if number and _lost(suspect.net, suspect.variables, repaired.variables, kept) > false_alarms:
            break
        best = repaired
        if number < rounds:
            left, seconds = pairs.again(
                jax.random.fold_in(key, 100 + number), suspect.net, repaired.variables, suspect.classes,
                suspect.image_shape, data, first, target, scan, progress, keep, f"{part}: what is left",
            )  # fmt: skip
            triggers.append(left)
            spent.append(seconds)
    return best._replace(seconds=loop.total(*spent))


@remembered(32)
def _starter(init: Callable[..., Any]) -> loop.Program:
    return loop.Program(init)


def of_classes(data: Batch, classes: Sequence[int]) -> Batch:
    """The images of some classes: those of a trigger's sources, or of its target."""
    rows = np.flatnonzero(np.isin(np.asarray(data.labels), list(classes)))
    return Batch(data.images[rows], data.labels[rows])


def activations(
    net: Net,
    variables: Variables,
    data: Batch,
    *,
    layer: str,
    channel: int | None = None,
    stamp: Stamp | None = None,
    model: Any = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Activations [N x positions, C] of one layer on `data`, [N x positions] of one channel of it (Fig. 1).

    Triggered where a stamp is given.

    Raises: UserError when the net shows no such layer or channel.
    """
    _check_shown(net, variables, data, layer, channel or 0)
    key, show = jax.random.key(0), _shower(net, layer)
    found = evaluate.per_image(key, show, variables, data, stamp, model, batch_size=batch_size)
    found = found.reshape(-1, found.shape[-1])
    return found if channel is None else found[:, channel]


@remembered(32)
def _shower(net: Net, layer: str) -> Callable[[Key, Variables, Array], Array]:
    """(key, variables, images) -> [B, …, C], one layer's activations; the same function for the same layer."""
    return lambda _, variables, images: net.outputs(variables, images)[1][layer]


def total_variations(clean: np.ndarray, triggered: np.ndarray, width: float, bins: int) -> np.ndarray:
    """Total variation [C] between activations [N, C] and [M, C], by intervals over the range of the clean ones."""
    grid = histogram.grid(jnp.asarray(clean.min(0)), jnp.asarray(clean.max(0)), width, bins)
    p, q = (histogram.hard(jnp.asarray(values), grid, bins) / len(values) for values in (clean, triggered))
    return np.asarray(losses.total_variation(p, q))


def layers(net: Net, variables: Variables, data: Batch) -> dict[str, int]:
    """Layers that the net shows, in order of execution, and how many channels each has; empty where it shows none."""
    found: dict[str, int] = {}
    if net.outputs is not None:
        note = lambda variables, images: found.update(
            {name: values.shape[-1] for name, values in net.outputs(variables, images)[1].items()}
        )
        jax.eval_shape(note, variables, to_float(jnp.asarray(data.images[:1])))
    return found


def _check_shown(net: Net, variables: Variables, data: Batch, layer: str, channel: int = 0) -> None:
    """Raises UserError when the net does not show `layer` or has no such channel in it."""
    shown = layers(net, variables, data)
    if layer not in shown:
        raise UserError(f"the net shows no layer {layer!r}; it shows {', '.join(shown) or 'none'}")
    if not 0 <= channel < shown[layer]:
        raise UserError(f"layer {layer} has channels 0..{shown[layer] - 1}, not {channel}")


class Divergences(NamedTuple):
    """Means over the channels of a layer, or of all layers, between 0 and the divergence's largest value."""

    tv: float
    js: float
    kl: float


def divergences(
    net: Net,
    variables: Variables,
    corrected: Variables,
    stamp: Stamp,
    model: Any,
    data: Batch,
    *,
    layer: str | None = None,
    width: float = 0.1,
    bins: int = 100,
) -> dict[str, Divergences]:
    """How far triggered activations in `corrected` are from clean ones in `variables`, the net as it came.

    Li et al. 2023, appendix D (Tables 9 and 10), with exact histograms over the range of the clean activations. Give
    `variables` twice for the net before its correction.

    Args:
      layer: the layer that counts; the last one shown, the penultimate of our nets, when not given.
    Returns: {layer: its mean, "all": the mean over the layers' means}.
    Raises: UserError when the net shows no such layer.
    """
    shown = layers(net, variables, data)
    layer = (list(shown) or ["penultimate"])[-1] if layer is None else layer
    _check_shown(net, variables, data, layer)
    images = jnp.asarray(data.images)
    found = jax.device_get(_diverger(net, stamp, width, bins)(variables, corrected, model, images))
    means = {name: Divergences(*map(float, values)) for name, values in found.items()}
    every = Divergences(*(float(value) for value in np.mean(list(means.values()), axis=0)))
    return {layer: means[layer], "all": every}


@remembered(32)
def _diverger(net: Net, stamp: Stamp, width: float, bins: int) -> loop.Program:
    """(clean variables, corrected ones, trigger, images) -> {layer: (TV, JS, KL)}."""

    def diverge(variables, corrected, model, images):
        clean = lambda _, chunk: net.outputs(variables, chunk)[1]
        stamped = lambda number, chunk: stamp(jax.random.fold_in(jax.random.key(0), number), model, chunk)
        triggered = lambda number, chunk: net.outputs(corrected, stamped(number, chunk))[1]
        ranges = measured.ranges(clean, images)
        grids = {name: histogram.grid(r.low, r.high, width, bins) for name, r in ranges.items()}
        p, q = (measured.histograms(show, images, grids, bins) for show in (clean, triggered))
        forms = (losses.total_variation, losses.jensen_shannon, losses.kullback_leibler)
        return {name: tuple(form(p[name], q[name]).mean() for form in forms) for name in p}

    return loop.Program(diverge)
