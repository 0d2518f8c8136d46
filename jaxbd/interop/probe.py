"""Candidates for a foreign model's preprocessing, measured on a person's images."""

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
"""Normalisations that are not tried: so close to another that luck on a few images would choose
between them."""
BGR_ONLY = {"caffe"}
"""Normalisations that only ever go with images in BGR order."""
NEAR = 1.0
"""Candidates whose distance of moments exceeds the least by more are measured only where no other
is convincing: a pass through the whole net costs far more than one through its first layers."""
Constants = tuple[tuple[float, ...], tuple[float, ...]]
"""Per-channel mean and standard deviation; empty for each image's own."""
Candidate = tuple[str, Constants, str]
"""Name, constants, order of the channels."""


class Row(NamedTuple):
    """One candidate.

    Attributes:
      normalisation: by name.
      channels: their order: "rgb", "bgr", or "grey".
      mean, std: constants.
      accuracy: clean accuracy.
      distance: of the first normalisation layer's moments, see `moments.Moments`; None where the
        net shows none.
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
    """The normalisations that fit the model's channels."""
    channels = model.spec.image_shape[2]
    for order in ("rgb", "bgr") if channels == 3 else ("rgb",):
        for name, constants in NORMALISATIONS.items():
            fits = len(constants[0]) in (0, 1, channels)
            if fits and name not in STATED_ONLY and (order == "bgr" or name not in BGR_ONLY):
                yield name, constants, order


class Probe:
    """A model and images on which candidates are measured.

    The net's own first operation x -> (x - m) / s stays in place and is undone in what it is fed,
    so that one compiled program serves all candidates.
    """

    def __init__(self, model: Model, data: Batch):
        if not model.spec.mean:  # standardising each image cannot be undone
            spec = dataclasses.replace(model.spec, mean=(0.0,), std=(1.0,))
            model = model._replace(spec=spec, net=load.net_of(model, spec))
        self._model, self._labels = model, data.labels
        self._images = np.asarray(data.images, np.float32) / 255
        self._layer = None
        if model.guard is None:
            self._layer = moments.first_layer(model.net, model.variables, self._images[:1])

    def sort(self, candidates: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """Candidates in two parts: those whose moments are nearly the best, and the others. All are
        in the first where the net shows no moments."""
        moved = [self.moments(constants, order) for _, constants, order in candidates]
        distances = [found.distance for found in moved if found is not None]
        if len(distances) < len(candidates):
            return candidates, []
        limit = min(distances) + NEAR
        pairs = list(zip(candidates, distances, strict=True))
        return [c for c, far in pairs if far <= limit], [c for c, far in pairs if far > limit]

    def measure(self, name: str, constants: Constants, order: str) -> Row:
        """Clean accuracy and distance of moments under one candidate."""
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
        """Those of the first normalisation layer under one candidate, None without such a layer."""
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
        return wanted * own_std + own_mean


def _numbers(values) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
