"""Help on one screen, and all of it on demand."""

import re

import numpy as np
import pytest

from jaxbd.cli import brief
from jaxbd.cli.main import main

FLAG = re.compile(r"--[a-z][a-z-]*[a-z]")


def shown(capsys, *words):
    assert main([*words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", brief.HELP)
def test_help_fits_a_screen_and_names_flags_that_there_are(verb, capsys):
    short = shown(capsys, verb, "--help")
    lines = short.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert short.startswith(f"usage: jaxbd {verb} ") and "Example:\n  jaxbd " in short
    every = shown(capsys, verb, "--help-all")
    assert len(every.splitlines()) > len(lines)
    own = "\n".join(line for line in lines if "jaxbd methods" not in line)
    known = {*FLAG.findall(every), "--help", "--help-all", "--method", "--attack"}
    assert set(FLAG.findall(own)) <= known


@pytest.mark.parametrize("verb", brief.HELP)
def test_the_example_of_the_help_can_be_parsed(verb):
    """Its flags and values are such as the verb takes; files need not be there."""
    import importlib

    from jaxbd.cli import parse

    text = brief.HELP[verb].partition("Example:\n")[2].partition("\n\n")[0]
    argv = text.replace("\\\n", " ").split()[2:]
    module = importlib.import_module(f"jaxbd.cli.commands.{verb}")
    kind, default = module.choose(argv) if hasattr(module, "choose") else (module.Args, None)
    parse.parse(kind, argv, f"jaxbd {verb}", default)


def test_help_beside_a_method_is_that_of_the_method(capsys):
    assert brief.of("scan", ["--method", "pairs", "--help"]) is None
    assert brief.of("scan", ["--method=pairs", "-h"]) is None
    assert brief.of("scan", ["model.pth", "-h"]) == brief.SCAN
    assert brief.of("scan", ["model.pth"]) is None and brief.of("demo", ["--help"]) is None
    assert brief.of("repair", ["--help", "--help-all"]) is None
    assert brief.spell_out(["--help-all", "m"]) == ["--help", "m"]


def test_classes_that_no_image_shows_are_told():
    from types import SimpleNamespace
    from typing import Any

    from jaxbd.base import Dataset
    from jaxbd.cli import common

    def say(labels, classes):
        model: Any = SimpleNamespace(spec=SimpleNamespace(classes=classes))
        images = np.zeros((len(labels), 2, 2, 1), np.uint8)
        return common._describe_classes(Dataset(images, np.array(labels), (), "d"), model)

    assert say([0, 1, 2, 1], 3) == ()
    told = "the model has 4 classes, the images show 2 of them (none of 1, 3)"
    assert say([0, 2, 2], 4) == (told,)
    assert say([0], 43)[0].endswith("(none of 1, 2, 3, 4, 5, 6, 7, 8, …)")
