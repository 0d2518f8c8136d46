"""`jaxbd convert`: a model in another format."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from jaxbd.base import UserError
from jaxbd.cli import common, show
from jaxbd.interop import load
from jaxbd.models.norm import NORMALISATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Writes a model as a PyTorch file (.pth), as .safetensors, or as a jaxbd model folder (any other name).

    Attributes:
      model: a PyTorch file, .safetensors, a jaxbd model folder or an Orbax folder.
      out: what to write; its ending says in which format.
      arch: architecture of a foreign file; by default recognised from its tensors.
      image_shape: height, width, channels of the model's images, where the file does not tell.
      normalisation: what the model expects of pixels in [0, 1]; a model folder states it.
    """

    model: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    out: pathlib.Path
    arch: str | None = None
    image_shape: tuple[int, int, int] | None = None
    normalisation: Literal[*NORMALISATIONS] | None = None


def run(args: Args) -> int:
    """Reads and writes; says what the new file does not hold."""
    common.check_output(args.out, folder=is_folder(args.out))
    mean, std = NORMALISATIONS[args.normalisation] if args.normalisation else (None, None)
    model = load.open_model(args.model, arch=args.arch, image_shape=args.image_shape, mean=mean, std=std)
    if is_folder(args.out) and not common.is_ours(model) and args.normalisation is None:
        raise UserError("the file does not say what normalisation its net expects; give --normalisation")
    note = write(args.out, model, model.variables)
    show.say(f"{model.spec.arch}, {model.spec.classes} classes, sha256 of the source {model.sha256}")
    show.say(*notes(args.out, model, note))
    show.written(args.out)
    return 0


def is_folder(path: pathlib.Path) -> bool:
    """Whether a model written to `path` becomes a jaxbd folder."""
    return path.suffix not in (*load.TORCH_SUFFIXES, ".safetensors")


def write(path: pathlib.Path, model: load.Model, variables) -> str | None:
    """`load.save_model`; a folder is swapped in whole."""
    if not is_folder(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return load.save_model(path, model, variables)
    common.write_folder(path, lambda new: load.save_model(new, model, variables))
    return None


def notes(path: pathlib.Path, model: load.Model, note: str | None) -> list[str]:
    """What the reader of the new file must know and the file does not hold."""
    found = [f"Note: {note}."] if note else []
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (model.spec.mean, model.spec.std))
    if not is_folder(path) and (set(model.spec.mean), set(model.spec.std)) != ({0.0}, {1.0}):
        found.append(f"Note: the file does not hold the input normalisation: mean {mean}; std {std}.")
    return found
