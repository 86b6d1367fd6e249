#!/usr/bin/env bash
# What leans on transformers most, with the newest one on PyPI laid over the libraries of .venv: about a minute. The whole
# suite with it, and with the oldest, each in an environment of its own, is `make matrix`.
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
OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -n 2 --dist worksteal -q \
    tests/test_contract.py tests/test_generation.py tests/test_checkpoint.py tests/test_serve.py \
    -k "(any_split and mixed) or known_by or greedy_left or every_family_reloads or pipeline" "$@"
