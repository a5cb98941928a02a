"""Describes a run's sample order and compares it with a checkpoint's."""

from __future__ import annotations

import logging

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.config.run import RunConfig
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.errors import CheckpointError

logger = logging.getLogger(__name__)


def document_treatment(config: RunConfig) -> str:
    """Describe the packing, the resets at document ends and fill-in-the-middle: a reference's losses depend on them."""
    data = config.data
    words: list[str] = [data.packing]
    if data.reset_attention_mask:
        words.append("attention reset")
    if data.reset_position_ids:
        words.append("positions reset")
    if config.fill_in_middle.fim_data:
        words.append(config.fill_in_middle.describe(data.eod_token))
    return ", ".join(words)


def check_order(config: RunConfig, manifest: Manifest | None, samples: BlendedSamples) -> bool:
    """Compare the order of the samples with a checkpoint's; in another order some would repeat and others be skipped.

    Returns:
        True if the samples continue those of the checkpoint, and without a checkpoint.

    Raises:
        CheckpointError: they do not, without --accept-new-sample-order.
    """
    if manifest is None or manifest.sample_order is None:
        return True
    if manifest.data:
        found = samples.difference(manifest.data, manifest.state.consumed_samples)
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
            f"match the checkpoint's run ({there}): same corpora, weights, --split, --seed, --seq-length, "
            "--packing, --samples-without-loss and, up to the checkpoint, --data-phases and --global-batch-size",
            "restore these (to change the blend from here on, keep --data-path and add a phase to --data-phases), or "
            "add --accept-new-sample-order: samples may repeat or be skipped",
        )
    logger.warning("the order of the samples differs from the checkpoint's run: samples may repeat or be skipped")
    return False


def describe_sources(samples: BlendedSamples) -> list[str]:
    """Describe the samples that a run draws, one line a corpus."""
    total = len(samples)
    return [
        f"corpus {source.name}: {source.orders[0].tokens_per_epoch:,} tokens, {drawn / total:.1%} of the samples, "
        f"{source.epochs(drawn):,.2f} epochs"
        for source, drawn in zip(samples.sources, samples.consumed(total), strict=True)
    ]
