"""Describes a run's sample order and compares it with a checkpoint's."""

from __future__ import annotations

import logging

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.config.data import DataConfig
from megatron_slm.config.run import RunConfig
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.errors import CheckpointError

logger = logging.getLogger(__name__)


def document_treatment(data: DataConfig) -> str:
    """What a reference's losses depend on beside the samples' tokens, in words."""
    words: list[str] = [data.packing]
    words += ["attention reset"] * data.reset_attention_mask + ["positions reset"] * data.reset_position_ids
    return ", ".join(words)


def check_order(config: RunConfig, manifest: Manifest | None, samples: BlendedSamples) -> bool:
    """Refuse to resume into another order of samples, in which some would repeat and others never come.

    Returns:
        whether the samples go on from those of the checkpoint, where there is one.

    Raises:
        CheckpointError: they do not, and --accept-new-sample-order is not given.
    """
    if manifest is None or manifest.sample_order is None:
        return True
    if manifest.data:
        found = samples.difference(manifest.data, manifest.consumed_samples)
    else:  # a checkpoint of a version before blends
        before, now = manifest.sample_order, samples.order_fingerprint
        found = None if before == now else ("order of the samples", before[:12], now[:12])
    if found is None:
        return True
    what, there, here = found
    if not config.checkpoint.accept_new_sample_order:
        raise CheckpointError(
            f"--load: {what}",
            here,
            f"is that of the checkpoint's run ({there}): same corpora, weights, --split, --seed, --seq-length, "
            "--packing and, up to the checkpoint, --data-phases and --global-batch-size",
            "restore these (to change the blend from here on, keep --data-path and add a phase to --data-phases), or "
            "accept that samples repeat or are left out with --accept-new-sample-order",
        )
    logger.warning("the order of the samples is not that of the checkpoint's run: samples may repeat or be left out")
    return False


def describe_sources(samples: BlendedSamples) -> list[str]:
    """What a run draws from each of its corpora, a line each."""
    total = len(samples)
    return [
        f"corpus {source.name}: {source.orders[0].tokens_per_epoch:,} tokens, {drawn / total:.1%} of the samples, "
        f"{source.epochs(drawn):,.2f} epochs"
        for source, drawn in zip(samples.sources, samples.consumed(total), strict=True)
    ]
