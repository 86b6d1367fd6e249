#!/usr/bin/env bash
# The wheel: built twice with equal bytes, then installed where there is no checkout: --help, list, show, a short run.
# With --alone pip fetches all that it needs; otherwise the libraries are those of .venv (or of $PYTHON).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
commit=$(git rev-parse HEAD)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct "$commit")
export SOURCE_DATE_EPOCH OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

for copy in 1 2; do  # each from a tree of its own, as the commit has it
    mkdir "$work/tree-$copy"
    git archive "$commit" | tar -x -C "$work/tree-$copy"
    "$python" -m pip wheel -q --no-deps -w "$work/$copy" "$work/tree-$copy"
done
cmp "$work"/1/*.whl "$work"/2/*.whl
sha256sum "$work"/1/*.whl | sed "s|$work/1/||"

"$python" -m venv "$work/venv"
if [ "${1:-}" = --alone ]; then
    "$work/venv/bin/python" -m pip install -q -c constraints.txt "$work"/1/*.whl
else
    site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$work/venv/bin/python" -m pip install -q --no-deps "$work"/1/*.whl
    # A folder added so has its own .pth files left unread, an editable install of the checkout among them.
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/libraries.pth"
fi

cd "$work"
linearize="$work/venv/bin/linearize"
"$linearize" --help > help.txt
grep -q unconvert help.txt
"$linearize" list recipes | grep -q '^quickstart '
"$linearize" show llama-3.2-1b/lolcats | grep -q '^teacher:'
"$linearize" run books-5m/lolcats --output run --json transfer.tokens=4096 finetune.tokens=4096 data.seq_len=256 \
    'data.sources=[{kind: self, tokens: 8000}]' 'evaluate.seq_lens=[256]' evaluate.sequences=2 'evaluate.recall_lens=[256]' \
    evaluate.recall_samples=2 evaluate.generate_tokens=8 evaluate.gates=false method.window=16 \
    control.enabled=false > run.txt 2> log.txt || { cat log.txt; exit 1; }
tail -1 run.txt | "$work/venv/bin/python" -c 'import json, sys; assert json.load(sys.stdin)["results"]'
"$work/venv/bin/python" -c 'import linearize; print("the wheel runs from", linearize.__file__.split("/lib/")[-1])'
