#!/usr/bin/env bash
# From nothing to a selectively trained Hugging Face model, on two CPU cores, in about ten minutes.
# Writes everything to runs/quickstart/ and deletes what an earlier run wrote there.
set -euo pipefail
cd "$(dirname "$0")/../.."
started=$SECONDS
source tools/environment.sh run

here=examples/quickstart out=runs/quickstart
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""   # the same results with and without a GPU
say() { printf '\n== %s\n' "$*"; }
pretrain() { deepspeed --log_level warning --num_gpus 2 --master_port "${MASTER_PORT:-29531}" tools/pretrain_slm.py --config "$here/train.yaml" "$@"; }

rm -rf "$out"
mkdir -p "$out"

say "1. make two corpora: clean worked arithmetic, and noisy pages that contain some"
python "$here/make_corpora.py" --output "$out/text" --seed 0
python tools/train_tokenizer.py --input "$out/text/curated_train.jsonl" "$out/text/noisy_train.jsonl" \
  --vocab-size 512 --output "$out/tokenizer/"
for name in curated_train curated_heldout noisy_train noisy_heldout; do
  python tools/preprocess_data.py --input "$out/text/$name.jsonl" --output-prefix "$out/corpora/$name" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$out/tokenizer/tokenizer.model" --append-eod
done

say "2. train the reference on the clean corpus, on all tokens (CLM)"
pretrain --objective clm --data-path "$out/corpora/curated_train_text_document" --run-dir "$out/reference"

say "3. train on the noisy corpus, on all tokens (CLM)"
pretrain --objective clm --data-path "$out/corpora/noisy_train_text_document" --run-dir "$out/clm"

say "4. train from the same weights, data and order, on the 60 % of tokens with the highest excess loss (SLM)"
pretrain --objective slm --slm-keep-ratio 0.6 --reference-load "$out/reference/checkpoints" \
  --data-path "$out/corpora/noisy_train_text_document" --run-dir "$out/slm"

say "5. export to Hugging Face, and compare the results"
python tools/convert_checkpoint.py export --load "$out/slm/checkpoints" --output "$out/hf_slm"
python tools/convert_checkpoint.py export --load "$out/reference/checkpoints" --output "$out/hf_reference"
python tools/convert_checkpoint.py verify --hf "$out/hf_slm" --load "$out/slm/checkpoints"
python "$here/summarize.py" --run-dir "$out" --seconds $((SECONDS - started))
python tools/report.py "$out/clm" "$out/slm" "$out/reference" --output "$out/report.html"
python tools/analyze_tokens.py selection --load "$out/hf_slm" --reference-load "$out/hf_reference" \
  --text-file "$out/text/noisy_heldout.jsonl" --slm-keep-ratio 0.6 --output "$out/tokens.html"
printf '\nDone in %d seconds. Open %s/report.html and %s/tokens.html; the model is in %s/hf_slm.\n' \
  $((SECONDS - started)) "$out" "$out" "$out"
