"""The script that installs: quiet unless pip fails."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PIP = """#!/bin/sh
[ "$1" = -c ] && exit 1
echo "WARNING: something about a cache"
exit %d
"""


@pytest.mark.parametrize("code", [0, 3])
def test_what_pip_says_is_shown_only_where_it_fails(tmp_path, code):
    for name in ("pyproject.toml", "scripts/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP % code)
    python.chmod(0o755)
    script = f'set -e; ROOT="{tmp_path}"; . "{ROOT}/scripts/environment.sh"; make_environment ""'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("WARNING" in done.stderr) == (code != 0) and "WARNING" not in done.stdout
    stamped = (tmp_path / ".venv/installed").exists()
    assert stamped == (code == 0), "a failed installation is tried again"
