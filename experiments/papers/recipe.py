"""How a victim is trained: one recipe for each paper and size."""

import dataclasses
from typing import Literal

import jax
import optax
from optax import contrib

from jaxbd.base import ArrayTree

BESIDE_MUON = 0.1
"""Highest learning rate of SGD for what Muon leaves out: BatchNorm and the linear layer."""
MUON_DECAY = 0.02
"""Share of a kernel that a Muon step takes away, times the learning rate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training of a victim; no label smoothing.

    Attributes:
      epochs: passes over the images.
      batch_size: images of a step.
      optimiser: "sgd" with momentum; "adam"; or "muon" (Jordan 2024): momentum whose matrices are
        made orthogonal, for the convolutions, and SGD for all else; it needs fewer passes.
      learning_rate: the highest; of "muon" that of the convolutions.
      schedule: "one-cycle": up over `warm_up` of the steps, then by a cosine to zero; "steps": x0.1
        after 60 and 80 % of the steps; "constant".
      warm_up: share of the steps.
      nesterov, momentum: of SGD and Muon.
      weight_decay: added to the gradient of SGD and Adam.
      crop_padding, flip: augmentation, after the trigger is on.
    """

    epochs: float
    batch_size: int = 128
    optimiser: Literal["sgd", "adam", "muon"] = "sgd"
    learning_rate: float = 0.1
    schedule: Literal["one-cycle", "steps", "constant"] = "one-cycle"
    warm_up: float = 0.2
    nesterov: bool = True
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_padding: int = 4
    flip: bool = True

    def count_steps(self, images: int) -> int:
        """Steps of the whole training on so many images."""
        return max(1, round(self.epochs * images / self.batch_size))

    def rule(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a training of so many steps."""
        decay = optax.add_decayed_weights(self.weight_decay)
        if self.optimiser == "adam":
            return optax.chain(decay, optax.adam(self._rate(steps, self.learning_rate)))
        if self.optimiser == "sgd":
            return optax.chain(decay, self._sgd(steps, self.learning_rate))
        muon = contrib.muon(
            self._rate(steps, self.learning_rate),
            ns_steps=3,
            beta=self.momentum,
            nesterov=self.nesterov,
            weight_decay=MUON_DECAY,
            # a kernel [side, side, inputs, outputs] as the matrix that it is
            muon_weight_dimension_numbers=lambda kernels: jax.tree.map(
                lambda _: contrib.MuonDimensionNumbers((0, 1, 2), 3), kernels
            ),
        )
        rest = optax.chain(decay, self._sgd(steps, BESIDE_MUON))
        return optax.multi_transform({"muon": muon, "sgd": rest}, _name_rules)

    def _sgd(self, steps: int, highest: float) -> optax.GradientTransformation:
        rate = self._rate(steps, highest)
        return optax.sgd(rate, momentum=self.momentum, nesterov=self.nesterov)

    def _rate(self, steps: int, highest: float) -> optax.ScalarOrSchedule:
        if self.schedule == "constant":
            return highest
        if self.schedule == "steps":
            # Differs from paper: it falls after 50 and 75 % of the passes (Yan et al. 2023, App. A)
            drops = {int(steps * share): 0.1 for share in (0.6, 0.8)}
            return optax.piecewise_constant_schedule(highest, drops)
        warm = max(1, int(self.warm_up * steps))
        return optax.warmup_cosine_decay_schedule(0.0, highest, warm, max(steps, warm + 1))


def _name_rules(params: ArrayTree) -> ArrayTree:
    """The rule of every parameter: Muon for kernels of convolutions."""
    return jax.tree.map(lambda leaf: "muon" if leaf.ndim == 4 else "sgd", params)
