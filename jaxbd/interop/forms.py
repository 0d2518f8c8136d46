"""Chooses the form of a net by its answers on images.

Some of an architecture leaves no trace in a state_dict: where the net pools, its activation, how a
shortcut without weights fills new channels. `Model.forms` lists the likely variants; each is tried
on the images, in full only the likeliest of many.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxbd.base import UserError
from jaxbd.interop import preprocess, screen
from jaxbd.interop.load import Model
from jaxbd.interop.matching import Matched
from jaxbd.metrics import evaluate
from jaxbd.models import build

Match = Callable[[Model, preprocess.Constants | None], Matched]
"""(model, constants or None) -> the model matched to images; with constants given, only that
normalisation is measured."""
FEW = 8
"""Up to this many forms are all tried in full."""
LIKELIEST = 5
"""Of more forms, this many of the likeliest are tried in full, see `screen`."""
DIFFERENT = 0.05
"""Share of images on which two forms may differ and still pass for the same net."""


def choose(model: Model, match: Match, read: screen.Read, stated: Sequence[str] = ()) -> Matched:
    """Matches the model to images in the form in which it is most accurate; if several are within
    two standard errors of the best, in the one under which their labels are likeliest.

    Args:
      match: reads images for a model and measures it, see `matching.match`.
      read: reads some of the same images at a given size.
      stated: what the user said about the form, e.g. "pool=True".
    Raises: UserError from `match` when no form can be used, or naming the forms when several are
      equally good but differ in their answers.
    """
    every = [_in_form(model, spec) for spec in keep(model.forms, stated)] or [model]
    tried = every if len(every) <= FEW else screen.shortlist(every, read, LIKELIEST)
    best: Matched | None = None
    failure: UserError | None = None
    near: list[tuple[Model, Matched]] = []
    for candidate in tried:
        try:
            found = match(candidate, None if best is None else _constants(best))
        except UserError as error:
            failure = failure or error
            continue
        if best is None or _accuracy(found) > _accuracy(best) + 2 * _table(best).error:
            # the constants of the old best need not suit this form, so measure all of them
            best = found if best is None else match(candidate, None)
            near = [(candidate, best)]
        elif _accuracy(found) >= _accuracy(best) - 2 * _table(best).error:
            near.append((candidate, found))
    if best is None:
        raise failure or UserError(f"{model.path}: no form of the net fits")
    if len(near) == 1:
        return best
    places = {id(candidate): index for index, candidate in enumerate(every)}
    near.sort(key=lambda pair: places[id(pair[0])])
    chosen, found = near[_likeliest([found for _, found in near], read)]
    # the others were measured with the constants of the best only
    return best if found is best else match(chosen, None)


def _likeliest(near: list[Matched], read: screen.Read) -> int:
    """Index of the form whose moments are nearest to the stored ones and under which the labels are
    likeliest; of those within two standard errors of it, of the first. Raises UserError if they
    differ in their answers."""
    scores, answers, distances = [], [], []
    for found in near:
        model = preprocess.adopt(found.model, _table(found))
        data = preprocess.sample(read(found.model.spec.image_shape))
        logits = evaluate.logits(model.net, model.variables, data)
        scores.append(screen.likelihoods(logits, np.asarray(data.labels)))
        answers.append(logits.argmax(-1))
        distances.append(screen.distance(model, data))
    left = list(range(len(near)))
    measured = [distance for distance in distances if distance is not None]
    if len(measured) == len(near):
        left = [i for i in left if measured[i] <= 1.25 * min(measured) + 0.01]
    top = max((scores[i] for i in left), key=np.mean)
    error = lambda gap: gap.std() / np.sqrt(len(gap))
    gaps = {i: top - scores[i] for i in left}
    equal = [i for i, gap in gaps.items() if gap.mean() <= 2 * error(gap) + 1e-4]
    first = equal[0]
    differing = [i for i in equal if (answers[i] != answers[first]).mean() > DIFFERENT]
    if differing:
        raise UserError(_question([near[i] for i in (first, *differing)]))
    return first


def stated(model: Model, form: Sequence[str]) -> Model:
    """`model` in its first form that agrees with `form`. Raises UserError if none does."""
    return _in_form(model, keep(model.forms, form)[0])


def keep(forms: Sequence[build.Spec], stated: Sequence[str]) -> list[build.Spec]:
    """The forms that agree with `stated`. Raises UserError if none does."""
    matching = list(forms)
    for text in stated:
        name, _, value = text.partition("=")
        matching = [s for s in matching if str(s.options.get(name)).lower() == value.lower()]
        if not matching:
            known = ", ".join(dict.fromkeys(part for s in forms for part in parts(s, forms)))
            raise UserError(f"--form {text} is not a form of this net; known: {known or 'none'}")
    return matching


def _in_form(model: Model, spec: build.Spec) -> Model:
    spec = dataclasses.replace(
        model.spec, options=spec.options, image_shape=spec.image_shape or model.spec.image_shape
    )
    return model._replace(spec=spec, net=build.net(spec))


def _table(found: Matched) -> preprocess.Table:
    if found.table is None:
        raise UserError(f"{found.model.path}: its accuracy was not measured")
    return found.table


def _constants(found: Matched) -> preprocess.Constants:
    return _table(found).used.mean, _table(found).used.std


def _accuracy(found: Matched) -> float:
    return _table(found).used.accuracy


def parts(spec: build.Spec, among: Sequence[build.Spec]) -> list[str]:
    """The options in which the forms `among` differ, with their values in `spec`, as arguments of
    --form."""
    names = [name for name in spec.options if len({_text(s, name) for s in among}) > 1]
    return [f"{name}={_text(spec, name)}" for name in names]


def _text(spec: build.Spec, name: str) -> str:
    return "" if name == "layers" else str(spec.options.get(name))


def _question(near: list[Matched]) -> str:
    specs = [found.model.spec for found in near]
    listed = "; ".join(
        f"{' '.join(parts(found.model.spec, specs))} ({_accuracy(found):.3f})" for found in near
    )
    return (
        f"several forms of the net are equally accurate on these images: {listed}; say which with"
        " --form NAME=VALUE"
    )
