"""Hardware utilization: floating-point operations of the architectures over the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.config.architecture import Architecture
from megatron_slm.device import device_name
from megatron_slm.engine.schedule.costs import inference_flops, training_flops
from megatron_slm.planning.gpus import named_gpu


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """Converts tokens per second to FLOP/s per device and to MFU.

    The model counts as three forward passes with the whole loss head, as in plain training and in other systems; the
    references count as one forward pass each. Work saved by the selection shows as higher utilization.
    """

    model_flops_per_token: float
    reference_flops_per_token: float
    """0 without a reference."""
    num_devices: int
    peak_flops_per_device: float | None
    """None if unknown."""

    @classmethod
    def of(
        cls,
        model: Architecture,
        references: Sequence[Architecture],
        *,
        seq_length: int,
        num_devices: int,
        bf16: bool,
        peak_tflops: float | None,
    ) -> Utilization:
        """Build it for a run.

        Args:
            peak_tflops: peak of one device; None: looked up by the name of this device in `planning/gpus.py`.
        """
        gpu = named_gpu(device_name())
        peak = gpu.flops(bf16=bf16) if gpu else None
        return cls(
            model_flops_per_token=training_flops(model, seq_length),
            reference_flops_per_token=sum(inference_flops(arch, seq_length) for arch in references),
            num_devices=num_devices,
            peak_flops_per_device=peak if peak_tflops is None else peak_tflops * 1e12,
        )

    def metrics(self, tokens_per_second: float) -> dict[str, float | None]:
        """Return the model's TFLOP/s per device, and MFU without and with the reference (None: unknown peak)."""
        rate = tokens_per_second / self.num_devices
        model, reference = self.model_flops_per_token * rate, self.reference_flops_per_token * rate
        peak = self.peak_flops_per_device
        return {
            "tflops_per_device": model / 1e12,
            "mfu": model / peak if peak else None,
            "mfu_with_reference": (model + reference) / peak if peak else None,
        }
