#!/usr/bin/env bash
# Make .venv hold requirements.lock; `make` calls this when the two differ.
#     bash book/tools/env.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
stamp=.venv/.installed # a copy of the lock that was installed last

if cmp -s requirements.lock "$stamp"; then
  touch "$stamp" # only touched, not changed
  exit 0
fi
if ! .venv/bin/python -c '' 2>/dev/null; then
  source book/tools/python.sh
  echo "making .venv with $("$python" --version); the first time takes some minutes"
  "$python" -m venv --clear .venv || {
    echo "error: $python cannot make an environment; install its venv module (such as python3-venv)" >&2
    exit 1
  }
fi
pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)
echo "installing requirements.lock into .venv"
"${pip[@]}" install -r requirements.lock
"${pip[@]}" install --no-deps --no-build-isolation -e .
cp requirements.lock "$stamp"
