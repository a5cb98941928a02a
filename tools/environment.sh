# Sourced by the scripts: leaves `python` pointing at an environment that has the package and what "$1" needs.
# An active environment that has them is taken as it is; else .venv in the checkout is made once and reused.
needs="${1:-run}"
extras="" probe="import megatron_slm, deepspeed"
if [ "$needs" = test ]; then
  extras="[test,dev]" probe="$probe, pytest, xdist, megatron.core, ruff, mypy, importlinter"
fi
# Runs outside the checkout: the folder megatron_slm/ beside this file is not an installation.
has_needs() { (cd / && "$1" -W ignore -c "$probe") >/dev/null 2>&1; }

if ! has_needs python; then
  if ! has_needs "$PWD/.venv/bin/python"; then
    echo "installing into $PWD/.venv (once)"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    # torch first and by itself: it is pinned, and nothing else may choose another build of it
    .venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".$extras"
  fi
  export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
fi
