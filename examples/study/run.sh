#!/usr/bin/env bash
# The paper's comparison with the controls it lacks, three seeds, on synthetic corpora: about an hour on two CPU cores.
# `--fast` runs a few steps of a few runs, with one seed. Finished runs are skipped: call it again to resume the study.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/study out=runs/study
if [ "${1:-}" = --fast ]; then out=runs/study_fast; rm -rf "$out"; fi
source tools/environment.sh run
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""   # the same results with and without a GPU
say() { printf '\n== %s\n' "$*"; }

if [ ! -e "$out/corpora/done" ]; then
  say "1. make corpora with known clean and noisy tokens, and a tokenizer"
  rm -rf "$out"
  python "$here/corpora.py" --output "$out/text" --seed 0
  python tools/train_tokenizer.py --input "$out/text/curated_train.jsonl" "$out/text/web_train.jsonl" \
    --vocab-size 512 --output "$out/tokenizer/"
  for name in web_train curated_train curated_heldout noisy_train noisy_heldout; do
    python tools/preprocess_data.py --input "$out/text/$name.jsonl" --output-prefix "$out/corpora/$name" \
      --tokenizer-type SentencePieceTokenizer --tokenizer-model "$out/tokenizer/tokenizer.model" --append-eod
  done
  touch "$out/corpora/done"
fi

say "2. train all runs"
python "$here/study.py" train --out "$out" "$@"
say "3. analyze the finished runs"
python "$here/study.py" results --out "$out" "$@"
