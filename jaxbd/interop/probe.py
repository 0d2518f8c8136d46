"""Measures candidates for a foreign model's preprocessing on the user's images."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxbd.base import Batch, UserError
from jaxbd.interop import load, moments
from jaxbd.interop.load import Model
from jaxbd.metrics import evaluate
from jaxbd.models.norm import NORMALISATIONS

STATED_ONLY = {"svhn", "mini-imagenet", "vggface2"}
"""Normalisations that are not tried: each is so close to another one that the choice would depend
on chance."""
BGR_ONLY = {"caffe"}
"""Normalisations used only with images in BGR order."""
NEAR = 1.0
"""Candidates whose distance of moments exceeds the smallest one by more than this are measured only
if no nearer candidate convinces: a pass through the whole net costs far more than one through its
first layers."""
Constants = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel; empty to standardise each image by its own."""
Candidate = tuple[str, Constants, str]
"""(name, constants, channel order)."""


class Row(NamedTuple):
    """One measured candidate.

    Attributes:
      normalisation: its name.
      channels: channel order: "rgb", "bgr", or "grey".
      mean, std: its constants.
      accuracy: clean accuracy.
      distance: distance of the first normalisation layer's moments, see `moments.Moments`; None if
        the net has no such layer.
      size: height and width of the images.
    """

    normalisation: str
    channels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    accuracy: float
    distance: float | None = None
    size: tuple[int, int] | None = None


def candidates(model: Model) -> Iterator[Candidate]:
    """The candidates whose constants fit the model's number of channels."""
    channels = model.spec.image_shape[2]
    for order in ("rgb", "bgr") if channels == 3 else ("rgb",):
        for name, constants in NORMALISATIONS.items():
            fits = len(constants[0]) in (0, 1, channels)
            if fits and name not in STATED_ONLY and (order == "bgr" or name not in BGR_ONLY):
                yield name, constants, order


class Probe:
    """Measures candidates on one model and one set of images.

    The net keeps its own first operation x -> (x - m) / s, and the inputs are changed to undo it,
    so that all candidates share one compiled program.
    """

    def __init__(self, model: Model, data: Batch):
        if not model.spec.mean:  # per-image standardisation cannot be undone
            spec = dataclasses.replace(model.spec, mean=(0.0,), std=(1.0,))
            model = model._replace(spec=spec, net=load.net_of(model, spec))
        self._model, self._labels = model, data.labels
        self._images = np.asarray(data.images, np.float32) / 255
        self._layer = None
        if model.guard is None:
            self._layer = moments.first_layer(model.net, model.variables, self._images[:1])

    def sort(self, candidates: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """Splits candidates into those whose moments are near the best (see `NEAR`) and the rest.
        If the net has no stored moments, all are in the first part."""
        moved = [self.moments(constants, order) for _, constants, order in candidates]
        distances = [found.distance for found in moved if found is not None]
        if len(distances) < len(candidates):
            return candidates, []
        limit = min(distances) + NEAR
        pairs = list(zip(candidates, distances, strict=True))
        return [c for c, far in pairs if far <= limit], [c for c, far in pairs if far > limit]

    def measure(self, name: str, constants: Constants, order: str) -> Row:
        """Measures clean accuracy and distance of moments under one candidate."""
        inputs, model = self._inputs(constants, order), self._model
        logits = evaluate.logits(
            model.net, model.variables, Batch(inputs, self._labels), batch_size=128
        )
        if not np.isfinite(logits).all():
            raise UserError(
                f"model {model.path} answers with NaN or infinite logits; get an intact file"
            )
        found = self.moments(constants, order)
        return Row(
            name,
            "grey" if inputs.shape[-1] == 1 else order,
            _numbers(constants[0]),
            _numbers(constants[1]),
            float((logits.argmax(-1) == self._labels).mean()),
            None if found is None else found.distance,
            (inputs.shape[1], inputs.shape[2]),
        )

    def moments(self, constants: Constants, order: str) -> moments.Moments | None:
        """Moments of the first normalisation layer's inputs under one candidate; None if there is
        no such layer."""
        if self._layer is None:
            return None
        inputs = self._inputs(constants, order)
        return moments.measure(self._model.net, self._model.variables, self._layer, inputs)

    def _inputs(self, constants: Constants, order: str) -> np.ndarray:
        images = self._images[..., ::-1] if order == "bgr" else self._images
        if not constants[0]:
            axes = (1, 2, 3)
            centred = images - images.mean(axes, keepdims=True)
            spread = np.sqrt(np.square(centred).mean(axes, keepdims=True))
            wanted = centred / np.maximum(spread, 1 / math.sqrt(images[0].size))
        else:
            mean, std = (np.asarray(values, np.float32) for values in constants)
            wanted = (images - mean) / std
        own_mean, own_std = (
            np.asarray(v, np.float32) for v in (self._model.spec.mean, self._model.spec.std)
        )
        # the net's own normalisation maps this back to `wanted`
        return wanted * own_std + own_mean


def _numbers(values) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
