"""The sections of a run's configuration. Field names are Megatron-LM's flag names where it has the flag.

`__post_init__` checks what a section can know alone and does no input or output; what needs files or the
world is checked in `training/plan.py`, before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_slm.config.backends import BackendConfig
from megatron_slm.config.data import DataConfig
from megatron_slm.config.health import HealthConfig
from megatron_slm.config.logging import LoggingConfig
from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.config.resilience import ResilienceConfig
from megatron_slm.config.rules import require, require_positive
from megatron_slm.config.selection import check_selection


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. Left out, it comes from --init-from; given as well, the two must agree."""

    num_layers: int | None = None
    """Number of decoder blocks."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the SwiGLU MLP."""
    num_attention_heads: int | None = None
    """Number of query heads."""
    num_query_groups: int | None = None
    """Key and value heads (grouped-query attention); default: as many as query heads."""
    kv_channels: int | None = None
    """Width of a head; default: hidden size / heads."""
    max_position_embeddings: int | None = None
    """Longest sequence the exported model claims to read; default: --seq-length."""
    norm_epsilon: float | None = None
    """Epsilon of RMSNorm; default 1e-5."""
    rotary_base: float | None = None
    """Theta of the rotary position embedding; default 10000."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling as in a Hugging Face config (rope_type linear or llama3)."""
    untie_embeddings_and_output_weights: bool | None = None
    """The output layer has a weight of its own (default) instead of the embedding's."""
    add_qkv_bias: bool | None = None
    """Biases on the query, key and value projections (Qwen2)."""
    qk_layernorm: bool | None = None
    """RMSNorm over each query and key head (Qwen3)."""
    window_size: int | None = None
    """Sliding-window attention: positions seen, the own one included."""
    init_method_std: float | None = None
    """Standard deviation of initial weights; default 0.02."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this, at any layout alike; padding is never stored."""
    init_from: str | None = None
    """Start from these weights: a Hugging Face folder, or one of our checkpoints written at any layout."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "max_position_embeddings",
            "window_size",
            "make_vocab_size_divisible_by",
            "norm_epsilon",
            "rotary_base",
            "init_method_std",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut over the ranks; what is left of the world is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer."""
    pipeline_model_parallel_size: int = 1
    """Stages the layers are cut into."""
    sequence_parallel: bool = False
    """Cut norms and the residual stream along the sequence over the tensor-parallel ranks."""
    recompute_granularity: Literal["full"] | None = None
    """`full` recomputes each block in the backward pass instead of keeping its activations."""
    reference_schedule: Literal["skewed", "bubble", "sequential", "ride-along"] = "skewed"
    """When the reference's forward passes run; the losses are the same bits. skewed: ahead, in the pipeline's idle
    slots, and on later stages partly in the next step's. bubble: in idle slots of the step before. sequential: all
    before the model's. ride-along: each right before the model's (always so with one stage, which never idles)."""
    reference_schedule_warmup_steps: int = 0
    """Time this many first steps and fit the schedule to them; 0: to costs counted from the architectures."""
    distributed_timeout_minutes: float = 10.0
    """Longest wait for another rank; beyond it the run ends with an error that names what was waited for."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON: ZeRO stage and its buckets, communication (default: ds_configs/zero1_bf16_pipeline.json)."""

    def __post_init__(self) -> None:
        require_positive(
            self, "tensor_model_parallel_size", "pipeline_model_parallel_size", "distributed_timeout_minutes"
        )
        warmup = self.reference_schedule_warmup_steps
        require(warmup >= 0, "reference_schedule_warmup_steps", warmup, "is 0 or more", "give 0 or more")
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel",
            True,
            "needs --tensor-model-parallel-size of 2 or more",
            "raise the tensor-parallel size or leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which tokens are trained on (Rho-1, arXiv 2404.07965, section 2.2)."""

    objective: Literal["slm", "clm"] = "slm"
    """slm: the tokens that score highest. clm: every token, no reference (how references are trained)."""
    slm_keep_ratio: float = 0.6
    """Share of the valid tokens that is kept, in (0, 1]; the paper's 0.6 (1B) and 0.7 (7B)."""
    slm_score: list[str] = field(default_factory=lambda: ["excess"])
    """What tokens are ranked by: excess, loss, -loss, reference-loss (low is kept), reference-entropy (low is kept),
    entropy, relative-excess, clipped-excess, random; several with --slm-combine."""
    slm_combine: Literal["intersection", "union", "sum"] | None = None
    """Several scores: the tokens that all of their selections keep, those that any keeps, or the top share of the
    weighted sum of the scores, each brought to mean 0 and deviation 1."""
    slm_combine_ratios: list[float] = field(default_factory=list)
    """Each selection's own keep ratio, for intersection and union; default: --slm-keep-ratio for each."""
    slm_combine_weights: list[float] = field(default_factory=list)
    """Each score's weight in the sum; default: 1 for each."""
    slm_policy: Literal["top-k", "threshold", "quantile", "sample", "weights"] = "top-k"
    """From scores to kept tokens: exactly the top share; those at or above --slm-threshold; those at or above a
    running quantile of earlier steps; a random sample that favours high scores; or soft weights on all."""
    slm_scope: Literal["sequence", "micro-batch", "data-parallel"] = "micro-batch"
    """The tokens that are ranked against each other; data-parallel: one micro-batch of every data-parallel rank."""
    slm_threshold: float | None = None
    """Lowest score that is kept, for --slm-policy threshold."""
    slm_threshold_decay: float = 0.9
    """How much of the running threshold of --slm-policy quantile stays from one step to the next."""
    slm_temperature: float = 1.0
    """Divides scores in --slm-policy sample and weights: high is even, low is greedy."""
    slm_weight_floor: float = 0.0
    """Least weight of a token in --slm-policy weights, in [0, 1]."""
    slm_keep_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the keep ratio goes from --slm-keep-start to its final value, after the warm-up."""
    slm_keep_warmup_iters: int = 0
    """Steps at the start of the run that train on every token."""
    slm_keep_decay_iters: int | None = None
    """Steps after the warm-up over which the keep ratio changes, for linear and cosine."""
    slm_keep_start: float = 1.0
    """Keep ratio at the start of a linear or cosine schedule."""
    slm_always_keep: list[int] = field(default_factory=list)
    """Token ids whose labels are kept in any case, before all others, even where they are more than the share."""
    slm_never_keep: list[int] = field(default_factory=list)
    """Token ids whose labels are never kept; they leave the ranking as if they were masked."""
    slm_probe_interval: int = 100
    """Every this many steps, select on the run's first batch and log how much of it changed; 0: never."""
    reference_load: str | None = None
    """The frozen reference: a Hugging Face folder, or one of our checkpoints written at any layout. Beside
    --reference-scores it is not loaded: the scores must then be this reference's."""
    reference_config: str | None = None
    """The reference's shape, for plans and dry runs while --reference-load is not there yet: a config.json, a folder
    with one, or the YAML file of the reference's own run. A reference that is loaded must agree with it."""
    reference_scores: list[str] = field(default_factory=list)
    """Stores of reference losses written by tools/score_corpus.py, read instead of running a reference."""
    reference_scores_combine: Literal["minimum", "mean"] | None = None
    """What several stores together say of a token: the least of their losses, or the mean."""
    reference_scores_verify: Literal["sampled", "whole"] = "sampled"
    """Checksums compared before the first step: of stores beyond 64 GiB evenly spread shards, or always all. Each
    sample is checked again when it is read."""

    def __post_init__(self) -> None:
        check_selection(self)
        if self.objective == "clm":  # whether slm needs one depends on the score: see selection/configure.py
            for name in ("reference_load", "reference_scores"):
                require(
                    not getattr(self, name),
                    name,
                    getattr(self, name),
                    "is left out when --objective is clm, which has no reference",
                    "drop it or use --objective slm",
                )
        self._check_stores()

    def _check_stores(self) -> None:
        several = len(self.reference_scores) > 1
        require(
            several == (self.reference_scores_combine is not None),
            "reference_scores_combine",
            self.reference_scores_combine,
            "is given with several --reference-scores, and only then",
            "choose minimum or mean for several stores, and leave it out for one",
        )
        require(
            not several or self.reference_load is None,
            "reference_load",
            self.reference_load,
            "is left out with several --reference-scores, which are of several references",
            "drop it",
        )


@dataclass(frozen=True, kw_only=True)
class LossHeadConfig:
    """How the loss spends memory to save time; results do not depend on it beyond rounding."""

    loss_head_variant: Literal["auto", "recompute", "stash", "predictive"] = "auto"
    """What is kept between the scoring of all tokens and the gradients of the kept ones: nothing (recompute), every
    token's exponentials (stash), those of tokens that will probably be kept (predictive), or whichever of these
    --loss-head-stash-mib and --slm-keep-ratio make the cheapest (auto)."""
    loss_head_stash_mib: int = 1024
    """Most memory, in MiB, for what is kept; 0 keeps nothing."""
    loss_head_stash_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Its precision; auto: that of the model."""
    loss_head_backend: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the loss; auto: triton on a GPU where it is installed, else torch."""

    def __post_init__(self) -> None:
        mib = self.loss_head_stash_mib
        require(mib >= 0, "loss_head_stash_mib", mib, "is 0 or more", "give 0 to keep nothing")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    """How the learning rate falls from --lr to --min-lr."""
    lr_warmup_iters: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    lr_decay_iters: int | None = None
    """Step at which the decay ends; default: --train-iters."""
    lr_wsd_decay_iters: int | None = None
    """Length of the final linear decay of WSD (warm-up, stable, decay), in steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "lr_decay_iters", "lr_wsd_decay_iters", "adam_eps")
        for name in ("min_lr", "lr_warmup_iters", "weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "is 0 or more", "give 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "lies in [0, 1)", "use e.g. 0.9")
        require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"is at most --lr ({self.lr})", "lower it")
        require(
            self.lr_decay_style != "WSD" or self.lr_wsd_decay_iters is not None,
            "lr_wsd_decay_iters",
            None,
            "is given when --lr-decay-style is WSD",
            "give the length of the final decay in steps",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batches, precision and length of the run."""

    train_iters: int
    """Steps of the whole run."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one data-parallel rank."""
    global_batch_size: int | None = None
    """Samples of one step over all ranks; default: micro-batch size x data-parallel size."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights and fp32 gradient accumulation (default: fp32)."""
    seed: int = 1234
    """Of initial weights and of the sample order."""
    max_skipped_steps: int = 20
    """Stop, with a checkpoint, after this many steps in a row that were not applied: losses or gradients were not
    finite, no token was kept, or (--skip-loss-spikes) the loss was a spike."""

    def __post_init__(self) -> None:
        require_positive(self, "train_iters", "micro_batch_size", "global_batch_size", "max_skipped_steps")
        require(self.seed >= 0, "seed", self.seed, "is 0 or more", "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    save: str | None = None
    """Folder for checkpoints (default with --save-interval: RUN_DIR/checkpoints); one is written at the end."""
    save_interval: int | None = None
    """Save every this many steps, and at the end."""
    async_save: bool = False
    """Go on training while a copy of the state is written; it takes as much host memory as the rank's files."""
    keep_last: int | None = None
    """Delete checkpoints but for this many newest ones, once a newer one is committed; default: delete none."""
    save_retain_interval: int | None = None
    """With --keep-last: keep those of every this many steps too."""
    keep_best: str | None = None
    """With --keep-last: keep the one with the lowest loss of this held-out set too; --save-interval must be a
    multiple of --eval-interval, so that each has a loss."""
    load: str | None = None
    """Resume from the newest complete checkpoint in this folder (or from this checkpoint), of any layout. The folder
    that the run saves to may hold none yet: the run then starts afresh, so that one command starts and resumes."""
    exit_on_missing_checkpoint: bool = False
    """End the run if --load finds no checkpoint, also in the folder that the run saves to."""
    load_fallback: bool = False
    """Where the newest checkpoint in --load is damaged, take the newest one that is not."""
    load_checksums: Literal["small", "all", "none"] = "small"
    """Files of --load whose checksums are compared: those up to 256 MiB, all, or none; sizes always are."""
    accept_new_sample_order: bool = False
    """Resume although the samples so far would be others (other corpus, --seed, --split or --seq-length); orders that
    were begun are then laid out anew, and samples may repeat or be left out."""

    def __post_init__(self) -> None:
        require_positive(self, "save_interval", "keep_last", "save_retain_interval")
        for name in ("save_retain_interval", "keep_best"):
            require(
                getattr(self, name) is None or self.keep_last is not None,
                name,
                getattr(self, name),
                "is an exception from --keep-last, without which nothing is deleted",
                "add --keep-last, or leave it out",
            )
        for name in ("exit_on_missing_checkpoint", "load_fallback"):
            require(self.load is not None or not getattr(self, name), name, True, "goes with --load", "add --load")

    @property
    def enabled(self) -> bool:
        """Whether the run writes checkpoints at all."""
        return self.save is not None or self.save_interval is not None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    selection: SelectionConfig
    loss_head: LossHeadConfig
    backend: BackendConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    health: HealthConfig
    logging: LoggingConfig
    resilience: ResilienceConfig
    preflight: PreflightConfig

    def __post_init__(self) -> None:
        saves, evaluates = self.checkpoint.save_interval, self.logging.eval_interval
        require(
            self.checkpoint.keep_best is None or not (saves is None or evaluates is None or saves % evaluates),
            "keep_best",
            self.checkpoint.keep_best,
            "has a loss of every checkpoint to compare",
            f"make --save-interval ({saves}) a multiple of --eval-interval ({evaluates})",
        )

    @property
    def save_folder(self) -> str:
        """Where the run's checkpoints go."""
        return self.checkpoint.save or f"{self.logging.run_dir}/checkpoints"
