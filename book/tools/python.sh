# Sourced by env.sh and lock.sh: `python` becomes the first Python for which all packages of the lock are built. 3.11
# comes first, because it is the one that made the lock.
for python in python3.11 python3.12 python3.13 python3.14 python3 python ''; do
  if [ -z "$python" ]; then
    echo "error: no Python 3.11 to 3.14 found. Install one (for example python3.11), or name one that" >&2
    echo "       holds requirements.lock already: make book PY=/path/to/python" >&2
    exit 1
  fi
  if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then break; fi
done
