"""Checks of the backward pass' rows against the selection and the layout."""

from __future__ import annotations

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backward import predicted_variance
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import ConfigError, LayoutError
from megatron_slm.selection.selector import Selector

MOST_PREDICTED_VARIANCE = 0.5
"""A fixed share with a higher prediction is refused: the sampling would drown the gradient."""


def check_backward_rows(config: RunConfig, selector: Selector, arch: Architecture) -> None:
    """Validate --backward-rows and --recompute-granularity.

    Args:
        arch: of the model.

    Raises:
        ConfigError: the share drowns the gradient, or something, the model included, cannot be combined with it.
        LayoutError: the layout cannot be.
    """
    kind, share = config.backward.backward_rows, config.backward.backward_row_share
    if config.parallel.recompute_granularity == "selective" and arch.norm_placement != "before":
        raise ConfigError(
            "--recompute-granularity",
            "selective",
            f"be full with a model whose norms are {arch.norm_placement} attention and MLP",
            "use --recompute-granularity full",
        )
    if config.backward.is_exact:
        return
    if arch.norm_placement != "before":
        raise ConfigError(
            "--backward-rows",
            kind,
            f"be exact with a model whose norms are {arch.norm_placement} attention and MLP",
            "use --backward-rows exact",
        )
    if config.backend.compile_blocks:
        raise ConfigError(
            "--compile-blocks",
            True,
            f"be left out with --backward-rows {kind}, whose blocks are one function of their own",
            "leave it out, or use --backward-rows exact",
        )
    if share is not None:
        keep_ratio = selector.expected_share(config.training.train_iters)
        predicted = predicted_variance(share, keep_ratio)
        if predicted > MOST_PREDICTED_VARIANCE:
            raise ConfigError(
                "--backward-row-share",
                share,
                f"leave the gradient recognizable: with {keep_ratio:g} of the tokens kept, sampling is predicted to "
                f"add {predicted:.2f} of the gradient's squared norm as variance (at most {MOST_PREDICTED_VARIANCE})",
                "raise it, or use --backward-row-variance 0.02 in its place",
            )
    if kind == "kept":
        _check_kept(config, selector)


def _check_kept(config: RunConfig, selector: Selector) -> None:
    if config.parallel.sequence_parallel:
        raise LayoutError(
            "--sequence-parallel",
            True,
            "be left out with --backward-rows kept, whose rows lie unevenly in the ranks' parts of a sequence",
            "leave it out, or use --backward-rows sampled",
        )
    if not selector.keeps_a_share:
        selection = config.selection
        raise ConfigError(
            "--backward-rows",
            "kept",
            f"be used where a share bounds the kept tokens of each micro-batch (--objective {selection.objective}, "
            f"--slm-policy {selection.slm_policy}, --slm-scope {selection.slm_scope}, "
            f"{len(selection.slm_always_keep)} ids in --slm-always-keep), because its number of rows is fixed",
            "use --backward-rows sampled, or --slm-policy top-k in the scope micro-batch or sequence",
        )
