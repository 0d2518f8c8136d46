# Sourced by the other scripts: makes .venv with pinned versions. Sets PYTHON (the environment's interpreter).
# $1: extras to install, for example "[test]"; empty for none.

make_environment() {
  local extras="$1" stamp python
  PYTHON="$ROOT/.venv/bin/python"
  python="$(command -v python3.11 || command -v python3 || command -v python)" || {
    echo "jaxbd: no python3 found; install Python 3.11 or newer" >&2; return 2; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "jaxbd: $("$python" --version) is too old; install Python 3.11 or newer" >&2; return 2; }
  if [ ! -x "$PYTHON" ]; then
    echo "making .venv with $("$python" --version)"
    "$python" -m venv "$ROOT/.venv"
  fi
  # one stamp per set of extras; it holds what the installation depended on
  stamp="$ROOT/.venv/installed${extras//[^a-z]/-}"
  if ! cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" | cmp -s - "$stamp"; then
    echo "installing jaxbd$extras with pinned versions (some minutes the first time)"
    if "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
      "$PYTHON" -m pip install --quiet --disable-pip-version-check -e "$ROOT$extras" -c "$ROOT/scripts/constraints.txt"
    else
      # newer Pythons take newer releases, within the bounds of pyproject.toml
      "$PYTHON" -m pip install --quiet --disable-pip-version-check -e "$ROOT$extras"
    fi
    cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" > "$stamp"
  fi
}
