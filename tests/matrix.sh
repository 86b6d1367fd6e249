#!/usr/bin/env bash
# The suite with the oldest supported transformers and with the newest on PyPI: tests/matrix.sh [PYTEST WORDS]
set -euo pipefail
cd "$(dirname "$0")/.."
oldest=$(sed -n 's/^ *"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
mkdir -p .matrix
sed '/^transformers==/d' constraints.txt > .matrix/constraints.txt
failed=0
for wanted in "transformers==$oldest.*" "transformers>=$oldest"; do
    home=.matrix/$([ "$wanted" = "transformers>=$oldest" ] && echo newest || echo oldest)
    [ -x "$home/bin/python" ] || "${PYTHON:-python3}" -m venv "$home"
    "$home/bin/python" -m pip install -q -U -c .matrix/constraints.txt -e '.[test]' "$wanted"
    echo "== $("$home/bin/python" -m pip list 2> /dev/null | grep -E '^transformers ')"
    OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -n 2 --dist worksteal -q "$@" || failed=1
done
exit $failed
