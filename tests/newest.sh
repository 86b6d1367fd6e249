#!/usr/bin/env bash
# The suite with the newest transformers on PyPI, laid over the libraries of .venv: tests/newest.sh [PYTEST WORDS].
# `make matrix` does the same, and with the oldest, each in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
home=.matrix/beside
[ -x "$home/bin/python" ] || "$python" -m venv "$home"
site=$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
{
    pwd  # an editable install's own .pth is not read from a folder that is added so
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
} > "$site/libraries.pth"
"$home/bin/python" -m pip install -q -U --upgrade-strategy only-if-needed transformers
echo "== $("$home/bin/python" -c 'import transformers; print("transformers", transformers.__version__)')"
OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -n 2 --dist worksteal -q "$@"
