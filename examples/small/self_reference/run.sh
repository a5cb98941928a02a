#!/usr/bin/env bash
# Selective training with a reference of the same corpus, its losses stored once: minutes on two CPU cores.
# `--fast` does a few steps of everything. What is under runs/self_reference/ already is made again.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=examples/small/self_reference out=runs/self_reference
source examples/small/corpora.sh "$@"

say "1. the reference: plain training on the noisy corpus itself"
launch tools/pretrain_slm.py --config "$here/train.yaml" --objective clm --run-dir "$out/reference" "${shorter[@]}"

say "2. its losses and entropies for the samples that the run will draw, stored once; here on two data-parallel ranks"
launch tools/score_corpus.py --config "$here/train.yaml" --reference-load "$out/reference/checkpoints" \
  --output "$out/scores" --with-entropy --pipeline-model-parallel-size 1 "${shorter[@]}"

say "3. the same corpus, the tokens that are in the lower 70 % by both, without a reference in memory"
launch tools/pretrain_slm.py --config "$here/train.yaml" --objective slm --slm-score reference-loss reference-entropy \
  --slm-combine intersection --slm-combine-ratios 0.7 0.7 --reference-scores "$out/scores" --run-dir "$out/slm" "${shorter[@]}"

say "held-out losses, in nats a token (the reference is plain training of the same length)"
held_out reference slm
