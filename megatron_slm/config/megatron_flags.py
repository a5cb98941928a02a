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
    "distributed-backend": "the choice of device: NCCL on GPUs, gloo on CPUs",
    "recompute-activations": "--recompute-granularity full",
    "checkpoint-activations": "--recompute-granularity full",
    "checkpoint-num-layers": "--recompute-granularity full (every block)",
    "use-torch-fsdp2": "ds_configs/zero3_bf16.json with --deepspeed-config",
    "use-megatron-fsdp": "ds_configs/zero3_bf16.json with --deepspeed-config",
    "data-parallel-sharding-strategy": "the ZeRO stage of --deepspeed-config",
    "optimizer-cpu-offload": "ds_configs/zero3_offload.json with --deepspeed-config",
    "lr-decay-samples": "--train-iters",
    "lr-warmup-samples": "--lr-warmup-iters",
    "lr-warmup-fraction": "--lr-warmup-iters",
    "train-samples": "--train-iters (samples / --global-batch-size)",
    "save-retain-n": "--keep-last",
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
    "log-throughput": "metrics.jsonl, which always has tflops_per_device, mfu and tokens_per_second",
    "log-progress": "metrics.jsonl",
    "log-timers-to-tensorboard": "--timing-log-level (always written to TensorBoard too)",
    "use-pytorch-profiler": "--profile-step-start",
    "normalization": "RMSNorm, the only one; --norm-epsilon",
    "position-embedding-type": "rotary embeddings, the only kind; --rotary-base, --rope-scaling",
    "rotary-scaling-factor": "--rope-scaling",
    "rope-scaling-factor": "--rope-scaling",
    "use-rope-scaling": "--rope-scaling",
    "group-query-attention": "--num-query-groups",
    "weight-decay-incr-style": "--weight-decay, constant",
    "exit-signal-handler": "SIGTERM, SIGUSR1 or SIGINT to any rank, always handled",
    "exit-signal": "SIGTERM, SIGUSR1 or SIGINT",
    "rerun-mode": "slm-replay",
    "error-injection-rate": "slm-replay (there is no injection)",
    "check-for-spiky-loss": "--loss-spike-sigmas",
    "no-check-for-nan-in-loss-and-grad": "--max-skipped-steps (non-finite steps are always skipped)",
    "micro-batch-size-per-rank": "--micro-batch-size",
    "world-size": "the launcher",
    "context-length": "--seq-length",
    "encoder-seq-length": "--seq-length",
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
        "auto-detect-ckpt-format mmap-bin-files rotary-interleaved attention-softmax-in-fp32"
    ),
    "chosen by the backends found at start": (
        "transformer-impl masked-softmax-fusion no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion "
        "bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion apply-rope-fusion cross-entropy-loss-fusion "
        "cross-entropy-fusion-impl no-gradient-accumulation-fusion gradient-accumulation-fusion "
        "no-persist-layer-norm tp-comm-overlap use-fused-rmsnorm use-nccl-ub delay-wgrad-compute "
        "align-param-gather align-grad-reduce overlap-param-gather ddp-bucket-size ddp-num-buckets "
        "ddp-average-in-collective no-async-tensor-model-parallel-allreduce overlap-p2p-communication "
        "no-overlap-p2p-communication batch-p2p-communication empty-unused-memory-level"
    ),
    "no dropout is applied": "attention-dropout hidden-dropout lora-dropout",
    "the engine sizes its buffers itself": "variable-seq-lengths initial-loss-scale-window",
    "nothing is built lazily": "lazy-mpu-init no-initialization use-cpu-initialization",
    "clean-up is automatic": "manual-gc manual-gc-interval no-manual-gc-eval",
    "data loading has no choice of kind": "dataloader-type no-create-attention-mask-in-dataloader",
    "reports come from slm-report": "log-params-norm log-num-zeros-in-grad log-straggler log-energy",
    "checkpoints record it": "ckpt-format dist-ckpt-strictness no-save-optim no-save-rng",
}
_NOT_SUPPORTED = {
    "fp16 training (use --bf16 or fp32)": (
        "fp16 loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis fp16-lm-cross-entropy "
        "apply-query-key-layer-scaling"
    ),
    "fp8 and fp4 training": (
        "fp8-format fp8-margin fp8-interval fp8-amax-history-len fp8-amax-compute-algo fp8-recipe fp8-param-gather "
        "no-fp8-wgrad fp4-format transformer-engine-fp8"
    ),
    "interleaved (virtual) pipeline stages; the reference fills the idle slots (--reference-schedule)": (
        "num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank "
        "microbatch-group-size-per-virtual-pipeline-stage pipeline-model-parallel-layout "
        "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers "
        "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split"
    ),
    "context parallelism": (
        "context-parallel-size cp-comm-type hierarchical-context-parallel-sizes context-parallel-method"
    ),
    "mixture of experts": (
        "num-experts moe-router-topk moe-router-load-balancing-type moe-aux-loss-coeff moe-grouped-gemm "
        "moe-token-dispatcher-type moe-ffn-hidden-size moe-shared-expert-intermediate-size moe-layer-freq "
        "moe-z-loss-coeff moe-permute-fusion moe-router-dtype expert-model-parallel-size expert-tensor-parallel-size"
    ),
    "multi-latent attention": "multi-latent-attention q-lora-rank kv-lora-rank qk-pos-emb-head-dim",
    "multi-token prediction": "mtp-num-layers mtp-loss-scaling-factor",
    "partial recomputation (use --recompute-granularity full)": (
        "recompute-method recompute-num-layers recompute-modules distribute-saved-activations cpu-offloading-num-layers"
    ),
    "growing batch sizes": "rampup-batch-size decrease-batch-size-if-needed",
    "fill-in-the-middle and other objectives": (
        "fim-data fim-rate fim-spm-rate mask-prob short-seq-prob retro-project-dir bert-load ict-load"
    ),
    "activations other than SwiGLU": "squared-relu openai-gelu onnx-safe add-bias-linear gelu glu",
    "norms other than RMSNorm": "apply-layernorm-1p apply-residual-connection-post-layernorm norm-type",
    "state-space and hybrid models": "hybrid-attention-ratio hybrid-mlp-ratio hybrid-override-pattern mamba-state-dim",
    "mock data (use examples/quickstart/make_corpora.py)": "mock-data",
    "CUDA graphs": "enable-cuda-graph cuda-graph-scope external-cuda-graph te-rng-tracker",
    "optimizers other than AdamW": "optimizer muon-momentum sgd-momentum decoupled-lr decoupled-min-lr",
    "a learning rate schedule of another checkpoint": "override-opt_param-scheduler",
    "label smoothing and z-loss": "label-smoothing z-loss-coeff",
    "weight decay schedules": "start-weight-decay end-weight-decay",
    "elastic and replicated restarts": "replication replication-jump replication-factor enable-ft-package",
    "inference from the trainer (export, then use transformers or vLLM)": (
        "inference-batch-times-seqlen-threshold inference-max-requests inference-dynamic-batching max-tokens-to-oom"
    ),
}


def _table() -> dict[str, MegatronFlag]:
    found = {name: MegatronFlag("called", text) for name, text in _CALLED.items()}
    for kind, groups in (("not needed", _NOT_NEEDED), ("not supported", _NOT_SUPPORTED)):
        for text, names in groups.items():
            found |= {name.replace("_", "-"): MegatronFlag(kind, text) for name in names.split()}  # type: ignore[arg-type]
    return dict(sorted(found.items()))


MEGATRON_FLAGS: dict[str, MegatronFlag] = _table()
"""Every flag by its name without dashes in front."""


def way_over(name: str) -> str | None:
    """Return what to do about a flag of Megatron-LM that does not exist here; None for other names.

    Args:
        name: as typed, with or without dashes in front, words joined by dashes or underscores.
    """
    plain = name.lstrip("-").replace("_", "-")
    found = MEGATRON_FLAGS.get(plain)
    if found is None:
        return None
    if found.kind == "called":
        return f"Megatron-LM's --{plain} is here {found.text}"
    if found.kind == "not needed":
        return f"remove it: Megatron-LM's --{plain} is not needed ({found.text})"
    return f"remove it: Megatron-LM's --{plain} is not supported ({found.text})"
