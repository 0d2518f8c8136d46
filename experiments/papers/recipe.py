"""How a victim is trained: one recipe for each paper and size."""

import dataclasses
from typing import Literal

import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training of a victim; no label smoothing.

    Attributes:
      epochs: passes over the images.
      batch_size: images of a step.
      optimiser: "sgd" with momentum, or "adam".
      learning_rate: the highest.
      schedule: "one-cycle": up over `warm_up` of the steps, then by a cosine to zero; "steps": x0.1
        after 60 and 80 % of the steps; "constant".
      warm_up: share of the steps.
      nesterov, momentum: of SGD.
      weight_decay: added to the gradient.
      crop_padding, flip: augmentation, after the trigger is on.
    """

    epochs: float
    batch_size: int = 128
    optimiser: Literal["sgd", "adam"] = "sgd"
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
        rate = self._rate(steps)
        descend = (
            optax.adam(rate)
            if self.optimiser == "adam"
            else optax.sgd(rate, momentum=self.momentum, nesterov=self.nesterov)
        )
        return optax.chain(optax.add_decayed_weights(self.weight_decay), descend)

    def _rate(self, steps: int) -> optax.ScalarOrSchedule:
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "steps":
            drops = {int(steps * share): 0.1 for share in (0.6, 0.8)}
            return optax.piecewise_constant_schedule(self.learning_rate, drops)
        warm = max(1, int(self.warm_up * steps))
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warm, max(steps, warm + 1)
        )
