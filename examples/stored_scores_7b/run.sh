#!/usr/bin/env bash
# Rho-1-Math-7B from stored scores: the reference reads the corpus once, and every run after that has none.
# Settings are in the YAML files; examples/launch/launch.sh shows how to run it on one machine, a hostfile or SLURM.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/launch/launch.sh
here=examples/stored_scores_7b model=models/mistral_7b out=runs/stored_scores_7b
steps_are data reference score slm export

if step data; then # text/NAME/* to corpora/mistral/NAME_text_document
  tokenize corpora/mistral/curated text/curated/*
  tokenize corpora/mistral/curated_heldout text/curated_heldout/*
  tokenize corpora/mistral/open_web_math text/open_web_math/*
  tokenize corpora/mistral/open_web_math_heldout text/open_web_math_heldout/*
fi

if step reference; then
  launch tools/pretrain_slm.py --config examples/rho1_math_7b/reference.yaml # the same run: resumes, or is complete already
fi

if step score; then
  launch tools/score_corpus.py --config "$here/slm.yaml" --score-dtype bfloat16
fi

if step slm; then
  launch tools/pretrain_slm.py --config "$here/slm.yaml"
fi

if step export; then
  here_only python tools/convert_checkpoint.py export --load "$out/keep_0.7/checkpoints" --output "$out/hf"
fi
