#!/usr/bin/env bash
# Rho-1-1B: a reference on curated general text, then 80B tokens of web, code and mathematics.
# Settings are in the YAML files; examples/launch/launch.sh shows how to run it on one machine, a hostfile or SLURM.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/launch/launch.sh
here=examples/rho1_general_1b model=models/tinyllama_1.1b out=runs/rho1_general_1b
steps_are data reference slm export

if step data; then # text/NAME/* to corpora/llama/NAME_text_document
  tokenize corpora/llama/general_curated text/general_curated/*
  tokenize corpora/llama/general_curated_heldout text/general_curated_heldout/*
  tokenize corpora/llama/slimpajama text/slimpajama/*
  tokenize corpora/llama/starcoder text/starcoder/*
  tokenize corpora/llama/open_web_math text/open_web_math/*
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
