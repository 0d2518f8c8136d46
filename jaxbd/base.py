"""Contracts shared by every part of jaxbd: aliases, data types, and the interfaces of methods.

Shape letters used in all docstrings: B images in a batch, N items, H W C image height, width,
channels, h w trigger height, width, K classes, L levels. Pixels are floats in [0, 1] unless a
docstring says uint8.

A method is a NamedTuple of pure functions made by a factory `make`. Sizes and functions are closed
over; arrays (weights, images, targets, levels) are always arguments. Methods never jit and never
store a key: drivers derive the key of a step by folding the step number into the run's key, so a
resumed run replays the same stream.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import jax

Array = jax.Array
ArrayTree = Any
"""A pytree of arrays."""
Key = jax.Array
"""A typed PRNG key, `jax.random.key`."""
Variables = Mapping[str, ArrayTree]
"""A net's arrays: {"params": …, "batch_stats": …}, and "bounds" if a defence adds them."""

ANY_SOURCE = -1
"""`Cell.source` of a trigger that works on images of every class but the target."""


class Batch(NamedTuple):
    """Images [B, H, W, C] in [0, 1] (a stored data set may hold uint8) and labels [B] int32.

    JAX arrays, or NumPy arrays if they stay in host memory.
    """

    images: Any
    labels: Any


class Cell(NamedTuple):
    """What a sweep varies; traced, so a grid of cells compiles once.

    Attributes:
      target: [] int32, class the trigger leads to.
      source: [] int32, class the trigger starts from; `ANY_SOURCE` for every class but the target.
      level: [] float32, the staircase level beta of MESA in (0, 1); methods without levels ignore
        it.
    """

    target: Array
    source: Array
    level: Array


class Net(NamedTuple):
    """A classifier as two pure functions.

    Attributes:
      init: (key) -> variables.
      apply: (variables, images [B, H, W, C] in [0, 1], *, train=False) -> (logits [B, K],
        batch_stats). Logits are at least float32, whatever the net computes in. With `train=True`
        normalisation uses the batch's moments, and `batch_stats` are the updated running moments;
        otherwise `batch_stats` are returned unchanged. Input normalisation is the net's own first
        operation.
      outputs: (variables, images) -> (logits, {"layer/path": [B, …, C]}): the logits of `apply` in
        evaluation, and the output of every layer that a defence may correct, in order of execution.
        None if the net exposes no layers.
      frozen: (variables) -> variables for evaluation only: `apply` and `outputs` give the same
        results up to rounding, for less work. Frozen variables stay as they are. None if there is
        nothing to gain.
    """

    init: Callable[..., Variables]
    apply: Callable[..., tuple[Array, ArrayTree]]
    outputs: Callable[..., tuple[Array, dict[str, Array]]] | None = None
    frozen: Callable[[Variables], Variables] | None = None


class Decoy(NamedTuple):
    """Decoys: images that an attack perturbs almost like its trigger does but does not relabel, so
    that only the exact trigger works.

    Attributes:
      ratio: decoys per poisoned image.
      stamp: (key, trigger, images [B, H, W, C]) -> images.
    """

    ratio: float
    stamp: Callable[[Key, ArrayTree, Array], Array]


class Attack(NamedTuple):
    """A backdoor attack.

    Attributes:
      init: (key) -> trigger, a pytree of arrays.
      stamp: (key, trigger, images [B, H, W, C]) -> images, every image carrying the trigger.
      poison: (key, trigger, batch) -> batch, a random share of the rows stamped and relabelled.
      relabel: (labels [B]) -> labels [B], what the attacker wants triggered images to become.
      decoy: decoys that `poison` adds; None for attacks without them.
    """

    init: Callable[[Key], ArrayTree]
    stamp: Callable[[Key, ArrayTree, Array], Array]
    poison: Callable[[Key, ArrayTree, Batch], Batch]
    relabel: Callable[[Array], Array]
    decoy: Decoy | None = None


class Inversion(NamedTuple):
    """Reverse-engineers triggers of a frozen victim for one cell.

    Attributes:
      init: (key) -> state, with an int32 scalar field `step`.
      step: (key, state, batch, cell, variables) -> (state, info); `variables` of the victim.
      stamp: (key, state, images [B, H, W, C]) -> images, each carrying a trigger drawn from the
        state.
      sample: (key, state, n) -> triggers [n, h, w, C] in [0, 1].
      converged: (state) -> [] bool, early-stopping test; once true, drivers no longer update the
        state. None for methods that run their full length.
      size: (state) -> [] float32, size of the trigger that `stamp` applies, in the method's own
        norm. None for methods whose triggers have one size.
      works: (state) -> [] bool, whether that trigger reached the method's success rate; None for
        methods without a success rate.
    """

    init: Callable[[Key], ArrayTree]
    step: Callable[..., tuple[ArrayTree, ArrayTree]]
    stamp: Callable[[Key, ArrayTree, Array], Array]
    sample: Callable[..., Array]
    converged: Callable[[ArrayTree], Array] | None = None
    size: Callable[[ArrayTree], Array] | None = None
    works: Callable[[ArrayTree], Array] | None = None


class Problem(NamedTuple):
    """The static part of a suspect, for which a method's programs are compiled. Hashable.

    Attributes:
      net: the architecture.
      image_shape: (H, W, C).
      classes: K.
      mean, std: input normalisation that the net's first operation applies, one number per channel
        or one for all. Methods that generate images of their own start from these moments.
      stamp: (key, trigger_params, images [B, H, W, C]) -> images; None if no trigger is known.
    """

    net: Net
    image_shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    stamp: Callable[[Key, ArrayTree, Array], Array] | None = None


class Suspect(NamedTuple):
    """A classifier that may have a backdoor: what every defence starts from.

    Attributes are those of `Problem`, the net's variables, and

      source: the file it was read from, for writing it back in the same format; None for a net that
        was not read from a file.
    """

    net: Net
    variables: Variables
    image_shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    source: Any = None

    def problem(self, evidence: "Evidence | None" = None) -> Problem:
        """The static part, with the stamp of `evidence` if given."""
        stamp = None if evidence is None else evidence.stamp
        return Problem(self.net, self.image_shape, self.classes, self.mean, self.std, stamp)

    def freeze(self) -> "Suspect":
        """The suspect for searches, which train no weights: with the variables of `Net.frozen`,
        or as it is where the net has none."""
        if self.net.frozen is None:
            return self
        return self._replace(variables=self.net.frozen(self.variables))


class Evidence(NamedTuple):
    """What is known about one backdoor: the output of every search and the input of every repair.

    Attributes:
      target: class the trigger leads to.
      sources: classes whose images it sends there; empty for every class but the target.
      stamp: (key, trigger_params, images [B, H, W, C]) -> images, each with a trigger. Must be the
        same function object for the same kind of trigger, so that compiled programs are shared.
      trigger_params: pytree of arrays: a fixed trigger, a model of a distribution, or a mixture of
        models (`repairs.mixture`).
    """

    target: int
    sources: tuple[int, ...]
    stamp: Callable[[Key, ArrayTree, Array], Array]
    trigger_params: ArrayTree

    def all_sources(self, classes: int) -> tuple[int, ...]:
        """The source classes as an explicit list, for a net of K = `classes`."""
        others = tuple(k for k in range(classes) if k != self.target)
        return self.sources or others


class RepairData(NamedTuple):
    """Arrays a repair works on; None for those that do not exist.

    Attributes:
      clean: clean images with labels.
      clean_sources: the clean images of the trigger's source classes.
      clean_target: the clean images of the target class.
      trigger_params: see `Evidence`.
    """

    clean: Batch | None = None
    clean_sources: Batch | None = None
    clean_target: Batch | None = None
    trigger_params: ArrayTree | None = None


class Phase(NamedTuple):
    """One stage of a repair, which is one training run.

    Attributes:
      name: for progress lines and checkpoints; unique within the repair.
      step: (key, state, batch or None) -> (state, info). The state is that of the whole repair.
      num_steps: number of steps.
      info: the NamedTuple class of `info`.
      draws: part of `RepairData` to draw batches from; None for stages without images.
      begin: (state) -> state, applied once before the first step, for example to turn the trained
        net into a teacher or to start a fresh optimiser.
      rows: number of images that a step generates itself if it draws none, so that several devices
        can share them; see `training.loop.chunks`.
      chunk: steps between two checks for progress reports and stop requests. Use fewer if a step
        takes minutes.
    """

    name: str
    step: Callable[..., tuple[ArrayTree, ArrayTree]]
    num_steps: int
    info: type
    draws: Literal["clean", "clean_sources"] | None = "clean"
    begin: Callable[[ArrayTree], ArrayTree] | None = None
    rows: int | None = None
    chunk: int = 20


Need = Literal["clean", "trigger"]
"""Inputs that a repair may require: clean images, a known trigger."""


class Repair(NamedTuple):
    """Turns a suspect's variables into those of a repaired net.

    Takes `RepairData`, not `Batch` and `Evidence`: rows of a class are selected before `init`,
    because their number depends on the data and compiled programs have fixed shapes.

    Attributes:
      init: (key, variables, RepairData) -> state, with an int32 scalar field `step`.
      phases: run in order on the same state.
      extract: (state, dial=None) -> variables; `dial` is one value of the array below, or None for
        the automatic choice.
      dial: [n] settings that are still free after training, for example pruning ratios. Extracting
        at each gives the trade-off between accuracy and attack success. None if there are none.
      needs: inputs that the repair requires.
    """

    init: Callable[[Key, Variables, RepairData], ArrayTree]
    phases: tuple[Phase, ...]
    extract: Callable[..., Variables]
    dial: Array | None = None
    needs: frozenset[Need] = frozenset({"clean"})


class Dataset(NamedTuple):
    """A whole data set in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N], in 0..K-1.
      class_names: K names.
      name: the source, for the record.
      notes: what the user should know about how it was read, for example skipped files.
    """

    images: Any
    labels: Any
    class_names: tuple[str, ...]
    name: str
    notes: tuple[str, ...] = ()


class UserError(Exception):
    """Bad input. The message is one line that names the problem and the fix; the command line exits
    with code 2."""


def check_targets(targets: Iterable[int], classes: int) -> None:
    """Raises UserError unless all `targets` are classes of a model with K = `classes`."""
    outside = [target for target in targets if not 0 <= target < classes]
    if outside:
        raise UserError(
            f"target {outside[0]} is out of range; the model has classes 0..{classes - 1}"
        )


def check_choices(method: str, config: object) -> None:
    """Raises UserError if a field of the dataclass `config` annotated `Literal[…]` has another
    value.

    A union with another type (`Literal[…] | int`) also allows values of that type.
    """
    for name, kind in get_type_hints(type(config)).items():
        parts = (kind,) if get_origin(kind) is Literal else get_args(kind)
        choices = [
            choice for part in parts if get_origin(part) is Literal for choice in get_args(part)
        ]
        others = tuple(part for part in parts if isinstance(part, type))
        value = getattr(config, name)
        if choices and value not in choices and not isinstance(value, others):
            raise UserError(
                f"{method}: {name} is {value!r}; choose from {', '.join(map(str, choices))}"
            )
