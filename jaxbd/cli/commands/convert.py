"""`jaxbd convert`: writes a model in another format."""

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
    """Writes a model as a PyTorch file (.pth), .safetensors, .onnx, or a jaxbd model folder (a name
    without an ending).

    Attributes:
      model: a PyTorch file, .safetensors, .onnx, .pt2, a jaxbd model folder or an Orbax folder.
      out: path to write; its ending selects the format.
      arch: architecture of a foreign file; by default recognised from its tensors.
      key: name of the net in a file that holds several, or of an ONNX file's logits.
      form: choice that the weights leave open, NAME=VALUE; by default the most likely one.
      image_shape: height, width, channels of the model's images, if the file does not state them.
      normalisation: input normalisation the model expects, applied to pixels in [0, 1]; a model
        folder states its own.
      mean: per-channel mean of a custom normalisation.
      std: per-channel standard deviation of a custom normalisation.
      force: replace an existing output.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    out: pathlib.Path
    arch: str | None = None
    key: str | None = None
    form: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    normalisation: Literal[*NORMALISATIONS] | None = None  # pyright: ignore[reportInvalidTypeForm]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    force: bool = False

    def __post_init__(self):
        common.check_image_shape(self.image_shape)


def run(args: Args) -> int:
    """Reads the model and writes it again; prints what the new file cannot hold."""
    outputs.check_model_output(args.out, [args.model], force=args.force)
    outputs.refuse_existing("--out", args.out, replace=args.force)
    given = common.constants(args.normalisation, args.mean, args.std)
    mean, std = given or (None, None)
    model = common.open_model(
        args.model, arch=args.arch, image_shape=args.image_shape, key=args.key, mean=mean, std=std
    )
    if args.form:
        model = forms.stated(model, args.form)
    if outputs.is_folder(args.out) and not model.states_normalisation() and given is None:
        raise UserError(
            "the file does not say which normalisation its net expects; give --normalisation, or"
            " --mean and --std"
        )
    note = outputs.write_model(args.out, model, model.variables)
    show.say(
        f"{model.spec.arch}, {model.spec.classes} classes, sha256 of the source {model.sha256}"
    )
    show.say(*outputs.list_notes(args.out, model, note))
    show.written(args.out)
    return 0
