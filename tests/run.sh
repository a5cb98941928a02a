#!/usr/bin/env bash
# Install what is missing and pass the tests: bash tests/run.sh [pytest arguments]
# Uses the active environment if it has the package and pytest, else .venv in the checkout, made when needed.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh test
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
python -m ruff check .
python -m ruff format --check .
python -m mypy
lint-imports --no-cache
# Two workers, a file at a time: fixtures that a file's tests share are made once. In one process: -n 0
exec python -m pytest -n 2 --dist loadfile "$@"
