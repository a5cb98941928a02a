#!/usr/bin/env bash
# Rho-1-Math-1B: a reference on curated mathematics, then 15B tokens of OpenWebMath.
# Settings are in the YAML files; examples/launch/launch.sh shows how to run it on one machine, a hostfile or SLURM.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/launch/launch.sh
here=examples/rho1_math_1b model=models/tinyllama_1.1b out=runs/rho1_math_1b
steps_are data reference slm export

if step data; then # text/NAME/* to corpora/llama/NAME_text_document
  tokenize corpora/llama/curated text/curated/*
  tokenize corpora/llama/curated_heldout text/curated_heldout/*
  tokenize corpora/llama/open_web_math text/open_web_math/*
  tokenize corpora/llama/open_web_math_heldout text/open_web_math_heldout/*
fi

if step reference; then
  launch tools/pretrain_slm.py --config "$here/reference.yaml"
fi

if step slm; then
  launch tools/pretrain_slm.py --config "$here/slm.yaml"
fi

if step export; then
  here_only python tools/convert_checkpoint.py export --load "$out/slm/checkpoints" --output "$out/hf"
fi
