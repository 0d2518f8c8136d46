# Sourced by the other scripts: makes an environment with jaxbd in it. Sets PYTHON, its interpreter.
# $1: extras to install, for example "[test]"; empty for none.
# $2: a Python version such as 3.12, whose environment is .venv-3.12; without it .venv, of Python 3.11 if there is one.

find_python() {
  # prints an interpreter of version $1 that starts: one on the PATH (a shim there may not), or one of pyenv's
  local found
  for found in $(type -ap "python$1") "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python"$1"; do
    if "$found" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      echo "$found"
      return 0
    fi
  done
  return 1
}

# pip with these arguments; what it says, warnings too, is shown only where it fails.
install_quietly() {
  local code=0 log="${PYTHON%/bin/python}/pip.log"
  "$PYTHON" -m pip install --disable-pip-version-check "$@" > "$log" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    cat "$log" >&2
    echo "jaxbd: the installation failed (exit code $code); pip's log above is also in $log" >&2
  fi
  return "$code"
}

make_environment() {
  local extras="$1" version="${2:-}" venv stamp python
  venv="$ROOT/.venv${version:+-$version}"
  PYTHON="$venv/bin/python"
  if [ -n "$version" ]; then
    python="$(find_python "$version")" || {
      echo "jaxbd: no Python $version found; install it, or put it on the PATH" >&2; return 2; }
  else
    python="$(command -v python3.11 || command -v python3 || command -v python)" || {
      echo "jaxbd: no python3 found; install Python 3.11 or newer" >&2; return 2; }
  fi
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "jaxbd: $("$python" --version) is too old; install Python 3.11 or newer" >&2; return 2; }
  if [ ! -x "$PYTHON" ]; then
    echo "making $(basename "$venv") with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  # one stamp per set of extras; it holds what the installation depended on
  stamp="$venv/installed${extras//[^a-z]/-}"
  if ! cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" | cmp -s - "$stamp"; then
    if "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
      echo "installing jaxbd$extras with pinned versions (some minutes the first time)"
      # what jaxbd runs on comes with its hashes; what only tests need is pinned by version
      install_quietly --require-hashes -r "$ROOT/scripts/locks/runtime-py311.txt"
      install_quietly -e "$ROOT$extras" -c "$ROOT/scripts/constraints.txt"
    else
      echo "installing jaxbd$extras with the newest versions (some minutes the first time)"
      # newer Pythons take newer releases, within the bounds of pyproject.toml
      install_quietly --upgrade -e "$ROOT$extras"
    fi
    cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" > "$stamp"
  fi
}
