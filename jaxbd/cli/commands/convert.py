"""`jaxbd convert`: a model in another format."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from jaxbd.base import UserError
from jaxbd.cli import common, outputs, show
from jaxbd.interop import forms
from jaxbd.models.norm import NORMALISATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Writes a model as a PyTorch file (.pth), as .safetensors, as .onnx, or as a jaxbd model
    folder (any other name).

    Attributes:
      model: a PyTorch file, .safetensors, .onnx, .pt2, a jaxbd model folder or an Orbax folder.
      out: what to write; its ending says in which format.
      arch: architecture of a foreign file; by default recognised from its tensors.
      key: name of the net in a file that holds several.
      form: what the weights leave open, NAME=VALUE; the likeliest otherwise.
      image_shape: height, width, channels of the model's images, where the file does not tell.
      normalisation: what the model expects of pixels in [0, 1]; a model folder states it.
      force: replace what lies at --out.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    out: pathlib.Path
    arch: str | None = None
    key: str | None = None
    form: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    normalisation: Literal[*NORMALISATIONS] | None = None  # pyright: ignore[reportInvalidTypeForm]
    force: bool = False


def run(args: Args) -> int:
    """Reads and writes; says what the new file does not hold."""
    outputs.check_model_output(args.out, [args.model], force=args.force)
    outputs.refuse_existing("--out", args.out, replace=args.force)
    mean, std = NORMALISATIONS[args.normalisation] if args.normalisation else (None, None)
    model = common.open_model(
        args.model, arch=args.arch, image_shape=args.image_shape, key=args.key, mean=mean, std=std
    )
    if args.form:
        model = forms.stated(model, args.form)
    if (
        outputs.is_folder(args.out)
        and not model.states_normalisation()
        and args.normalisation is None
    ):
        raise UserError(
            "the file does not say what normalisation its net expects; give --normalisation"
        )
    note = outputs.write_model(args.out, model, model.variables)
    show.say(
        f"{model.spec.arch}, {model.spec.classes} classes, sha256 of the source {model.sha256}"
    )
    show.say(*outputs.list_notes(args.out, model, note))
    show.written(args.out)
    return 0
