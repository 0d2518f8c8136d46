"""The first answer of `jaxbd scan`: margins, which need no images."""

from typing import Any

import jax
import numpy as np

from jaxbd import files
from jaxbd.cli import common, show
from jaxbd.interop import forms
from jaxbd.interop import load as models
from jaxbd.inversion import margin as margins
from jaxbd.pipelines import margin_scan
from jaxbd.report import results
from jaxbd.training.run import Run

BLIND = (
    "Margins miss triggers that depend on the image or hardly move the logits, and backdoors with"
    " several targets at once. Nothing here was checked on images: give --data for a verdict."
)
"""Limits of any answer without data."""


def open_suspect(path: Any, reading: common.Reading) -> models.Model:
    """Opens the model; assumes what only images could tell, and prints a note about it.

    Raises: UserError for a guarded model, since no margin can be searched through one; for one
      whose logits are not finite; or when the net has no form that agrees with --form.
    """
    given = common.stated(reading)
    model = common.open_model(
        path, arch=reading.arch, image_shape=reading.image_shape, key=reading.key, **given
    )
    common.refuse_guarded(model, path)
    model = common.assume_form(model, reading)
    if not given and not model.states_normalisation():
        show.note(
            "note: the file does not say which normalisation its net expects; assuming none, pixels"
            " in [0, 1] (set it with --normalisation, or give --data to find it)"
        )
    if reading.image_shape is None and not (common.is_ours(model) or common.has_fixed_size(model)):
        height, width, _ = model.spec.image_shape
        show.note(f"note: the file does not say how large images are; assuming {height}x{width}")
    common.check_answers(model)
    return model


def search(
    run: Run, model: models.Model, reading: common.Reading, config: margin_scan.Config
) -> dict[str, Any]:
    """The content of scan.json.

    Raises: FloatingPointError if the logits overflow on the images that are searched.
    """
    suspect = models.suspect_of(model)
    spec = model.spec
    names = tuple(spec.class_names or map(str, range(spec.classes)))
    found, why_not = None, ""
    if spec.classes < margins.LEAST_CLASSES:
        why_not = (
            f"a model with {spec.classes} classes has no margins to compare: with two classes, one"
            " margin mirrors the other"
        )
    else:
        overflow = FloatingPointError(
            f"{model.path}: its logits are not finite on some images, so it has no margins to"
            " compare; ask for the file again"
        )
        try:
            found = margin_scan.scan(run, jax.random.key(reading.seed), suspect, config)
        except FloatingPointError:
            raise overflow from None
        if np.isnan(found.outliers.p_value) and found.outliers.measured < spec.classes:
            raise overflow
    content = results.first_answer(
        found,
        why_not,
        config,
        model={**common.model_record(model), "form": forms.parts(spec, model.forms)},
        class_names=names,
        seed=reading.seed,
    )
    return files.plain(content)


def say(content: dict[str, Any]) -> None:
    """Prints what stands out, and the limits of this answer."""
    names = tuple(row["name"] for row in content["classes"])
    show.say(headline(content["margin"], names, content["decided_by"]), BLIND)
    if content["margin"] is not None:
        times = show.seconds(content["margin"]["seconds"])
        show.say(f"{content['margin']['image_steps']} image-steps, {times}, {content['device']}.")


def headline(margin: dict[str, Any] | None, names: tuple[str, ...], why_not: str) -> str:
    """What the margins say, in one sentence."""
    if margin is None:
        return f"INCONCLUSIVE: {why_not}; give --data to search for triggers."
    if margin["p_value"] is None:
        return "INCONCLUSIVE: too few classes have a margin to compare; give --data."
    p_value = f"p = {margin['p_value']:.2g}"
    if margin["classes"]:
        labels = ", ".join(common.class_label(k, names) for k in margin["classes"])
        return f"SUSPICIOUS: class {labels}: the largest margin stands out, {p_value}."
    return f"NOTHING STANDS OUT: no class has an unusual margin, {p_value}."
