"""The repair that checks itself, for `jaxbd repair`: when it runs, its record and its printed
summary."""

from typing import Any

from jaxbd import methods
from jaxbd.base import Batch, Key, Suspect, UserError
from jaxbd.cli import known, show
from jaxbd.files import plain
from jaxbd.pipelines import evidence, hold
from jaxbd.pipelines.scan import Scan
from jaxbd.training.run import Run

AUTO, BASE = hold.AUTO, "unlearn"
"""The method's name on the command line, and the repair it repeats in rounds."""
ROUNDS = hold.Config().rounds
SEARCHED = (
    "The fresh search covered masks (from large and small starts), square patches at their places,"
    " and additive patterns, for these classes only; other kinds of trigger may remain."
)
NAMES = {"mask": "a mask", "patch": "square patches", "additive": "an additive pattern"}


def find(name: str) -> methods.Method:
    """The repair of that name; for `AUTO`, the one it uses with a trigger."""
    return methods.find("repair", BASE if name == AUTO else name)


def pick_preset(name: str, preset: str | None) -> str | None:
    """The preset given by the user; for `AUTO` without one, the preset for rounds."""
    return hold.PRESET if name == AUTO and preset is None else preset


def is_asked(args: Any) -> bool:
    """Whether the repair should check itself."""
    return args.method == AUTO or args.rounds is not None


def check(args: Any, method: methods.Method) -> None:
    """Raises UserError on flags that cannot work together, before anything is read."""
    if is_asked(args):
        if method.guards or "trigger" not in method.needs:
            raise UserError(
                "--rounds needs a repair that starts from a trigger and changes weights;"
                f" {method.name} does not, leave --rounds out"
            )
        configure(args)
    elif args.max_drop != hold.Config().max_drop:
        raise UserError("--max-drop is for --method auto or --rounds; give one of them")


def configure(args: Any) -> hold.Config:
    """The settings given by the flags."""
    rounds = ROUNDS if args.rounds is None else args.rounds
    return hold.Config(max_drop=args.max_drop, rounds=rounds)


def pick_without_trigger(args: Any, found: known.Known) -> tuple[methods.Method, Any] | None:
    """(method, settings) to use if a scan recovered no trigger; None if the verdict is clean or the
    user chose another method."""
    if args.method != AUTO or found.verdict() in (None, "clean"):
        return None
    method, settings = hold.without_trigger(args.max_drop)
    show.say(
        f"The scan is inconclusive and recovered no trigger; repairing with {method.name} instead."
    )
    return method, settings


def say_doubt(args: Any, found: known.Known) -> None:
    """After an inconclusive scan, prints which classes are repaired all the same."""
    doubtful = args.method == AUTO and found.verdict() == "inconclusive"
    if doubtful and found.evidence and args.given.target is None:
        targets = dict.fromkeys(each.target for each in found.evidence)
        classes = "class" if len(targets) == 1 else "classes"
        show.say(
            f"The scan is inconclusive; repairing {classes} {', '.join(map(str, targets))}, which"
            f" {'shows' if len(targets) == 1 else 'show'} one sign of a backdoor."
        )


def repair(
    run: Run,
    key: Key,
    suspect: Suspect,
    images: tuple[Batch, Batch],
    found: known.Known,
    settings: Any,
    args: Any,
) -> hold.Held:
    """Repairs in rounds, from every working trigger of the scan, or from the given one.

    Args:
      images: (those to repair with, those that check the repair).
    """
    triggers, norms = found.evidence, found.norms
    if isinstance(found.scan, Scan):
        if found.scan.located is not None:
            norms = found.scan.located.norms
        if args.evidence == "mixture":
            targets = dict.fromkeys(each.target for each in triggers)
            triggers = [e for t in targets for e in evidence.every_trigger(found.scan, t)]
    base, (clean, held) = (find(args.method).name, settings), images
    return hold.repair(
        run,
        key,
        suspect,
        clean,
        triggers,
        configure(args),
        base,
        held=held,
        norms=norms,
        batch_size=args.batch_size,
    )


def as_record(held: hold.Held) -> dict[str, Any]:
    """What repair.json says about the rounds; round 0 is the suspect."""
    rounds = [
        {
            "accuracy": each.accuracy,
            "kept": each.kept,
            "shares": {str(target): share for target, share in each.shares.items()},
            "known": [{"class": target, "rate": rate} for target, rate in each.rates],
            "found": [
                {
                    "class": one.evidence.target,
                    "kind": one.kind,
                    "size": one.size,
                    "rate": one.rate,
                    "left": any(one is other for other in each.left),
                }
                for one in each.found
            ],
        }
        for each in held.rounds
    ]
    end = {"end": held.end, "undone": held.undone, "checked_on": held.checked_on}
    return plain({"rounds": rounds, "limits": held.limits, **end})


def say(held: hold.Held, args: Any) -> None:
    """Prints why the repair ended, and what was measured then."""
    count, last = len(held.rounds) - 1, held.last
    many = "1 round" if count == 1 else f"{count} rounds"
    highest = max((rate for _, rate in last.rates), default=0.0)
    figures = (
        f"On {held.checked_on} images that the repair did not train on, the known triggers reach at"
        f" most {show.percent(highest)}; accuracy went from"
        f" {show.percent(held.rounds[0].accuracy)} to {show.percent(last.accuracy)}."
    )
    left = "; ".join(
        f"{NAMES[each.kind]} that sends {show.percent(each.rate)} to class {each.evidence.target}"
        for each in last.left
    )
    still = f" Still working: {left}." if left else ""
    if held.end == "nothing left":
        why = "a fresh search found no unusually small trigger that works"
    elif held.end == "rounds":
        why = "no rounds are left"
    else:
        why = f"even part of the last round would cost more than --max-drop {args.max_drop:g}"
        why += "; the model is unchanged" if count == 1 else ", so it was undone"
    show.say(f"The repair ended after {many}: {why}.{still}", figures, SEARCHED)
