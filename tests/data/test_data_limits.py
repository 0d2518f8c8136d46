"""Hostile files of images: refused in one line, little time and little memory."""

import json
import os
import subprocess
import sys

import hostile_data
import pytest

MEGABYTES, SECONDS = 400, 2
"""More than what importing takes; CPU seconds of the reading process."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{case: (what was said, CPU seconds, megabytes by which the process grew)}, from one process
    of its own, since memory that was once used is not given back."""
    command = [sys.executable, hostile_data.__file__, str(tmp_path_factory.mktemp("hostile"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"TMPDIR": str(tmp_path_factory.mktemp("tmp"))}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = map(json.loads, ran.stdout.splitlines())
    return {name: tuple(rest) for name, *rest in rows}


@pytest.mark.parametrize("name", hostile_data.CASES)
def test_hostile_files_of_images(answers, name):
    said, seconds, megabytes = answers[name]
    assert said.startswith("refused: ") and "\n" not in said, said
    assert seconds < SECONDS and megabytes < MEGABYTES, (said, seconds, megabytes)


def test_all_of_them_together_stay_small(answers):
    assert sum(megabytes for _, _, megabytes in answers.values()) < MEGABYTES
