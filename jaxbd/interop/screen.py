"""Compares the forms of a net by how well their logits predict the labels of images.

Accuracy on a few hundred images hardly tells two activations apart; the likelihood of the labels
does, and so do stored moments.
"""

from collections.abc import Callable, Sequence

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Batch, UserError
from jaxbd.data import pictures
from jaxbd.images import to_float
from jaxbd.interop import moments
from jaxbd.interop.load import Model
from jaxbd.interop.probe import Constants
from jaxbd.metrics import activations
from jaxbd.models.norm import NORMALISATIONS

Read = Callable[[pictures.Shape], Batch]
"""Image shape (height and width 0: the images' own) -> images and labels; raises UserError if they
have another size, or differ in size."""
SAMPLE = 48
"""Number of images with which many forms are compared."""
TEMPERATURES = 2.0 ** np.arange(-3, 5)


def shortlist(models: Sequence[Model], read: Read, most: int) -> list[Model]:
    """The `most` likeliest models, the likeliest first. Models for another size of images than
    their own are left out if possible.

    Each is measured under a few normalisations. The nets run uncompiled: forms share most of their
    operations, so that hundreds of forms cost less than compiling a few.
    """
    channels = models[0].spec.image_shape[2]
    batches: dict[pictures.Shape, Batch | None] = {}
    own = _read(read, (0, 0, channels))
    if own is not None:
        shape = (*own.images.shape[1:3], channels)
        batches[shape] = own
        models = [model for model in models if model.spec.image_shape == shape] or models
    scores = []
    for model in models:
        shape = model.spec.image_shape
        if shape not in batches:
            batches[shape] = _read(read, shape)
        batch = batches[shape]
        scores.append(-np.inf if batch is None else _score(model, batch))
    # a stable sort, so that of equals the first stays first
    order = np.argsort(-np.asarray(scores), kind="stable")
    return [models[index] for index in order[:most]]


def _read(read: Read, shape: pictures.Shape) -> Batch | None:
    """At most `SAMPLE` images; None if there are none of this shape."""
    try:
        batch = read(shape)
    except UserError:
        return None
    images = to_float(jnp.asarray(batch.images[:SAMPLE]))
    return Batch(np.asarray(images), np.asarray(batch.labels[:SAMPLE]))


def _score(model: Model, batch: Batch) -> float:
    """Mean log-likelihood of the labels under the best of a few normalisations; -inf if the form
    does not take the images."""
    images, labels = _normalise(model, batch.images), batch.labels
    try:
        logits = np.asarray(model.net.apply(model.variables, images)[0])
    except UserError:
        return -np.inf
    parts = logits.reshape(-1, len(labels), logits.shape[-1])
    finite = [part for part in parts if np.isfinite(part).all()]
    return max((float(likelihoods(part, labels).mean()) for part in finite), default=-np.inf)


def _normalise(model: Model, images: np.ndarray) -> np.ndarray:
    """`images` [N, H, W, C] under each of a few normalisations in turn, as the net takes them."""
    own = (model.spec.mean, model.spec.std)
    if not own[0]:
        return images
    parts = []
    for constants in _constants(own, images.shape[-1]):
        mean, std, own_mean, own_std = (
            np.asarray(values, np.float32) for values in (*constants, *own)
        )
        # the net's own normalisation maps this back to (images - mean) / std
        parts.append((images - mean) / std * own_std + own_mean)
    return np.concatenate(parts)


def _constants(own: Constants, channels: int) -> list[Constants]:
    """The net's own constants, and others from which all usual ones differ little."""
    names = ("none", "half", "mnist" if channels == 1 else "imagenet", "0-255")
    return list(dict.fromkeys([own, *(NORMALISATIONS[name] for name in names)]))


def distance(model: Model, data: Batch) -> float | None:
    """How much the inputs of the second normalisation layer, which an activation or pooling before
    it changes, differ from those in training, see `moments.Moments`; None if there is no such
    layer."""
    stored = flax.traverse_util.flatten_dict(model.variables.get("batch_stats", {}), sep="/")
    if model.guard is not None or model.variables.get("bounds"):
        return None
    layers = activations.layers(model.net, model.variables, data)
    normed = [name for name in layers if f"{name}/mean" in stored]
    if len(normed) < 2:
        return None
    images = np.asarray(to_float(jnp.asarray(data.images)))
    found = moments.measure(model.net, model.variables, normed[1], images)
    return None if found is None else found.distance


def likelihoods(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N] log-likelihood of each label under logits [N, K], scaled by the one temperature that
    suits them best: over-confidence must not count against a form."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(1, keepdims=True)
    logits /= max(logits.std(), 1e-12)
    found = []
    for temperature in TEMPERATURES:
        scaled = logits * temperature
        chosen = scaled[np.arange(len(labels)), labels]
        found.append(chosen - np.log(np.exp(scaled).sum(1)))
    return max(found, key=np.mean)
