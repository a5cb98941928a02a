#!/usr/bin/env bash
# Weak to strong: Llama-2-7B with the 1.1B reference of rho1_math_1b.
# Settings are in the YAML files; examples/launch/launch.sh shows how to run it on one machine, a hostfile or SLURM.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/launch/launch.sh
here=examples/weak_to_strong_7b model=models/llama2_7b out=runs/weak_to_strong_7b
steps_are data reference slm export

if step data; then # text/NAME/* to corpora/llama/NAME_text_document
  tokenize corpora/llama/curated text/curated/*
  tokenize corpora/llama/curated_heldout text/curated_heldout/*
  tokenize corpora/llama/open_web_math text/open_web_math/*
  tokenize corpora/llama/open_web_math_heldout text/open_web_math_heldout/*
fi

if step reference; then
  launch tools/pretrain_slm.py --config examples/rho1_math_1b/reference.yaml # the same run: resumes, or is complete already
fi

if step slm; then
  launch tools/pretrain_slm.py --config "$here/slm.yaml"
fi

if step export; then
  here_only python tools/convert_checkpoint.py export --load "$out/slm/checkpoints" --output "$out/hf"
fi
