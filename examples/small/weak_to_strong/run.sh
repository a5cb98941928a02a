#!/usr/bin/env bash
# Selective training with a reference several times smaller than the model: minutes on two CPU cores.
# `--fast` runs a few steps of everything. Deletes what an earlier run wrote to runs/weak_to_strong/.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=examples/small/weak_to_strong out=runs/weak_to_strong
source examples/small/corpora.sh "$@"

say "1. train the reference, a small model, on the clean corpus, on all tokens"
launch tools/pretrain_slm.py --config "$here/reference.yaml" --run-dir "$out/reference" "${shorter[@]}"

say "2. train the model on the noisy corpus, on all tokens (CLM)"
launch tools/pretrain_slm.py --config "$here/train.yaml" --objective clm --run-dir "$out/clm" "${shorter[@]}"

say "3. train from the same weights, data and order, on the 60 % of tokens with the highest excess loss (SLM)"
launch tools/pretrain_slm.py --config "$here/train.yaml" --objective slm --slm-keep-ratio 0.6 \
  --reference-load "$out/reference/checkpoints" --run-dir "$out/slm" "${shorter[@]}"

say "held-out losses in nats per token"
held_out reference clm slm
