"""What the flags of a selection must satisfy together; names of scores and ids are checked where they are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.config.rules import require
from megatron_slm.errors import ConfigError


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


def check_selection(config: SelectionConfig) -> None:
    """Refuse shares out of range and flags that contradict or miss each other.

    Raises:
        ConfigError: with the flag, its value, the rule and the fix.
    """
    _check_combination(config)
    _check_policy(config)
    _check_schedule(config)
    _check_protected_ids(config)
    _require(config.slm_probe_interval >= 0, config, "slm_probe_interval", "is 0 or more", "give 0 to leave probes out")


def _require(condition: bool, config: SelectionConfig, name: str, rule: str, fix: str) -> None:
    if not condition:
        raise ConfigError("--" + name.replace("_", "-"), getattr(config, name), rule, fix)


def _is_share(value: float) -> bool:
    return 0.0 < value <= 1.0


def _check_combination(config: SelectionConfig) -> None:
    count, combine, policy = len(config.slm_score), config.slm_combine, config.slm_policy
    _require(
        0 < count == len(set(config.slm_score)), config, "slm_score", "names each score once", "name one or several"
    )
    _require(
        combine is None or count > 1,
        config,
        "slm_combine",
        f"combines two or more scores (--slm-score names {config.slm_score[0]} alone)",
        "name another score, or leave --slm-combine out",
    )
    _require(
        combine is not None or count == 1,
        config,
        "slm_combine",
        f"is given when --slm-score names several ({', '.join(config.slm_score)})",
        "choose intersection, union or sum",
    )
    for name, users, words in (
        ("slm_combine_ratios", ("intersection", "union"), "intersection or union"),
        ("slm_combine_weights", ("sum",), "sum"),
    ):
        given = getattr(config, name)
        _require(not given or combine in users, config, name, f"is for --slm-combine {words}", "leave it out")
        _require(
            len(given) in (0, count),
            config,
            name,
            f"has a number for each of the {count} scores",
            f"give {count} numbers, or leave it out",
        )
    _require(
        all(map(_is_share, config.slm_combine_ratios)), config, "slm_combine_ratios", "lies in (0, 1]", "use e.g. 0.7"
    )
    weights = config.slm_combine_weights
    _require(
        not weights or (all(map(math.isfinite, weights)) and max(weights) > 0),
        config,
        "slm_combine_weights",
        "is finite, and greater than 0 for at least one score",
        "give a score that should count a positive weight",
    )
    if combine is not None:
        fitting = ("top-k", "sample", "weights") if combine == "sum" else ("top-k",)
        rule = f"is {' or '.join(fitting)} with --slm-combine {combine}"
        _require(policy in fitting, config, "slm_policy", rule, "use --slm-policy top-k")


def _check_policy(config: SelectionConfig) -> None:
    policy = config.slm_policy
    _require(_is_share(config.slm_keep_ratio), config, "slm_keep_ratio", "lies in (0, 1]", "use a share such as 0.6")
    _require(
        (config.slm_threshold is not None) == (policy == "threshold"),
        config,
        "slm_threshold",
        "is given when --slm-policy is threshold, and only then",
        "give the lowest score that is kept, in nats" if policy == "threshold" else "leave it out",
    )
    _require(
        config.slm_threshold is None or math.isfinite(config.slm_threshold),
        config,
        "slm_threshold",
        "is finite",
        "give a number",
    )
    _require(0 <= config.slm_threshold_decay < 1, config, "slm_threshold_decay", "lies in [0, 1)", "use e.g. 0.9")
    _require(
        0 < config.slm_temperature < math.inf, config, "slm_temperature", "is greater than 0 and finite", "use e.g. 1.0"
    )
    _require(0 <= config.slm_weight_floor <= 1, config, "slm_weight_floor", "lies in [0, 1]", "use e.g. 0.1")
    _require(
        config.slm_weight_floor == 0 or policy == "weights",
        config,
        "slm_weight_floor",
        "is for --slm-policy weights",
        "leave it out",
    )
    _require(
        config.slm_scope == "micro-batch" or policy not in ("threshold", "quantile"),
        config,
        "slm_scope",
        f"is micro-batch with --slm-policy {policy}, which ranks no tokens against each other",
        "leave it out",
    )


def _check_schedule(config: SelectionConfig) -> None:
    kind = config.slm_keep_schedule
    _require(config.slm_keep_warmup_iters >= 0, config, "slm_keep_warmup_iters", "is 0 or more", "give 0 or more")
    _require(_is_share(config.slm_keep_start), config, "slm_keep_start", "lies in (0, 1]", "use e.g. 1.0")
    decay = config.slm_keep_decay_iters
    _require(decay is None or decay > 0, config, "slm_keep_decay_iters", "is greater than 0", "give a number of steps")
    _require(
        (decay is not None) == (kind != "constant"),
        config,
        "slm_keep_decay_iters",
        "is given when --slm-keep-schedule is linear or cosine, and only then",
        "leave it out" if kind == "constant" else "give the steps over which the share falls",
    )
    _require(
        kind == "constant" or config.slm_policy not in ("threshold", "weights"),
        config,
        "slm_keep_schedule",
        f"is constant with --slm-policy {config.slm_policy}, which keeps no fixed share",
        "leave it out, or use --slm-policy top-k",
    )


def _check_protected_ids(config: SelectionConfig) -> None:
    for name in ("slm_always_keep", "slm_never_keep"):
        _require(min(getattr(config, name), default=0) >= 0, config, name, "holds token ids, 0 or more", "correct it")
    both = sorted(set(config.slm_always_keep) & set(config.slm_never_keep))
    _require(
        not both, config, "slm_always_keep", f"shares no id with --slm-never-keep (both hold {both})", "choose one"
    )
    _require(
        not config.slm_always_keep or config.slm_policy != "weights",
        config,
        "slm_always_keep",
        "is for policies that leave tokens out (--slm-policy weights trains on all of them)",
        "leave it out",
    )
