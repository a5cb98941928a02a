"""What the flags of a selection must satisfy together; names of scores and ids are checked where they are known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_slm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_slm.config.sections import SelectionConfig


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
