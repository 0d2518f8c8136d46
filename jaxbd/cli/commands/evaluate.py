"""`jaxbd evaluate`: clean accuracy, and the attack success rate of a trigger."""

import dataclasses
import pathlib
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from jaxbd import files
from jaxbd.attacks import amplified, given
from jaxbd.base import Batch, UserError
from jaxbd.cli import case, common, outputs, show, triggers
from jaxbd.data import load
from jaxbd.interop import preprocess
from jaxbd.metrics import evaluate, relearn
from jaxbd.report import results
from jaxbd.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures a model's clean accuracy and, with a trigger, its attack success rate.

    Attributes:
      model: a PyTorch file, .safetensors, .onnx, .pt2, or a jaxbd model folder.
      data: clean images with labels, see `jaxbd scan --help`.
      out: write the result here, as NAME.json.
      copies: copies of a patch on an image. 4: one in each corner, as far from the edges as the
        original; 9: also in the middle of the image and of each edge (the amplified attack of Yan
        et al. 2023).
      relearn: also train the model on three quarters of the images, 1 % of them with the trigger
        and its label, and report after how many steps the backdoor works again on half of the
        other images; a clean model needs more steps than one whose backdoor is only hidden.
      given: the trigger.
      force: replace an existing output.
      reading: how the model and the data are read.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: str
    out: pathlib.Path | None = None
    copies: amplified.Copies = 1
    relearn: bool = False
    given: Annotated[triggers.Trigger, tyro.conf.arg(name="")] = triggers.Trigger()
    force: bool = False
    reading: Annotated[common.Reading, tyro.conf.arg(name="")] = common.Reading(limit=10_000)

    def __post_init__(self):
        if self.given.trigger is None and self.given != triggers.Trigger():
            raise UserError(
                "--apply, --place and --target describe a trigger; give it with --trigger"
            )
        if self.given.trigger is None and self.relearn:
            raise UserError("--relearn teaches a trigger; give the trigger with --trigger")
        if self.given.trigger is None and self.copies != 1:
            raise UserError(
                "--copies repeats a trigger on the image; give the trigger with --trigger"
            )


def run(args: Args) -> int:
    """Measures the model, prints one line with both denominators, and writes the result."""
    common.start()
    outputs.check_output(args.out)
    outputs.check_ending("--out", args.out, (".json",))
    outputs.refuse_existing("--out", args.out, replace=args.force)
    loaded = triggers.load_trigger(args.given)
    show.note(f"reading {args.model} and {args.data} …")
    opened = common.open_both(
        args.model, args.data, args.reading, must_classify=False, guarded=True
    )
    show.preprocessing(opened.table)
    model, data = opened.model, load.as_batch(opened.dataset)
    config = attack = pixels = None
    if loaded is not None:
        config = triggers.settle(opened, args.given, loaded, all_to_all=True)
        attack, pixels = triggers.make_attack(opened, config, loaded)
        if args.copies != 1:
            attack, pixels = triggers.amplify(opened, config, loaded, args.copies)
    found = evaluate.rates(
        jax.random.key(args.reading.seed), model.net, model.variables, data, attack, pixels
    )
    rates = results.rates(found)
    show.rates([(pathlib.Path(model.path).name, rates)])
    if args.copies != 1:
        show.say(f"Every triggered image has {args.copies} copies of the trigger.")
    if config is not None and config.all_to_all:
        show.say(
            "All-to-all: the attack on an image of class c succeeds if the model answers c + 1 mod"
            f" {model.spec.classes}."
        )
    back = _relearn(opened, data, attack, pixels, args) if args.relearn else None
    if args.out is not None:
        files.write_json(args.out, _as_record(opened, rates, config, args) | {"relearn": back})
    show.written(args.out)
    return 0


def _relearn(
    opened: common.Opened, data: Batch, attack: Any, trigger: Any, args: Args
) -> dict[str, Any]:
    """Prints how soon the backdoor is back, and returns it as a record. The model is not changed.

    Raises: UserError for a guarded model, which has no weights of its own to train.
    """
    model, config = opened.model, relearn.Config()
    if getattr(model, "guard", None) is not None:
        raise UserError("--relearn trains weights, and a guard has none; leave --relearn out")
    order = np.random.default_rng(args.reading.seed).permutation(len(data.labels))
    parts = np.split(order, [3 * len(order) // 4])
    images, judge = (Batch(data.images[rows], data.labels[rows]) for rows in parts)
    key = jax.random.key(args.reading.seed)
    found = relearn.relearn(
        Run(), key, model.net, model.variables, images, judge, attack, trigger, config
    )
    after = (
        f"was not back within {config.num_steps} steps"
        if found.steps is None
        else f"was back after {found.steps} steps"
    )
    show.say(
        f"Relearning: the backdoor {after} on {found.poisoned} poisoned images of"
        f" {len(images.labels)}."
    )
    return found._asdict() | {"config": results.settings(config)}


def _as_record(
    opened: common.Opened, rates: dict[str, Any], config: given.Config | None, args: Args
) -> dict[str, Any]:
    """The content of evaluate.json."""
    return {
        "schema": f"{results.SCHEMA}/evaluate",
        **rates,
        "trigger": (
            None
            if config is None
            else {**triggers.describe(args.given, config), "copies": args.copies}
        ),
        "model": common.model_record(opened.model),
        "inputs": {"model": case.place_of(args.model)},
        "data": common.data_record(opened.dataset, args.reading),
        "preprocessing": preprocess.as_record(opened.table) if opened.table else None,
        **results.provenance(args.reading.seed),
    }
