#!/usr/bin/env bash
# Write requirements.lock: a fresh environment, every extra but vision, and what pip then holds.
#     make lock
set -euo pipefail
torch=2.13.0
extras="book data scores compact bench dev"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source book/tools/python.sh

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
"$python" -m venv "$room/venv"
pip=("$room/venv/bin/python" -m pip --disable-pip-version-check)
wanted=$("$python" - $extras <<'END'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *(r for e in sys.argv[1:] for r in project["optional-dependencies"][e]), sep="\n")
END
)
"${pip[@]}" install --quiet "torch==$torch" setuptools -r <(echo "$wanted")
"${pip[@]}" check

# pip, and what torch brings for a GPU, are not ours to pin; a build label such as +cpu belongs to one
# machine. setuptools is there to install our own package from the checkout.
{
  echo "# The exact packages of the book, its tests and its data: pyproject.toml with the extras"
  echo "# $extras. Made by 'make lock' with Python $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')."
  "${pip[@]}" freeze --all --exclude pip |
    grep -viE '^(nvidia|triton|cuda)' | sed -E 's/\+[a-z0-9.]+$//; s/ @ .*//' | LC_ALL=C sort -f
} >"$room/lock"
if grep -vqE '^(#.*|[A-Za-z0-9._-]+==[^ ]+)$' "$room/lock"; then
  echo "error: a line of the new lock is no exact pin:" >&2
  grep -vE '^(#.*|[A-Za-z0-9._-]+==[^ ]+)$' "$room/lock" >&2
  exit 1
fi
cp "$room/lock" requirements.lock.part
mv requirements.lock.part requirements.lock
echo "requirements.lock: $(grep -c == requirements.lock) packages"
