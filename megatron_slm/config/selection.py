"""Configuration of the token selection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.config.rules import flag, require, require_given, require_not_negative, require_positive
from megatron_slm.config.scores import check_score_name, describe_scores, needs_reference

START_MODEL = "init"
"""Value of --reference-load that names the model of --init-from."""


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Selection of the tokens to train on (Rho-1, arXiv 2404.07965, section 2.2)."""

    objective: Literal["slm", "clm"] = "slm"
    """slm: train on the tokens with the highest scores. clm: train on every token, without a reference (to train
    references, for example)."""
    slm_keep_ratio: float = 0.6
    """Share of the valid tokens to keep, in (0, 1]. The paper uses 0.6 (1B) and 0.7 (7B)."""
    slm_score: list[str] = field(default_factory=lambda: ["excess"], metadata={"choices_help": describe_scores()})
    """Scores that rank the tokens, highest first; several with --slm-combine. L and H are the loss and entropy of the
    model, L_RM and H_RM those of the reference."""
    slm_combine: Literal["intersection", "union", "sum"] | None = None
    """Combination of several scores: keep the tokens kept by all (intersection) or by any (union) of them, or rank by
    their weighted sum, each normalized to mean 0 and standard deviation 1 (sum)."""
    slm_combine_ratios: list[float] = field(default_factory=list)
    """Keep ratio of each score, for intersection and union. Default: --slm-keep-ratio for each."""
    slm_combine_weights: list[float] = field(default_factory=list)
    """Weight of each score, for sum. Default: 1 for each."""
    slm_policy: Literal["top-k", "threshold", "quantile", "sample", "weights"] = "top-k"
    """Selection by score. top-k: exactly the top share. threshold: scores of at least --slm-threshold. quantile:
    scores of at least a running quantile of preceding steps. sample: a random sample that favors high scores.
    weights: all tokens, with soft weights."""
    slm_scope: Literal["sequence", "micro-batch", "data-parallel"] = "micro-batch"
    """Set of tokens ranked against each other. data-parallel: one micro-batch of every data-parallel rank."""
    slm_threshold: float | None = None
    """Lowest score to keep, in the score's unit, with --slm-policy threshold."""
    slm_threshold_decay: float = 0.9
    """Weight of the preceding threshold in the running average of --slm-policy quantile, in [0, 1)."""
    slm_temperature: float = 1.0
    """Divisor of the scores in --slm-policy sample and weights; higher is more uniform, lower more greedy."""
    slm_weight_floor: float = 0.0
    """Least weight of a token in --slm-policy weights, in [0, 1]."""
    slm_keep_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the change from --slm-keep-start to the final keep ratio, after the warm-up."""
    slm_keep_warmup_iters: int = 0
    """Number of first steps that train on every token."""
    slm_keep_decay_iters: int | None = None
    """Number of steps after the warm-up over which the keep ratio changes, with linear and cosine."""
    slm_keep_start: float = 1.0
    """Keep ratio at the start of a linear or cosine schedule, in (0, 1]."""
    slm_always_keep: list[int] = field(default_factory=list)
    """Token ids always kept as labels, before all others, even if they exceed the keep ratio."""
    slm_never_keep: list[int] = field(default_factory=list)
    """Token ids never kept as labels; they are masked and not ranked."""
    slm_probe_interval: int = 100
    """Every this many steps, repeat the selection on the run's first batch and log how much of it changed; 0
    disables it."""
    reference_load: str | None = None
    """Frozen reference: a Hugging Face folder, a checkpoint of this package saved at any layout, or `init`, the model
    of --init-from. With --reference-scores it is not loaded, but the scores must come from it."""
    reference_config: str | None = None
    """Architecture of the reference, for plans and dry runs without --reference-load: a config.json, a folder with
    one, or the YAML configuration of the reference's run. A loaded reference must match it."""
    reference_scores: list[str] = field(default_factory=list)
    """Stores of reference losses (tools/score_corpus.py) to read instead of running a reference."""
    reference_scores_combine: Literal["minimum", "mean", "difference"] | None = None
    """Combination of several stores: the minimum or the mean of each token's losses, or the first one's less the second
    one's (with --slm-score reference-loss: tokens that the first reference predicts better than the second)."""
    reference_scores_verify: Literal["sampled", "whole"] = "sampled"
    """Checksums verified before the first step. sampled: a sample of evenly spaced shards for stores above 64 GiB,
    else all. whole: always all. Samples are also verified as they are read."""

    def __post_init__(self) -> None:
        self._check_scores()
        self._check_combination()
        self._check_policy()
        self._check_schedule()
        self._check_protected_ids()
        require_not_negative(self, "slm_probe_interval")
        self._check_reference()

    def _check_scores(self) -> None:
        unique = 0 < len(self.slm_score) == len(set(self.slm_score))
        require(unique, self, "slm_score", "name one or more scores, each once", "use e.g. excess")
        for name in self.slm_score:
            check_score_name(name)

    def _check_combination(self) -> None:
        count, combine = len(self.slm_score), self.slm_combine
        if combine is None:
            required_by = f"--slm-score with several scores ({', '.join(self.slm_score)})"
            require_given(count == 1, "slm_combine", required_by, "choose intersection, union or sum")
        else:
            rule = f"be used with two or more scores (--slm-score is {self.slm_score[0]})"
            require(count > 1, self, "slm_combine", rule, "add a score, or remove --slm-combine")
        for name, users in (("slm_combine_ratios", ("intersection", "union")), ("slm_combine_weights", ("sum",))):
            values = getattr(self, name)
            rule = f"be used with --slm-combine {' or '.join(users)}"
            require(not values or combine in users, self, name, rule, f"remove {flag(name)}")
            rule = f"contain one number for each of the {count} scores"
            require(len(values) in (0, count), self, name, rule, f"give {count} numbers, or remove it")
        ratios, weights = self.slm_combine_ratios, self.slm_combine_weights
        require(all(map(_is_share, ratios)), self, "slm_combine_ratios", "be in (0, 1]", "use e.g. 0.7")
        require(
            not weights or (all(map(math.isfinite, weights)) and max(weights) > 0),
            self,
            "slm_combine_weights",
            "be finite, with at least one above 0",
            "use a positive weight for at least one score",
        )
        if combine is not None:
            policies = ("top-k", "sample", "weights") if combine == "sum" else ("top-k",)
            rule = f"be {' or '.join(policies)} with --slm-combine {combine}"
            require(self.slm_policy in policies, self, "slm_policy", rule, "use --slm-policy top-k")

    def _check_policy(self) -> None:
        policy, threshold = self.slm_policy, self.slm_threshold
        require(_is_share(self.slm_keep_ratio), self, "slm_keep_ratio", "be in (0, 1]", "use a share such as 0.6")
        if policy == "threshold":
            fix = "set it to the lowest score to keep"
            require_given(threshold is not None, "slm_threshold", "--slm-policy threshold", fix)
        else:
            rule = "be used with --slm-policy threshold"
            require(threshold is None, self, "slm_threshold", rule, "remove it, or use --slm-policy threshold")
        finite = threshold is None or math.isfinite(threshold)
        require(finite, self, "slm_threshold", "be finite", "use a finite number")
        require(0 <= self.slm_threshold_decay < 1, self, "slm_threshold_decay", "be in [0, 1)", "use e.g. 0.9")
        positive = 0 < self.slm_temperature < math.inf
        require(positive, self, "slm_temperature", "be positive and finite", "use e.g. 1.0")
        require(0 <= self.slm_weight_floor <= 1, self, "slm_weight_floor", "be in [0, 1]", "use e.g. 0.1")
        weights_only = self.slm_weight_floor == 0 or policy == "weights"
        require(weights_only, self, "slm_weight_floor", "be used with --slm-policy weights", "remove it")
        require(
            self.slm_scope == "micro-batch" or policy not in ("threshold", "quantile"),
            self,
            "slm_scope",
            f"be micro-batch with --slm-policy {policy}, which does not rank tokens against each other",
            "remove it",
        )

    def _check_schedule(self) -> None:
        kind = self.slm_keep_schedule
        require_not_negative(self, "slm_keep_warmup_iters")
        require(_is_share(self.slm_keep_start), self, "slm_keep_start", "be in (0, 1]", "use e.g. 1.0")
        require_positive(self, "slm_keep_decay_iters")
        decays = self.slm_keep_decay_iters is not None
        if kind == "constant":
            rule = "be used with --slm-keep-schedule linear or cosine"
            require(not decays, self, "slm_keep_decay_iters", rule, "remove it, or choose a schedule")
        else:
            fix = "set it to the number of steps over which the keep ratio changes"
            require_given(decays, "slm_keep_decay_iters", f"--slm-keep-schedule {kind}", fix)
        require(
            kind == "constant" or self.slm_policy not in ("threshold", "weights"),
            self,
            "slm_keep_schedule",
            f"be constant with --slm-policy {self.slm_policy}, which keeps no fixed share",
            "remove it, or use --slm-policy top-k",
        )

    def _check_protected_ids(self) -> None:
        for name in ("slm_always_keep", "slm_never_keep"):
            ids = getattr(self, name)
            require(min(ids, default=0) >= 0, self, name, "contain token ids of at least 0", "remove negative ids")
        both = sorted(set(self.slm_always_keep) & set(self.slm_never_keep))
        rule = f"share no id with --slm-never-keep (both contain {', '.join(map(str, both))})"
        require(not both, self, "slm_always_keep", rule, "remove the ids from one of them")
        require(
            not self.slm_always_keep or self.slm_policy != "weights",
            self,
            "slm_always_keep",
            "not be used with --slm-policy weights, which trains on all tokens",
            "remove it",
        )

    def _check_reference(self) -> None:
        """Check the reference's flags; `selection/configure.py` checks that slm has one where its scores need it."""
        if self.objective == "clm":
            for name in ("reference_load", "reference_scores"):
                rule = "not be used with --objective clm, which has no reference"
                require(not getattr(self, name), self, name, rule, "remove it, or use --objective slm")
        if len(self.reference_scores) > 1:
            given = self.reference_scores_combine is not None
            require_given(
                given, "reference_scores_combine", "several --reference-scores", "choose minimum, mean or difference"
            )
            rule = "not be used with several --reference-scores, which come from several references"
            require(self.reference_load is None, self, "reference_load", rule, "remove it")
            self._check_difference()
        else:
            rule = "be used with several --reference-scores"
            require(self.reference_scores_combine is None, self, "reference_scores_combine", rule, "remove it")

    def _check_difference(self) -> None:
        if self.reference_scores_combine != "difference":
            return
        rule = "be two stores with --reference-scores-combine difference"
        require(len(self.reference_scores) == 2, self, "reference_scores", rule, "name two, or choose mean")
        others = [name for name in self.slm_score if name != "reference-loss" and needs_reference(name)]
        rule = "be reference-loss, or a score without a reference, with --reference-scores-combine difference"
        require(not others, self, "slm_score", rule, "use --slm-score reference-loss")


def _is_share(value: float) -> bool:
    return 0.0 < value <= 1.0
