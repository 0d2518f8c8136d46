"""Chooses the form of a net by its accuracy on images.

Some of an architecture leaves no trace in a state_dict: where the net pools, its activation, how a
shortcut without weights fills new channels. `Model.forms` lists the likely variants; each is tried
on the images.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxbd.base import UserError
from jaxbd.interop import preprocess
from jaxbd.interop.load import Model
from jaxbd.interop.matching import Matched
from jaxbd.models import build

Match = Callable[[Model, preprocess.Constants | None], Matched]
"""(model, constants or None) -> the model matched to images; with constants given, only that
normalisation is measured."""


def choose(model: Model, match: Match, stated: Sequence[str] = ()) -> Matched:
    """Matches the model to images in the form in which it is most accurate.

    Args:
      match: reads images for a model and measures it, see `matching.match`.
      stated: what the user said about the form, e.g. "pool=True".
    Raises: UserError from `match` when no form can be used, or naming the forms when several are
      within two standard errors of the best.
    """
    candidates = [_in_form(model, spec) for spec in keep(model.forms, stated)] or [model]
    best: Matched | None = None
    failure: UserError | None = None
    near: list[tuple[Model, float]] = []
    for candidate in candidates:
        try:
            found = match(candidate, None if best is None else _constants(best))
        except UserError as error:
            failure = failure or error
            continue
        if best is not None and _accuracy(found) > _accuracy(best) + 2 * _table(best).error:
            # the constants of the old best need not suit this form, so measure all of them
            best, near = match(candidate, None), []
        elif best is None:
            best = found
        elif _accuracy(found) >= _accuracy(best) - 2 * _table(best).error:
            near.append((candidate, _accuracy(found)))
    if best is None:
        raise failure or UserError(f"{model.path}: no form of the net fits")
    if near:
        raise UserError(_question(best, near))
    return best


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


def _question(best: Matched, near: list[tuple[Model, float]]) -> str:
    found: list[tuple[Any, float]] = [(best.model, _accuracy(best)), *near]
    specs = [model.spec for model, _ in found]
    listed = "; ".join(
        f"{' '.join(parts(model.spec, specs))} ({accuracy:.3f})" for model, accuracy in found
    )
    return (
        f"several forms of the net are equally accurate on these images: {listed}; say which with"
        " --form NAME=VALUE"
    )
