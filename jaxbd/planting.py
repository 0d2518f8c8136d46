"""Attacks that start from a clean net: clean-label poisoning and Trojaning. Composition, as `workflow`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import evaluate, loop, stages, supervised
from jaxbd.attacks import clean_label, later_layers, poison, trojan
from jaxbd.attacks.patch import Trigger
from jaxbd.base import Attack, Batch, Key, Net, UserError, Variables
from jaxbd.data import draw
from jaxbd.images import to_float
from jaxbd.remembered import remembered
from jaxbd.workflow import Progress

make_harder, make_search = (remembered(32)(factory) for factory in (clean_label.harder, trojan.search))
"""The factories, remembering what they made, so that nothing is traced twice for the same net and settings."""


TUNING = (
    "target", "all_to_all", "retrain_steps", "retrain_learning_rate", "retrain_momentum", "retrain_weight_decay",
    "poison_rate",
)  # fmt: skip
"""Fields of `trojan.Config` that the search does not look at."""


class Hidden(NamedTuple):
    """Data poisoned with a clean-label attack.

    Attributes:
      data: all of it, images uint8, labels as they were.
      rows: [n] which of it is poisoned.
      recognised: share of the poisoned images that the clean net still takes for their class before the patch is on.
    """

    data: Batch
    rows: np.ndarray
    recognised: float


class Trojaned(NamedTuple):
    """A net with a Trojan: its variables, the trigger, neurons [n] tied to it, infos of both stages, seconds."""

    variables: Variables
    trigger: Trigger
    neurons: np.ndarray
    search: trojan.Info
    retraining: supervised.Info
    seconds: loop.Seconds


def hide(
    key: Key,
    net: Net,
    variables: Variables,
    attack: Attack,
    trigger: clean_label.Trigger,
    data: Batch,
    config: clean_label.Config,
    count: int | float | None = None,
    *,
    batch_size: int = 100,
    progress: Progress | None = None,
    label: str = "perturb",
    keep: stages.Keep = stages.through,
) -> Hidden:
    """Poisons `count` images of the target class without changing a label (Turner et al. 2019, section 4).

    They are made hard to recognise for the clean net with weights `variables`, then stamped with `attack`'s trigger.

    Args:
      count: images, or below 1 a share of the target class; `config.poison_rate` of it by default.
      keep: what may save what is done and go on from there; its steps are batches.
    Raises: UserError when the target class has fewer images.
    """
    choose_key, climb_key, stamp_key = jax.random.split(key, 3)
    labels = np.asarray(data.labels)
    order = np.asarray(jax.random.permutation(choose_key, len(labels)))
    candidates = order[labels[order] == config.target]
    share = round(config.poison_rate * len(candidates))
    rows = candidates[: share if count is None else poison.number_of(count, len(candidates))]
    if not len(rows):
        raise UserError(f"clean-label: no image of class {config.target} to poison; choose a class of the data")
    chosen = Batch(np.asarray(to_float(jnp.asarray(np.asarray(data.images)[rows]))), labels[rows])
    report = progress or (lambda *_: None)
    perturbed = _climb(climb_key, make_harder(net, config), variables, chosen, batch_size, report, label, keep)
    seen = evaluate.logits(net, variables, Batch(perturbed, chosen.labels)).argmax(-1)
    images = poison.to_uint8(np.array(data.images))
    images[rows] = poison.stamped(attack.stamp, stamp_key, trigger, poison.to_uint8(perturbed))
    return Hidden(Batch(images, labels), rows, float((seen == config.target).mean()))


def _climb(key, harder, variables, chosen: Batch, batch_size, report, label, keep) -> np.ndarray:
    """The images of `chosen` made hard to recognise, batch by batch."""
    batch_size = min(batch_size, len(chosen.labels))
    total = -(-len(chosen.labels) // batch_size)
    report(label, 0, total)

    def fit(images, left, on_chunk):
        images = np.array(images)
        for number in range(total - left, total):
            part = evaluate.per_image(key, harder, variables, chosen, batch_size=batch_size, numbers=(number,))
            images[number * batch_size :][: len(part)] = part
            on_chunk(number + 1 - total + left, images, stages.NoInfo())
        return images, None, loop.Seconds(0.0, 0.0)

    images, *_ = stages.run(keep, report, label, np.asarray(chosen.images), fit, info=stages.NoInfo, num_steps=total)
    return images


def trojan_net(
    key: Key,
    net: Net,
    variables: Variables,
    data: Batch,
    classes: int,
    config: trojan.Config,
    *,
    count: int | float | None = None,
    batch_size: int = 64,
    crop_padding: int = 0,
    flip: bool = False,
    progress: Progress | None = None,
    label: str = "trojan",
    keep: stages.Keep = stages.through,
) -> Trojaned:
    """Turns a clean net with weights `variables` into a Trojaned one (Liu et al. 2018): trigger first, then the net.

    Args:
      data: images to search the trigger and to fine-tune on.
      count: images to stamp once and for all, see `poison.static`; by default other ones in every batch.
      keep: what may save search and fine-tuning and go on from there.
    Raises: UserError when the layer, its neurons, or the trigger's place do not fit the net.
    """
    image_shape = tuple(data.images.shape[1:])
    search_key, tune_key, poison_key = jax.random.split(key, 3)
    trigger, neurons, seen, searched = _searched(
        search_key, net, variables, data, classes, config, batch_size, progress, f"{label}: trigger", keep
    )
    attack, name = trojan.make(image_shape, classes, config), trojan.layer(net, variables, image_shape, config)
    which = later_layers.later(net, variables, image_shape, name)
    # in evaluation throughout: with moments of the batch, the layers that stay would change what they do
    trainer = supervised.trainer(net, later_layers.only(which, trojan.optimiser(config)), train=False)
    drawn: Any = draw.uniform(batch_size, crop_padding=crop_padding, flip=flip)
    source: Any = data
    if count is None:
        drawn, source = poison.dynamic(attack, drawn), (data, trigger)
    else:
        source = Batch(*map(jnp.asarray, poison.static(poison_key, attack, trigger, data, count)))
    report, tuning = progress or (lambda *_: None), f"{label}: fine-tune"
    report(tuning, 0, config.retrain_steps)
    fit = lambda state, left, on_chunk: loop.fit(
        tune_key, trainer.step, drawn, source, state, num_steps=left, on_chunk=on_chunk
    )
    state, infos, tuned = stages.run(
        keep, report, tuning, trainer.init(variables), fit, info=supervised.Info, num_steps=config.retrain_steps
    )
    return Trojaned(state.variables, trigger, neurons, seen, infos, loop.total(searched, tuned))


def _searched(key, net, variables, data, classes, config, batch_size, progress, label, keep):
    """Trigger, neurons, infos and seconds of the search."""
    image_shape = tuple(data.images.shape[1:])
    # what only the fine-tuning looks at does not make another search
    plain = {name: getattr(trojan.Config(), name) for name in TUNING}
    search = make_search(net, image_shape, classes, dataclasses.replace(config, **plain))
    report = progress or (lambda *_: None)
    report(label, 0, config.search_steps)
    drawn = draw.uniform(batch_size)
    fit = lambda state, left, on_chunk: loop.fit(
        jax.random.fold_in(key, 1), search.step, drawn, data, state, variables, num_steps=left, on_chunk=on_chunk
    )
    state, infos, seconds = stages.run(
        keep, report, label, search.init(jax.random.fold_in(key, 0), variables), fit,
        info=trojan.Info, num_steps=config.search_steps,
    )  # fmt: skip
    return search.extract(state), np.asarray(state.neurons), infos, seconds
