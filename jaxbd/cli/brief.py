"""One-screen `--help` for verbs with many flags.

The text is hand-written, so it prints without importing the parser; a test checks it against the
real flags. `--help-all`, or `--help` together with a flag that chooses a method, shows every flag.
"""

from collections.abc import Sequence

CHOOSING = ("--method", "--attack", "--search.method", "--preset")
"""Flags that choose a method: `--help` next to one of them shows that method's full help."""

SCAN = """usage: jaxbd scan MODEL [--data DATA] [flags]

Scans a model for a backdoor and names the class it targets.

  MODEL           PyTorch file (.pth, .pt, .tar), .safetensors, .onnx, or jaxbd
                  model folder; nothing in it is executed
  --data DATA     a few hundred or more clean labelled images: digits, a .npz or
                  .parquet file, a folder with one sub-folder per class, CIFAR
                  batches, or tfds:NAME. Without --data: only a first answer
  --out CASE      write a case folder with scan.json, report.html and triggers/,
                  for `jaxbd repair CASE`. FILE.json writes only the result
  --report FILE   write a self-contained HTML page
  --sarif FILE    write the result for code scanning (--mlbom FILE: an ML-BOM)
  --limit N       use at most N images, drawn at random (2000)

Search:
  --method NAME   auto (default): margins, masks and patches, two signs decide;
                  mesa, neural-cleanse, pixel: one of these searches alone;
                  pairs, pt-red, neural-cleanse-pairs: every pair of classes
  --targets K …   search only these classes; says nothing about the others
  --preset NAME   quick (default); released, paper: MESA as published, hours
  --calibration FILE   null.json that `jaxbd calibrate` made from clean models
  --seed N        seed for all random choices (0)

If the model file does not describe its input images:
  --normalisation NAME   none, cifar10, imagenet, …; default: found by trying
  --image-shape H W C    size and channels
  --arch NAME            architecture, if it cannot be told from the tensors
  --classes FILE         class names in the model's order, one per line
  --resume        continue a stopped scan that has the same --out or --report

Example:
  jaxbd scan model.pth --data photos/ --out case

Exit codes: 0 clean, 1 backdoored, 3 inconclusive, 2 could not run.
`jaxbd scan --help-all` lists every flag; add --method NAME for that method's.
"""

REPAIR = """usage: jaxbd repair MODEL --out OUT [--data DATA] [flags]

Removes a backdoor and writes the repaired model.

  MODEL             PyTorch file, .safetensors, .onnx, or jaxbd model folder
  --out OUT         the repaired model: .pth or .safetensors with the source's
                    keys and layout, or a model folder; figures go next to it
  --data DATA       clean images with labels, see `jaxbd scan --help`; a quarter
                    of them are held out to measure the repair
  --test-data DATA  measure the repair on these images instead

Repair:
  --method NAME     auto (default): unlearn the triggers that a scan recovers,
                    search for remaining ones, and repeat;
                    bna: leave the weights alone and flag triggered images;
                    dhbe: use no images. `jaxbd methods` lists all
  --max-drop SHARE  clean accuracy that the rounds may cost (0.02)
  --scan CASE       an earlier scan: repair the triggers it recovered; a
                    scan.json without triggers limits the search to its classes
  --trigger FILE    the trigger, if you have it; no scan is run
  --target K        the class it leads to
  --steps N         length of the repair

If the model file does not describe its input images:
  --normalisation NAME, --image-shape H W C, --arch NAME   as for `jaxbd scan`
  --resume          continue a stopped repair that has the same --out

Example:
  jaxbd repair model.pth --data photos/ --scan scan.json --out repaired.pth

Scan the repaired model again before you use it.
`jaxbd repair --help-all` lists every flag; add --method NAME for that method's.
"""

EVALUATE = """usage: jaxbd evaluate MODEL --data DATA [flags]

Measures a model's clean accuracy and, with a trigger, its attack success rate.

  MODEL             PyTorch file, .safetensors, .onnx, or jaxbd model folder
  --data DATA       clean images with labels, see `jaxbd scan --help`
  --trigger FILE    a picture, the .npz that `jaxbd attack` wrote, or white:HxW
  --place ROW,COL   top-left corner of the trigger, or random
  --apply HOW       overwrite the pixels, or add to them
  --target K        the class the trigger leads to
  --copies N        copies of the trigger per image: 1 (default), 4 or 9
  --out FILE        write the result as JSON
  --limit N         use at most N images, drawn at random (10000)

Example:
  jaxbd evaluate model.pth --data photos/ --trigger white:4x4 --place 27,27 \\
    --target 8

`jaxbd evaluate --help-all` lists every flag.
"""

GUARD = """usage: jaxbd guard MODEL --data DATA [flags]

Classifies each image and says whether it carries the trigger.

  MODEL             guarded model written by `jaxbd repair --method bna`
  --data DATA       a picture, a folder of pictures, a .npz with images, or
                    images with labels, see `jaxbd scan --help`
  --out FILE        write one line of JSON per image here (default: stdout)
  --strip DATA      clean images for a second opinion from STRIP, which takes a
                    hundred passes per image
  --limit N         use at most N images, drawn at random (10000)

Example:
  jaxbd guard guarded --data inbox/ --out flags.jsonl

`jaxbd guard --help-all` lists every flag.
"""

ATTACK = """usage: jaxbd attack --data DATA --out FOLDER [flags]

Trains a backdoored model, or a clean one, to try the other verbs on.

  --data DATA       training images with labels, see `jaxbd scan --help`
  --out FOLDER      model folder to write, with the trigger and the figures
  --attack NAME     badnets (default), blend, …; `jaxbd methods` lists all
  --no-attack       train a clean model instead
  --target K        the class the trigger leads to
  --poison-rate R   share of each batch that carries the trigger
  --arch NAME       architecture (cnn)
  --num-steps N     training steps (800)
  --seed N          seed for all random choices (0)
  --resume          continue a stopped training that has the same --out

Example:
  jaxbd attack --data digits --target 3 --out victim

`jaxbd attack --help-all` lists every flag; add --attack NAME for that attack's.
"""

HELP = {"scan": SCAN, "repair": REPAIR, "evaluate": EVALUATE, "guard": GUARD, "attack": ATTACK}
"""Verb -> its short help."""
EVERYTHING = "--help-all"


def of(verb: str, argv: Sequence[str]) -> str | None:
    """The short help, if the words after `verb` ask for it; None otherwise."""
    words = {word.partition("=")[0].replace("_", "-") for word in argv}
    asked = bool({"-h", "--help"} & words) and EVERYTHING not in words
    return HELP.get(verb) if asked and not words & {*CHOOSING} else None


def spell_out(argv: Sequence[str]) -> list[str]:
    """`argv` with `--help-all` replaced by the parser's own `--help`."""
    return ["--help" if word == EVERYTHING else word for word in argv]
