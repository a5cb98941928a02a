"""The selector that a configuration asks for."""

from __future__ import annotations

from megatron_slm.config.selection import SelectionConfig
from megatron_slm.errors import ConfigError
from megatron_slm.selection.schedule import KeepSchedule
from megatron_slm.selection.scores import score_named
from megatron_slm.selection.selector import Selector


def build_selector(config: SelectionConfig, *, seed: int, vocabulary_size: int) -> Selector:
    """Make the selector of a run.

    Args:
        seed: the run's, for scores and policies that draw random numbers.
        vocabulary_size: protected ids are below it.

    Raises:
        ConfigError: an unknown score, a reference that is needed and not given, or an id out of the vocabulary.
    """
    if config.objective == "clm":
        return Selector()
    scores = tuple(score_named(name) for name in config.slm_score)
    wanting = [score.name for score in scores if score.needs_reference]
    if wanting and config.reference_load is None and not config.reference_scores:
        raise ConfigError(
            "--reference-load",
            None,
            f"is given when --objective is slm and --slm-score is {wanting[0]}",
            "name its folder or a store of its scores (--reference-scores), choose a score without one (loss, "
            "entropy), or use --objective clm",
        )
    for flag in ("slm_always_keep", "slm_never_keep"):
        for token_id in getattr(config, flag):
            if token_id >= vocabulary_size:
                raise ConfigError(
                    "--" + flag.replace("_", "-"),
                    token_id,
                    f"holds ids of the vocabulary, below {vocabulary_size}",
                    "give ids of this run's tokenizer",
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
        temperature=config.slm_temperature,
        weight_floor=config.slm_weight_floor,
        always_keep=tuple(config.slm_always_keep),
        never_keep=tuple(config.slm_never_keep),
        seed=seed,
    )
