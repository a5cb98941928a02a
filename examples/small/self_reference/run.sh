#!/usr/bin/env bash
# Selective training with a reference of the same corpus, its losses stored once: minutes on two CPU cores.
# `--fast` runs a few steps of everything. Deletes what an earlier run wrote to runs/self_reference/.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=examples/small/self_reference out=runs/self_reference
source examples/small/corpora.sh "$@"

say "1. train the reference on the noisy corpus itself, on all tokens"
launch tools/pretrain_slm.py --config "$here/train.yaml" --objective clm --run-dir "$out/reference" "${shorter[@]}"

say "2. store its losses and entropies for the samples that the run will draw, on two data-parallel ranks"
launch tools/score_corpus.py --config "$here/train.yaml" --reference-load "$out/reference/checkpoints" \
  --output "$out/scores" --with-entropy --pipeline-model-parallel-size 1 "${shorter[@]}"

say "3. train on the same corpus, on the tokens in the lower 70 % of both, without a reference in memory"
launch tools/pretrain_slm.py --config "$here/train.yaml" --objective slm --slm-score reference-loss reference-entropy \
  --slm-combine intersection --slm-combine-ratios 0.7 0.7 --reference-scores "$out/scores" --run-dir "$out/slm" "${shorter[@]}"

say "held-out losses in nats per token (the reference trained on all tokens for the same number of steps)"
held_out reference slm
