#!/usr/bin/env bash
# Selective training with a reference several times smaller than the model: minutes on two CPU cores.
# `--fast` does a few steps of everything. What is under runs/weak_to_strong/ already is made again.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=examples/small/weak_to_strong out=runs/weak_to_strong
source examples/small/corpora.sh "$@"

say "1. the reference: plain training of a small model on the clean corpus"
launch tools/pretrain_slm.py --config "$here/reference.yaml" --run-dir "$out/reference" "${shorter[@]}"

say "2. the model on the noisy corpus, all tokens (CLM)"
launch tools/pretrain_slm.py --config "$here/train.yaml" --objective clm --run-dir "$out/clm" "${shorter[@]}"

say "3. the same start, data and order, the 60 % of tokens with the highest excess loss over the small reference (SLM)"
launch tools/pretrain_slm.py --config "$here/train.yaml" --objective slm --slm-keep-ratio 0.6 \
  --reference-load "$out/reference/checkpoints" --run-dir "$out/slm" "${shorter[@]}"

say "held-out losses, in nats a token"
held_out reference clm slm
