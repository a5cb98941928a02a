#!/usr/bin/env bash
# Build the wheel and the sdist, install the wheel into a fresh environment, and use it outside the checkout.
#   bash tools/check_package.sh [PARENT_SITE]
# PARENT_SITE: a site-packages folder with the dependencies, for machines without a network; the wheel itself is then
# installed without dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/build"
"$work/build/bin/pip" install -q build
git archive --format=tar HEAD | (mkdir "$work/source" && tar -x -C "$work/source")   # committed files only
"$work/build/bin/python" -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || { tail -30 "$work/build.log"; exit 1; }

python3 -m venv "$work/fresh"
if [ -n "${1:-}" ]; then
  echo "$1" >"$("$work/fresh/bin/python" -c 'import site; print(site.getsitepackages()[0])')/parent.pth"
  "$work/fresh/bin/pip" install -q --no-deps --ignore-installed "$work"/dist/*.whl
else
  "$work/fresh/bin/pip" install -q torch==2.13.0
  "$work/fresh/bin/pip" install -q -c constraints.txt "$work"/dist/*.whl
fi

mkdir "$work/empty"
cd "$work/empty"
unset PYTHONPATH
export PATH="$work/fresh/bin:$PATH" OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
scripts=$("$work/fresh/bin/python" -c 'from importlib.metadata import distribution
print(*(e.name for e in distribution("megatron_slm").entry_points if e.group == "console_scripts"))')
[ "$(echo "$scripts" | wc -w)" -gt 10 ]
for script in $scripts; do
  "$work/fresh/bin/$script" --help >/dev/null || { echo "$script --help failed"; exit 1; }
done
"$work/fresh/bin/python" - <<'PY'
import pathlib, numpy, megatron_slm
assert "site-packages" in megatron_slm.__file__, megatron_slm.__file__
assert pathlib.Path(megatron_slm.__file__).with_name("py.typed").is_file()
with megatron_slm.IndexedCorpusWriter("corpus", numpy.uint16) as writer:
    for first in range(40):
        writer.add_document([(first + i) % 50 for i in range(30)])
PY
slm-pretrain --objective clm --num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 \
  --data-path corpus --tokenizer-type NullTokenizer --vocab-size 50 --seq-length 16 --micro-batch-size 2 \
  --global-batch-size 2 --train-iters 2 --lr 1e-3 --run-dir run --save-interval 2
slm-checkpoint list run/checkpoints
echo "package: $(ls "$work/dist" | tr '\n' ' ')built, installed and used; $(echo "$scripts" | wc -w) commands"
