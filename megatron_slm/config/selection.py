"""Configuration of the token selection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.config.rules import flag, require, require_given, require_not_negative, require_positive
from megatron_slm.config.scores import EXTERNAL, check_column_name, describe_scores, score_definition
from megatron_slm.config.weights import WeightDefinition, describe_weights, weight_definition

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
    model, L_RM and H_RM those of the reference. external:NAME reads PREFIX_NAME beside each corpus."""
    slm_combine: Literal["intersection", "union", "sum"] | None = None
    """Combination of several scores: keep the tokens kept by all (intersection) or by any (union) of them, or rank by
    their weighted sum, each normalized to mean 0 and standard deviation 1 (sum)."""
    slm_combine_ratios: list[float] = field(default_factory=list)
    """Keep ratio of each score, for intersection and union. Default: --slm-keep-ratio for each."""
    slm_combine_weights: list[float] = field(default_factory=list)
    """Weight of each score, for sum. Default: 1 for each."""
    slm_policy: Literal["top-k", "threshold", "quantile", "sample", "weights", "positive", "peaking"] = "top-k"
    """Selection by score. top-k: exactly the top share. threshold: scores of at least --slm-threshold. quantile:
    scores of at least a running quantile of preceding steps. sample: a random sample that favors high scores.
    weights: all tokens, with the weights of --slm-weight (default: gibbs). positive: scores above 0, but at least the
    share --slm-keep-ratio and at most --slm-keep-most. peaking: all but runs of low scores."""
    slm_keep_most: float = 1.0
    """Largest share that --slm-policy positive keeps, in (0, 1]."""
    slm_peaking_share: float = 0.6
    """Share of the lowest scores that form the runs of --slm-policy peaking; a run is dropped if it has one of the
    lowest 1 - --slm-keep-ratio."""
    slm_peaking_length: int = 3
    """Least number of tokens of such a run."""
    slm_weight: str | None = field(default=None, metadata={"choices_help": describe_weights()})
    """Weight of each kept token's loss, with any policy; default: 1. L, H and p = exp(-L) are the model's loss,
    entropy and probability of the token, H_20 the entropy of its 20 most likely tokens, T the temperature, a the
    power. external:NAME reads PREFIX_NAME beside each corpus."""
    slm_weight_normalization: Literal["mean", "none"] | None = None
    """mean: the weights of the tokens kept in a scope are divided by their mean. none: they are used as they are.
    Default: the weight's own, above."""
    slm_weight_power: float | None = None
    """Exponent a of eaft (default 1), focal (2) and mile (1)."""
    slm_token_weights: str | None = None
    """File of weights by token id, a .safetensors with the tensor token_weights [vocabulary size]; multiplies the
    weight of each label."""
    slm_scope: Literal["sequence", "micro-batch", "data-parallel"] = "micro-batch"
    """Set of tokens ranked against each other. data-parallel: one micro-batch of every data-parallel rank."""
    slm_threshold: float | None = None
    """Lowest score to keep, in the score's unit, with --slm-policy threshold."""
    slm_threshold_decay: float = 0.9
    """Weight of the preceding threshold in the running average of --slm-policy quantile, in [0, 1)."""
    slm_temperature: float | None = None
    """Divisor T in --slm-policy sample and --slm-weight gibbs (default 1) and talr; higher is more uniform, lower
    more greedy."""
    slm_weight_floor: float = 0.0
    """Least weight of a token in --slm-weight gibbs and talr, in [0, 1]."""
    slm_keep_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the change from --slm-keep-start to the final keep ratio, after the warm-up."""
    slm_keep_warmup_iters: int = 0
    """Number of first steps that train on every token."""
    slm_keep_decay_iters: int | None = None
    """Number of steps after the warm-up over which the keep ratio changes, with linear and cosine."""
    slm_keep_start: float = 1.0
    """Keep ratio at the start of a linear or cosine schedule, in (0, 1]."""
    slm_keep_adaptation: float = 0.0
    """Sensitivity of a keep ratio that adapts to the loss of the kept tokens, from --slm-keep-ratio on; 0: fixed."""
    slm_keep_least: float = 0.1
    """Smallest ratio of --slm-keep-adaptation, in (0, 1]."""
    slm_always_keep: list[int] = field(default_factory=list)
    """Token ids always kept as labels, before all others, even if they exceed the keep ratio."""
    slm_never_keep: list[int] = field(default_factory=list)
    """Token ids never kept as labels; they are masked and not ranked."""
    slm_protected_spans: str | None = None
    """Name of a column PREFIX_NAME beside each corpus: tokens with a number above 0 are always kept as labels, those
    below 0 never."""
    slm_probe_interval: int = 100
    """Every this many steps, repeat the selection on the run's first batch and log how much of it changed; 0
    disables it."""
    reference_load: str | None = None
    """Frozen reference: a Hugging Face folder, a name of the hub, a checkpoint of this package saved at any layout, or
    `init`, the model of --init-from. With --reference-scores it is not loaded, but the scores must come from it."""
    reference_base: str | None = None
    """A second frozen model that the reference is compared with, named like --reference-load: the reference's loss is
    then its own less this one's (with --slm-score reference-loss: tokens that the reference predicts better)."""
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
        self._check_weights()
        self._check_schedule()
        self._check_adaptation()
        self._check_protected_ids()
        require_not_negative(self, "slm_probe_interval")
        self._check_reference()

    def _check_scores(self) -> None:
        unique = 0 < len(self.slm_score) == len(set(self.slm_score))
        require(unique, self, "slm_score", "name one or more scores, each once", "use e.g. excess")
        for name in self.slm_score:
            score_definition(name)

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
        self._check_adaptive_policies()
        require(
            self.slm_scope == "micro-batch" or policy not in ("threshold", "quantile"),
            self,
            "slm_scope",
            f"be micro-batch with --slm-policy {policy}, which does not rank tokens against each other",
            "remove it",
        )

    def _check_adaptive_policies(self) -> None:
        """Check the flags of the policies `positive` and `peaking`."""
        policy, ratio, most, share = self.slm_policy, self.slm_keep_ratio, self.slm_keep_most, self.slm_peaking_share
        require(_is_share(most), self, "slm_keep_most", "be in (0, 1]", "use a share such as 0.8")
        if policy == "positive":
            rule = f"be at least --slm-keep-ratio, {ratio}"
            require(most >= ratio, self, "slm_keep_most", rule, "raise it, or lower --slm-keep-ratio")
            has_pair = self.reference_base is not None or self.reference_scores_combine == "difference"
            has_sign = score_definition(self.slm_score[0]).has_sign or (
                self.slm_score == ["reference-loss"] and has_pair
            )
            rule = "be a difference with --slm-policy positive: an excess, external:NAME, or that of two references"
            require(has_sign, self, "slm_score", rule, "use --slm-score excess, or --slm-policy top-k")
        else:
            require(most == 1, self, "slm_keep_most", "be used with --slm-policy positive", "remove it")
        require(_is_share(share), self, "slm_peaking_share", "be in (0, 1]", "use a share such as 0.6")
        require_positive(self, "slm_peaking_length")
        for name, default in (("slm_peaking_share", 0.6), ("slm_peaking_length", 3)):
            unused = policy != "peaking" and getattr(self, name) != default
            require(not unused, self, name, "be used with --slm-policy peaking", "remove it")
        if policy == "peaking":
            rule = f"be at least 1 - --slm-keep-ratio, {1 - ratio:.4g}, the share of the lowest scores"
            require(share >= 1 - ratio - 1e-9, self, "slm_peaking_share", rule, "raise it, or raise --slm-keep-ratio")

    @property
    def weight(self) -> WeightDefinition | None:
        """The weight of kept tokens; None: 1 for all."""
        name = self.slm_weight or ("gibbs" if self.slm_policy == "weights" else None)
        return None if name is None else weight_definition(name)

    @property
    def uses_scores(self) -> bool:
        """True if scores decide on tokens or their weights."""
        ranks = self.slm_policy != "weights" or self.slm_weight in (None, "gibbs")
        return self.objective == "slm" and ranks

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns beside the corpora that this selection reads, each once."""
        if self.objective == "clm":
            return ()
        names = [*(self.slm_score if self.uses_scores else ()), *([self.slm_weight] if self.slm_weight else ())]
        found = [name.removeprefix(EXTERNAL) for name in names if name.startswith(EXTERNAL)]
        if self.slm_protected_spans is not None:
            found.append(self.slm_protected_spans)
        return tuple(dict.fromkeys(found))

    def _check_weights(self) -> None:
        weight, temperature, floor = self.weight, self.slm_temperature, self.slm_weight_floor
        name = None if weight is None else weight.name
        if self.objective == "clm":
            for field_name in ("slm_weight", "slm_token_weights"):
                fix = "use --objective slm --slm-policy weights, which needs no reference, or remove it"
                rule = "not be used with --objective clm, which trains on all tokens alike"
                require(getattr(self, field_name) is None, self, field_name, rule, fix)
        if self.slm_policy == "weights" and not self.uses_scores and self.objective == "slm":
            rule = f"not be used with --slm-policy weights and --slm-weight {name}, which read no score"
            fix = "remove it, or choose a policy that ranks tokens, such as top-k"
            require(self.slm_score == ["excess"], self, "slm_score", rule, fix)
        positive = temperature is None or 0 < temperature < math.inf
        require(positive, self, "slm_temperature", "be positive and finite", "use e.g. 1.0")
        require(0 <= floor <= 1, self, "slm_weight_floor", "be in [0, 1]", "use e.g. 0.1")
        rule = "be used with --slm-weight gibbs or talr (--slm-policy weights has gibbs)"
        require(floor == 0 or name in ("gibbs", "talr"), self, "slm_weight_floor", rule, "remove it")
        power = self.slm_weight_power
        positive = power is None or 0 < power < math.inf
        require(positive, self, "slm_weight_power", "be positive and finite", "use e.g. 1")
        has_power = power is None or (weight is not None and weight.power is not None)
        rule = "be used with --slm-weight eaft, focal or mile"
        require(has_power, self, "slm_weight_power", rule, "remove it")
        normalization = self.slm_weight_normalization
        weighs = normalization is None or weight is not None or self.slm_token_weights is not None
        rule = "be used with --slm-weight or --slm-token-weights"
        require(weighs, self, "slm_weight_normalization", rule, "remove it")
        rule = "be mean with --slm-weight gibbs, a distribution over the kept tokens"
        require(normalization != "none" or name != "gibbs", self, "slm_weight_normalization", rule, "remove it")

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

    def _check_adaptation(self) -> None:
        require_not_negative(self, "slm_keep_adaptation")
        least = self.slm_keep_least
        require(_is_share(least), self, "slm_keep_least", "be in (0, 1]", "use a share such as 0.1")
        if self.slm_keep_adaptation == 0:
            require(least == 0.1, self, "slm_keep_least", "be used with --slm-keep-adaptation", "remove it")
            return
        ranks = self.slm_policy in ("top-k", "sample") and self.slm_combine in (None, "sum")
        rule = "be used with --slm-policy top-k or sample, and one score or their sum"
        require(ranks and self.objective == "slm", self, "slm_keep_adaptation", rule, "remove it")
        rule = "be used with --slm-keep-schedule constant: both change the ratio"
        require(self.slm_keep_schedule == "constant", self, "slm_keep_adaptation", rule, "remove one of them")
        rule = f"be at most --slm-keep-ratio, {self.slm_keep_ratio}"
        require(least <= self.slm_keep_ratio, self, "slm_keep_least", rule, "lower it")
        rule = "be below 1 with --slm-keep-adaptation, which starts from it"
        require(self.slm_keep_ratio < 1, self, "slm_keep_ratio", rule, "use e.g. 0.9")

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
        if self.slm_protected_spans is not None:
            check_column_name("--slm-protected-spans", self.slm_protected_spans, self.slm_protected_spans)
            rule = "not be used with --objective clm, which trains on all tokens"
            require(self.objective == "slm", self, "slm_protected_spans", rule, "remove it")
            rule = "not be used with --slm-policy weights, which trains on all tokens"
            require(
                self.slm_policy != "weights", self, "slm_protected_spans", rule, "use --slm-never-keep, or remove it"
            )

    def _check_reference(self) -> None:
        """Check the reference's flags; `selection/configure.py` checks that slm has one where its scores need it."""
        if self.objective == "clm":
            for name in ("reference_load", "reference_base", "reference_scores"):
                rule = "not be used with --objective clm, which has no reference"
                require(not getattr(self, name), self, name, rule, "remove it, or use --objective slm")
        self._check_base()
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
        self._check_scores_of_difference("--reference-scores-combine difference")

    def _check_base(self) -> None:
        if self.reference_base is None:
            return
        fix = "name two stores with --reference-scores-combine difference"
        rule = "not be used with --reference-scores"
        require(not self.reference_scores, self, "reference_base", rule, fix)
        fix = "set it to the reference that is compared with this base"
        require_given(self.reference_load is not None, "reference_load", "--reference-base", fix)
        self._check_scores_of_difference("--reference-base")
        needs = any(score_definition(name).needs_reference for name in self.slm_score)
        rule = "include reference-loss with --reference-base"
        require(needs and self.uses_scores, self, "slm_score", rule, "use --slm-score reference-loss")

    def _check_scores_of_difference(self, flags: str) -> None:
        others = [
            name for name in self.slm_score if name != "reference-loss" and score_definition(name).needs_reference
        ]
        rule = f"be reference-loss, or a score without a reference, with {flags}"
        require(not others, self, "slm_score", rule, "use --slm-score reference-loss")


def _is_share(value: float) -> bool:
    return 0.0 < value <= 1.0
