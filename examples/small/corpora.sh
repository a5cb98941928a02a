# Sourced by the recipes in this folder: makes the quickstart's two corpora and a tokenizer under "$out", and defines
# `launch`. With the argument `--fast` every run takes a few steps on little text, as a smoke test.
source tools/environment.sh run
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""   # the same results with and without a GPU

say() { printf '\n== %s\n' "$*"; }
launch() { deepspeed --log_level warning --num_gpus 2 --master_port "${MASTER_PORT:-29541}" "$@"; }
held_out() { for run in "$@"; do grep '"event": "eval"' "$out/$run/metrics.jsonl" | tail -n 2 | sed "s|^|$run  |"; done; }

documents=() shorter=()
if [ "${1:-}" = --fast ]; then
  documents=(--curated-documents 600 --noisy-documents 400 --heldout-documents 40)
  shorter=(--train-iters 4 --save-interval 4 --lr-warmup-iters 1)
fi

rm -rf "$out"
mkdir -p "$out"
say "make two corpora: clean worked arithmetic, and noisy pages that contain some"
python examples/quickstart/make_corpora.py --output "$out/text" --seed 0 "${documents[@]}"
python tools/train_tokenizer.py --input "$out/text/curated_train.jsonl" "$out/text/noisy_train.jsonl" \
  --vocab-size 512 --output "$out/tokenizer/"
for name in curated_train curated_heldout noisy_train noisy_heldout; do
  python tools/preprocess_data.py --input "$out/text/$name.jsonl" --output-prefix "$out/corpora/$name" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$out/tokenizer/tokenizer.model" --append-eod
done
