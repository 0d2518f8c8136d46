"""The short help of verbs with many flags: what most people need, on one screen.

Written by hand, so that it is there at once and reads well; a test holds it against the flags that
there are. `--help-all`, or `--help` beside a flag that chooses a method, shows every flag.
"""

from collections.abc import Sequence

CHOOSING = ("--method", "--attack", "--search.method", "--preset")
"""Flags whose help somebody wants who asks for help beside them."""

SCAN = """usage: jaxbd scan MODEL [--data DATA] [flags]

Is there a backdoor in this model, and to which class does it lead?

  MODEL           a PyTorch file (.pth, .pt, .tar), .safetensors, .onnx, or a
                  jaxbd model folder; nothing in it is executed
  --data DATA     a few hundred or more clean images with labels: digits, a .npz
                  or .parquet file, a folder with a sub-folder per class, CIFAR
                  batches, or tfds:NAME. Without any: a first answer
  --out CASE      write a folder: scan.json, report.html, triggers/, from which
                  `jaxbd repair CASE` goes on. FILE.json: the result alone
  --report FILE   write one self-contained HTML page here
  --sarif FILE    write the finding for code scanning (--mlbom FILE: an ML-BOM)
  --limit N       use at most N images, drawn at random (2000)

What is searched:
  --method NAME   auto (default): margins, masks and patches, two signs decide;
                  mesa, neural-cleanse, pixel: one of these searches alone;
                  pairs, pt-red, neural-cleanse-pairs: each class to each other
  --targets K …   these classes only; nothing is said of the others
  --preset NAME   quick (default); released, paper: MESA as published, for hours
  --calibration FILE   null.json of `jaxbd calibrate`, made from clean models
  --seed N        of everything random (0)

Where the file does not say how its images have to be:
  --normalisation NAME   none, cifar10, imagenet, …; found out without it
  --image-shape H W C    size and channels
  --arch NAME            architecture, where the tensors do not tell
  --classes FILE         names of the classes in the model's order, one a line
  --resume        go on where a scan with the same --out or --report stopped

Example:
  jaxbd scan model.pth --data photos/ --out case

Exit code: 0 clean, 1 backdoored, 3 inconclusive, 2 could not run.
`jaxbd scan --help-all` has every flag, with --method NAME those of a method.
"""

REPAIR = """usage: jaxbd repair MODEL --out OUT [--data DATA] [flags]

Removes a backdoor and writes the repaired model.

  MODEL             a PyTorch file, .safetensors, .onnx, or a jaxbd model folder
  --out OUT         the repaired model: .pth or .safetensors in the source's own
                    keys and layout, or a model folder; figures go beside it
  --data DATA       clean images with labels, see `jaxbd scan --help`; a quarter
                    of them judges the repair
  --test-data DATA  judge by these images instead

How to repair:
  --method NAME     auto (default): unlearn the triggers a scan recovers, then
                    look for what is left, in rounds;
                    bna: leave the weights alone and flag triggered images;
                    dhbe: without any image. `jaxbd methods` lists all
  --max-drop SHARE  clean accuracy that the rounds may cost (0.02)
  --scan FILE       scan.json of an earlier scan: search its classes alone
  --trigger FILE    the trigger, where you have it: no scan is run
  --target K        the class it leads to
  --steps N         length of the repair

Where the file does not say how its images have to be:
  --normalisation NAME, --image-shape H W C, --arch NAME   as for `jaxbd scan`
  --resume          go on where a repair with the same --out stopped

Example:
  jaxbd repair model.pth --data photos/ --scan scan.json --out repaired.pth

Scan the repaired model again before it is used.
`jaxbd repair --help-all` has every flag, with --method NAME those of one.
"""

EVALUATE = """usage: jaxbd evaluate MODEL --data DATA [flags]

Measures a model's clean accuracy and, with a trigger, its attack success rate.

  MODEL             a PyTorch file, .safetensors, .onnx, or a jaxbd model folder
  --data DATA       clean images with labels, see `jaxbd scan --help`
  --trigger FILE    a picture, the .npz of `jaxbd attack`, or white:HxW
  --place ROW,COL   its top-left corner, or random
  --apply HOW       overwrite pixels, or add to them
  --target K        the class it leads to
  --copies N        how often it stands on an image: 1 (default), 4 or 9
  --out FILE        write the result here as JSON
  --limit N         use at most N images, drawn at random (10000)

Example:
  jaxbd evaluate model.pth --data photos/ --trigger white:4x4 --place 27,27 \\
    --target 8

`jaxbd evaluate --help-all` has every flag.
"""

GUARD = """usage: jaxbd guard MODEL --data DATA [flags]

Says of each image what it shows, and whether it carries the trigger.

  MODEL             a guarded model, which `jaxbd repair --method bna` wrote
  --data DATA       a picture, a folder of pictures, a .npz with images, or
                    images with labels, see `jaxbd scan --help`
  --out FILE        write a line of JSON per image here; otherwise to stdout
  --strip DATA      clean images for a second opinion by STRIP, which takes a
                    hundred passes per image
  --limit N         use at most N images, drawn at random (10000)

Example:
  jaxbd guard guarded --data inbox/ --out flags.jsonl

`jaxbd guard --help-all` has every flag.
"""

ATTACK = """usage: jaxbd attack --data DATA --out FOLDER [flags]

Trains a model with a backdoor in it, or a clean one, to try the other verbs on.

  --data DATA       training images with labels, see `jaxbd scan --help`
  --out FOLDER      the model folder, with the trigger and figures in it
  --attack NAME     badnets (default), blend, …; `jaxbd methods` lists all
  --no-attack       plant nothing: a clean model
  --target K        the class that the trigger leads to
  --poison-rate R   share of the images of a batch that carry it
  --arch NAME       architecture (cnn)
  --num-steps N     length of the training (800)
  --seed N          of everything random (0)
  --resume          go on where a training with the same --out stopped

Example:
  jaxbd attack --data digits --target 3 --out victim

`jaxbd attack --help-all` has every flag, with --attack NAME an attack's own.
"""

HELP = {"scan": SCAN, "repair": REPAIR, "evaluate": EVALUATE, "guard": GUARD, "attack": ATTACK}
"""Verb -> its short help."""
EVERYTHING = "--help-all"


def of(verb: str, argv: Sequence[str]) -> str | None:
    """The short help, where the words after `verb` ask for it; None where they do not."""
    words = {word.partition("=")[0].replace("_", "-") for word in argv}
    asked = bool({"-h", "--help"} & words) and EVERYTHING not in words
    return HELP.get(verb) if asked and not words & {*CHOOSING} else None


def spell_out(argv: Sequence[str]) -> list[str]:
    """The words with `--help-all` as the parser knows it."""
    return ["--help" if word == EVERYTHING else word for word in argv]
