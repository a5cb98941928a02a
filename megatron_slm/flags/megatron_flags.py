"""Flags of Megatron-LM that this package does not have, each with the way over.

Used by the error for unknown flags and by docs/from-megatron.md, which is generated from these tables.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["called", "not needed", "not supported"]


class MegatronFlag(NamedTuple):
    """A training argument of Megatron-LM."""

    kind: Kind
    """`called`: exists under another name; `not needed`: can be removed; `not supported`: cannot be had."""
    text: str
    """The way over, as a clause without a full stop."""


_CALLED = {
    "use-flash-attn": "--attention-backend flash (auto uses flash-attn where it is installed)",
    "wandb-project": 'the section "wandb" of the DeepSpeed JSON (docs/metrics.md)',
    "wandb-exp-name": 'the section "wandb" of the DeepSpeed JSON (docs/metrics.md)',
    "wandb-save-dir": "--run-dir",
    "tensorboard-dir": "--run-dir (TensorBoard is in its folder tensorboard/)",
    "wandb-entity": 'the section "wandb" of the DeepSpeed JSON (docs/metrics.md)',
    "tensorboard-log-interval": "--log-interval",
    "logging-level": "--quiet",
    "config-logger-dir": "--run-dir (its config.yaml)",
    "yaml-cfg": "--config",
    "timing-log-option": "--timing-log-level (least and most of all ranks)",
    "distributed-backend": "the choice of device: NCCL on GPUs, gloo on CPUs",
    "recompute-activations": "--recompute-granularity selective",
    "checkpoint-activations": "--recompute-granularity full",
    "checkpoint-num-layers": "--recompute-granularity full --recompute-num-layers N",
    "use-torch-fsdp2": "ds_configs/zero3_bf16.json with --deepspeed-config",
    "use-megatron-fsdp": "ds_configs/zero3_bf16.json with --deepspeed-config",
    "data-parallel-sharding-strategy": "the ZeRO stage of --deepspeed-config",
    "torch-fsdp2-no-reshard-after-forward": "ds_configs/zero2_bf16.json with --deepspeed-config",
    "optimizer-cpu-offload": "ds_configs/zero3_offload.json with --deepspeed-config",
    "optimizer-offload-fraction": "ds_configs/zero3_offload.json with --deepspeed-config",
    "use-torch-optimizer-for-cpu-offload": "ds_configs/zero3_offload.json with --deepspeed-config",
    "overlap-cpu-optimizer-d2h-h2d": "ds_configs/zero3_offload.json with --deepspeed-config",
    "grad-reduce-in-bf16": 'communication_data_type "bf16" in the DeepSpeed JSON',
    "distributed-timeout-seconds-after-init": "--distributed-timeout-minutes",
    "batch-size": "--micro-batch-size",
    "model-parallel-size": "--tensor-model-parallel-size",
    "warmup": "--lr-warmup-iters",
    "lr-wsd-decay-samples": "--lr-wsd-decay-iters",
    "lr-wsd-decay-style": "--lr-wsd-decay-iters (the decay is linear)",
    "lr-decay-samples": "--train-iters",
    "lr-warmup-samples": "--lr-warmup-iters",
    "lr-warmup-fraction": "--lr-warmup-iters",
    "train-samples": "--train-iters (samples / --global-batch-size)",
    "save-retain-n": "--keep-last",
    "persistent-save-interval": "--save-interval",
    "use-persistent-ckpt-worker": "--async-save",
    "ckpt-step": "--load with the folder of one checkpoint (RUN_DIR/checkpoints/step_00000500)",
    "finetune": "--init-from (weights without the optimizer) in place of --load",
    "no-load-optim": "--init-from CHECKPOINT in place of --load: weights without optimizer, step and data position",
    "no-load-rng": "--init-from CHECKPOINT in place of --load",
    "pretrained-checkpoint": "--init-from",
    "load-main-params-from-ckpt": "--init-from",
    "ckpt-convert-format": "slm-convert export",
    "ckpt-convert-save": "slm-convert export --output",
    "tokenizer-path": "--tokenizer-model",
    "vocab-file": "--tokenizer-model",
    "merge-file": "--tokenizer-model",
    "padded-vocab-size": "--make-vocab-size-divisible-by",
    "vocab-extra-ids": "slm-convert import, which adds the tokens of another tokenizer",
    "tiktoken-pattern": "the flag of slm-preprocess with this name",
    "tiktoken-num-special-tokens": "the flag of slm-preprocess with this name",
    "tiktoken-special-tokens": "the flag of slm-preprocess with this name",
    "sft": "slm-preprocess, which masks prompts (docs/corpora.md)",
    "sft-tokenizer-prompt-format": "slm-preprocess, which masks prompts (docs/corpora.md)",
    "multiple-validation-sets": "--valid-data-path NAME=PREFIX ..., each evaluated by itself",
    "full-validation": "--eval-iters",
    "object-storage-cache-path": "--data-cache-path",
    "log-throughput": "metrics.jsonl, which always has tflops_per_device, mfu and tokens_per_second",
    "log-progress": "metrics.jsonl",
    "log-timers-to-tensorboard": "--timing-log-level (always written to TensorBoard too)",
    "use-pytorch-profiler": "--profile-step-start",
    "profile": "--profile-step-start",
    "normalization": "RMSNorm, the only one; --norm-epsilon",
    "position-embedding-type": "rotary embeddings, the only kind; --rotary-base, --rope-scaling",
    "rotary-scaling-factor": "--rope-scaling",
    "rotary-seq-len-interpolation-factor": "--rope-scaling",
    "rope-type": "--rope-scaling",
    "rope-scaling-factor": "--rope-scaling",
    "use-rope-scaling": "--rope-scaling",
    "group-query-attention": "--num-query-groups",
    "weight-decay-incr-style": "--weight-decay, constant",
    "exit-signal-handler": "SIGTERM, SIGUSR1 or SIGINT to any rank, always handled",
    "exit-signal": "SIGTERM, SIGUSR1 or SIGINT",
    "rerun-mode": "slm-replay",
    "error-injection-rate": "slm-replay (there is no injection)",
    "error-injection-type": "slm-replay (there is no injection)",
    "result-rejected-tracker-filename": "slm-replay",
    "rampup-batch-size": "--step-batch-size-schedule",
    "check-for-spiky-loss": "--loss-spike-sigmas",
    "check-for-large-grads": "--loss-spike-sigmas",
    "no-check-for-nan-in-loss-and-grad": "--max-skipped-steps (non-finite steps are always skipped)",
    "micro-batch-size-per-rank": "--micro-batch-size",
    "world-size": "the launcher",
    "context-length": "--seq-length",
    "encoder-seq-length": "--seq-length",
    "decoder-seq-length": "--seq-length",
    "encoder-num-layers": "--num-layers",
    "decoder-num-layers": "--num-layers",
    "deepspeed": "--deepspeed-config (DeepSpeed is always on)",
    "zero-stage": "--deepspeed-config",
}
_NOT_NEEDED = {
    "always on": (
        "swiglu use-mcore-models use-distributed-optimizer overlap-grad-reduce disable-bias-linear "
        "no-position-embedding use-rotary-position-embeddings accumulate-allreduce-grads-in-fp32 "
        "check-for-nan-in-loss-and-grad use-checkpoint-args use-checkpoint-opt_param-scheduler "
        "log-memory-to-tensorboard log-validation-ppl-to-tensorboard log-world-size-to-tensorboard "
        "log-learning-rate-to-tensorboard log-batch-size-to-tensorboard ckpt-fully-parallel-save "
        "ckpt-fully-parallel-load ckpt-assume-constant-structure dist-ckpt-format use-dist-ckpt "
        "auto-detect-ckpt-format mmap-bin-files no-mmap-bin-files attention-softmax-in-fp32 "
        "calculate-per-token-loss no-log-loss-scale-to-tensorboard use-mp-args-from-checkpoint-args "
        "no-use-tokenizer-model-from-checkpoint-args"
    ),
    "chosen by the backends found at start": (
        "transformer-impl masked-softmax-fusion no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion "
        "bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion apply-rope-fusion cross-entropy-loss-fusion "
        "cross-entropy-fusion-impl no-gradient-accumulation-fusion gradient-accumulation-fusion "
        "no-persist-layer-norm use-fused-rmsnorm use-nccl-ub delay-wgrad-compute "
        "align-param-gather align-grad-reduce overlap-param-gather ddp-bucket-size ddp-num-buckets "
        "ddp-average-in-collective no-async-tensor-model-parallel-allreduce overlap-p2p-communication "
        "no-overlap-p2p-communication batch-p2p-communication empty-unused-memory-level "
        "overlap-p2p-communication-warmup-flush pipeline-model-parallel-comm-backend no-align-grad-reduce "
        "no-align-param-gather no-scatter-gather-tensors-in-pipeline use-ring-exchange-p2p use-te-activation-func "
        "overlap-param-gather-with-optimizer-step defer-embedding-wgrad-compute wgrad-deferral-limit "
        "no-gradient-reduce-div-fusion no-clone-scatter-output-in-embedding use-fused-weighted-squared-relu "
        "disable-bf16-reduced-precision-matmul train-sync-interval high-priority-stream-groups no-pin-cpu-grads "
        "no-pin-cpu-params symmetric-ar-type"
    ),
    "no dropout is applied": "attention-dropout hidden-dropout lora-dropout",
    "the engine sizes its buffers itself": (
        "variable-seq-lengths initial-loss-scale-window fsdp-double-buffer suggested-communication-unit-size "
        "num-distributed-optimizer-instances enable-full-sharding-in-hsdp tensorboard-queue-size"
    ),
    "nothing is built lazily": "lazy-mpu-init no-initialization use-cpu-initialization init-model-with-meta-device",
    "clean-up is automatic": "manual-gc manual-gc-interval no-manual-gc-eval",
    "data loading has no choice of kind": (
        "dataloader-type no-create-attention-mask-in-dataloader num-dataset-builder-threads mid-level-dataset-surplus "
        "allow-ambiguous-pad-tokens"
    ),
    "reports come from slm-report": "log-params-norm log-num-zeros-in-grad log-energy",
    "slow ranks are always measured (docs/metrics.md)": (
        "log-straggler disable-straggler-on-startup straggler-ctrlr-port straggler-minmax-count "
        "no-barrier-with-level-1-timing run-workload-inspector-server"
    ),
    "checkpoints record it": "ckpt-format dist-ckpt-strictness no-save-optim no-save-rng",
    "checkpoints have one format, for every layout": (
        "no-ckpt-fully-parallel-save dist-ckpt-save-pre-mcore-014 dist-ckpt-optim-fully-reshardable "
        "distrib-optim-fully-reshardable-mem-efficient no-strict-fsdp-dtensor-load "
        "ckpt-convert-update-legacy-dist-opt-format use-legacy-models"
    ),
    "tokenizers have one interface": "tokenizer-metadata legacy-tokenizer",
    "process groups are made as needed": "disable-gloo-process-groups use-tp-pp-dp-mapping",
    "it is part of NVIDIA's own services": (
        "no-one-logger app-tag-run-name app-tag-run-version adlr-autoresume adlr-autoresume-interval disable-msc"
    ),
}
_NOT_SUPPORTED = {
    "fp16 training (use --bf16 or fp32)": (
        "fp16 loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis fp16-lm-cross-entropy "
        "apply-query-key-layer-scaling"
    ),
    "fp8 and fp4 training": (
        "no-fp8-wgrad transformer-engine-fp8 first-last-layers-bf16 num-layers-at-start-in-bf16 "
        "num-layers-at-end-in-bf16 keep-fp8-transpose-cache reuse-grad-buf-for-mxfp8-param-ag"
    ),
    "interleaved (virtual) pipeline stages; the reference fills the idle slots (--reference-schedule)": (
        "num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank "
        "microbatch-group-size-per-virtual-pipeline-stage pipeline-model-parallel-layout "
        "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers "
        "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split"
    ),
    "other ways of context parallelism (keys and values are gathered over --context-parallel-size)": (
        "cp-comm-type hierarchical-context-parallel-sizes context-parallel-method"
    ),
    "mixture of experts": (
        "num-experts expert-model-parallel-size expert-tensor-parallel-size overlap-moe-expert-parallel-comm"
    ),
    "multi-latent attention": (
        "multi-latent-attention q-lora-rank kv-lora-rank qk-pos-emb-head-dim qk-head-dim v-head-dim mscale "
        "mscale-all-dim cache-mla-latents"
    ),
    "a choice of recomputed modules (use --recompute-granularity selective)": (
        "recompute-modules distribute-saved-activations cpu-offloading-num-layers"
    ),
    "batches of other sizes than asked for": "decrease-batch-size-if-needed",
    "objectives of other models": "mask-prob short-seq-prob test-mode sample-rate",
    "BERT, retrieval and biencoders": (
        "titles-data-path query-in-block-prob use-one-sent-docs evidence-data-path block-data-path embedding-path "
        "output-bert-embeddings"
    ),
    "vision models": (
        "num-classes img-h img-w num-channels patch-dim classes-fraction data-per-class-fraction no-data-sharding "
        "head-lr-mult swin-backbone-type mask-type mask-factor iter-per-epoch mrope-section"
    ),
    "reinforcement learning": "perform-rl-step",
    "partial, interleaved, relative or missing rotary positions": (
        "rotary-percent rotary-interleaved no-rope-freq relative-attention-num-buckets relative-attention-max-distance"
    ),
    "other kinds of softmax, and windows on some blocks only (--window-size is for all)": (
        "softmax-type window-attn-skip-freq qk-l2-norm"
    ),
    "skipping chosen steps (bad steps are skipped and logged: docs/health.md)": "iterations-to-skip",
    "snapshots of memory": "record-memory-history memory-snapshot-path",
    "deterministic kernels by a flag; one layout repeats its bits on the CPU (docs/exactness.md)": "deterministic-mode",
    "comparison of replicas": "check-weight-hash-across-dp-replicas-interval",
    "other initializations": "data-parallel-random-init embedding-init-method-std init-method-xavier-uniform",
    "a warm-up from above zero": "lr-warmup-init",
    "code of a model's own": "trust-remote-code spec enable-experimental",
    "residuals in fp32 beside bf16": "fp32-residual-connection",
    "parameters in groups of one's own": "dump-param-to-param-group-map",
    "NCCL's own settings by a flag (NCCL reads its environment)": (
        "use-sharp sharp-enabled-group nccl-communicator-config-path ddp-pad-buckets-for-high-nccl-busbw "
        "ddp-reduce-scatter-with-fp32-accumulation disable-symmetric-registration"
    ),
    "optimizer states below fp32": (
        "use-precision-aware-optimizer main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype"
    ),
    "activations other than SwiGLU": (
        "squared-relu openai-gelu onnx-safe add-bias-linear gelu glu quick-geglu activation-func-clamp-value "
        "glu-linear-offset"
    ),
    "norms other than RMSNorm": "apply-layernorm-1p apply-residual-connection-post-layernorm norm-type",
    "state-space and hybrid models": "is-hybrid-model disable-mamba-mem-eff-path",
    "mock data (use examples/quickstart/make_corpora.py)": "mock-data",
    "CUDA graphs": "enable-cuda-graph external-cuda-graph te-rng-tracker decode-only-cuda-graphs",
    "optimizers other than AdamW": "optimizer sgd-momentum decoupled-lr decoupled-min-lr",
    "a learning rate schedule of another checkpoint": "override-opt_param-scheduler",
    "label smoothing and z-loss": "label-smoothing z-loss-coeff",
    "weight decay schedules": "start-weight-decay end-weight-decay",
    "elastic and replicated restarts": (
        "replication replication-jump replication-factor enable-ft-package calc-ft-timeouts"
    ),
    "inference from the trainer (export, then use transformers or vLLM)": (
        "max-tokens-to-oom flash-decode use-legacy-static-engine nccl-all-reduce-for-prefill mlp-chunks-for-prefill "
        "disable-chunked-prefill"
    ),
}
_PREFIXES: dict[str, tuple[Kind, str]] = {
    "bert-": ("not supported", "BERT, retrieval and biencoders"),
    "biencoder-": ("not supported", "BERT, retrieval and biencoders"),
    "cuda-graph-": ("not supported", "CUDA graphs"),
    "dino-": ("not supported", "vision models"),
    "disable-tp-comm-": ("not needed", "chosen by the backends found at start"),
    "fp4-": ("not supported", "fp8 and fp4 training"),
    "fp8-": ("not supported", "fp8 and fp4 training"),
    "grpo-": ("not supported", "reinforcement learning"),
    "heterogeneous-": ("not supported", "blocks of different shapes"),
    "hybrid-": ("not supported", "state-space and hybrid models"),
    "ict-": ("not supported", "BERT, retrieval and biencoders"),
    "indexer-": ("not supported", "BERT, retrieval and biencoders"),
    "inference-": ("not supported", "inference from the trainer (export, then use transformers or vLLM)"),
    "inprocess-": ("called", "slm-supervise, which restarts a failed run from its newest checkpoint"),
    "kitchen-": ("not supported", "fp8 and fp4 training"),
    "langrl-": ("not supported", "reinforcement learning"),
    "mamba-": ("not supported", "state-space and hybrid models"),
    "moe-": ("not supported", "mixture of experts"),
    "mtp-": ("not supported", "multi-token prediction"),
    "muon-": ("not supported", "optimizers other than AdamW"),
    "non-persistent-": ("called", "--save-interval and --keep-last (a resumed run takes the newest checkpoint)"),
    "one-logger-": ("not needed", "it is part of NVIDIA's own services"),
    "retriever-": ("not supported", "BERT, retrieval and biencoders"),
    "retro-": ("not supported", "BERT, retrieval and biencoders"),
    "rl-": ("not supported", "reinforcement learning"),
    "tp-comm-": ("not needed", "chosen by the backends found at start"),
    "vision-": ("not supported", "vision models"),
}


def _table() -> dict[str, MegatronFlag]:
    found = {name: MegatronFlag("called", text) for name, text in _CALLED.items()}
    for kind, groups in (("not needed", _NOT_NEEDED), ("not supported", _NOT_SUPPORTED)):
        for text, names in groups.items():
            found |= {name.replace("_", "-"): MegatronFlag(kind, text) for name in names.split()}  # type: ignore[arg-type]
    return dict(sorted(found.items()))


MEGATRON_FLAGS: dict[str, MegatronFlag] = _table()
"""Flags by their name without dashes in front."""
MEGATRON_PREFIXES = {prefix: MegatronFlag(kind, text) for prefix, (kind, text) in _PREFIXES.items()}
"""Families of flags by the beginning of their names."""


def way_over(name: str) -> str | None:
    """Return what to do about a flag of Megatron-LM that does not exist here; None for other names.

    Args:
        name: as typed, with or without dashes in front, words joined by dashes or underscores.
    """
    plain = name.lstrip("-").replace("_", "-")
    family = next((one for prefix, one in MEGATRON_PREFIXES.items() if plain.startswith(prefix)), None)
    found = MEGATRON_FLAGS.get(plain, family)
    if found is None:
        return None
    if found.kind == "called":
        return f"Megatron-LM's --{plain} is here {found.text}"
    if found.kind == "not needed":
        return f"remove it: Megatron-LM's --{plain} is not needed ({found.text})"
    return f"remove it: Megatron-LM's --{plain} is not supported ({found.text})"
