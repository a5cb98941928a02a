"""Builds a run's selector from its configuration."""

from __future__ import annotations

from megatron_slm.config.rules import flag
from megatron_slm.config.selection import SelectionConfig
from megatron_slm.errors import ConfigError
from megatron_slm.selection.schedule import KeepSchedule
from megatron_slm.selection.scores import score_named
from megatron_slm.selection.selector import Selector
from megatron_slm.selection.token_weights import read_token_weights
from megatron_slm.selection.weights import weight_named


def build_selector(config: SelectionConfig, *, seed: int, vocabulary_size: int | None) -> Selector:
    """Build the selector of a run. Reads the file of --slm-token-weights.

    Args:
        seed: the run's seed, for random scores and policies.
        vocabulary_size: exclusive bound of --slm-always-keep and --slm-never-keep; None where it is unknown.

    Raises:
        ConfigError: a missing reference, a token id outside the vocabulary, or unusable token weights.
    """
    if config.objective == "clm":
        return Selector()
    scores = tuple(score_named(name) for name in config.slm_score) if config.uses_scores else ()
    need_reference = [score.name for score in scores if score.needs_reference]
    if need_reference and config.reference_load is None and not config.reference_scores:
        raise ConfigError.missing(
            "--reference-load",
            f"--objective slm with --slm-score {need_reference[0]}",
            "set it to the reference's folder, use --reference-scores, choose a score without a reference (loss, "
            "entropy), or use --objective clm",
        )
    for name in ("slm_always_keep", "slm_never_keep"):
        for token_id in getattr(config, name):
            if vocabulary_size is not None and token_id >= vocabulary_size:
                raise ConfigError(
                    flag(name),
                    token_id,
                    f"be an id of the vocabulary, below {vocabulary_size}",
                    "use ids of this run's tokenizer",
                )
    ratio, count = config.slm_keep_ratio, len(scores)
    return Selector(
        scores=scores,
        keep_ratio=ratio,
        scope=config.slm_scope,
        policy=config.slm_policy,
        combine=config.slm_combine,
        combine_ratios=tuple(config.slm_combine_ratios) or (ratio,) * count,
        combine_weights=tuple(config.slm_combine_weights) or (1.0,) * count,
        schedule=KeepSchedule(
            kind=config.slm_keep_schedule,
            warmup_iters=config.slm_keep_warmup_iters,
            decay_iters=config.slm_keep_decay_iters or 0,
            start=config.slm_keep_start,
        ),
        threshold=0.0 if config.slm_threshold is None else config.slm_threshold,
        threshold_decay=config.slm_threshold_decay,
        keep_adaptation=config.slm_keep_adaptation,
        keep_least=config.slm_keep_least,
        keep_most=config.slm_keep_most,
        peaking_share=config.slm_peaking_share,
        peaking_length=config.slm_peaking_length,
        temperature=config.slm_temperature,
        weight=None if config.weight is None else weight_named(config.weight.name),
        weight_normalization=config.slm_weight_normalization,
        weight_power=config.slm_weight_power,
        weight_floor=config.slm_weight_floor,
        token_weight_V=None
        if config.slm_token_weights is None
        else read_token_weights(config.slm_token_weights, vocabulary_size),
        always_keep=tuple(config.slm_always_keep),
        never_keep=tuple(config.slm_never_keep),
        protected_spans=config.slm_protected_spans,
        seed=seed,
    )
