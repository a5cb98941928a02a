# Sourced by the recipes' run.sh: parses the steps to run, and defines `launch` for one machine, a hostfile, or SLURM.
#
#   bash examples/RECIPE/run.sh                          every step, on all GPUs of this machine
#   bash examples/RECIPE/run.sh slm --lr 4e-5            one step, with flags that override the recipe's
#   HOSTFILE=hosts bash examples/RECIPE/run.sh slm       on the machines of a DeepSpeed hostfile ("node1 slots=8" a line)
#   sbatch --nodes 4 examples/launch/slurm.sbatch RECIPE slm
#   NODES=4 GPU=h100 bash examples/RECIPE/run.sh plan    layout, memory and time, without GPUs, weights or corpora;
#                                                        `plan slm` for one step
#
# GPUS: GPUs per machine (default: all; 8 in a plan). NODES, GPU: machines and GPU model of a plan. MASTER_PORT: a free
# port (default 29500). The checkout, with its models/, corpora/ and runs/, must have the same path on all machines.

export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
steps=() flags=()
for word in "$@"; do
  if [ ${#flags[@]} -eq 0 ] && [[ "$word" != --* ]]; then steps+=("$word"); else flags+=("$word"); fi
done
planning=""
if [ "${steps[0]:-}" = plan ]; then planning=1 steps=("${steps[@]:1}"); fi
source tools/environment.sh run

# `steps_are data reference slm export` declares a recipe's steps, in order, and rejects others.
steps_are() {
  local asked
  for asked in "${steps[@]}"; do
    case " $* " in
      *" $asked "*) ;;
      *) printf "error: step is '%s': must be one of plan %s. Fix: name a step of this recipe\n" "$asked" "$*" >&2; exit 2 ;;
    esac
  done
  if [ ${#steps[@]} -eq 0 ]; then steps=("$@"); fi
}

# A plan prints the heading of a step with what it plans of it; of steps that need no plan it prints nothing.
step() {
  case " ${steps[*]} " in *" $1 "*) heading="$1" ;; *) return 1 ;; esac
  if [ -z "$planning" ]; then printf '\n== %s\n' "$heading"; fi
}

# Runs a command on this machine, without GPUs; skipped in a plan.
here_only() { if [ -z "$planning" ]; then "$@"; fi; }

# `tokenize PREFIX FILE...`: JSON lines (plain, .gz, .zst) or Parquet to PREFIX_text_document, with the model's tokenizer.
tokenize() {
  local prefix="$1"
  shift
  if [ -e "${prefix}_text_document.meta.json" ]; then return; fi # complete; an interrupted one resumes below
  here_only python tools/preprocess_data.py --input "$@" --output-prefix "$prefix" --append-eod \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$model" --workers "${WORKERS:-$(nproc)}"
}

launch() {
  local port="${MASTER_PORT:-29500}"
  if [ -n "$planning" ]; then
    plan "$@"
    return
  elif [ -n "${SLURM_JOB_ID:-}" ]; then
    launch_on_slurm "$port" "$@"
  elif [ -n "${HOSTFILE:-}" ]; then
    deepspeed --hostfile "$HOSTFILE" --master_port "$port" "$@" "${flags[@]}"
  else
    deepspeed ${GPUS:+--num_gpus "$GPUS"} --master_port "$port" "$@" "${flags[@]}"
  fi
  if [ "$1" = tools/pretrain_slm.py ]; then end_if_stopped "$@"; fi
}

# Starts one launcher per node, without ssh.
launch_on_slurm() {
  local port="$1" run first code=0
  shift
  mkdir -p runs
  if [ "$1" = tools/pretrain_slm.py ]; then # the only command that can be asked to stop
    run="$(run_state folder "$@")"
    rm -f "$run/STOP" # left by a request that came too late
    printf '%s\n' "$run" > "runs/current.$SLURM_JOB_ID" # for the batch script, which may have to stop the run
  fi
  first="$(hostname)"
  scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}/" > "runs/hosts.$SLURM_JOB_ID"
  srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --kill-on-bad-exit=1 \
    bash -c 'exec deepspeed --no_ssh --node_rank "$SLURM_NODEID" "$@"' launcher \
    --hostfile "runs/hosts.$SLURM_JOB_ID" --master_addr "$first" --master_port "$port" "$@" "${flags[@]}" || code=$?
  rm -f "runs/current.$SLURM_JOB_ID"
  if [ "$code" -ne 0 ]; then exit "$code"; fi
}

# `run_state folder|stopped tools/pretrain_slm.py --config FILE`: state of the run with these flags.
run_state() { python examples/launch/run_state.py "$1" "${@:3}" "${flags[@]}"; }

# A run that was asked to stop exits with 0 too; the next step must not use its incomplete result.
end_if_stopped() {
  local progress
  progress="$(run_state stopped "$@")"
  if [ -n "$progress" ]; then
    printf '%s\n' "$progress"
    exit 0
  fi
}

plan() {
  local nodes="${NODES:-1}" gpus="${GPUS:-8}" script="$1" speed="" code=0
  shift
  if [ "$script" != tools/pretrain_slm.py ]; then
    printf '\n== %s (%s is not planned)\n' "$heading" "$script"
    return
  fi
  printf '\n== %s: %s\n' "$heading" "$*"
  if [ -n "${GPU:-}" ]; then # beside the dry run: both take seconds to start
    speed="$(mktemp)"
    DS_ACCELERATOR=cpu python tools/plan.py layout --nodes "$nodes" --gpus-per-node "$gpus" --gpu "$GPU" "$@" \
      "${flags[@]}" > "$speed" 2>&1 &
  fi
  DS_ACCELERATOR=cpu WORLD_SIZE=$((nodes * gpus)) python "$script" "$@" "${flags[@]}" --dry-run --without-files || code=$?
  if [ -n "$speed" ]; then
    if [ "$code" -ne 0 ]; then
      wait $! || true # the dry run's error says it all
    else
      wait $! || code=$?
      cat "$speed"
    fi
    rm -f "$speed"
  fi
  return "$code"
}
