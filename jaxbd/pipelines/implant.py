"""Attacks that start from a clean net: clean-label poisoning and Trojaning."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.attacks import clean_label, later_layers, poison, trojan
from jaxbd.attacks.patch import Trigger
from jaxbd.base import Attack, Batch, Key, Suspect, UserError, Variables
from jaxbd.caching import cached
from jaxbd.data import draw
from jaxbd.images import to_float
from jaxbd.metrics import evaluate
from jaxbd.training import supervised
from jaxbd.training.loop import Chunk
from jaxbd.training.program import Seconds, total_seconds
from jaxbd.training.run import Fitted, NoInfo, Run

make_harder, make_search = (cached(32)(factory) for factory in (clean_label.harder, trojan.search))
"""Cached factories, so that the same net and settings are traced once."""

TUNING = (
    "target",
    "all_to_all",
    "retrain_steps",
    "retrain_learning_rate",
    "retrain_momentum",
    "retrain_weight_decay",
    "poison_rate",
)
"""Fields of `trojan.Config` that the trigger search does not use."""


class Hidden(NamedTuple):
    """Data poisoned with a clean-label attack.

    Attributes:
      data: all of the data; images uint8, labels unchanged.
      rows: [n] indices of the poisoned images.
      recognised: share of the poisoned images that the clean net still assigns to their class
        before the trigger is stamped.
    """

    data: Batch
    rows: np.ndarray
    recognised: float


class Trojaned(NamedTuple):
    """A net with a Trojan: its variables, the trigger, the neurons [n] it excites, infos of both
    stages, seconds."""

    variables: Variables
    trigger: Trigger
    neurons: np.ndarray
    search: trojan.Info
    retraining: supervised.Info
    seconds: Seconds


def hide(
    run: Run,
    name: str,
    key: Key,
    clean: Suspect,
    attack: tuple[Attack, clean_label.Trigger],
    data: Batch,
    config: clean_label.Config,
    *,
    count: int | float | None = None,
    batch_size: int = 100,
) -> Hidden:
    """Poisons `count` images of the target class without changing a label (Turner et al. 2019,
    section 4).

    The images are perturbed so that the clean net hardly recognises them, then stamped with the
    attack's trigger.

    Args:
      attack: (attack, trigger).
      count: number of images, or below 1 a share of the target class; default: the share
        `config.poison_rate`.
    Raises: UserError when the target class has no images.
    """
    choose_key, climb_key, stamp_key = jax.random.split(key, 3)
    labels = np.asarray(data.labels)
    order = np.asarray(jax.random.permutation(choose_key, len(labels)))
    candidates = order[labels[order] == config.target]
    share = round(config.poison_rate * len(candidates))
    rows = candidates[: share if count is None else poison.number_of(count, len(candidates))]
    if not len(rows):
        raise UserError(
            f"clean-label: no image of class {config.target} to poison; choose a class of the data"
        )
    chosen = Batch(np.asarray(to_float(jnp.asarray(np.asarray(data.images)[rows]))), labels[rows])
    perturbed = _perturb(run, name, climb_key, clean, chosen, config, batch_size)
    seen = evaluate.logits(clean.net, clean.variables, Batch(perturbed, chosen.labels)).argmax(-1)
    images = poison.to_uint8(np.array(data.images))
    images[rows] = poison.stamp_uint8(
        attack[0].stamp, stamp_key, attack[1], poison.to_uint8(perturbed)
    )
    return Hidden(Batch(images, labels), rows, float((seen == config.target).mean()))


def _perturb(
    run: Run,
    name: str,
    key: Key,
    clean: Suspect,
    chosen: Batch,
    config: clean_label.Config,
    batch_size: int,
) -> np.ndarray:
    """Perturbs the images of `chosen` so that they are hard to recognise; one batch per step."""
    harder = make_harder(clean.net, config)
    batch_size = min(batch_size, len(chosen.labels))
    total = -(-len(chosen.labels) // batch_size)

    def chunks(images: Any, left: int) -> Iterator[Chunk]:
        images = np.array(images)  # a copy, since it is written to; a resumed run starts mid-way
        for number in range(total - left, total):
            part = evaluate.per_image(
                key, harder, clean.variables, chosen, batch_size=batch_size, numbers=(number,)
            )
            images[number * batch_size :][: len(part)] = part
            yield Chunk(number + 1 - total + left, lambda: images, NoInfo())

    fitted = run.follow(name, np.asarray(chosen.images), chunks, info=NoInfo, num_steps=total)
    return fitted.state


def plant_trojan(
    run: Run,
    name: str,
    key: Key,
    clean: Suspect,
    data: Batch,
    config: trojan.Config,
    *,
    count: int | float | None = None,
    batching: draw.Batching = draw.Batching(),
) -> Trojaned:
    """Plants a Trojan in a clean net (Liu et al. 2018): searches the trigger, then fine-tunes.

    Args:
      data: images to search the trigger and to fine-tune on.
      count: number of images to poison once before training, see `poison.static`; by default each
        batch is poisoned on its own.
    Raises: UserError when the layer, its neurons, or the trigger's place do not fit the net.
    """
    search_key, tune_key, poison_key = jax.random.split(key, 3)
    trigger, searched = _search_trigger(
        run, f"{name}: trigger", search_key, clean, data, config, batching.batch_size
    )
    attack = trojan.make(clean.image_shape, clean.classes, config)
    layer = trojan.layer(clean.net, clean.variables, clean.image_shape, config)
    which = later_layers.later(clean.net, clean.variables, clean.image_shape, layer)
    # train=False: batch moments would change the output of the layers that must stay as they are
    trainer = supervised.trainer(
        clean.net, later_layers.only(which, trojan.optimiser(config)), train=False
    )
    drawn: Any = batching.draw()
    source: Any = data
    if count is None:
        drawn, source = poison.dynamic(attack, drawn), (data, trigger)
    else:
        source = Batch(*map(jnp.asarray, poison.static(poison_key, attack, trigger, data, count)))
    tuned = run.fit(
        f"{name}: fine-tune",
        tune_key,
        trainer.step,
        drawn,
        source,
        trainer.init(clean.variables),
        info=supervised.Info,
        num_steps=config.retrain_steps,
    )
    return Trojaned(
        variables=tuned.state.variables,
        trigger=trigger,
        neurons=np.asarray(searched.state.neurons),
        search=searched.infos,
        retraining=tuned.infos,
        seconds=total_seconds(searched.seconds, tuned.seconds),
    )


def _search_trigger(
    run: Run,
    name: str,
    key: Key,
    clean: Suspect,
    data: Batch,
    config: trojan.Config,
    batch_size: int,
) -> tuple[Trigger, Fitted]:
    """Searches a trigger that excites the chosen neurons; returns it and the fitted search."""
    # reset fields that only fine-tuning uses, so that they do not miss the factory's cache
    plain = {field: getattr(trojan.Config(), field) for field in TUNING}
    search = make_search(
        clean.net, clean.image_shape, clean.classes, dataclasses.replace(config, **plain)
    )
    fitted = run.fit(
        name,
        jax.random.fold_in(key, 1),
        search.step,
        draw.uniform(batch_size),
        data,
        search.init(jax.random.fold_in(key, 0), clean.variables),
        clean.variables,
        info=trojan.Info,
        num_steps=config.search_steps,
    )
    return search.extract(fitted.state), fitted
